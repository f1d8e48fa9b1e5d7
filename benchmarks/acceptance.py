"""
How good a drafter is: tau, which positions of a block are accepted, whether the outputs are the
target's own, and whether they are right. The report also has the rounds of one answer.
"""
import os

from benchmarks import figures
from benchmarks.common import (mean_round_length, measure_decoding, mode_of, print_figures,
                               write_rows)


def run(config):
    workload, rows, report = measure_decoding(config, default_count=80)
    report["transcript"] = None  # random ids have no text
    number = median_prompt(rows)
    if workload.tokenizer and number is not None:
        report["transcript"] = transcript(config, workload, number)
    figures.acceptance(os.path.join(config.out_dir, "acceptance.png"), report)
    write_rows(config, "acceptance", rows)
    print_figures(report)
    return report


def median_prompt(rows):
    """The number of the prompt with the median tau, or None if no answer had a round."""
    rows = [row for row in rows if row["speculative"]["rounds"]]
    rows.sort(key=lambda row: mean_round_length(row["speculative"]["rounds"]))
    if not rows:
        return None
    return rows[len(rows) // 2]["prompt"]


def transcript(config, workload, number):
    """The rounds of one answer as text. It is decoded once more, alone, because rows do not keep
    rejected guesses.

    prompt     its number                 question   its text
    first      the token of the prefill, which is in no round
    rounds     the anchor, the guesses, how many of them were accepted, and the target's own token
               after them (None if the answer ended before it)
    """
    prompt = workload.prompts[number]
    decode = workload.tokenizer.decode
    mode = mode_of(config, workload, workload.drafter, workload.drafter.block_size)
    answer, = mode([prompt.ids])
    first = decode(answer.tokens[:1])
    anchor = first
    rounds = []
    for output in answer.rounds:
        guesses = output.tokens[:output.accepted] + output.rejected
        own = None
        if len(output.tokens) > output.accepted:
            own = decode(output.tokens[-1:])
        rounds.append({"anchor": anchor, "guesses": [decode([token]) for token in guesses],
                       "accepted": output.accepted, "own": own})
        anchor = own
    return {"prompt": number, "question": prompt.question, "first": first, "rounds": rounds}
