"""
How good a drafter is: tau, which slots of a block are accepted, whether the outputs are the
target's own, whether they are right, and the speedup. Also the rounds of one answer, with their
times.
"""
import itertools
import os
import time
from typing import NamedTuple

from benchmarks import pictures
from benchmarks.common import (accuracy_text, decode_in_turns, decoding_arms, load,
                               mean_round_length, sampling_of, setup_of, slots_of, speed_text,
                               summarize)
from benchmarks.journal import Journal
from benchmarks.machine import card, print_card, print_row
from draft_decode import RoundOutput, generate, timed_generate


def run(config):
    workload = load(config, default_count=80)
    setup = setup_of(config, workload.prompts, workload.stops)
    journal = Journal(config, "acceptance", setup)
    arms = decoding_arms(config, workload)
    slots = slots_of(config)
    rows = decode_in_turns(arms, workload.prompts, journal, slots)
    figures = summarize(rows, workload.tokenizer, workload.drafter.block_size)
    report = {"command": "acceptance", "slots": slots} | figures
    report["transcript"] = None  # random ids have no text
    number = median_prompt(rows)
    if workload.tokenizer and number is not None:
        report["transcript"] = transcript(config, workload, number)
    pictures.acceptance(os.path.join(config.out_dir, "acceptance.png"), report)
    journal.close(round_rows(rows))
    print_report(config, workload, report)
    return report, setup


def round_rows(rows):
    """A row for each round of each prompt."""
    lines = []
    for row in rows:
        for number, (accepted, tokens) in enumerate(row["speculative"]["rounds"]):
            lines.append({"prompt": row["prompt"], "round": number, "accepted": accepted,
                          "tokens": tokens})
    return lines


def print_report(config, workload, report):
    print_card(card(config, workload.target, workload.drafter,
                    report["tau_micro"], report["speedup"]))
    shares = enumerate(report["accepted_up_to_slot"], 1)
    print_row("tau, micro", f"{report['tau_micro']:.3f}   "
              f"{report['tokens']} tokens in {report['rounds']} rounds")
    print_row("tau, macro", f"{report['tau_macro']:.3f}   mean over {report['prompts']} prompts")
    print_row("accepted up to slot", " ".join(f"{slot}:{share:.2f}" for slot, share in shares))
    print_row("identical outputs",
              f"{report['identical']:.1%}   to the target alone at the same shape")
    print_row("", f"{report['identical_to_steps']:.1%}   to the target alone, one row a step")
    print_row("accuracy", accuracy_text(report))
    print_row("tokens/s", speed_text(report))
    print_row("speedup", f"{report['speedup']:.2f}   over the target alone, one row a step")
    print_row("wrote", f"{config.out_dir}/acceptance.png, {config.out_dir}/acceptance.jsonl")


# ------------------------------------------------------------------------------------------------
# the rounds of one answer


def median_prompt(rows):
    """The number of the prompt with the median tau; None if no answer had a round."""
    taus = []
    for row in rows:
        rounds = row["speculative"]["rounds"]
        if rounds:
            taus.append((mean_round_length(rounds), row["prompt"]))
    if not taus:
        return None
    _, number = sorted(taus)[len(taus) // 2]
    return number


class TimedRound(NamedTuple):
    block: list       # token ids: the anchor and the guesses
    result: RoundOutput
    seconds: float


def timed_rounds(config, workload, drafter, tokens_per_forward, prompt_ids):
    """The TimedRounds of one answer, in a single run after a warm-up."""
    rounds = []
    decoders = {}
    started = 0.0

    def on_piece(tokens, result):
        nonlocal started
        seconds = time.perf_counter() - started
        if len(tokens) > len(result.tokens):  # the first token is of the prefill, in no round
            decoder, = decoders.values()
            block = decoder.block[0].tolist()  # still this round's: the next has not begun
            rounds.append(TimedRound(block, result, seconds))
        started = time.perf_counter()

    request = (workload.target, drafter, prompt_ids, config.max_new_tokens, workload.stops,
               tokens_per_forward, sampling_of(config), decoders)
    list(itertools.islice(generate(*request), 4))  # the warm-up
    timed_generate(*request, on_piece)
    return rounds


def transcript(config, workload, number):
    """One answer as text, with times; it is decoded once more, by itself.

    prompt     its number                 question   its text
    first      the token of the prefill, which is in no round
    rounds     of drafter and target, each with the anchor, all K - 1 guesses, how many of them were
               accepted, the target's own token after them (None where the answer ended before it),
               the texts of the tokens returned, without the mark of the end, and the seconds
    steps      of the target alone, one row each: its text, and the seconds
    """
    prompt = workload.prompts[number]
    decode = workload.tokenizer.decode
    block_size = workload.drafter.block_size
    rounds = []
    for block, result, seconds in timed_rounds(
            config, workload, workload.drafter, block_size, prompt.ids):
        anchor, *guesses = [decode([token]) for token in block]
        own = None
        if len(result.tokens) > result.accepted:
            own = decode(result.tokens[-1:])
        texts = [decode([token], skip_special_tokens=True) for token in result.tokens]
        rounds.append({"anchor": anchor, "guesses": guesses, "accepted": result.accepted,
                       "own": own, "texts": texts, "seconds": round(seconds, 6)})
    steps = []
    for _, result, seconds in timed_rounds(config, workload, None, 1, prompt.ids):
        text = decode(result.tokens, skip_special_tokens=True)
        steps.append({"text": text, "seconds": round(seconds, 6)})
    return {"prompt": number, "question": prompt.question, "first": rounds[0]["anchor"],
            "rounds": rounds, "steps": steps}
