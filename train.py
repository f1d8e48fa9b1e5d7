"""
Trains a DFlash drafter for a frozen target, online: the target makes the features, the drafter learns from them.

    python train.py config/nano.py                           # the shipped nano pair, two CPU cores, minutes
    python train.py config/nano.py --resume                  # go on after an interruption

The defaults below are the recipe of Phase 1.2; a config file holds what another run changes. A checkpoint is a folder
out_dir/step-000123 that engines load; beside it stand log.jsonl, and loss and tau as a picture.
"""
import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import torch

from configurator import configure
from data.rows import Rows
from draft_decode import run
from model import (DFlashDraftModel, block_labels, block_loss, drafter_config, load_drafter, newest, sample_anchors,
                   save_drafter)
from target import fingerprint, load_target, load_tokenizer, stop_ids

# what
target = "Qwen/Qwen3.5-0.8B"                # folder of the frozen target
data = "data/math240k"                      # folder of rows; its prepare.py is run when they are missing
out_dir = "out/phase1_2-dflash"             # checkpoints; engines know the method by "dflash" in the path
resume = False                              # go on from the newest checkpoint in out_dir
# the drafter
layers = 5                                  # of it
heads = 8                                   # of attention
kv_heads = 2                                # of attention's keys and values
head_dim = 256                              # of a head, channels
mlp = 3584                                  # channels of the SwiGLU
taps = (3, 7, 11, 15, 19)                   # target layers whose outputs are the features
block_size = 16                             # K: the anchor and K - 1 guesses
mask_token_id: int | None = None            # id of the mask; None: the first after the tokenizer
# the loss
anchors = 512                               # blocks of a row
gamma = 7.0                                 # slots over which a slot's weight falls to 1/e
head_rows = 1024                            # rows of logits that exist at once
# optimisation
batch_size = 2                              # rows of a micro-batch
accumulation = 2                            # micro-batches of a step
max_length = 3072                           # tokens of a row; longer ones are cut
epochs = 1.0                                # passes over the rows
lr = 3e-4                                   # peak of the learning rate
warmup = 0.04                               # share of the steps up to it; then a cosine to zero
betas = (0.9, 0.999)                        # of AdamW
weight_decay = 0.0                          # of AdamW
clip = 1.0                                  # norm of the gradient at most
seed = 0                                    # of weights, row order and anchors
# sight
log_every = 10                              # steps
eval_every = 500                            # steps between estimates on held-out rows
eval_rows = 64                              # held-out rows of an estimate
save_every = 1000                           # steps between checkpoints
decode_rows = 64                            # held-out prompts really decoded at the end
decode_tokens = 512                         # new tokens of each at most
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of the target and of products; weights and moments are fp32

# ----------------------------------------------------------------------------------------------------------------------
# data: a batch is a pure function of (seed, step, rank), so a resumed run needs no loader state


def micro_batch(rows, index, rank=0, world=1):
    """Tokens and supervised mask (B, T) of micro-batch number `index` of the run, T a multiple of 64."""
    chosen = []
    for i in range(batch_size):
        epoch, place = divmod((index * world + rank) * batch_size + i, len(rows))
        chosen.append(rows[order(seed, epoch, len(rows))[place]])
    return pad(chosen)


@functools.lru_cache(2)  # a batch may reach into the next epoch
def order(seed, epoch, count):
    """The order of `count` rows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def pad(chosen):
    """(tokens, supervised) on the device from a list of rows; padding is unsupervised and, being last, unseen."""
    T = -(-min(max_length, max(len(t) for t, _ in chosen)) // 64) * 64
    tokens, mask = torch.zeros(len(chosen), T, dtype=torch.long), torch.zeros(len(chosen), T, dtype=torch.bool)
    for i, (t, m) in enumerate(chosen):
        n = min(len(t), max_length)
        tokens[i, :n], mask[i, :n] = torch.from_numpy(t[:n]), torch.from_numpy(m[:n] > 0)
    return tokens.to(device), mask.to(device)


def ensure_data(folder):
    """Run the folder's own prepare.py when its output is missing."""
    script = os.path.join(folder, "prepare.py")
    if not os.path.exists(os.path.join(folder, "meta.json")) and os.path.exists(script):
        print(f"{folder} has no rows yet: running {script}", flush=True)
        if subprocess.run([sys.executable, script]).returncode:
            raise ValueError(f"{script} failed; its message stands above")

