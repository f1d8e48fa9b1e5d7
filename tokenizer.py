"""
From a question to token ids and back: tokenizer, chat template, and the ids that end an answer.

Decoding, benchmarks, and training data all use chat_prompt, so that no two of them can use
different templates. A drafter that is trained on one template and served with a different one loses
much of its acceptance.
"""
import functools
import json
import os
import re
import zlib

from transformers import AutoTokenizer

from checkpoint import checkpoint_folder, read_target_config
from formats.files import one_line, where

DEEPEST = 50  # levels of lists and dicts in messages and tools


def load_tokenizer(name):
    """The tokenizer of a target's folder or hub id, with its chat template.

    ValueError when there is none, as for targets with random weights.
    """
    _, folder = read_target_config(name)
    if folder is None:
        raise ValueError(f"target {name!r} has random weights and no tokenizer: it serves to "
                         "measure speed and exactness; for text give a folder or a hub id")
    return tokenizer_in(folder)


def tokenizer_in(folder):
    """The tokenizer in a folder, which need not hold a model. ValueError when there is none."""
    if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
        raise ValueError(f"no tokenizer.json in {where(folder)!r}: copy it there from the "
                         "checkpoint's publisher")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError and others for missing and broken files
        raise ValueError(f"no tokenizer in {where(folder)!r}: {one_line(error)}") from None


def chat_prompt(tokenizer, prompt, thinking=False, tools=None):
    """Token ids of a conversation and the opening of the answer.

    prompt: the user's text, or a list of messages that ends with the user's turn. The other
    arguments are chat_text's. ValueError as in chat_text, and if a message contains a special
    token: "<|im_end|>", typed by a user, would end the message.
    """
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    try:
        check_special_tokens(tokenizer, [messages, tools])
    except ValueError as error:
        raise ValueError(f"{error}: remove it from the prompt") from None
    text = chat_text(tokenizer, messages, thinking, tools)
    return tokenizer.encode(text, add_special_tokens=False)


def chat_text(tokenizer, messages, thinking=False, tools=None, opens_answer=True):
    """The text that the chat template makes of messages and tools.

    thinking: passed on explicitly, because its default differs between the public targets.
    opens_answer: whether the text ends with the opening of an answer. ValueError if the tokenizer
    has no template, or if the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use that of a chat model, or "
                         "continue text with --raw")
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=opens_answer,
            enable_thinking=thinking)
    except Exception as error:  # a template is a program, so it can raise anything
        reason = one_line(error)[:100]
        raise ValueError(f"the chat template refuses this conversation: {reason}") from error


def check_special_tokens(tokenizer, value):
    """ValueError if a text in a JSON value contains a special token."""
    for text in texts_in(value):
        match = special_tokens(tokenizer).search(text)
        if match:
            raise ValueError(f"a special token in the text: {one_line(match[0])}")


def texts_in(value):
    """The texts in a JSON value. ValueError if it is nested too deeply for a template, or if it is
    not JSON: tables hold dates and bytes."""
    texts = []
    level = [value]
    for _ in range(DEEPEST + 1):
        deeper = []
        for item in level:
            kind = type(item)
            if kind is str:
                texts.append(item)
            elif kind is list:
                deeper.extend(item)
            elif kind is dict:
                deeper.extend(item)
                deeper.extend(item.values())
            elif not isinstance(item, int | float | None):
                raise ValueError("values that are not JSON")
        if not deeper:
            return texts
        level = deeper
    raise ValueError("JSON that is nested too deeply")


@functools.cache
def special_tokens(tokenizer):
    """A pattern of the tokens that structure a chat. <think>, <tool_call> and the like are not
    among them, because an answer may contain them."""
    tokens = []
    for token in tokenizer.added_tokens_decoder.values():
        is_markup = token.content.startswith("<|") or token.special
        if is_markup and token.content not in ("<think>", "</think>"):
            tokens.append(re.escape(token.content))
    return re.compile("|".join(tokens) or "(?!)")  # (?!) matches nothing


@functools.cache
def max_characters(tokenizer, count):
    """A text of more characters than this always has more than `count` tokens."""
    longest = max(map(len, tokenizer.get_vocab()))
    # normalization can join two characters into one, for example a letter and its accent
    return 2 * longest * (count + 1)


def stop_ids(tokenizer):
    """The ids that end an answer: <|im_end|> and <|endoftext|>, whichever the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    endings = ("<|im_end|>", "<|endoftext|>", tokenizer.eos_token)
    return {vocabulary[token] for token in endings if token in vocabulary}


def tokenizer_fingerprint(name):
    """A checksum of a target's tokenizer and chat template.

    Training rows carry it, because a drafter would silently train on rows of a different one.
    """
    folder = checkpoint_folder(name)
    checksum = 0
    for file_name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = os.path.join(folder, file_name)
        if not os.path.isfile(path):
            continue
        with open(path, "rb") as f:
            content = f.read()
        if file_name == "tokenizer_config.json":
            # some checkpoints keep the template here, among much that may change
            content = str(json.loads(content).get("chat_template", "")).encode()
        checksum = zlib.crc32(content, checksum)
    return checksum
