"""
How good a drafter is: tau, which slots of a block are accepted, whether the outputs are the
target's own, and whether they are right. The report also has the rounds of one answer, with their
times.
"""
import itertools
import os

from benchmarks import pictures
from benchmarks.common import (decode_in_turns, decoding_modes, load, mean_round_length,
                               print_figures, sampling_of, setup_of, slots_of, summarize,
                               write_rows)
from benchmarks.machine import print_row
from draft_decode import collect, generate


def run(config):
    workload = load(config, default_count=80)
    slots = slots_of(config)
    rows = decode_in_turns(decoding_modes(config, workload), workload.prompts, slots)
    figures = summarize(rows, workload.tokenizer, workload.drafter.block_size)
    report = {"command": "acceptance", "slots": slots} | figures
    report["transcript"] = None  # random ids have no text
    number = median_prompt(rows)
    if workload.tokenizer and number is not None:
        report["transcript"] = transcript(config, workload, number)
    pictures.acceptance(os.path.join(config.out_dir, "acceptance.png"), report)
    write_rows(config, "acceptance", rows)
    print_report(config, report)
    return report, setup_of(config, workload.prompts, workload.stops)


def print_report(config, report):
    shares = enumerate(report["accepted_up_to_slot"], 1)
    print_figures(report)
    print_row("accepted up to slot", " ".join(f"{slot}:{share:.2f}" for slot, share in shares))
    print_row("wrote", f"{config.out_dir}/acceptance.png, {config.out_dir}/acceptance.jsonl")


# ------------------------------------------------------------------------------------------------
# the rounds of one answer


def median_prompt(rows):
    """The number of the prompt with the median tau, or None if no answer had a round."""
    taus = []
    for row in rows:
        rounds = row["speculative"]["rounds"]
        if rounds:
            taus.append((mean_round_length(rounds), row["prompt"]))
    if not taus:
        return None
    _, number = sorted(taus)[len(taus) // 2]
    return number


def one_answer(config, workload, drafter, tokens_per_forward, prompt_ids):
    """The Generation of one prompt, from a single run after a warm-up."""
    decoders = {}

    def run():
        return generate(
            workload.target, drafter, prompt_ids, max_new_tokens=config.max_new_tokens,
            stop_token_ids=workload.stops, tokens_per_forward=tokens_per_forward,
            sampling=sampling_of(config), decoders=decoders)

    list(itertools.islice(run(), 4))
    return collect(run())


def transcript(config, workload, number):
    """One answer as text, with times. It is decoded once more, alone.

    prompt     its number                 question   its text
    first      the token of the prefill, which is in no round
    rounds     of drafter and target: the anchor, the guesses, how many of them were accepted, the
               target's own token after them (None if the answer ended before it), the texts of the
               returned tokens without the end mark, and the seconds
    steps      of the target alone with 1-token forwards: the text and the seconds
    """
    prompt = workload.prompts[number]
    decode = workload.tokenizer.decode
    answer = one_answer(
        config, workload, workload.drafter, workload.drafter.block_size, prompt.ids)
    first = decode(answer.tokens[:1])
    anchor = first
    rounds = []
    for output in answer.rounds:
        guesses = output.tokens[:output.accepted] + output.rejected
        own = None
        if len(output.tokens) > output.accepted:
            own = decode(output.tokens[-1:])
        texts = [decode([token], skip_special_tokens=True) for token in output.tokens]
        rounds.append({"anchor": anchor, "guesses": [decode([token]) for token in guesses],
                       "accepted": output.accepted, "own": own, "texts": texts,
                       "seconds": round(output.seconds, 6)})
        anchor = own
    steps = []
    for output in one_answer(config, workload, None, 1, prompt.ids).rounds:
        text = decode(output.tokens, skip_special_tokens=True)
        steps.append({"text": text, "seconds": round(output.seconds, 6)})
    return {"prompt": number, "question": prompt.question, "first": first, "rounds": rounds,
            "steps": steps}