# ----------------------------------------------------------------------------------------------------------------------
# one step


def block_forward(model, drafter, tokens, supervised, generator):
    """Sum of the loss over the batch's blocks, sum of its weights, and the slots (A', K-1) of real anchors: whether
    the guess is right, and whether the slot lies inside the response."""
    embedding = model.embed_tokens.weight
    with torch.no_grad():
        features, _ = model(tokens, taps=drafter.taps)
    at, real = sample_anchors(supervised, anchors, generator)
    labels, weights = block_labels(tokens, supervised, at, real, drafter.block_size, gamma)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = drafter(features, drafter.block(tokens.gather(1, at), embedding), at)
    loss, _, correct = block_loss(hidden, model.head, labels, weights, head_rows)
    return loss, weights.sum(), correct[real] & (weights[real] > 0), weights[real] > 0


def acceptance(correct, inside):
    """Estimated tau, and the share of blocks accepted up to each slot (K-1,), among those that reach it."""
    prefix = correct.long().cumprod(-1).float()
    return 1 + prefix.sum().item() / max(1, len(prefix)), (prefix.sum(0) / inside.sum(0).clamp(min=1)).tolist()


@torch.no_grad()
def estimate(model, drafter, rows):
    """(loss, tau, slots) on held-out rows with anchors that are the same every time. tau is 1 + the mean sum of prefix
    products, never an accuracy. Its anchors are random, those of decoding stand where a guess just failed: it reads
    high, by a tenth on the nano pair."""
    total, weight, seen = 0.0, 0.0, []
    for i in range(0, min(eval_rows, len(rows)), batch_size):
        tokens, supervised = pad([rows[j] for j in range(i, min(i + batch_size, len(rows)))])
        loss, w, *slots = block_forward(model, drafter, tokens, supervised, torch.Generator().manual_seed(i))
        total, weight, seen = total + loss.item(), weight + w.item(), seen + [slots]
    correct, inside = (torch.cat(x) for x in zip(*seen))
    return total / max(weight, 1e-9), *acceptance(correct, inside)


