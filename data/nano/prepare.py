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

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import chat_prompt, load_tokenizer, tokenizer_fingerprint
from checkpoint import read_target_config
from configurator import configure
from data import regenerate
from data.nano.problems import problems
from data.samples import write_samples
from formats.files import one_line, printable, where, write_whole

target = os.path.join(ROOT, "data", "nano", "target")               # whose answers to write
out_dir = os.path.join(ROOT, "data", "nano")                        # where the samples go
answers = os.path.join(ROOT, "data", "nano", "answers.jsonl.gz")    # of split, question, answer
fresh = False           # let the target answer; otherwise use the answers file as it is
train_rows = 12_000     # training problems of the drafter's mix, from number `skip` on
val_rows = 200          # problems of the split val
skip = 400_000          # training problems to skip; pretraining saw the first 320,000
device = "cpu"          # cpu or cuda


def main(argv=None):
    config = configure(globals(), argv)
    if config.fresh:
        write_answers(config)
    try:
        tokenizer = load_tokenizer(config.target)
        target_config, _ = read_target_config(config.target)
        answered = read_answers(config.answers)
    except (OSError, EOFError, ValueError) as error:
        sys.exit(f"error: {one_line(error, 190)}")
    splits = {"train": [], "val": []}
    for row in answered:
        prompt = chat_prompt(tokenizer, row["question"])
        reply = tokenizer.encode(row["answer"] + tokenizer.eos_token)
        mask = [0] * len(prompt) + [1] * len(reply)
        splits[row["split"]].append((prompt + reply, mask))
    meta = {"vocab_size": target_config.vocab_size,
            "tokenizer": tokenizer_fingerprint(config.target)}
    for split, counts in write_samples(config.out_dir, splits, meta)["splits"].items():
        print(printable(f"{config.out_dir}/{split}: {counts}"))


def read_answers(path):
    """The target's answers, as rows {"split", "question", "answer"}."""
    try:
        with gzip.open(path, "rt") as f:
            return [json.loads(line) for line in f]
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {where(path)} ({one_line(error, 50)}): make it again, "
                         "python data/nano/prepare.py --fresh") from None


def write_answers(config):
    """Let data/regenerate.py ask the target. It leaves out answers that did not end and those that
    change if they are decoded to text and encoded again."""
    prompts = config.answers + ".prompts.jsonl"
    lines = []
    for split, count, start in (("train", config.train_rows, config.skip),
                                ("val", config.val_rows, 0)):
        for question, _, _ in problems(split, count, start, "drafter"):
            lines.append(json.dumps({"id": split, "question": question}) + "\n")
    write_whole(prompts, "".join(lines))
    answered = config.answers + ".jsonl"
    regenerate.main([
        f"--prompts={prompts}", f"--out={answered}", f"--target={config.target}",
        f"--device={config.device}", "--dtype=float32", "--slots=64", "--max_new_tokens=160"])

    lines = []
    with open(answered) as f:
        for row in map(json.loads, f):
            question, answer = row["messages"]
            lines.append(json.dumps({"split": row["id"], "question": question["content"],
                                     "answer": answer["content"]}) + "\n")
    # mtime=0: the same answers, the same bytes
    write_whole(config.answers, gzip.compress("".join(lines).encode(), mtime=0))
    for path in (prompts, answered):
        os.remove(path)


if __name__ == "__main__":
    main()
