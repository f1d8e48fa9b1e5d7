"""
What a tau is worth: the speedup over the target alone, one row a step, against tau. The points come
from oracles that are right by chance but cost what the real drafter costs; the last one is its own.
"""
import os
from typing import NamedTuple

from benchmarks import pictures
from benchmarks.common import load, sampling_of, setup_of
from benchmarks.drafters import Oracle, probability_for
from benchmarks.timing import in_turn, progress
from draft_decode import timed_generate

TAUS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
BLOCKS = 8  # full blocks that the best oracle returns of each prompt


class Timed(NamedTuple):
    """One generation: tokens that its rounds returned, rounds, seconds."""
    tokens: int
    rounds: int
    seconds: float


def run(config):
    workload = load(config, default_count=4)
    drafter = workload.drafter
    block_size = drafter.block_size
    length = 1 + BLOCKS * block_size  # the first token is the prefill's
    sampling = sampling_of(config)
    oracle = Oracle(workload.target, drafter, block_size)
    decoders = {}

    def decode(drafter, prompt_ids, rows, stops=()):
        request = (workload.target, drafter, prompt_ids, length, stops, rows, sampling, decoders)
        known = len(decoders)
        generation = timed_generate(*request)
        if len(decoders) > known:  # a new shape was compiled and captured: that was its warm-up
            generation = timed_generate(*request)
        return generation

    arms = ["one row", *TAUS]
    if config.drafter != "random":
        arms.append("trained")
    timed = {arm: [] for arm in arms}
    for number, prompt in enumerate(progress(workload.prompts)):
        answer = decode(None, prompt.ids, block_size).tokens
        for arm in in_turn(arms, number):
            if arm == "one row":
                generation = decode(None, prompt.ids, 1)
            elif arm == "trained":
                generation = decode(drafter, prompt.ids, block_size, workload.stops)
            else:
                oracle.learn(prompt.ids, answer, probability_for(arm, block_size))
                generation = decode(oracle, prompt.ids, block_size)
            timed[arm].append(count(generation))

    points = points_of(timed)
    print_table(points)
    pictures.curve(os.path.join(config.out_dir, "curve.png"), {"oracles": points})
    print(f"wrote {config.out_dir}/curve.png")
    report = {"command": "curve", "prompts": len(workload.prompts), "rows": points}
    return report, setup_of(config, workload.prompts, workload.stops)


def count(generation):
    tokens = sum(len(result.tokens) for result in generation.rounds)
    return Timed(tokens, len(generation.rounds), generation.seconds)


def points_of(timed):
    """A point for each arm with a drafter. timed: {arm: [Timed of each prompt]}."""
    steps = [one_row.seconds / one_row.rounds for one_row in timed["one row"]]
    points = []
    for arm, generations in timed.items():
        tokens = sum(generation.tokens for generation in generations)
        rounds = sum(generation.rounds for generation in generations)
        seconds = sum(generation.seconds for generation in generations)
        if arm == "one row" or rounds == 0:  # every answer ended with its first token
            continue
        # what the target alone would need for the same tokens, a step each
        alone = 0.0
        for generation, step in zip(generations, steps):
            alone += generation.tokens * step
        points.append({"drafter": "trained" if arm == "trained" else "oracle",
                       "tau": tokens / rounds, "speedup": alone / seconds,
                       "round_s": seconds / rounds, "step_s": alone / tokens})
    return points


def print_table(points):
    print(f"{'drafter':8} {'tau':>6} {'speedup':>8} {'round':>9} {'step':>9}")
    for point in points:
        print(f"{point['drafter']:8} {point['tau']:6.2f} {point['speedup']:7.2f}x "
              f"{1e3 * point['round_s']:6.2f} ms {1e3 * point['step_s']:6.2f} ms")
