"""
Compares the output with a drafter, token by token, with three others:

    same shape     the target alone, with forwards of the same K tokens: must be bitwise identical
    1-token        the target alone, with 1-token forwards: equal up to rounding
    transformers   its own greedy generate: equal up to rounding

for good and bad drafters at several temperatures, in the dtype of the key `dtype`. If two outputs
differ, the verdict follows from the margin between the target's scores of the first two tokens that
differ. Rounding only flips near-ties. docs/bugs.md has the margins of states that are wrong.
"""
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

from benchmarks.common import (decode_in_turns, load, mean_round_length, mode_of, portions,
                               sampling_of, setup_of, slots_of, write_rows)
from benchmarks.drafters import Oracle, random_drafter
from benchmarks.reference import reference_answer, transformers_reference
from draft_decode import Generation, first_difference
from sampling import gumbel_noise, perturbed_scores

# The largest margin that we call rounding, by dtype. Almost all margins are smaller. The largest
# that rounding has flipped so far is 0.16 in bfloat16, and it has flipped none in float32.
LARGEST_ROUNDING = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
EQUAL = "equal"
ROUNDING = "rounding"
WRONG = "wrong state"
UNKNOWN = "unknown"     # the outputs differ, and there are no two tokens to compare

DRAFTERS = ("random", "trained", "oracle", "wrong")
ORACLES = {"oracle": 0.8, "wrong": 0.0}  # the probability that a guess of each one is right


class Difference(NamedTuple):
    """The outputs for one prompt, with a drafter and in another mode."""
    prompt: int
    drafter: str
    against: str
    position: int | None   # of the first token that differs; None: the outputs are equal
    margin: float | None   # see margin_of()
    rounds: list           # of the drafter: pairs [accepted guesses, tokens returned]


def run(config):
    workload = load(config, default_count=4)
    reference = None
    if 0 in config.temperatures:
        reference = transformers_reference(workload.target)
    rows = []
    details = []
    for temperature in config.temperatures:
        here = SimpleNamespace(**vars(config) | {"temperature": temperature})
        modes = modes_of(here, workload)
        if temperature == 0:
            modes["transformers"] = transformers_mode(here, workload, reference)
        decoded = decode_in_turns(modes, workload.prompts, slots_of(here))
        differences = differences_of(decoded, workload, sampling_of(here))
        for row in summarize(differences):
            row |= {"temperature": temperature, "dtype": config.dtype}
            row["verdict"] = verdict(row["identical"] == 1, row["margin"], config.dtype)
            rows.append(row)
        for difference in differences:
            details.append({"temperature": temperature} | difference._asdict())
    write_rows(config, "exactness", details)
    print_table(rows)
    report = {"command": "exactness", "slots": slots_of(config), "rows": rows}
    return report, setup_of(config, workload.prompts, workload.stops)


def modes_of(config, workload):
    """{name: mode}: the target alone in two shapes, and four drafters. These are an untrained one,
    the trained one if there is one, and the ORACLES, which know the target's answer."""
    target = workload.target
    block_size = workload.drafter.block_size
    decoders = {}
    same_shape = mode_of(config, workload, None, block_size, decoders)
    modes = {"same shape": same_shape, "1-token": mode_of(config, workload, None, 1, decoders)}
    drafters = {"random": workload.drafter}
    if config.drafter != "random":
        drafters = {"random": random_drafter(target), "trained": workload.drafter}
    if drafters["random"].block_size != block_size:
        raise ValueError(f"{config.drafter} has blocks of {block_size}, but the untrained drafter "
                         f"drafts {drafters['random'].block_size}: give --drafter=random")
    for name, drafter in drafters.items():
        modes[name] = mode_of(config, workload, drafter, block_size, decoders)

    longest = len(portions(len(workload.prompts), slots_of(config))[0])
    for name, probability in ORACLES.items():
        oracle = Oracle(target, block_size=block_size, prompts=longest)
        mode = mode_of(config, workload, oracle, block_size, decoders)
        modes[name] = oracle_mode(oracle, probability, mode, same_shape)
    return modes


