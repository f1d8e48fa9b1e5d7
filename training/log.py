"""
The numbers of a training run and their log: lines on the screen, log.jsonl, training.png, and on
request Weights & Biases. Only process 0 writes.
"""
import contextlib
import io
import json
import os
import shlex
import time
from typing import NamedTuple

import torch

from data.samples import read_meta
from formats.files import printable, write_whole
from training.flops import mfu
from training.parallel import peak_memory, rank

SHOWN_POSITIONS = (1, 2, 4, 8, 15)  # of the K - 1, on the screen and in the plot

# --------------------------------------------------------------------------------------------------
# the numbers of a step: sums over blocks, which add up over micro-batches and processes


class BlockSums(NamedTuple):
    """Sums over the blocks of a micro-batch, in float64."""
    loss: torch.Tensor
    weight: torch.Tensor
    right_up_to: torch.Tensor       # (K-1,) blocks whose guesses are right up to this position
    reached: torch.Tensor           # (K-1,) blocks whose response is long enough for this position
    tokens: torch.Tensor            # including padding
    operations: torch.Tensor


def block_sums(loss, weights, correct, in_response, *, tokens, operations):
    """BlockSums of a micro-batch; weights, correct, and in_response are (B, A, K-1)."""
    right_up_to = (correct & in_response).long().cumprod(-1)
    # torch.full lets the GPU write the number. Copying it to the GPU would make the CPU wait.
    return BlockSums(
        loss=loss.detach().double(),
        weight=weights.sum().double(),
        right_up_to=right_up_to.sum((0, 1)).double(),
        reached=in_response.sum((0, 1)).double(),
        tokens=torch.full((), tokens, dtype=torch.float64, device=loss.device),
        operations=torch.full((), operations, dtype=torch.float64, device=loss.device))


def add_up(parts):
    """The BlockSums of several micro-batches together."""
    return BlockSums(*[sum(values) for values in zip(*parts)])


def figures(sums):
    """The numbers of the log: mean loss, estimated tau, and the fraction of blocks that are right
    up to each of the K-1 positions.

    tau is 1 (the target's own token) plus the mean number of right guesses before the first wrong
    one. Position k averages over the blocks whose response has at least k more tokens.
    """
    blocks = sums.reached[0].clamp(min=1)
    return {"loss": (sums.loss / sums.weight.clamp(min=1e-9)).item(),  # 0 without any weight
            "tau": 1 + (sums.right_up_to.sum() / blocks).item(),
            "accepted_up_to_position": (sums.right_up_to / sums.reached.clamp(min=1)).tolist()}

# --------------------------------------------------------------------------------------------------
# the log


class TrainingLog:
    """The log of a run from its current step on.

    log.jsonl has a line per entry: its kind (train or val), its step, and its numbers. Speed and
    time left are measured since this process began, including evaluations and checkpoints.
    """

    def __init__(self, run):
        config = run.config
        self.config = config
        self.file = open_log(config, run.step)
        self.shown = [k for k in SHOWN_POSITIONS if k < config.block_size]
        self.first_step = run.step  # above 0 in a resumed run
        self.began = time.time()
        self.tokens = 0
        self.operations = 0
        if config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def count(self, sums):
        """Add the BlockSums of a step."""
        self.tokens += sums.tokens.item()
        self.operations += sums.operations.item()

    def training(self, run, entry):
        """Write the entry of a step, with speed and time left."""
        config = self.config
        seconds = time.time() - self.began
        steps_left = run.total_steps - run.step
        speed = self.tokens / seconds
        flops = mfu(self.operations / seconds, config.device, config.dtype)
        memory = peak_memory(config.device)
        minutes = steps_left * seconds / (run.step - self.first_step) / 60
        entry |= {"seconds": seconds, "tokens_per_s": speed, "mfu": flops, "peak_gb": memory,
                  "minutes_left": minutes}
        line = f"norm {entry['grad_norm']:.2f} | lr {entry['lr']:.1e} | {speed:,.0f} tokens/s | "
        if flops:
            line += f"{flops:.1%} MFU | "
        if memory:
            line += f"{max(memory):.1f} GB | "
        if entry["skipped"]:
            line += f"{entry['skipped']} skipped | "
        self.write(run, "train", entry, f"{line}{minutes:.1f} min left")

    def held_out(self, run, entry):
        """Write the entry of an evaluation."""
        fractions = entry["accepted_up_to_position"]
        shown = " ".join(f"{k}:{fractions[k - 1]:.2f}" for k in self.shown)
        self.write(run, "val", entry, f"accepted up to position {shown}")

    def write(self, run, kind, entry, line):
        self.file.write(json.dumps({"kind": kind, "step": run.step, **entry}) + "\n")
        source = "held out: " if kind == "val" else ""
        print(f"step {run.step}/{run.total_steps} | {source}loss {entry['loss']:.4f} | "
              f"tau {entry['tau']:.2f} | {line}", flush=True)
        if self.config.wandb_project and rank() == 0:
            import wandb
            # lists per position or process have no curve
            numbers = {f"{kind}/{key}": x for key, x in entry.items() if not isinstance(x, list)}
            wandb.log(numbers, step=run.step)

    def close(self):
        """Close log.jsonl and plot all of it, including the steps before a resume."""
        self.file.close()
        if rank() == 0:
            entries = read_log(self.config)
            plot_training(os.path.join(self.config.out_dir, "training.png"), entries, self.shown)


