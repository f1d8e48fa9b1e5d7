"""
From a question to token ids and back: tokenizer, chat template, and the ids that end an answer.

Decoding, benchmarks and training data all go through chat_prompt, so that no two of them can use
different templates. A drafter trained on one template and served with another loses half of its
acceptance.
"""
import json
import os
import zlib

from jinja2 import TemplateError
from transformers import AutoTokenizer

from checkpoint import checkpoint_folder, one_line, read_target_config


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
        raise ValueError(f"no tokenizer.json in {folder!r}: copy it there from the checkpoint's "
                         "publisher")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError and others for missing and broken files
        raise ValueError(f"no tokenizer in {folder!r}: {one_line(error)}") from None


def chat_prompt(tokenizer, prompt, thinking=False):
    """Token ids of a conversation and the opening of the answer.

    prompt: the user's text, or a list of {"role", "content"} that ends with the user's turn.
    thinking: passed on explicitly, because its default differs between the public targets.
    ValueError when the tokenizer has no template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use that of a chat model, or "
                         "continue text with --raw")
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=False)
    except TemplateError as error:
        reason = one_line(error)
        raise ValueError(f"the chat template refuses this conversation: {reason}") from None


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