def rate(step, steps):
    """Learning rate of a step: linear warm-up, then a cosine to zero."""
    first = max(1, round(warmup * steps))
    if step < first:
        return lr * (step + 1) / first
    return lr * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def train_step(model, drafter, optimizer, rows, step, steps):
    """One optimizer step. Gradients and weights are summed over the micro-batches and divided once, so that the
    split does not matter. Returns what is logged, and the tokens seen."""
    total, weight, seen, count = 0.0, 0.0, [], 0
    for micro in range(accumulation):
        index = step * accumulation + micro
        tokens, supervised = micro_batch(rows, index)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))
        loss, w, *slots = block_forward(model, drafter, tokens, supervised, generator)
        loss.backward()
        total, weight, count = total + loss.detach(), weight + w, count + tokens.numel()
        seen.append(slots)
    weight = weight.clamp(min=1e-9)  # rows cut before their answer give a step without loss, and then no gradient
    for p in drafter.parameters():
        p.grad /= weight
    norm = torch.nn.utils.clip_grad_norm_(drafter.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate(step, steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tau, slots = acceptance(*(torch.cat(x) for x in zip(*seen)))
    return {"loss": (total / weight).item(), "norm": norm.item(), "tau": tau, "slots": slots}, count

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def save(drafter, optimizer, step, steps, config):
    """out_dir/step-NNNNNN: what engines load, and training_state.pt in SpecForge's layout, with fp32 weights added,
    as a run resumed from the bf16 ones would not be the same run."""
    state = {"epoch": 0, "global_step": step, "args": argparse.Namespace(**config),
             "optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": {"last_epoch": step},
             "master_weights": drafter.state_dict()}
    card = (f"# DFlash drafter for {os.path.basename(os.path.normpath(target))}\n\nBlock-diffusion speculative "
            f"decoding (arXiv 2602.06036): {layers} layers, blocks of {block_size}, features of target layers "
            f"{list(taps)}.\nStep {step} of {steps}; data: {os.path.basename(os.path.normpath(data))}.\n")
    folder = os.path.join(out_dir, f"step-{step:06d}")
    save_drafter(drafter, folder, card, {"training_state.pt": state})
    return folder


FREE = ("resume", "out_dir", "log_every", "eval_every", "eval_rows", "save_every", "decode_rows", "decode_tokens",
        "device", "head_rows")  # keys that a resumed run may change and still be the same run


def load_state(folder, drafter, optimizer, config):
    """Weights and moments from a checkpoint of ours; returns its step. Only tensors and a Namespace are unpickled.
    ValueError when the run was another one: it would go on with other rows, anchors or rates without a word."""
    path = os.path.join(folder, "training_state.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no training_state.pt, so it cannot be resumed")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, map_location=device, weights_only=True)
    before = vars(state["args"])
    other = [f"{k} was {before[k]!r}, is {v!r}" for k, v in config.items() if k not in FREE and before.get(k, v) != v]
    if other:
        raise ValueError(f"{folder} is of another run, --resume cannot go on with it: {'; '.join(other)}")
    drafter.load_state_dict(state["master_weights"])
    optimizer.load_state_dict(state["optimizer_state_dict"])
    return state["global_step"]


def start_log(step):
    """Open log.jsonl for appending, without what an interrupted run wrote after the step it resumes from."""
    path = os.path.join(out_dir, "log.jsonl")
    lines = []
    if os.path.exists(path):
        with open(path) as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
    with open(path + ".tmp", "w") as f:
        f.writelines(lines)
    os.replace(path + ".tmp", path)
    return open(path, "a", buffering=1)


def plot(path):
    """Loss and tau over steps as a picture, from log.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(os.path.join(out_dir, "log.jsonl")) as f:
        log = [json.loads(line) for line in f]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("loss", "tau")):
        for kind, label in (("train", "training"), ("val", "held out")):
            points = [(entry["step"], entry[name]) for entry in log if entry["kind"] == kind]
            axis.plot(*zip(*points) if points else ((), ()), label=label, marker="o" if kind == "val" else None)
        axis.set(xlabel="step", ylabel={"loss": "loss (nats)", "tau": "tau, estimated (tokens a round)"}[name])
        axis.legend()
    figure.savefig(path + ".tmp", format="png", dpi=120)
    plt.close(figure)
    os.replace(path + ".tmp", path)

# ----------------------------------------------------------------------------------------------------------------------
# the run


def decode_held_out(model, folder, rows, stops):
    """tau (micro), all tokens over all rounds, of real greedy decoding on held-out prompts with a saved checkpoint."""
    drafter, tokens, rounds = load_drafter(folder, model.config, device, dtype), 0, 0
    for i in range(min(decode_rows, len(rows))):
        ids, mask = rows[i]
        _, result, _ = run(model, drafter, ids[:int(mask.argmax())].tolist(), decode_tokens, stops)
        tokens, rounds = tokens + sum(len(r.tokens) for r in result), rounds + len(result)
    return tokens / max(1, rounds)


def setup(config):
    """Everything a run needs: target, drafter, optimizer, rows, stop ids, and the step to begin with."""
    folder = newest(out_dir)
    if os.path.basename(folder).startswith("step-") and not resume:
        raise ValueError(f"{out_dir} holds a run ({os.path.basename(folder)}): --resume goes on with it, "
                         "--out_dir=... starts another")
    if resume and folder == out_dir:
        raise ValueError(f"nothing to resume: {out_dir} holds no step-* checkpoint")
    model, tokenizer = load_target(target, device, dtype), load_tokenizer(target)
    ensure_data(data)
    rows = [Rows(data, split, model.config.vocab_size, fingerprint(target)) for split in ("train", "val")]
    mask_id = len(tokenizer) if mask_token_id is None else mask_token_id
    if not 0 <= mask_id < model.config.vocab_size:
        raise ValueError(f"mask_token_id = {mask_id} is outside the target's vocabulary of {model.config.vocab_size}")
    torch.manual_seed(seed)
    drafter = DFlashDraftModel(drafter_config(model.config, layers, taps, mask_id, heads, kv_heads, head_dim, mlp,
                                              block_size)).to(device)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    step = load_state(folder, drafter, optimizer, config) if resume else 0
    return model, drafter, optimizer, *rows, stop_ids(tokenizer), step


def loop(model, drafter, optimizer, rows, held_out, step, steps, config):
    """Steps from `step` to `steps`, logged, estimated and saved; returns the last checkpoint's folder."""
    os.makedirs(out_dir, exist_ok=True)
    log, folder, began, first, tokens = start_log(step), newest(out_dir), time.time(), step, 0
    while step < steps:
        entry, count = train_step(model, drafter, optimizer, rows, step, steps)
        step, tokens = step + 1, tokens + count
        if step % log_every == 0 or step == steps:
            seconds = time.time() - began
            log.write(json.dumps({"kind": "train", "step": step, "lr": rate(step - 1, steps), **entry,
                                  "tokens_per_s": tokens / seconds}) + "\n")
            left = (steps - step) * seconds / (step - first)
            print(f"step {step}/{steps} | loss {entry['loss']:.4f} | tau {entry['tau']:.2f} | norm {entry['norm']:.2f}"
                  f" | lr {rate(step - 1, steps):.1e} | {tokens / seconds:,.0f} tokens/s | {left / 60:.1f} min left",
                  flush=True)
        if step % eval_every == 0 or step == steps:
            loss, tau, slots = estimate(model, drafter, held_out)
            log.write(json.dumps({"kind": "val", "step": step, "loss": loss, "tau": tau, "slots": slots}) + "\n")
            shown = " ".join(f"{k}:{slots[k - 1]:.2f}" for k in (1, 2, 4, 8, len(slots)) if k <= len(slots))
            print(f"step {step}/{steps} | held out: loss {loss:.4f} | tau {tau:.2f} | accepted up to slot {shown}",
                  flush=True)
        if step % save_every == 0 or step == steps:
            folder = save(drafter, optimizer, step, steps, config)
    log.close()
    return folder


def main():
    config = configure(globals())
    try:
        model, drafter, optimizer, rows, held_out, stops, step = setup(config)
        steps = int(epochs * len(rows)) // (batch_size * accumulation)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (drafter, model)]
        print(f"{sizes[0]:,} parameters to train for a target of {sizes[1]:,} | {len(rows):,} rows, {steps:,} steps on "
              f"{device}", flush=True)
        if steps < 1:
            raise ValueError(f"{len(rows)} rows make no step of {batch_size} x {accumulation} rows: lower batch_size")
        folder = loop(model, drafter, optimizer, rows, held_out, step, steps, config)
        plot(os.path.join(out_dir, "training.png"))
        tau = decode_held_out(model, folder, held_out, stops)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {folder} and {out_dir}/training.png\n"
          f"try it: python draft_decode.py --drafter={folder} --prompt \"...\"\n"
          f"held-out tau from real decoding: {tau:.3f} ({min(decode_rows, len(held_out))} prompts)")


if __name__ == "__main__":
    main()
