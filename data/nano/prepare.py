"""
Training samples for the nano drafter: the nano target's answers to problems that are new to it.

    python data/nano/prepare.py             # seconds, from answers.jsonl.gz; train.py runs it
    python data/nano/prepare.py --fresh     # minutes: first the target answers all questions again

The drafter learns to guess what this target says, right or wrong, not what a teacher would say.
"""
import gzip
import json
import os
import sys

from tqdm import tqdm

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
import fast
from tokenizer import chat_prompt, load_tokenizer, tokenizer_fingerprint
from checkpoint import load_target, read_target_config
from configurator import configure
from data.nano.problems import problems
from data.samples import write_samples
from draft_decode import generate_many
from formats.files import write_whole

target = os.path.join(ROOT, "data", "nano", "target")               # whose answers to write
out_dir = os.path.join(ROOT, "data", "nano")                        # where the samples go
answers = os.path.join(ROOT, "data", "nano", "answers.jsonl.gz")    # of split, question, answer
fresh = False           # let the target answer; otherwise use the answers file as it is
train_rows = 12_000     # training problems of the drafter's mix, from number `skip` on
val_rows = 200          # problems of the split val
skip = 400_000          # training problems to skip; pretraining saw the first 320,000
slots = 64              # prompts that are answered at once
max_new_tokens = 160    # max tokens per answer
device = "cpu"          # cpu or cuda


def main(argv=None):
    config = configure(globals(), argv)
    try:
        tokenizer = load_tokenizer(config.target)
        target_config, _ = read_target_config(config.target)
        if config.fresh:
            target = load_target(config.target, config.device)
            fast.prepare_for_decoding(target)
            write_answers(target, tokenizer, config)
    except ValueError as error:
        sys.exit(f"error: {error}\nbuild the nano target first: python data/nano/pretrain.py")
    try:
        answered = read_answers(config.answers)
    except (OSError, EOFError, json.JSONDecodeError) as error:
        sys.exit(f"error: cannot read {config.answers}: {error}\n"
                 "make it again: python data/nano/prepare.py --fresh")
    splits = {"train": [], "val": []}
    for row in answered:
        prompt = chat_prompt(tokenizer, row["question"])
        reply = tokenizer.encode(row["answer"] + tokenizer.eos_token)
        mask = [0] * len(prompt) + [1] * len(reply)
        splits[row["split"]].append((prompt + reply, mask))
    meta = {"vocab_size": target_config.vocab_size,
            "tokenizer": tokenizer_fingerprint(config.target)}
    for split, counts in write_samples(config.out_dir, splits, meta)["splits"].items():
        print(f"{config.out_dir}/{split}: {counts}")


def read_answers(path):
    """The target's answers, as rows {"split", "question", "answer"}."""
    with gzip.open(path, "rt") as f:
        return [json.loads(line) for line in f]


def write_answers(target, tokenizer, config):
    """Ask the target and write its answers, except those that did not end and those that change
    if they are decoded to text and encoded again."""
    questions = []
    splits = []
    for split, count, start in (("train", config.train_rows, config.skip),
                                ("val", config.val_rows, 0)):
        for question, _, _ in problems(split, count, start, "drafter"):
            questions.append(question)
            splits.append(split)
    answered = answer_questions(target, tokenizer, questions, config)

    lines = []
    for split, question, (_, token_ids) in zip(splits, questions, answered):
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        if tokenizer.encode(text + tokenizer.eos_token) == token_ids:
            row = {"split": split, "question": question, "answer": text}
            lines.append(json.dumps(row) + "\n")
    # mtime=0: the same answers, the same bytes
    write_whole(config.answers, gzip.compress("".join(lines).encode(), mtime=0))
    print(f"{config.answers}: {len(lines):,} answers of {len(questions):,}")


def answer_questions(target, tokenizer, questions, config):
    """Greedy answers [(prompt ids, answer ids)] of the target alone, in the order of the questions.

    An answer ends with <|im_end|>, or after max_new_tokens without it.
    """
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    replies = [[] for _ in prompts]
    with tqdm(total=len(prompts), unit="prompt", disable=not sys.stderr.isatty()) as bar:
        for index, output in generate_many(
                target, None, prompts, max_new_tokens=config.max_new_tokens, slots=config.slots,
                stop_token_ids=tokenizer.eos_token_id, tokens_per_forward=1):
            replies[index] += output.tokens
            bar.update(output.is_last)
    return list(zip(prompts, replies))


if __name__ == "__main__":
    main()
