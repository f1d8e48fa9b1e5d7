"""
Training samples for train.py from conversations whose answers the target wrote itself.

    python data/conversations.py --source=answers.jsonl --target=DIR --out_dir=data/mine

A source is a file of JSON lines or parquet, a folder of such files, or a data set on the hub. Each
row has a list of {"role", "content"} under "conversations" or "messages".

A sample begins with exactly the tokens that chat_prompt gives to decoding. A drafter that was
trained with a different template loses half of its acceptance.
"""
import collections
import functools
import itertools
import multiprocessing
import os
import sys
import zlib
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import chat_prompt, load_tokenizer, tokenizer_fingerprint
from checkpoint import read_target_config
from configurator import configure
from data.samples import read_source, split_writers

source = ""             # hub id, file or folder of JSON lines or parquet
target = ""             # whose tokenizer and chat template to use: folder or hub id
out_dir = ""            # where the samples go
max_length = 3072       # max tokens per sample; longer ones are cut
thinking = False        # whether the answers begin with a thought
val_rows = 512          # held-out rows, at most a tenth of all; rows of one question stay together
num_proc = min(8, os.cpu_count() or 1)    # processes that tokenize

ASSISTANT = "<|im_start|>assistant\n"
END = "<|im_end|>"
MARKS = ("<|im_start|>", END)  # a text that holds one would pretend to be several messages


