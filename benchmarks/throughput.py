"""
Many sequences at once: tokens/s with and without the drafter for several batch sizes (`slots`).

A round of B sequences reads the weights once but computes B times as much as a round of one. For
one sequence reading the weights dominates, so a round with its 16-token forward takes not much
longer than a 1-token forward. With more sequences computing dominates. So the break-even tau, which
is the time of a round divided by the time of a 1-token forward, rises with B.

Rounds are timed with all slots busy, after 256 tokens, in a buffer of 1,024. The time of a round
does not depend on tau, so tau is a key: set --assumed_tau to the tau that acceptance measures.
"""
import os
from statistics import median

import torch

from benchmarks import pictures
from benchmarks.common import load, print_table, setup_of
from benchmarks.speed import timed_rounds
from benchmarks.timing import device_name, time_interleaved

SLOTS = (1, 2, 4, 8, 16, 32)
COLUMNS = ("slots", "tokens_per_s", "seconds", "speedup", "break_even_tau")


def run(config):
    all_slots = config.slots or SLOTS
    if min(all_slots) < 1:
        raise ValueError(f"slots = {config.slots}: decode at least one sequence at a time")
    if config.assumed_tau < 1:
        raise ValueError(f"assumed_tau = {config.assumed_tau}: a round returns at least one token")
    workload = load(config, default_count=1)
    print(f"{config.dtype} on {device_name(config.device)}, tau {config.assumed_tau:.2f}\n")
    rows = []
    for slots in all_slots:
        rows.append(measure(config, workload, slots))
        print_table(rows[-1:], COLUMNS, header=len(rows) == 1)
    pictures.throughput(os.path.join(config.out_dir, "throughput.png"), {config.target: rows})
    return {"command": "throughput", "rows": rows}, setup_of(config)


@torch.inference_mode()
def measure(config, workload, slots):
    """The row of a batch size: seconds of a round of drafter and target, and of the target alone in
    1-token forwards; tokens/s of all sequences; the speedup, and the tau at which it is 1."""
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
