"""
What the decoding benchmarks share: models and prompts by the keys, the prompts decoded by every
arm in turns, and the figures that follow from the rounds.

An arm is a way of decoding. Three are always there:

    speculative        drafter and target
    target_same_shape  the target alone, its forwards of as many rows: must return the same tokens
    target             the target alone, one row a step: our fastest mode, the speed to beat

tau, the acceptance length, is the number of tokens returned in a round, the target's own
included. micro: all tokens over all rounds. macro: the mean over prompts of each prompt's tau.
Tokens past the end of an answer do not count, and neither does the first token, which the prefill
made and no round.
"""
import functools
import hashlib
import json
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from benchmarks.drafters import random_drafter
from benchmarks.prompts import is_correct, load_prompts
from benchmarks.timing import in_turn, progress
from chat import load_tokenizer, stop_ids
from checkpoint import load_drafter, load_target
from draft_decode import timed_generate
from sampling import Sampling


class Workload(NamedTuple):
    """What is measured."""
    target: object
    drafter: object
    tokenizer: object   # None for a target with random weights
    prompts: list
    stops: tuple        # token ids that end an answer


def load(config, default_count, dtype=None):
    """The Workload that the keys name; default_count prompts where config.limit is 0."""
    dtype = dtype or config.dtype
    target = load_target(config.target, config.device, dtype)
    tokenizer = None
    stops = ()
    if not config.target.startswith("random:"):
        tokenizer = load_tokenizer(config.target)
        stops = stop_ids(tokenizer)
    prompts = load_prompts(config, config.limit or default_count, target, tokenizer)
    if config.drafter == "random":
        drafter = random_drafter(target)
    else:
        drafter = load_drafter(config.drafter, target.config, config.device, dtype)
    if config.compile:
        target.compile_decoding()
        drafter.compile_decoding()
    return Workload(target, drafter, tokenizer, prompts, stops)


def sampling_of(config):
    return Sampling(config.temperature, config.top_k, config.top_p, config.seed,
                    config.draft_temperature)