def main(argv=None):
    config = configure(globals(), argv)
    try:
        meta = prepare(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    splits = meta["splits"]
    kept = sum(split["rows"] for split in splits.values())
    dropped = sum(meta["dropped"].values())
    print(f"{config.out_dir}: {meta['read']:,} rows read, {kept:,} kept ({meta['cut']:,} of them "
          f"cut at {config.max_length} tokens), {dropped:,} dropped")
    for reason, count in meta["dropped"].items():
        print(f"dropped {count:,}: {reason}")
    for name, split in splits.items():
        print(f"{name}: {split['rows']:,} samples, {split['tokens']:,} tokens, "
              f"{split['supervised']:,} supervised")


def prepare(config):
    """Write the samples of all conversations. Returns the content of meta.json."""
    if not config.source or not config.target or not config.out_dir:
        raise ValueError("give --source, --target and --out_dir")
    if config.num_proc < 1 or config.val_rows < 1 or config.max_length < 2:
        raise ValueError(
            f"num_proc = {config.num_proc}, val_rows = {config.val_rows} and max_length = "
            f"{config.max_length} must be positive")

    # A first pass counts the rows and chooses the held-out ones: their questions have the smallest
    # keys. The choice depends neither on the order of the rows nor on chance.
    keys = question_keys(config)
    largest_val_key = largest_held_out_key(keys, config.val_rows)

    meta = {
        "vocab_size": read_target_config(config.target)[0].vocab_size,
        "tokenizer": tokenizer_fingerprint(config.target),
        "source": config.source,
        "max_length": config.max_length,
        "thinking": config.thinking,
        "read": len(keys),
        "cut": 0,
    }
    dropped = collections.Counter()
    with split_writers(config.out_dir, ("train", "val"), meta) as writers:
        results = encode_all(read_source(config.source), config)
        bar = tqdm(results, total=len(keys), unit="row", disable=not sys.stderr.isatty())
        for (encoded, why_dropped), key in zip(bar, keys):
            if why_dropped:
                dropped[why_dropped] += 1
                continue
            split = "val" if key <= largest_val_key else "train"
            writers[split].add(encoded.tokens, encoded.mask)
            meta["cut"] += encoded.was_cut
        meta["dropped"] = dict(sorted(dropped.items()))
        train_count = writers["train"].samples
        val_count = writers["val"].samples
        if not train_count or not val_count:
            raise ValueError(
                f"{config.source!r} gives {train_count} rows to train on and {val_count} to hold "
                f"out, and needs one of each; {len(keys)} were read, dropped: {meta['dropped']}")
    return meta


def question_keys(config):
    """A number for each row of the source: a hash of its first message, so rows of one question
    have the same key. None for a row that is dropped."""
    template = answer_template(config.target, config.thinking)
    keys = []
    for row in read_source(config.source):
        try:
            messages, _ = split_answer(row, template, config.thinking)
            keys.append(zlib.crc32(messages[0]["content"].encode()))
        except UnusableRow:
            keys.append(None)
    return keys


def largest_held_out_key(keys, val_rows):
    """Rows up to this key are held out: val_rows of them, but at most a tenth of all."""
    known = sorted(key for key in keys if key is not None)
    if not known:
        return -1
    count = min(val_rows, max(1, len(known) // 10))
    return known[count - 1]


def encode_all(rows, config):
    """encode_or_reason() of each row, in order, in num_proc processes."""
    work = functools.partial(
        encode_or_reason, target=config.target, thinking=config.thinking,
        max_length=config.max_length)
    if config.num_proc == 1:
        yield from map(work, rows)
        return
    rows = iter(rows)
    at_once = 1024 * config.num_proc  # rows in memory
    with multiprocessing.Pool(config.num_proc) as pool:
        some = list(itertools.islice(rows, at_once))
        while some:
            yield from pool.map(work, some, 64)
            some = list(itertools.islice(rows, at_once))


# --------------------------------------------------------------------------------------------------
# one row


class UnusableRow(ValueError):
    """Why a row is dropped."""


class EncodedRow(NamedTuple):
    tokens: np.ndarray
    mask: np.ndarray
    was_cut: bool


class AnswerTemplate(NamedTuple):
    """How the chat template begins an answer."""
    tokenizer: object
    header: list        # token ids of <|im_start|>assistant
    opening: list       # what chat_prompt writes after the header: an empty or an open thought
    opening_text: str


@functools.cache
def answer_template(target, thinking):
    """The AnswerTemplate of a target."""
    tokenizer = load_tokenizer(target)
    header = tokenizer.encode(ASSISTANT)
    prompt = chat_prompt(tokenizer, "x", thinking)
    headers = find_all(header, prompt)
    if len(headers) != 1:
        raise ValueError(
            f"the chat template of {target!r} does not open an answer with "
            "<|im_start|>assistant")
    opening = prompt[headers[0] + len(header):]
    return AnswerTemplate(tokenizer, header, opening, tokenizer.decode(opening))


def find_all(part, tokens):
    """Where a list of tokens occurs in a longer one."""
    starts = range(len(tokens) - len(part) + 1)
    return [i for i in starts if tokens[i:i + len(part)] == part]


def encode_or_reason(row, target, thinking, max_length):
    """(EncodedRow, None) of a row, or (None, why it is dropped)."""
    try:
        return encode(row, target, thinking, max_length), None
    except UnusableRow as reason:
        return None, str(reason)


def encode(row, target, thinking, max_length):
    """The EncodedRow of a conversation; UnusableRow says why there is none.

    Supervised is what assistants say, with the closing <|im_end|>.
    """
    template = answer_template(target, thinking)
    tokenizer = template.tokenizer
    messages, answer = split_answer(row, template, thinking)
    try:
        prompt = chat_prompt(tokenizer, messages, thinking)
    except ValueError:
        raise UnusableRow("refused by the chat template") from None
    reply = tokenizer.encode(answer + END, add_special_tokens=False)
    mask = np.zeros(len(prompt) + len(reply), np.uint8)
    mask[len(prompt):] = 1
    if any(message["role"] == "assistant" for message in messages):
        supervise_earlier_answers(prompt, mask, template, end=reply[-1])
    if not mask[:max_length].any():
        raise UnusableRow(f"no answer within {max_length} tokens")
    tokens = np.array(prompt + reply, np.uint32)
    return EncodedRow(tokens[:max_length], mask[:max_length], was_cut=len(tokens) > max_length)


def supervise_earlier_answers(prompt, mask, template, end):
    """Set the mask to 1 on the answers inside a prompt, each up to its closing <|im_end|>."""
    headers = find_all(template.header, prompt)
    for i in headers[:-1]:  # the last one opens the answer that comes after the prompt
        begin = i + len(template.header)
        opening_end = begin + len(template.opening)
        if prompt[begin:opening_end] == template.opening:
            begin = opening_end
        mask[begin:prompt.index(end, begin) + 1] = 1


def split_answer(row, template, thinking):
    """(messages before the last answer, the last answer) of a row; UnusableRow says why not.

    What follows the last answer is left out, and so is an opening that chat_prompt writes itself.
    """
    messages = read_conversation(row)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise UnusableRow("no assistant's answer")
    last = answers[-1]
    answer = messages[last]["content"].removeprefix(template.opening_text)
    if not answer.strip():
        raise UnusableRow("an empty answer")
    for message in messages:
        if any(mark in message["content"] for mark in MARKS):
            raise UnusableRow("<|im_start|> or <|im_end|> in the text")
    has_thought = "</think>" in answer
    if has_thought and not thinking:
        raise UnusableRow("a thought, with thinking off")
    if thinking and not has_thought:
        raise UnusableRow("no thought, with thinking on")
    return messages[:last], answer


def read_conversation(row):
    """The messages [{"role", "content"}, ..] of a row; UnusableRow says why there are none."""
    messages = row.get("conversations") or row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UnusableRow("no conversation")
    conversation = []
    for message in messages:
        if not isinstance(message, dict):
            raise UnusableRow("a message without role and content")
        role = message.get("role")
        content = message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UnusableRow("a message without role and content")
        conversation.append({"role": role, "content": content})
    return conversation


if __name__ == "__main__":
    main()
