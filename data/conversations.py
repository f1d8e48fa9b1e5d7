"""
Training samples for train.py from conversations whose answers the target wrote itself.

    python data/conversations.py --source=answers.jsonl --target=DIR --out_dir=data/mine

A source is a file of JSON lines or parquet, a folder of them, a .json array, or a data set on
the hub. data/rows.py says which rows can be read. If a row has "target_turns" (data/regenerate.py
writes them), only these messages are supervised; without them, all answers of the row are.

A sample begins with exactly the tokens that chat_prompt gives to decoding. A drafter that was
trained with a different template loses much of its acceptance.
"""
import collections
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import chat_prompt, load_tokenizer, max_characters, tokenizer_fingerprint
from checkpoint import read_target_config
from configurator import configure
from data.rows import (
    Conversation, Dropped, UnusableRow, UnwantedRow, progress, read_conversations,
    refuse_special_tokens, render)
from data.samples import split_writers
from formats.files import LINE, one_line, where

source = ""             # hub id, file or folder of JSON lines or parquet
target = ""             # whose tokenizer and chat template to use: folder or hub id
out_dir = ""            # where the samples go
max_length = 3072       # max tokens per sample; longer ones are cut
thinking = False        # whether the answers begin with a thought
val_rows = 512          # held-out rows, at most a tenth of all; rows of one question stay together
num_proc = min(8, os.cpu_count() or 1)    # processes that tokenize

ASSISTANT = "<|im_start|>assistant\n"
END = "<|im_end|>"


def main(argv=None):
    config = configure(globals(), argv)
    try:
        meta = prepare(config)
    except (ValueError, OSError) as error:
        sys.exit(one_line(f"error: {error}", LINE))
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was kept, the same command starts again")
    splits = meta["splits"]
    kept = sum(split["rows"] for split in splits.values())
    print(f"{config.out_dir}: {meta['read']:,} rows read, {kept:,} kept ({meta['cut']:,} of them "
          f"cut at {config.max_length} tokens), {meta['read'] - kept:,} dropped")
    print(f"{meta['answers']:,} answers are supervised, {meta['other_answers']:,} are not; "
          f"{meta['unmarked']:,} rows have no target_turns, so all their answers count as the "
          "target's own")
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

    meta = {
        "vocab_size": read_target_config(config.target)[0].vocab_size,
        "tokenizer": tokenizer_fingerprint(config.target),
        "source": config.source,
        "max_length": config.max_length,
        "thinking": config.thinking,
    }
    dropped = Dropped(config.source)
    with (split_writers(config.out_dir, ("train", "val"), meta) as writers,
          tempfile.TemporaryFile(dir=config.out_dir) as waiting):
        # All questions together decide which rows are held out, so until then the rows wait on disk
        counts = collections.Counter()
        rows = []
        for place, row in dropped.usable(progress(encode_all(config), "row")):
            counts[row.key] += row.mask[row.answer_start:].any()
            waiting.write(row.tokens.tobytes())
            waiting.write(row.mask.tobytes())
            rows.append((place, len(row.mask), row._replace(tokens=None, mask=None)))
        held_out = held_out_keys(counts, config.val_rows)

        # A sample to train on has all answers of the target. A held-out sample has the last one
        # only: it follows the prompt that decoding gets.
        sums = collections.Counter(cut=0, answers=0, other_answers=0, unmarked=0)
        kept = collections.Counter(train=0, val=0)
        waiting.seek(0)
        for place, length, row in rows:
            tokens = np.frombuffer(waiting.read(4 * length), np.uint32)
            mask = np.frombuffer(waiting.read(length), np.uint8)
            row = row._replace(tokens=tokens, mask=mask)
            split = "train"
            if row.key in held_out:
                split = "val"
                row = last_answer_only(row)
            if not row.answers:
                reason = UnwantedRow("held out, and the last answer is beyond max_length")
                dropped.add(reason, place)
                continue
            writers[split].add(row.tokens, row.mask)
            kept[split] += 1
            sums.update(cut=row.was_cut, answers=row.answers, other_answers=row.other_answers,
                        unmarked=not row.is_marked)
        meta |= sums
        meta["read"] = dropped.read
        meta["dropped"] = dropped.counts()
        dropped.finish()
        if not kept["train"] or not kept["val"]:
            raise ValueError(
                f"{where(config.source)!r} gives {kept['train']} rows to train on and "
                f"{kept['val']} to hold out, and needs one of each with another question; "
                f"{dropped.read} were read")
    return meta


