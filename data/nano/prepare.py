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

import torch
from tqdm import tqdm

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from whatever folder this is run
from chat import chat_prompt, load_tokenizer, tokenizer_fingerprint
from checkpoint import load_target, read_target_config
from configurator import configure
from data.nano.problems import problems
from data.samples import write_samples
from decode_state import DecodeState

target = os.path.join(ROOT, "data", "nano", "target")               # whose answers to write
out_dir = os.path.join(ROOT, "data", "nano")                        # where the rows go
answers = os.path.join(ROOT, "data", "nano", "answers.jsonl.gz")    # of split, question, answer
fresh = False           # let the target answer; else read what it said when the repository was made
train_rows = 12_000     # training problems of the drafter's mix, from number `skip` on
val_rows = 200          # problems of the split val
skip = 500_000          # training problems passed over; pretraining saw the first 320,000
batch_size = 256        # prompts of one length that are answered in lockstep
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
        target, tokenizer, questions, config.max_new_tokens, config.batch_size)

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


def answer_questions(target, tokenizer, questions, max_new_tokens, batch_size):
    """Greedy answers [(prompt ids, answer ids)], in the order of the questions.

    An answer ends with <|im_end|>, or without it after max_new_tokens. Prompts of one length go
    through together, one row a step: sequences of a batch share their position.
    """
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answered = [None] * len(prompts)
    bar = tqdm(total=len(prompts), unit="row", disable=not sys.stderr.isatty())
    while waiting:
        length = len(prompts[waiting[0]])
        group = [i for i in waiting[:batch_size] if len(prompts[i]) == length]
        waiting = waiting[len(group):]
        batch = [prompts[i] for i in group]
        replies = answer_batch(target, batch, max_new_tokens, tokenizer.eos_token_id)
        for i, reply in zip(group, replies):
            answered[i] = (prompts[i], reply)
        bar.update(len(group))
    bar.close()
    return answered


@torch.no_grad()
def answer_batch(target, prompts, max_new_tokens, stop_id):
    """Greedy answers, lists of token ids, to prompts of one length."""
    tokens = torch.tensor(prompts, device=target.embed_tokens.weight.device)  # (B, T)
    B, T = tokens.shape
    state = DecodeState(target, B, T + max_new_tokens, forward_rows=1)
    _, logits = target.prefill(tokens, state)
    next_token = logits.argmax(-1)  # (B,)
    steps = [next_token]
    stopped = next_token == stop_id
    while len(steps) < max_new_tokens:
        # to know whether all have stopped is to wait for the device, so only every 8 steps
        if len(steps) % 8 == 0 and stopped.all():
            break
        _, hidden = target(next_token[:, None], state)
        state.commit(1)
        next_token = target.logits(hidden)[:, 0].argmax(-1)
        steps.append(next_token)
        stopped |= next_token == stop_id
    # an answer that stopped earlier than others of its batch goes on in vain: cut what follows
    replies = []
    for reply in torch.stack(steps, 1).tolist():
        if stop_id in reply:
            reply = reply[:reply.index(stop_id) + 1]
        replies.append(reply)
    return replies


if __name__ == "__main__":
    main()
