"""
How much faster a drafter makes the fastest mode of the target alone, prompt by prompt, each several
times, the arms in turns; and, with --hf, how much faster than transformers' own generate.
"""
import math
import os
import time
from statistics import median

from benchmarks import pictures
from benchmarks.common import (Arm, accuracy_text, answered_texts, both_arms, decode_in_turns,
                               decoding_arms, load, mean_round_length, setup_of, share, slots_of,
                               speed_text, summarize, tokens_per_second)
from benchmarks.journal import Journal
from benchmarks.machine import card, print_card, print_row
from benchmarks.peer import peer_answer, transformers_peer
from data.nano.problems import boxed
from draft_decode import Generation


def run(config):
    if config.repeats < 1:
        raise ValueError(f"repeats = {config.repeats}: time each prompt at least once")
    if config.hf and config.temperature:
        raise ValueError("--hf compares with transformers' greedy generate: "
                         "leave --temperature at 0")
    slots = slots_of(config)
    if config.hf and slots > 1:
        raise ValueError("--hf times transformers' generate of one sequence: leave --slots at 1")
    workload = load(config, default_count=8 if config.hf else 24)
    setup = setup_of(config, workload.prompts, workload.stops)
    setup |= {"repeats": config.repeats, "hf": config.hf}
    journal = Journal(config, "speedup", setup)
    arms = decoding_arms(config, workload, config.repeats)
    if config.hf:
        arms["transformers"] = transformers_arm(config, workload)
    rows = decode_in_turns(arms, workload.prompts, journal, slots)
    add_gains(rows)
    report = report_of(config, workload, rows)
    pictures.speedup(os.path.join(config.out_dir, "speedup.png"), rows, report)
    journal.close(rows)
    print_report(config, report)
    return report, setup


def transformers_arm(config, workload):
    """transformers' generate as an arm. It cannot leave its prefill out of its time; so that is
    timed as a generation of one token, and subtracted."""
    peer = transformers_peer(workload.target)

    def answer(prompt_ids, max_new_tokens):
        return peer_answer(peer, prompt_ids, max_new_tokens, workload.stops,
                           workload.drafter.block_size)

    def decode(prompts):
        prompt_ids, = prompts  # one at a time
        start = time.perf_counter()
        answer(prompt_ids, 1)
        prefilled = time.perf_counter()
        tokens = answer(prompt_ids, config.max_new_tokens)
        end = time.perf_counter()
        seconds = (end - prefilled) - (prefilled - start)
        return [Generation(tokens, [], max(0.0, seconds))]

    return Arm(decode, config.repeats)


def add_gains(rows):
    """Adds to each row its tau and its speedup over the target alone; None where the answer ended
    with its first token, so that there was no round."""
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
    report["boxed"] = {}
    for arm in ("target", "speculative"):
        pairs = answered_texts(rows, workload.tokenizer, arm)
        report["boxed"][arm] = share(boxed(text) is not None for text, _ in pairs)
    if config.hf:
        speed = report["tokens_per_s"]
        speed["transformers"] = tokens_per_second(rows, "transformers")
        report["speedup_over_transformers"] = (
            speed["speculative"] / max(1e-9, speed["transformers"]))
        report["identical_to_transformers"] = share(
            row["speculative"]["tokens"] == row["transformers"]["tokens"] for row in rows)
    report["card"] = card(config, workload.target, workload.drafter,
                          report["tau_micro"], report["speedup"])
    return report


def print_report(config, report):
    print_card(report["card"])
    untimed = report["prompts"] - report["timed"]
    ended_early = f"; {untimed} ended at the first token" if untimed else ""
    print_row("faster", f"{report['faster']} of {report['prompts']} prompts{ended_early}")
    print_row("speedup a prompt", f"{report['geomean']:.2f}x geometric mean; "
              f"{report['min']:.2f}x to {report['max']:.2f}x, median {report['median']:.2f}x")
    print_row("speedup in all", f"{report['speedup']:.2f}x in total time, "
              f"{report['card']['share_of_ceiling']:.0%} of the ceiling")
    print_row("tau", f"{report['tau_micro']:.3f} micro, {report['tau_macro']:.3f} macro; "
              f"{report['tokens']} tokens in {report['rounds']} rounds")
    print_row("identical outputs", f"{report['identical']:.1%} to the target alone at the same "
              f"shape, {report['identical_to_steps']:.1%} one row a step")
    print_row("boxed an answer", both_arms(report["boxed"]))
    print_row("accuracy", accuracy_text(report))
    print_row("tokens/s", speed_text(report))
    if "identical_to_transformers" in report:
        print_row("transformers", f"{report['speedup_over_transformers']:.2f}x over its generate, "
                  f"{report['identical_to_transformers']:.1%} identical outputs")
    print_row("wrote", f"{config.out_dir}/speedup.png, {config.out_dir}/speedup.jsonl")
    print()
    print(method(config, report))


def method(config, report):
    """The sentence that a published figure needs beside it."""
    choice = "greedy"
    if config.temperature:
        choice = (f"temperature {config.temperature}, top_k {config.top_k}, top_p {config.top_p}, "
                  f"seed {config.seed}")
    thinking = "on" if config.thinking else "off"
    compiled = ", compiled" if config.compile else ""
    card = report["card"]
    at_a_time = "one sequence at a time"
    if report["slots"] > 1:
        at_a_time = f"{report['slots']} sequences at once in both arms, tokens/s of all of them"
    return (f"Method: {report['prompts']} prompts of {config.prompts}, {choice}, at most "
            f"{config.max_new_tokens} new tokens, thinking {thinking}; target {config.target}, "
            f"drafter {config.drafter}; {config.dtype} on {card['device']}, torch "
            f"{card['torch']}{compiled}; baseline: the same code's fastest target-only mode, one "
            f"row a step; {at_a_time}, both arms in one process, prompt by prompt in "
            f"alternating order after a warm-up, median of {config.repeats}; every round is "
            f"timed, the first draft too, the prefill is not; tokens past a stop or the limit do "
            f"not count.")
