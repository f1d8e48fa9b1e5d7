"""
Target-matched rows for the nano drafter: the nano target answers fresh problems, and its answers are the data.

    python data/nano/prepare.py             # seconds: from the shipped answers; train.py runs it when rows are missing
    python data/nano/prepare.py --fresh     # minutes: let the target answer again, and write answers.jsonl.gz anew

The drafter learns to guess what this target says, right or wrong, not what a teacher would say.
"""
import gzip
import json
import os
import sys

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "data", "nano")]  # the project's modules, from whatever folder this is run
from configurator import configure
from data.rows import write_rows
from problems import problems
from target import DecodeState, chat_prompt, fingerprint, load_target, load_tokenizer

target = os.path.join(ROOT, "data", "nano", "target")   # whose answers to write
out_dir = os.path.join(ROOT, "data", "nano")            # where the rows go
answers = os.path.join(ROOT, "data", "nano", "answers.jsonl.gz")    # lines of split, question, answer
fresh = False           # let the target answer, rather than read what it said when the repository was made
train_rows = 6000       # fresh training problems: those after the ones that the target was pretrained on
val_rows = 200          # of the split val
skip = 200_000          # training problems passed over; pretraining saw the first 105,600
batch_size = 256        # prompts of one length answered in lockstep
limit = 160             # tokens of an answer at most
device = "cpu"          # cpu or cuda


@torch.no_grad()
def answer(target, tokenizer, questions, limit, batch_size):
    """Greedy answers, [(prompt ids, answer ids)] in the order of the questions. An answer ends with <|im_end|>, or
    without it after `limit` tokens. Prompts of one length go through together, one row a step: they share a position.
    """
    where, stop = target.embed_tokens.weight.device, tokenizer.eos_token_id
    prompts = [chat_prompt(tokenizer, q) for q in questions]
    order, answers = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
    bar = tqdm(total=len(prompts), unit="row", disable=not sys.stderr.isatty())
    while order:
        n = len(prompts[order[0]])
        group = [i for i in order[:batch_size] if len(prompts[i]) == n]
        order = order[len(group):]
        state = DecodeState(target, len(group), n + limit, 1)
        _, logits = target.prefill(torch.tensor([prompts[i] for i in group], device=where), state)
        steps = [logits.argmax(-1)]
        stopped = steps[0] == stop
        while len(steps) < limit and not (len(steps) % 8 == 0 and bool(stopped.all())):
            _, logits = target(steps[-1][:, None], state, rows=slice(None))
            state.commit(1)
            steps.append(logits[:, 0].argmax(-1))
            stopped |= steps[-1] == stop
        for i, ids in zip(group, torch.stack(steps, 1).tolist()):
            answers[i] = prompts[i], ids[:ids.index(stop) + 1] if stop in ids else ids
        bar.update(len(group))
    bar.close()
    return answers


def write_answers(model, tokenizer):
    """Ask the target and write answers.jsonl.gz; answers that did not end, or do not survive as text, are left out."""
    lines = []
    for split, count, start in (("train", train_rows, skip), ("val", val_rows, 0)):
        questions = [q for q, _, _ in problems(split, count, start)]
        for question, (_, ids) in zip(questions, answer(model, tokenizer, questions, limit, batch_size)):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if tokenizer.encode(text + tokenizer.eos_token) == ids:
                lines.append(json.dumps({"split": split, "question": question, "answer": text}) + "\n")
    with open(answers + ".tmp", "wb") as f:
        f.write(gzip.compress("".join(lines).encode(), mtime=0))
    os.replace(answers + ".tmp", answers)
    print(f"{answers}: {len(lines):,} answers of {train_rows + val_rows:,}")


def read_answers():
    try:
        with gzip.open(answers, "rt") as f:
            return [json.loads(line) for line in f]
    except (OSError, EOFError, json.JSONDecodeError) as error:
        sys.exit(f"error: cannot read {answers}: {error}\nmake it anew: python data/nano/prepare.py --fresh")


def main():
    configure(globals())
    try:
        tokenizer, model = load_tokenizer(target), load_target(target, device)
    except ValueError as error:
        sys.exit(f"error: {error}\nbuild the nano target first: python data/nano/pretrain.py")
    if fresh:
        write_answers(model, tokenizer)
    splits = {"train": [], "val": []}
    for row in read_answers():
        prompt = chat_prompt(tokenizer, row["question"])
        reply = tokenizer.encode(row["answer"] + tokenizer.eos_token)
        splits[row["split"]].append((prompt + reply, [0] * len(prompt) + [1] * len(reply)))
    meta = write_rows(out_dir, splits, {"vocab_size": model.config.vocab_size, "tokenizer": fingerprint(target)})
    for name, counts in meta["splits"].items():
        print(f"{out_dir}/{name}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))


if __name__ == "__main__":
    main()
