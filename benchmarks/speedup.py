"""
How much faster decoding is with a drafter than the target alone in its fastest mode, prompt by
prompt. The modes run in one process in alternating order after a warm-up, and each prompt's time is
the median of three repeats. Every round is timed, including the first draft. The prefill is not.
"""
import math
import os
from statistics import median

from benchmarks import pictures
from benchmarks.common import (decode_in_turns, decoding_modes, load, mean_round_length,
                               print_figures, setup_of, slots_of, summarize, tokens_per_second,
                               write_rows)
from benchmarks.machine import card, print_card, print_row

REPEATS = 3  # per prompt


def run(config):
    workload = load(config, default_count=24)
    modes = decoding_modes(config, workload)
    rows = decode_in_turns(modes, workload.prompts, slots_of(config), REPEATS)
    add_gains(rows)
    report = report_of(config, workload, rows)
    pictures.speedup(os.path.join(config.out_dir, "speedup.png"), rows, report)
    write_rows(config, "speedup", rows)
    print_report(config, report)
    return report, setup_of(config, workload.prompts, workload.stops)


def add_gains(rows):
    """Add to each row its tau and its speedup over the target alone. Both are None if the answer
    ended with its first token, because then there was no round."""
    for row in rows:
        rounds = row["speculative"]["rounds"]
        row["tau"] = None
        row["speedup"] = None
        if rounds and row["target"]["rounds"]:
            row["tau"] = mean_round_length(rounds)
            speed = tokens_per_second([row], "speculative")
            row["speedup"] = speed / tokens_per_second([row], "target")


def report_of(config, workload, rows):
    gains = [row["speedup"] for row in rows if row["speedup"] is not None]
    if not gains:
        raise ValueError("every answer ended with its first token, so there is no round to time: "
                         "use other prompts")
    figures = summarize(rows, workload.tokenizer, workload.drafter.block_size)
    report = {"command": "speedup", "slots": slots_of(config)} | figures | {
        "faster": sum(gain > 1 for gain in gains), "timed": len(gains),
        "geomean": math.exp(sum(map(math.log, gains)) / len(gains)),
        "min": min(gains), "median": median(gains), "max": max(gains)}
    report["card"] = card(config, workload.target, workload.drafter,
                          report["tau_micro"], report["speedup"])
    return report


def print_report(config, report):
    print_card(report["card"])
    print_figures(report)
    print_row("share of ceiling", f"{report['card']['share_of_ceiling']:.0%}")
    print_row("speedup per prompt", f"{report['geomean']:.2f}x geometric mean; "
              f"{report['min']:.2f}x to {report['max']:.2f}x, median {report['median']:.2f}x")
    print_row("faster", f"{report['faster']} of {report['timed']} prompts with at least one round")
    print_row("wrote", f"{config.out_dir}/speedup.png, {config.out_dir}/speedup.jsonl")
