"""
Tokens for train.py from conversations whose answers the target wrote itself: those of Phase 1.2, or your own.

    python data/math240k/prepare.py                                  # the hub's 239,467 rows, for Qwen/Qwen3.5-0.8B
    python data/math240k/prepare.py --source=answers.jsonl --target=DIR --out_dir=data/mine      # JSON lines, parquet

A row begins exactly as chat_prompt begins decoding: a drafter trained on another template loses half its acceptance.
"""
import collections
import functools
import itertools
import multiprocessing
import os
import sys
import zlib

import numpy as np
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT]  # the project's modules, from whatever folder this is run
from configurator import configure
from data.rows import conversation, read_source, writers
from target import chat_prompt, fingerprint, load_tokenizer, target_config

source = "Moonlight556/qwen3.5-0.8b-target-matched-math-240k"   # hub id, file or folder of JSON lines or parquet
target = "Qwen/Qwen3.5-0.8B"                        # whose tokenizer and chat template to use: folder or hub id
out_dir = os.path.join(ROOT, "data", "math240k")    # where the rows go
max_length = 3072       # tokens of a row; longer ones are cut
thinking = False        # whether the answers begin with a thought, as the target's do when thinking is on
val_rows = 512          # rows held out, a tenth of all at most; those with the same question stay together
num_proc = min(8, os.cpu_count() or 1)              # processes that tokenise

# ----------------------------------------------------------------------------------------------------------------------
# one row


@functools.cache
def template(target, thinking):
    """(tokenizer, ids of an assistant's header, ids and text of what chat_prompt opens an answer with after it)."""
    tokenizer = load_tokenizer(target)
    header, prompt = tokenizer.encode("<|im_start|>assistant\n"), chat_prompt(tokenizer, "x", thinking)
    starts = [i for i in range(len(prompt)) if prompt[i:i + len(header)] == header]
    if len(starts) != 1:
        raise ValueError(f"the chat template of {target!r} does not open an answer with <|im_start|>assistant")
    opening = prompt[starts[0] + len(header):]
    return tokenizer, header, opening, tokenizer.decode(opening)


def checked(row, thinking, opening):
    """(messages before the last answer, that answer) of a row in the public form, or a word on why it is dropped. What
    follows the last answer is left out, and so is an opening that chat_prompt writes itself."""
    messages = conversation(row)
    if isinstance(messages, str):
        return messages
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    if not last:
        return "no assistant's answer"
    answer = messages[last]["content"].removeprefix(opening)
    if not answer.strip():
        return "an empty answer"
    if any(mark in m["content"] for m in messages for mark in ("<|im_start|>", "<|im_end|>")):
        return "<|im_start|> or <|im_end|> in the text"
    if thinking != ("</think>" in answer):
        return f"{'no' if thinking else 'a'} thought, with thinking {'on' if thinking else 'off'}"
    return messages[:last], answer


def encode(row, target, thinking, max_length):
    """(tokens, mask, whether cut) of a row, or a word on why it is dropped. Supervised is what assistants say, with the
    closing <|im_end|>."""
    tokenizer, header, opening, opening_text = template(target, thinking)
    found = checked(row, thinking, opening_text)
    if isinstance(found, str):
        return found
    messages, answer = found
    try:
        prompt = chat_prompt(tokenizer, messages, thinking)
    except ValueError:
        return "refused by the chat template"
    reply = tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)
    mask, end = np.zeros(len(prompt) + len(reply), np.uint8), reply[-1]
    mask[len(prompt):] = 1
    earlier = any(m["role"] == "assistant" for m in messages)
    for i in range(len(prompt) - len(header) - len(opening) if earlier else 0):
        if prompt[i:i + len(header)] == header:
            begin = i + len(header)
            begin += len(opening) if prompt[begin:begin + len(opening)] == opening else 0
            mask[begin:prompt.index(end, begin) + 1] = 1
    if not mask[:max_length].any():
        return f"no answer within {max_length} tokens"
    return np.array(prompt + reply, np.uint32)[:max_length], mask[:max_length], len(mask) > max_length

# ----------------------------------------------------------------------------------------------------------------------
# all rows


def question_key(row, opening):
    """A number that is the same for rows with the same first message, and random otherwise; None for a bad row."""
    found = checked(row, thinking, opening)
    return None if isinstance(found, str) else zlib.crc32(found[0][0]["content"].encode())


def encoded(rows):
    """encode() of each row, in order; in num_proc processes."""
    work = functools.partial(encode, target=target, thinking=thinking, max_length=max_length)
    if num_proc == 1:
        yield from map(work, rows)
        return
    rows = iter(rows)
    with multiprocessing.Pool(num_proc) as pool:
        while some := list(itertools.islice(rows, 1024 * num_proc)):  # so many are in memory at once
            yield from pool.map(work, some, 64)


def prepare():
    """Write the rows; returns meta.json's content. A first pass over the source counts rows and picks those held out:
    the ones whose questions have the smallest keys, which depends neither on order nor on chance."""
    if num_proc < 1 or val_rows < 1 or max_length < 2:
        raise ValueError(f"num_proc = {num_proc}, val_rows = {val_rows} and max_length = {max_length} must be positive")
    opening = template(target, thinking)[-1]
    keys = [question_key(row, opening) for row in read_source(source)]
    known = sorted(key for key in keys if key is not None)
    limit = known[min(val_rows, max(1, len(known) // 10)) - 1] if known else -1
    meta = {"vocab_size": target_config(target)[0].vocab_size, "tokenizer": fingerprint(target), "source": source,
            "max_length": max_length, "thinking": thinking, "read": len(keys), "cut": 0}
    dropped = collections.Counter()
    with writers(out_dir, ("train", "val"), meta) as files:
        results = zip(keys, encoded(read_source(source)))
        for key, result in tqdm(results, total=len(keys), unit="row", disable=not sys.stderr.isatty()):
            if isinstance(result, str):
                dropped[result] += 1
                continue
            tokens, mask, cut = result
            files["val" if key is not None and key <= limit else "train"].add(tokens, mask)
            meta["cut"] += cut
        meta["dropped"] = dict(sorted(dropped.items()))
        rows = [len(file.offsets) - 1 for file in files.values()]
        if not all(rows):
            raise ValueError(f"{source!r} gives {rows[0]} rows to train on and {rows[1]} to hold out, at least one of "
                             f"each is needed; {len(keys)} were read, dropped: {meta['dropped']}")
    return meta


def main():
    configure(globals())
    try:
        meta = prepare()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    rows = sum(split["rows"] for split in meta["splits"].values())
    print(f"{out_dir}: {meta['read']:,} rows read, {rows:,} kept ({meta['cut']:,} of them cut at {max_length} tokens), "
          f"{sum(meta['dropped'].values()):,} dropped")
    for reason, count in meta["dropped"].items():
        print(f"dropped {count:,}: {reason}")
    for name, split in meta["splits"].items():
        print(f"{name}: {split['rows']:,} rows, {split['tokens']:,} tokens, {split['supervised']:,} supervised")


if __name__ == "__main__":
    main()