def setup_of(config, prompts, stops):
    """What a report was made from; a journal goes on only if this is the same."""
    rows = [{"ids": prompt.ids, "answer": prompt.answer} for prompt in prompts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    setup = {
        "target": config.target, "drafter": config.drafter, "device": config.device,
        "dtype": config.dtype, "compile": config.compile,
        "prompts": config.prompts, "count": len(prompts), "digest": digest[:16],
        "max_new_tokens": config.max_new_tokens, "stops": sorted(stops),
        "thinking": config.thinking}
    return setup | vars(sampling_of(config))


# ------------------------------------------------------------------------------------------------
# decoding in turns


class Arm(NamedTuple):
    decode: Callable   # from a prompt's token ids to a Generation
    repeats: int       # of each prompt; the median time counts


def decoding_arms(config, workload, repeats=1):
    """The three arms of the module's docstring. They share what they allocate and compile."""
    block_size = workload.drafter.block_size
    sampling = sampling_of(config)
    decoders = {}

    def arm(drafter, forward_rows, repeats):
        def decode(prompt_ids):
            return timed_generate(workload.target, drafter, prompt_ids, config.max_new_tokens,
                                  workload.stops, forward_rows, sampling, decoders)
        return Arm(decode, repeats)

    return {"speculative": arm(workload.drafter, block_size, repeats),
            "target_same_shape": arm(None, block_size, 1),
            "target": arm(None, 1, repeats)}


def decode_in_turns(arms, prompts, journal):
    """Decodes every prompt by every arm; the arms' order alternates. Returns a row a prompt:

    {"answer": the known one, ARM: {"tokens", "rounds", "seconds", "repeats"}, ..}, where rounds are
    pairs [guesses accepted, tokens returned] and seconds is the median of the repeats.
    """
    warm = False

    def measure(number):
        nonlocal warm
        if not warm:  # nobody pays for the first use of a kernel, a graph or a compiler
            for arm in arms.values():
                arm.decode(prompts[0].ids)
            warm = True
        generations = {name: [] for name in arms}
        for repeat in range(max(arm.repeats for arm in arms.values())):
            for name in in_turn(arms, number + repeat):
                if repeat < arms[name].repeats:
                    generations[name].append(arms[name].decode(prompts[number].ids))
        row = {"answer": prompts[number].answer}
        for name in arms:
            row[name] = arm_row(generations[name])
        return row

    rows = []
    for number in progress(range(len(prompts))):
        rows.append(journal.row(number, functools.partial(measure, number)))
    return rows


def arm_row(generations):
    """The repeats of one prompt by one arm; their tokens and rounds are the same."""
    first = generations[0]
    seconds = [generation.seconds for generation in generations]
    rounds = [[result.accepted, result.tokens] for result in first.rounds]
    return {"tokens": first.tokens, "rounds": rounds, "seconds": median(seconds),
            "repeats": seconds}


# ------------------------------------------------------------------------------------------------
# figures


def mean_round_length(rounds):
    """tau of rounds [guesses accepted, tokens returned]."""
    return sum(len(tokens) for _, tokens in rounds) / max(1, len(rounds))


def tokens_per_second(rows, arm):
    """Of an arm's rounds. The prefill is not in the seconds, so its token does not count."""
    tokens = sum(len(row[arm]["tokens"]) - 1 for row in rows)
    seconds = sum(row[arm]["seconds"] for row in rows)
    return tokens / max(1e-9, seconds)


def share(flags):
    """The share of true ones; None where there is none, or where one is None: unknown."""
    flags = list(flags)
    if not flags or None in flags:
        return None
    return sum(flags) / len(flags)


def agreement(rows, arm):
    """The share of prompts on which speculative decoding returned the very tokens of an arm."""
    return share(row["speculative"]["tokens"] == row[arm]["tokens"] for row in rows)


def answered_texts(rows, tokenizer, arm):
    """[(text, known answer)] of the prompts whose answer is known."""
    pairs = []
    for row in rows:
        if row["answer"] is not None:
            text = tokenizer.decode(row[arm]["tokens"], skip_special_tokens=True)
            pairs.append((text, row["answer"]))
    return pairs


def verdicts_of(rows, tokenizer, arm):
    """Whether the answers are right; None: only math-verify could tell."""
    return [is_correct(*pair) for pair in answered_texts(rows, tokenizer, arm)]


def summarize(rows, tokenizer, block_size):
    """The figures of a report, from the rows of decode_in_turns."""
    of_prompts = [row["speculative"]["rounds"] for row in rows]
    of_prompts = [rounds for rounds in of_prompts if rounds]  # an answer may be one token long
    rounds = sum(of_prompts, [])
    lengths = [len(tokens) for _, tokens in rounds]
    accepted_up_to_slot = []
    for slot in range(1, block_size):
        count = sum(accepted >= slot for accepted, _ in rounds)
        accepted_up_to_slot.append(count / max(1, len(rounds)))
    taus = [mean_round_length(rounds) for rounds in of_prompts]
    verdicts = {arm: verdicts_of(rows, tokenizer, arm) for arm in ("target", "speculative")}
    speed = {arm: tokens_per_second(rows, arm)
             for arm in ("target", "target_same_shape", "speculative")}
    return {
        "prompts": len(rows), "rounds": len(rounds), "tokens": sum(lengths),
        "tau_micro": mean_round_length(rounds), "tau_macro": sum(taus) / max(1, len(taus)),
        "accepted_up_to_slot": accepted_up_to_slot,
        "rounds_of_length": [lengths.count(n) for n in range(1, block_size + 1)],
        "identical": agreement(rows, "target_same_shape"),
        "identical_to_steps": agreement(rows, "target"),
        "accuracy": {arm: share(verdicts[arm]) for arm in verdicts},
        "need_math_verify": sum(verdicts[arm].count(None) for arm in verdicts),
        "tokens_per_s": speed,
        "speedup": speed["speculative"] / max(1e-9, speed["target"])}


# ------------------------------------------------------------------------------------------------
# figures as text


def percent(value):
    if value is None:
        return "unknown"
    return f"{value:.1%}"


def both_arms(shares):
    return f"{percent(shares['target'])} target, {percent(shares['speculative'])} speculative"


def accuracy_text(report):
    text = both_arms(report["accuracy"])
    count = report["need_math_verify"]
    if count:
        text += (f"; to compare {count} answers with the known ones as mathematics: "
                 "pip install math-verify")
    return text


def speed_text(report):
    return ", ".join(f"{speed:,.0f} {arm}" for arm, speed in report["tokens_per_s"].items())