def oracle_mode(oracle, probability, mode, same_shape):
    """A mode whose oracle first learns what the target alone answers."""
    def decode(prompts):
        for place, answer in enumerate(same_shape(prompts)):
            oracle.learn(prompts[place], answer.tokens, probability, place)
        return mode(prompts)
    return decode


def transformers_mode(config, workload, reference):
    """transformers' greedy generate, one prompt at a time."""
    def decode(prompts):
        generations = []
        for prompt_ids in prompts:
            tokens = reference_answer(reference, prompt_ids, config.max_new_tokens, workload.stops,
                                 workload.drafter.block_size)
            generations.append(Generation(tokens, [], 0.0))
        return generations
    return decode


def differences_of(rows, workload, sampling):
    """The Differences between each drafter and each other mode, from rows of decode_in_turns()."""
    differences = []
    for row in rows:
        prompt_ids = workload.prompts[row["prompt"]].ids
        for drafter in DRAFTERS:
            for against in ("same shape", "1-token", "transformers"):
                if drafter in row and against in row:
                    tokens = row[drafter]["tokens"]
                    other = row[against]["tokens"]
                    differences.append(Difference(
                        row["prompt"], drafter, against, first_difference(tokens, other),
                        margin_of(workload.target, sampling, prompt_ids, tokens, other),
                        row[drafter]["rounds"]))
    return differences


@torch.inference_mode()
def margin_of(target, sampling, prompt_ids, tokens, other):
    """The margin between the target's scores of the first two tokens that differ. Rounding flips
    small margins only, while a wrong state flips any. None if the outputs are equal, if one of them
    ends there, or if top_k or top_p exclude one of the two tokens."""
    position = first_difference(tokens, other)
    if position is None or position >= min(len(tokens), len(other)):
        return None
    device = target.embed_tokens.weight.device
    ids = torch.tensor([prompt_ids + tokens[:position]], device=device)
    _, hidden = target(ids)
    logits = target.logits(hidden[:, -1:])[:, 0]
    noise = None
    if sampling.temperature:
        positions = torch.tensor([ids.shape[1]], device=device)
        sequence_ids = torch.zeros_like(positions)  # generate() decodes sequence 0
        noise = gumbel_noise(sampling.seed, sequence_ids, positions, logits.shape[-1])
    scores = perturbed_scores(logits.float(), sampling, sampling.temperature, noise)
    margin = (scores[0, tokens[position]] - scores[0, other[position]]).abs().item()
    if math.isfinite(margin):
        return margin
    return None


# ------------------------------------------------------------------------------------------------
# the report


def summarize(differences):
    """A row of the report for each drafter and each mode that it was compared with."""
    groups = {}
    for difference in differences:
        groups.setdefault((difference.drafter, difference.against), []).append(difference)
    rows = []
    for (drafter, against), group in groups.items():
        identical = sum(difference.position is None for difference in group)
        margins = [difference.margin for difference in group if difference.margin is not None]
        rounds = sum([difference.rounds for difference in group], [])
        rows.append({"drafter": drafter, "against": against, "prompts": len(group),
                     "identical": identical / len(group), "margin": max(margins, default=None),
                     "tau": mean_round_length(rounds)})
    return rows


def verdict(is_identical, margin, dtype):
    """What explains the outputs of a group of prompts: EQUAL, ROUNDING, WRONG, or UNKNOWN.

    margin: the largest of the group. A wrong state can also flip a near-tie first, so believe
    ROUNDING only over several prompts.
    """
    if is_identical:
        return EQUAL
    if margin is None:
        return UNKNOWN
    if margin <= LARGEST_ROUNDING[dtype]:
        return ROUNDING
    return WRONG


def print_table(rows):
    print(f"{rows[0]['prompts']} prompts in {rows[0]['dtype']}; margin: the largest between the "
          "scores of the first two tokens that differ\n")
    print(f"{'T':>4} {'drafter':8} {'tau':>6}  {'against':13} {'identical':>9} {'margin':>8}  "
          "verdict")
    for row in rows:
        margin = "-"
        if row["margin"] is not None:
            margin = f"{row['margin']:.4f}"
        print(f"{row['temperature']:4} {row['drafter']:8} {row['tau']:6.2f}  {row['against']:13} "
              f"{row['identical']:9.1%} {margin:>8}  {row['verdict']}")
