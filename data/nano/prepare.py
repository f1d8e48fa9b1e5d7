"""
Target-matched rows for the nano drafter: answers of the nano target to problems that are new to it.

    python data/nano/prepare.py             # seconds: rows of the shipped answers; train.py runs it
    python data/nano/prepare.py --fresh     # minutes: let the target answer again, and write
                                            # answers.jsonl.gz anew

The drafter learns to guess what this target says, right or wrong, not what a teacher would say.
"""
import gzip
import json
import os
import sys

from tqdm import tqdm

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from whatever folder this is run
from tokenizer import chat_prompt, load_tokenizer, tokenizer_fingerprint
from checkpoint import load_target, read_target_config
from configurator import configure
from data.nano.problems import problems
from data.samples import write_samples
from draft_decode import generate_many

target = os.path.join(ROOT, "data", "nano", "target")               # whose answers to write
out_dir = os.path.join(ROOT, "data", "nano")                        # where the rows go
answers = os.path.join(ROOT, "data", "nano", "answers.jsonl.gz")    # of split, question, answer
fresh = False           # let the target answer; else read what it said when the repository was made
train_rows = 12_000     # training problems of the drafter's mix, from number `skip` on
val_rows = 200          # problems of the split val
skip = 400_000          # training problems passed over; pretraining saw the first 320,000
slots = 64              # prompts that are answered at once
max_new_tokens = 160    # tokens of an answer at most
device = "cpu"          # cpu or cuda


def main(argv=None):
    config = configure(globals(), argv)
    try:
        tokenizer = load_tokenizer(config.target)
        target_config, _ = read_target_config(config.target)
        if config.fresh:
            target = load_target(config.target, config.device)
    except ValueError as error:
        sys.exit(f"error: {error}\nbuild the nano target first: python data/nano/pretrain.py")
    if config.fresh:
        write_answers(target, tokenizer, config)
    try:
        answered = read_answers(config.answers)
    except (OSError, EOFError, json.JSONDecodeError) as error:
        sys.exit(f"error: cannot read {config.answers}: {error}\n"
                 "make it anew: python data/nano/prepare.py --fresh")
    splits = {"train": [], "val": []}
    for row in answered:
        prompt = chat_prompt(tokenizer, row["question"])
        reply = tokenizer.encode(row["answer"] + tokenizer.eos_token)
        mask = [0] * len(prompt) + [1] * len(reply)
        splits[row["split"]].append((prompt + reply, mask))
    meta = write_samples(config.out_dir, splits, {
        "vocab_size": target_config.vocab_size,
        "tokenizer": tokenizer_fingerprint(config.target),
    })
    for name, counts in meta["splits"].items():
        listed = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        print(f"{config.out_dir}/{name}: {listed}")


def read_answers(path):
    """Rows {"split", "question", "answer"} of what the target answered."""
    with gzip.open(path, "rt") as f:
        return [json.loads(line) for line in f]


def write_answers(target, tokenizer, config):
    """Ask the target and write its answers, but for those that did not end or that do not survive
    as text."""
    asked = []  # (split, question)
    for question, _, _ in problems("train", config.train_rows, config.skip, "drafter"):
        asked.append(("train", question))
    for question, _, _ in problems("val", config.val_rows, task="drafter"):
        asked.append(("val", question))
    questions = [question for _, question in asked]
    answered = answer_questions(
        target, tokenizer, questions, config.max_new_tokens, config.slots)

    lines = []
    for (split, question), (_, token_ids) in zip(asked, answered):
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        if tokenizer.encode(text + tokenizer.eos_token) == token_ids:
            row = {"split": split, "question": question, "answer": text}
            lines.append(json.dumps(row) + "\n")
    # no time of writing in it: the same answers give the same bytes
    content = gzip.compress("".join(lines).encode(), mtime=0)
    with open(config.answers + ".tmp", "wb") as f:
        f.write(content)
    os.replace(config.answers + ".tmp", config.answers)
    print(f"{config.answers}: {len(lines):,} answers of {len(asked):,}")


def answer_questions(target, tokenizer, questions, max_new_tokens, slots):
    """Greedy answers [(prompt ids, answer ids)], in the order of the questions.

    An answer ends with <|im_end|>, or without it after max_new_tokens. The target alone answers,
    one row a step.
    """
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    replies = [[] for _ in prompts]
    with tqdm(total=len(prompts), unit="row", disable=not sys.stderr.isatty()) as bar:
        for index, piece in generate_many(
                target, None, prompts, max_new_tokens, slots, {tokenizer.eos_token_id},
                tokens_per_forward=1):
            replies[index] += piece.tokens
            bar.update(piece.is_last)
    return list(zip(prompts, replies))


if __name__ == "__main__":
    main()