def start_wandb(config):
    """Start a Weights & Biases run in process 0 if the configuration names a project."""
    if not config.wandb_project or rank() != 0:
        return
    try:
        import wandb
    except ImportError:
        raise ValueError(f"wandb_project = {config.wandb_project!r:.60} needs the package wandb: "
                         "run pip install wandb or drop wandb_project") from None
    name = os.path.basename(os.path.normpath(config.out_dir))
    wandb.init(project=config.wandb_project, name=name, config=vars(config))


def open_log(config, step):
    """out_dir/log.jsonl for appending, without what an interrupted run wrote after `step`.

    An old file is replaced. So its last line is whole, and it is not a link to a file elsewhere.
    """
    if rank() != 0:
        return open(os.devnull, "a")
    kept = [json.dumps(entry) + "\n" for entry in read_log(config) if entry["step"] <= step]
    path = os.path.join(config.out_dir, "log.jsonl")
    write_whole(path, "".join(kept))
    return open(path, "a", buffering=1)


def read_log(config):
    """The entries of out_dir/log.jsonl, without damaged lines and lines that are not ours."""
    path = os.path.join(config.out_dir, "log.jsonl")
    if not os.path.isfile(path):
        return []
    entries = []
    with open(path, errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                entry = json.loads(line)
                numbers = [entry["loss"], entry["tau"], *entry["accepted_up_to_position"]]
                has_step = type(entry["step"]) is int and entry["step"] >= 0
                has_numbers = all(type(x) is float for x in numbers)
                has_all = len(numbers) == 2 + config.block_size - 1
                if entry["kind"] in ("train", "val") and has_step and has_numbers and has_all:
                    entries.append(entry)
    return entries


def plot_training(path, log, positions):
    """Draw the entries of log.jsonl. positions: those of the block whose acceptance is shown."""
    from matplotlib.figure import Figure  # takes a second to import

    training = [entry for entry in log if entry["kind"] == "train"]
    held_out = [entry for entry in log if entry["kind"] == "val"]
    training_steps = [entry["step"] for entry in training]
    held_out_steps = [entry["step"] for entry in held_out]
    figure = Figure(figsize=(15, 4), layout="constrained")
    loss_axis, tau_axis, acceptance_axis = figure.subplots(1, 3)
    for axis, key in ((loss_axis, "loss"), (tau_axis, "tau")):
        axis.plot(training_steps, [entry[key] for entry in training], label="training")
        axis.plot(held_out_steps, [entry[key] for entry in held_out], label="held out", marker="o")
    for position in positions:
        fractions = [entry["accepted_up_to_position"][position - 1] for entry in held_out]
        acceptance_axis.plot(held_out_steps, fractions, label=f"position {position}", marker="o")
    loss_axis.set(xlabel="step", ylabel="loss (nats)")
    tau_axis.set(xlabel="step", ylabel="estimated tau (tokens per round)")
    acceptance_axis.set(xlabel="step", ylabel="held out: accepted up to position")
    for axis in (loss_axis, tau_axis, acceptance_axis):
        axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def how_to_use(config, folder):
    """The commands that decode with the drafter in a folder, measure it, and serve it."""
    target = shlex.quote(config.target)
    drafter = shlex.quote(folder)
    pair = f"--target={target} --drafter={drafter}"
    if config.target.startswith("random:"):  # it has no text
        return printable(f"measure: python bench.py exactness {pair} --prompts=random:64:256")
    meta = read_meta(config.data, "")
    if meta.get("thinking"):
        pair += " --thinking"
    prompts = str(meta.get("source", "nano"))  # the rows that the samples come from
    if prompts != "nano" and not os.path.exists(prompts):
        prompts = "math500"
    vllm = {"method": "dflash", "model": folder, "num_speculative_tokens": config.block_size - 1}
    return printable(f"""decode: python draft_decode.py {pair} --prompt="..."
measure: python bench.py acceptance {pair} --prompts={shlex.quote(prompts)}
SGLang: sglang serve --model-path {target} --dtype bfloat16 --port 30000 \
--attention-backend triton --linear-attn-backend triton \
--mamba-radix-cache-strategy extra_buffer --speculative-algorithm DFLASH \
--speculative-draft-model-path {drafter} --speculative-num-draft-tokens {config.block_size}
vLLM: vllm serve {target} --dtype bfloat16 --port 30000 --language-model-only \
--attention-backend flash_attn --no-enable-prefix-caching \
--speculative-config {shlex.quote(json.dumps(vllm))}""")
