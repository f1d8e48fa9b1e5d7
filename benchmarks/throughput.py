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
from benchmarks.common import load, setup_of
from benchmarks.machine import device_name
from benchmarks.speed import timed_rounds
from benchmarks.timing import time_interleaved

SLOTS = (1, 2, 4, 8, 16, 32)


def run(config):
    all_slots = config.slots or SLOTS
    if min(all_slots) < 1:
        raise ValueError(f"slots = {config.slots}: decode at least one sequence at a time")
    if config.assumed_tau < 1:
        raise ValueError(f"assumed_tau = {config.assumed_tau}: a round returns at least one token")
    workload = load(config, default_count=1)
    print(f"{config.dtype} on {device_name(config.device)}, torch {torch.__version__}, "
          f"tau {config.assumed_tau:.2f}\n")
    print(f"{'':5} | {'drafter and target':^31} | {'target alone':^18} |")
    print(f"{'slots':>5} | {'tokens/s':>9} {'each':>10} {'ms':>10} | {'tokens/s':>9} {'ms':>8} | "
          f"{'speedup':>8} {'break-even tau':>14}")
    rows = []
    for slots in all_slots:
        row = new_row(slots, config.assumed_tau, round_seconds(config, workload, slots))
        print_row(row)
        rows.append(row)
    for name, draw in (("throughput.png", pictures.throughput), ("curve.png", pictures.curve)):
        path = os.path.join(config.out_dir, name)
        draw(path, {config.target: rows})
        print(f"wrote {path}")
    report = {
        "command": "throughput", "target": config.target, "compile": config.compile,
        "device": device_name(config.device), "dtype": config.dtype, "torch": torch.__version__,
        "rows": rows}
    return report, setup_of(config, workload.prompts, workload.stops)


@torch.inference_mode()
def round_seconds(config, workload, slots):
    """{mode: seconds of a round}: drafter and target, and the target alone in 1-token forwards."""
    target = workload.target
    drafter = workload.drafter
    calls = 32 if config.device.startswith("cuda") else 8
    seconds = time_interleaved({
        "speculative": timed_rounds(target, drafter, drafter.block_size, calls, slots),
        "target": timed_rounds(target, None, 1, calls, slots)})
    return {mode: median(repeats) for mode, repeats in seconds.items()}


def new_row(slots, tau, seconds):
    """Tokens/s of all sequences together, the speedup, and the tau at which it is 1."""
    tokens_per_s = {
        "speculative": slots * tau / seconds["speculative"],
        "target": slots / seconds["target"]}
    return {
        "slots": slots, "tau": tau, "seconds": seconds, "tokens_per_s": tokens_per_s,
        "speedup": tokens_per_s["speculative"] / tokens_per_s["target"],
        "break_even_tau": seconds["speculative"] / seconds["target"]}


def print_row(row):
    speed = row["tokens_per_s"]
    milliseconds = {mode: 1e3 * seconds for mode, seconds in row["seconds"].items()}
    print(f"{row['slots']:5} | {speed['speculative']:9,.0f} "
          f"{speed['speculative'] / row['slots']:10,.0f} {milliseconds['speculative']:10.2f} | "
          f"{speed['target']:9,.0f} {milliseconds['target']:8.2f} | {row['speedup']:7.2f}x "
          f"{row['break_even_tau']:14.2f}", flush=True)