def held_out_keys(counts, val_rows):
    """The questions to hold out: those with the smallest keys, together val_rows rows, but at most
    a tenth of all. The choice depends neither on the order of the rows nor on chance.

    counts: Counter of the rows per question_key(). A key with more rows than are still wanted
    stays in the training data, unless no other key is left.
    """
    wanted = min(val_rows, max(1, counts.total() // 10))
    held_out = set()
    for key in sorted(counts):
        if 0 < counts[key] <= wanted:
            held_out.add(key)
            wanted -= counts[key]
    if not held_out and len(counts) > 1:
        held_out.add(min(counts, key=counts.get))
    return held_out


def question_key(conversation):
    """A hash of the first question. Rows of one question have the same key."""
    roles = [message["role"] for message in conversation.messages]
    question = conversation.messages[roles.index("user")]["content"]
    return zlib.crc32(question.strip().encode())


def last_answer_only(row):
    """An EncodedRow with only its last answer supervised, if max_length leaves a part of it."""
    mask = row.mask.copy()
    mask[:row.answer_start] = 0
    answers = int(mask.any())
    others = row.other_answers + row.answers - answers
    return row._replace(mask=mask, answers=answers, other_answers=others)


def encode_all(config):
    """Yield (place, EncodedRow or UnusableRow) of each row, in order, from num_proc processes."""
    rows = read_conversations(config.source)
    work = functools.partial(
        encode_or_reason, target=config.target, thinking=config.thinking,
        max_length=config.max_length)
    if config.num_proc == 1:
        yield from map(work, rows)
        return
    chunks = iter(lambda: list(itertools.islice(rows, 256 * config.num_proc)), [])
    with ProcessPoolExecutor(config.num_proc, initializer=prepare_worker) as pool:
        for some in chunks:
            done = 0
            try:
                for result in pool.map(work, some, chunksize=16):
                    yield result
                    done += 1
            except BrokenProcessPool:
                raise ValueError(
                    f"a process died, perhaps for lack of memory, with one of the rows at line "
                    f"{some[done][0]} to {some[-1][0]} of {where(config.source)}") from None


def prepare_worker():
    """A process of the pool leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_or_reason(placed_row, target, thinking, max_length):
    """(place, EncodedRow or UnusableRow) of a (place, Conversation or UnusableRow)."""
    place, row = placed_row
    if isinstance(row, Conversation):
        try:
            row = encode(row, target, thinking, max_length)
        except UnusableRow as reason:
            row = reason
    return place, row


# --------------------------------------------------------------------------------------------------
# one row


class EncodedRow(NamedTuple):
    tokens: np.ndarray
    mask: np.ndarray
    was_cut: bool
    key: int                # question_key()
    answer_start: int       # where the last answer begins
    answers: int            # how many are supervised
    other_answers: int
    is_marked: bool         # whether the row says which answers are the target's own


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
    found = []
    i = -1
    for _ in range(tokens.count(part[0])):
        i = tokens.index(part[0], i + 1)
        if tokens[i:i + len(part)] == part:
            found.append(i)
    return found


def encode(conversation, target, thinking, max_length):
    """The EncodedRow of a Conversation; UnusableRow says why there is none.

    What the target says is supervised, with the closing <|im_end|>.
    """
    template = answer_template(target, thinking)
    tokenizer = template.tokenizer
    messages = conversation.messages
    last, answer = split_answer(conversation, template, thinking)
    text = render(tokenizer, messages[:last], conversation.tools, thinking)
    if "tool_calls" in messages[last]:
        answer = answer_with_calls(conversation, last, text, template, thinking)
    refuse_special_tokens(tokenizer, messages[last])

    # a text much longer than max_length would take gigabytes as tokens, so it is cut before
    longest = max_characters(tokenizer, max_length)
    prompt = tokenizer.encode(text[:longest], add_special_tokens=False)
    reply = tokenizer.encode(answer[:longest] + END, add_special_tokens=False)
    tokens = prompt + reply
    mask = np.zeros(len(tokens), np.uint8)
    mask[len(prompt):] = 1
    begins = [len(prompt)]  # of supervised answers
    headers = find_all(template.header, prompt)
    earlier = [i for i in range(last) if messages[i]["role"] == "assistant"]
    if len(headers) != len(earlier) + 1 and len(text) <= longest:
        raise UnusableRow("the chat template joins or leaves out messages")
    own = own_turns(conversation)
    for i, header in zip(earlier, headers):
        begin = header + len(template.header)
        opening_end = begin + len(template.opening)
        has_opening = prompt[begin:opening_end] == template.opening
        if i not in own or (thinking and not has_opening):
            continue  # of somebody else, or the template left its thought out
        if has_opening:
            begin = opening_end
        mask[begin:tokens.index(reply[-1], begin) + 1] = 1
        begins.append(begin)
    answers = sum(begin < max_length for begin in begins)
    if not answers:
        raise UnwantedRow(f"no answer within {max_length} tokens")
    return EncodedRow(
        tokens=np.array(tokens[:max_length], np.uint32),
        mask=mask[:max_length],
        was_cut=len(mask) > max_length,
        key=question_key(conversation),
        answer_start=len(prompt),
        answers=answers,
        other_answers=len(earlier) + 1 - answers,
        is_marked=conversation.target_turns is not None)


def own_turns(conversation):
    """The numbers of the messages that the target wrote. A row without target_turns is taken to be
    the target's own as a whole, because a data set of a target's answers need not say so."""
    if conversation.target_turns is None:
        return conversation.answers()
    return conversation.target_turns


def split_answer(conversation, template, thinking):
    """(number of the target's last message, its text after the prompt). UnusableRow says why not.

    The text has no opening, because chat_prompt writes it.
    """
    own = own_turns(conversation)
    if not own:
        raise UnusableRow("no assistant's answer")
    last = max(own)
    for message in conversation.messages[:last + 1]:
        if message["role"] == "assistant":
            text, thought = check_answer(message, template, thinking)
    if thinking and thought:
        text = thought + "\n</think>\n\n" + text.lstrip("\n")
    if thinking and "</think>" not in text:
        raise UnwantedRow("no thought, with thinking on")
    return last, text


def check_answer(message, template, thinking):
    """(text, thought) of an assistant's message. UnusableRow if it is empty, or if it is not clear
    what the thought is."""
    text = message["content"].removeprefix(template.opening_text)
    thought = message.get("reasoning_content", "").strip()
    ends = text.count("</think>")
    begins = text.lstrip().startswith("<think>")
    if not text.strip() and "tool_calls" not in message:
        raise UnusableRow("an empty answer")
    if not thinking and (thought or (begins and ends)):
        raise UnwantedRow("a thought, with thinking off")
    if not thinking and ends:
        raise UnusableRow("</think> in the text of an answer")
    if ends > 1 or (ends and thought):
        raise UnusableRow("more than one </think> in an answer")
    if thinking and begins:
        raise UnusableRow("a thought that begins differently than in the chat template")
    return text, thought


def answer_with_calls(conversation, last, prompt, template, thinking):
    """The text of an answer with tool calls, in the chat template's form, after a prompt."""
    text = render(template.tokenizer, conversation.messages[:last + 1], conversation.tools,
                  thinking, opens_answer=False)
    answer, end, _ = text[len(prompt):].partition(END)
    if not text.startswith(prompt) or not end:
        raise UnusableRow("the chat template opens an answer with tool_calls differently")
    thought = conversation.messages[last].get("reasoning_content", "").strip()
    if thought not in answer or (thinking and "</think>" not in answer):
        raise UnusableRow("the chat template leaves out the thought before tool_calls")
    return answer


if __name__ == "__main__":
    main()
