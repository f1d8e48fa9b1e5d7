"""
Many sequences at once: is the drafter worth it? Compares rounds of drafter and target with the
target alone in its fastest mode, which is 1-token steps, for several batch sizes (`slots`).

A round of B sequences reads the weights once but computes B times as much as a round of one. For
one sequence reading the weights dominates, so a round with its 16-token forward takes not much
longer than a step. With more sequences computing dominates. So the break-even tau, which is the
time of a round divided by the time of a step, rises with B. Below that tau speculation is slower.

Rounds and steps are timed with all slots busy, after 256 tokens, in a buffer of 1,024. The time of
a round does not depend on tau, so tau is a key: set --assumed_tau to the tau that acceptance
measures.
"""
import os

import torch

from benchmarks import figures
from benchmarks.common import load
from benchmarks.speed import timed_rounds
from benchmarks.timing import device_name, median_seconds

SLOTS = (1, 2, 4, 8, 16, 32)


def run(config):
    workload = load(config, default_count=1)
    print(f"{config.dtype} on {device_name(config.device)}, rounds at tau {config.assumed_tau:.2f}")
    rows = []
    for slots in config.slots or SLOTS:
        row = measure(config, workload, slots)
        rows.append(row)
        print(in_words(row), flush=True)
    figures.throughput(os.path.join(config.out_dir, "throughput.png"), {config.target: rows})
    return {"rows": rows}


@torch.inference_mode()
def measure(config, workload, slots):
    """The row of a batch size: seconds of a round of drafter and target, and of a step; tokens/s of
    all sequences; the speedup, and the tau at which it is 1."""
    target = workload.target
    drafter = workload.drafter
    seconds = median_seconds({
        "speculative": timed_rounds(target, drafter, drafter.block_size, slots),
        "target": timed_rounds(target, None, 1, slots)})
    tau = config.assumed_tau
    break_even_tau = seconds["speculative"] / seconds["target"]
    return {
        "slots": slots, "tau": tau, "seconds": seconds,
        "tokens_per_s": {"speculative": slots * tau / seconds["speculative"],
                         "target": slots / seconds["target"]},
        "speedup": tau / break_even_tau, "break_even_tau": break_even_tau}


def in_words(row):
    """The figures of a row, and which mode to use for this number of sequences."""
    numbers = []
    for mode, name in (("target", "step"), ("speculative", "round")):
        milliseconds = 1000 * row["seconds"][mode]
        numbers.append(f"{name} {milliseconds:.2f} ms, {row['tokens_per_s'][mode]:,.0f} tokens/s")
    better = "with the drafter"
    factor = row["speedup"]
    if factor < 1:
        better = "the target alone"
        factor = 1 / factor
    return (f"sequences: {row['slots']} | {' | '.join(numbers)} | break-even tau "
            f"{row['break_even_tau']:.2f} | better: {better}, {factor:.2f}x")
