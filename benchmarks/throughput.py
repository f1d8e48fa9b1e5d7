"""
Many sequences at once: is the drafter worth it? Compares rounds of drafter and target with the
target alone in its fastest mode, which is 1-token steps, for several batch sizes (`slots`).

A round of B sequences reads the weights once but computes B times as much as a round of one. For
one sequence reading the weights dominates, so a round with its 16-token forward takes not much
longer than a step. With more sequences computing dominates. So the break-even tau, which is the
time of a round divided by the time of a step, rises with B. Below that tau speculation is slower.

Both are timed with all slots busy, after 256 tokens, in a buffer of 1,024. The time of a round does
not depend on tau, so tau is a key: set --assumed_tau to the tau that acceptance measures.
"""
import os
from statistics import median

import torch

from benchmarks import pictures
from benchmarks.common import load, print_table, setup_of
from benchmarks.speed import timed_rounds
from benchmarks.timing import device_name, time_interleaved

SLOTS = (1, 2, 4, 8, 16, 32)
COLUMNS = ("sequences", "ms per step", "tokens/s alone", "ms per round", "tokens/s with drafter",
           "break-even tau")


def run(config):
    workload = load(config, default_count=1)
    print(f"{config.dtype} on {device_name(config.device)}, rounds at tau "
          f"{config.assumed_tau:.2f}\n")
    rows = []
    for slots in config.slots or SLOTS:
        row = measure(config, workload, slots)
        rows.append(row)
        print_table([cells(row)], COLUMNS, header=len(rows) == 1)
    print()
    for row in rows:
        print(conclusion(row))
    pictures.throughput(os.path.join(config.out_dir, "throughput.png"), {config.target: rows})
    return {"command": "throughput", "rows": rows}, setup_of(config)


@torch.inference_mode()
def measure(config, workload, slots):
    """The row of a batch size: seconds of a round of drafter and target, and of a step; tokens/s of
    all sequences; the speedup, and the tau at which it is 1."""
    target = workload.target
    drafter = workload.drafter
    calls = 32 if config.device.startswith("cuda") else 8
    repeats = time_interleaved({
        "speculative": timed_rounds(target, drafter, drafter.block_size, calls, slots),
        "target": timed_rounds(target, None, 1, calls, slots)})
    seconds = {mode: median(repeats[mode]) for mode in repeats}
    tau = config.assumed_tau
    break_even_tau = seconds["speculative"] / seconds["target"]
    return {
        "slots": slots, "tau": tau, "seconds": seconds,
        "tokens_per_s": {"speculative": slots * tau / seconds["speculative"],
                         "target": slots / seconds["target"]},
        "speedup": tau / break_even_tau, "break_even_tau": break_even_tau}


def cells(row):
    numbers = [row["slots"]]
    for mode in ("target", "speculative"):
        numbers += [1000 * row["seconds"][mode], row["tokens_per_s"][mode]]
    return dict(zip(COLUMNS, [*numbers, row["break_even_tau"]]))


def conclusion(row):
    """Which mode to use for this number of sequences."""
    better = "with the drafter"
    factor = row["speedup"]
    if factor < 1:
        better = "the target alone"
        factor = 1 / factor
    return (f"sequences: {row['slots']}, better: {better}, {factor:.2f}x (tau {row['tau']:.2f}, "
            f"break-even {row['break_even_tau']:.2f})")
