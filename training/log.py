"""
What a training run says of itself: lines on the screen, log.jsonl, a picture, Weights & Biases.
Process 0 says it; in other processes nothing is written.
"""
import json
import os
import time

import torch

from benchmarks import pictures
from training.flops import mfu
from training.parallel import gather_numbers, rank

SHOWN_SLOTS = (1, 2, 4, 8, 15)  # of the K - 1, on the screen and in the picture


class TrainingLog:
    """The log of a run from its present step on.

    log.jsonl has a line for each entry: its kind (train or val), its step and its numbers. Speed
    and time left are those since this process began; estimates and checkpoints are in the time.
    """

    def __init__(self, run):
        self.out_dir = run.config.out_dir
        self.file = open_log(self.out_dir, run.step)
        self.first_step = run.step  # above 0 in a resumed run
        self.began = time.time()
        self.tokens = 0
        self.operations = 0
        if run.config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def count(self, sums):
        """Take note of a step's BlockSums."""
        self.tokens += sums.tokens.item()
        self.operations += sums.operations.item()

    def training(self, run, entry):
        """A step's entry, with speed and time left."""
        config = run.config
        seconds = time.time() - self.began
        steps_done = run.step - self.first_step
        steps_left = run.total_steps - run.step
        entry = {
            **entry,
            "tokens_per_s": self.tokens / seconds,
            "mfu": mfu(self.operations / seconds, config.device, config.dtype),
            "peak_gb": peak_memory(config.device),
            "minutes_left": steps_left * seconds / steps_done / 60,
        }
        self.write(run, "train", entry)
        line = (f"step {run.step}/{run.total_steps} | loss {entry['loss']:.4f} | "
                f"tau {entry['tau']:.2f} | norm {entry['grad_norm']:.2f} | lr {entry['lr']:.1e} | "
                f"{entry['tokens_per_s']:,.0f} tokens/s | ")
        if entry["mfu"]:
            line += f"{entry['mfu']:.1%} MFU | "
        if entry["peak_gb"]:
            line += f"{max(entry['peak_gb']):.1f} GB | "
        if entry["skipped"]:
            line += f"{entry['skipped']} skipped | "
        print(f"{line}{entry['minutes_left']:.1f} min left", flush=True)

    def held_out(self, run, entry):
        """An estimate's entry."""
        self.write(run, "val", entry)
        shares = entry["accepted_up_to_slot"]
        shown = " ".join(f"{k}:{shares[k - 1]:.2f}" for k in SHOWN_SLOTS if k <= len(shares))
        print(f"step {run.step}/{run.total_steps} | held out: loss {entry['loss']:.4f} | "
              f"tau {entry['tau']:.2f} | accepted up to slot {shown}", flush=True)

    def write(self, run, kind, entry):
        self.file.write(json.dumps({"kind": kind, "step": run.step, **entry}) + "\n")
        if run.config.wandb_project and rank() == 0:
            import wandb
            numbers = {}
            for key, value in entry.items():
                if not isinstance(value, list):  # values by slot or by process have no curve
                    numbers[f"{kind}/{key}"] = value
            wandb.log(numbers, step=run.step)

    def close(self):
        """Close log.jsonl and draw training.png from it, also what was before a resume."""
        self.file.close()
        if rank() != 0:
            return
        with open(os.path.join(self.out_dir, "log.jsonl")) as f:
            entries = [json.loads(line) for line in f]
        pictures.training(os.path.join(self.out_dir, "training.png"), entries, SHOWN_SLOTS)


def peak_memory(device):
    """Gigabytes that tensors took at most since the loop began, by process; None on CPUs."""
    if device != "cuda":
        return None
    return gather_numbers(torch.cuda.max_memory_allocated() / 1e9, device)


def open_log(out_dir, step):
    """out_dir/log.jsonl for appending, without what an interrupted run wrote after `step`."""
    if rank() != 0:
        return open(os.devnull, "a")
    path = os.path.join(out_dir, "log.jsonl")
    if os.path.isfile(path):
        kept = []
        with open(path) as f:
            for line in f:
                is_whole = line.endswith("\n")  # a crash may tear the last one
                if is_whole and json.loads(line)["step"] <= step:
                    kept.append(line)
        with open(path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)
    return open(path, "a", buffering=1)
