"""
What the decoding benchmarks share: models and prompts by the keys, the prompts decoded by every
arm in turns, and the figures that follow from the rounds.

An arm is a way of decoding. Three are always there:

    speculative        drafter and target
    target_same_shape  the target alone, its forwards of as many rows: must return the same tokens
    target             the target alone, one row a step: our fastest mode, the speed to beat

With --slots=B an arm decodes B sequences at once, and tokens/s are those of all of them.

tau, the acceptance length, is the number of tokens returned in a round, the target's own
included. micro: all tokens over all rounds. macro: the mean over prompts of each prompt's tau.
Tokens past the end of an answer do not count, and neither does the first token, which the prefill
made and no round.
"""
import hashlib
import json
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from benchmarks.drafters import random_drafter
from benchmarks.prompts import is_correct, load_prompts
from benchmarks.timing import in_turn, progress
from tokenizer import load_tokenizer, stop_ids
from checkpoint import load_drafter, load_target
from draft_decode import Generation, generate_many
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


def slots_of(config):
    """How many sequences are decoded at once, by the key of that name; 1 where it is empty."""
    if not config.slots:
        return 1
    if len(config.slots) > 1 or config.slots[0] < 1:
        raise ValueError(f"slots = {config.slots}: give one number of sequences to decode at once, "
                         "at least 1; only throughput takes several")
    return config.slots[0]


def setup_of(config, prompts, stops):
    """What a report was made from; a journal goes on only if this is the same."""
    rows = [{"ids": prompt.ids, "answer": prompt.answer} for prompt in prompts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    setup = {
        "target": config.target, "drafter": config.drafter, "device": config.device,
        "dtype": config.dtype, "compile": config.compile,
        "prompts": config.prompts, "count": len(prompts), "digest": digest[:16],
        "max_new_tokens": config.max_new_tokens, "stops": sorted(stops),
        "thinking": config.thinking, "slots": config.slots}
    return setup | vars(sampling_of(config))


# ------------------------------------------------------------------------------------------------
# decoding in turns


class Arm(NamedTuple):
    decode: Callable   # from the token ids of some prompts to a Generation of each
    repeats: int       # of each prompt; the median time counts


def decoding_arms(config, workload, repeats=1):
    """The three arms of the module's docstring. They share what they allocate and compile."""
    block_size = workload.drafter.block_size
    sampling = sampling_of(config)
    slots = slots_of(config)
    decoders = {}

    def arm(drafter, tokens_per_forward, repeats):
        def decode(prompts):
            return timed_generate_many(
                workload.target, drafter, prompts, config.max_new_tokens, slots, workload.stops,
                tokens_per_forward, sampling, decoders)
        return Arm(decode, repeats)

    return {"speculative": arm(workload.drafter, block_size, repeats),
            "target_same_shape": arm(None, block_size, 1),
            "target": arm(None, 1, repeats)}


def timed_generate_many(target, drafter, prompts, max_new_tokens, slots, stops, tokens_per_forward,
                        sampling, decoders):
    """The Generations of prompts, decoded `slots` at a time; the arguments of generate_many().

    Rounds are timed, reading prompts is not. A round is one of several sequences and takes the same
    time whatever they are. So a prompt's seconds are its share in those of all rounds, by the
    number of its own. The sum over prompts is the time that really passed.
    """
    tokens = [[] for _ in prompts]
    rounds = [[] for _ in prompts]
    seconds = 0.0
    pieces = generate_many(
        target, drafter, prompts, max_new_tokens, slots, stops, tokens_per_forward, sampling, decoders)
    while True:
        began = time.perf_counter()
        index, piece = next(pieces, (None, None))
        elapsed = time.perf_counter() - began
        is_prompt = piece is not None and not tokens[index]
        if not is_prompt:
            seconds += elapsed
        if piece is None:
            break
        if not is_prompt:
            rounds[index].append(piece)
        tokens[index].extend(piece.tokens)

    seconds_a_round = seconds / max(1, sum(map(len, rounds)))
    generations = []
    for number in range(len(prompts)):
        share = len(rounds[number]) * seconds_a_round
        generations.append(Generation(tokens[number], rounds[number], share))
    return generations


def portions(count, slots):
    """The numbers of prompts, in portions that are decoded together: one by one in one slot. In
    several a portion is long enough that few slots wait for its last answers, and short enough that
    an interruption loses little."""
    size = 1 if slots == 1 else 8 * slots
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def decode_in_turns(arms, prompts, journal, slots=1):
    """Decodes every prompt by every arm; the arms' order alternates. Returns a row a prompt:

    {"answer": the known one, ARM: {"tokens", "rounds", "seconds", "repeats"}, ..}, where rounds are
    pairs [guesses accepted, tokens returned] and seconds is the median of the repeats.
    """
    warm = False
    turn = 0

    def measure(numbers):
        nonlocal warm
        if not warm:  # nobody pays for the first use of a kernel, a graph or a compiler
            for arm in arms.values():
                arm.decode([prompts[0].ids])
            warm = True
        portion = [prompts[number].ids for number in numbers]
        repeats = {name: [] for name in arms}  # for each repeat the Generations of the portion
        for repeat in range(max(arm.repeats for arm in arms.values())):
            for name in in_turn(arms, turn + repeat):
                if repeat < arms[name].repeats:
                    repeats[name].append(arms[name].decode(portion))
        rows = []
        for i, number in enumerate(numbers):
            row = {"answer": prompts[number].answer}
            for name in arms:
                row[name] = arm_row([generations[i] for generations in repeats[name]])
            rows.append(row)
        return rows

    rows = []
    for turn, numbers in enumerate(progress(portions(len(prompts), slots))):
        rows += journal.rows_of(numbers, measure)
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
    text = ", ".join(f"{speed:,.0f} {arm}" for arm, speed in report["tokens_per_s"].items())
    if report["slots"] > 1:
        text += f"; {report['slots']} sequences at once, all of them together"
    return text
