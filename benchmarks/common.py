"""
Shared by the decoding benchmarks: loading by the keys, decoding prompts in several modes, and the
figures that follow from the rounds.

A mode is a way to decode:

    speculative        drafter and target
    target_same_shape  the target alone, with K-token forwards too; its output must be
                       bitwise identical to the speculative output
    target             the target alone, with 1-token forwards; this is our fastest mode without a
                       drafter, so speedups are stated against it

With --slots=B a mode decodes B sequences at once, and tokens/s is the throughput of all of them.

tau, the acceptance length, is the mean number of tokens per round, including the target's own.
tau_micro divides all tokens by all rounds; tau_macro is the mean of each prompt's tau. Tokens after
the end of an answer do not count. The first token does not count either, because it comes from the
prefill and not from a round.
"""
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from statistics import median
from typing import NamedTuple

import torch
import transformers

import fast
from benchmarks.drafters import random_drafter
from benchmarks.prompts import fraction_correct, load_prompts
from benchmarks.timing import alternating_order, device_name, progress
from checkpoint import load_drafter, load_target
from draft_decode import collect, generate_many
from formats.files import printable, where, write_whole
from sampling import Sampling
from tokenizer import load_tokenizer, stop_ids


class Workload(NamedTuple):
    """The models and prompts to measure."""
    target: object
    drafter: object
    tokenizer: object   # None for a target with random weights
    prompts: list
    stops: tuple        # token ids that end an answer
    decoders: dict      # of generate_many(): all modes share them, and so their graphs


def load(config, default_count):
    """The Workload that the keys name. It has default_count prompts if config.limit is 0."""
    target = load_target(config.target, config.device, config.dtype)
    tokenizer = None
    stops = ()
    if not config.target.startswith("random:"):
        tokenizer = load_tokenizer(config.target)
        stops = stop_ids(tokenizer)
    prompts = load_prompts(config, config.limit or default_count, target, tokenizer)
    if config.drafter == "random":
        drafter = random_drafter(target)
    else:
        drafter = load_drafter(config.drafter, target.config, config.device, config.dtype)
    fast.prepare_for_decoding(target, drafter, compile=config.compile)
    return Workload(target, drafter, tokenizer, prompts, stops, {})


def sampling_of(config):
    return Sampling(config.temperature, config.top_k, config.top_p, config.seed,
                    config.draft_temperature)


def slots_of(config):
    """How many sequences are decoded at once, per the key `slots`; 1 if it is empty."""
    if not config.slots:
        return 1
    if len(config.slots) > 1:
        raise ValueError(f"slots = {config.slots}: give one number of sequences to decode at once; "
                         "only throughput and rollback take several")
    return config.slots[0]


def setup_of(config):
    """The setup of a report: all keys, and what else is needed to repeat the run."""
    return vars(config) | {
        "command": f"python bench.py {shlex.join(sys.argv[1:])}",
        "commit": git_commit(), "date": datetime.now().isoformat(timespec="minutes"),
        "machine": f"{device_name(config.device)}, {platform.platform()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__}}


def git_commit():
    """The commit of this code, with "-dirty" if a file was changed since. None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_rows(config, command, rows):
    """Write the raw results of a command to OUT_DIR/COMMAND.jsonl, one line per row."""
    lines = [json.dumps(row) + "\n" for row in rows]
    write_whole(os.path.join(config.out_dir, f"{command}.jsonl"), "".join(lines))


def print_table(rows, columns, header=True):
    """Columns of rows as a Markdown table. A server or a file can be the source of a cell."""
    if header:
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [printable(text_of(row.get(column, ""))) for column in columns]
        print(f"| {' | '.join(cells)} |", flush=True)


def text_of(value):
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list):
        return " ".join(text_of(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{text_of(part)} {name}" for name, part in value.items())
    return str(value)


def measure_decoding(config, default_count, repeats=1):
    """Decode the prompts in the three modes of the module's docstring. Returns the Workload, the
    rows of decode_in_turns(), and a report."""
    workload = load(config, default_count)
    block_size = workload.drafter.block_size
    slots = slots_of(config)
    modes = {
        "speculative": mode_of(config, workload, workload.drafter, block_size),
        "target_same_shape": mode_of(config, workload, None, block_size),
        "target": mode_of(config, workload, None, 1)}
    rows = decode_in_turns(modes, workload.prompts, slots, repeats)
    return workload, rows, {"slots": slots} | summarize(rows, workload.tokenizer, block_size)


def mode_of(config, workload, drafter, tokens_per_forward):
    """A mode: a function from some prompts (lists of token ids) to a Generation of each. Without a
    drafter the target decodes alone.

    The sequences in a round share its time equally, so the sum over prompts is the time that
    passed. Prefills are not in the seconds.
    """
    def decode(prompts):
        outputs_of = [[] for _ in prompts]
        outputs = generate_many(
            workload.target, drafter, prompts, max_new_tokens=config.max_new_tokens,
            slots=slots_of(config), stop_token_ids=workload.stops,
            tokens_per_forward=tokens_per_forward, sampling=sampling_of(config),
            sequence_ids=[0] * len(prompts),  # a sample does not depend on the other prompts
            decoders=workload.decoders)
        for index, output in outputs:
            check_finite(output.is_finite, config.target)
            outputs_of[index].append(output)
        return [collect(outputs) for outputs in outputs_of]
    return decode


def check_finite(is_finite, name):
    """All modes choose the same token from NaN, so they would seem identical and right."""
    if not is_finite:
        raise ValueError(f"the target in {where(name)!r} gives logits that are not finite, so its "
                         "tokens mean nothing: use other weights or --dtype=float32")


def decode_in_turns(modes, prompts, slots=1, repeats=1):
    """Decode every prompt in every mode, in alternating order. Returns a row per prompt:

    {"prompt": its number, "answer": the known one, MODE: {"tokens", "rounds", "seconds",
    "repeats"}, ..}. Rounds are pairs [accepted guesses, tokens returned], and seconds is the median
    of the repeats.
    """
    for decode in modes.values():  # the warm-up: no mode pays for the first use of a kernel
        decode([prompts[0].ids])
    rows = []
    for turn, group in enumerate(progress(groups_of(prompts, slots))):
        token_ids = [prompt.ids for prompt in group]
        decoded = {name: [] for name in modes}  # per repeat, the Generations of the group
        for repeat in range(repeats):
            for name in alternating_order(modes, turn + repeat):
                decoded[name].append(modes[name](token_ids))
        for i, prompt in enumerate(group):
            row = {"prompt": len(rows), "answer": prompt.answer}
            for name in modes:
                answer = decoded[name][0][i]  # the other repeats have the same tokens and rounds
                seconds = [generations[i].seconds for generations in decoded[name]]
                row[name] = {"tokens": answer.tokens, "rounds": pairs_of(answer.rounds),
                             "seconds": median(seconds), "repeats": seconds}
            rows.append(row)
    return rows


def groups_of(prompts, slots):
    """The prompts in groups that are decoded together: one by one, or 8 per slot, so that few slots
    are idle at the end."""
    size = 1 if slots == 1 else 8 * slots
    return [prompts[first:first + size] for first in range(0, len(prompts), size)]


def pairs_of(rounds):
    """RoundOutputs as pairs [accepted guesses, tokens returned]."""
    return [[one_round.accepted, one_round.tokens] for one_round in rounds]


def mean_round_length(rounds):
    """tau of rounds, which are pairs [accepted guesses, tokens returned]."""
    return sum(len(tokens) for _, tokens in rounds) / max(1, len(rounds))


def tokens_per_second(rows, mode):
    """Throughput of a mode. The seconds exclude the prefill, so its token does not count."""
    tokens = sum(len(row[mode]["tokens"]) - 1 for row in rows)
    seconds = sum(row[mode]["seconds"] for row in rows)
    return tokens / max(1e-9, seconds)


def round_figures(of_prompts, block_size):
    """The figures that follow from the rounds of each prompt."""
    of_prompts = [rounds for rounds in of_prompts if rounds]  # an answer can be one token long
    rounds = sum(of_prompts, [])
    lengths = [len(tokens) for _, tokens in rounds]
    accepted_up_to_position = []
    for position in range(1, block_size):
        count = sum(accepted >= position for accepted, _ in rounds)
        accepted_up_to_position.append(count / max(1, len(rounds)))
    taus = [mean_round_length(rounds) for rounds in of_prompts]
    return {
        "rounds": len(rounds), "tokens": sum(lengths),
        "tau_micro": mean_round_length(rounds), "tau_macro": sum(taus) / max(1, len(taus)),
        "accepted_up_to_position": accepted_up_to_position,
        "rounds_of_length": [lengths.count(n) for n in range(1, block_size + 1)]}


def summarize(rows, tokenizer, block_size):
    """The figures of a report, from the rows of decode_in_turns()."""
    figures = round_figures([row["speculative"]["rounds"] for row in rows], block_size)
    graded = [row for row in rows if row["answer"] is not None]
    speed = {}
    identical = {}  # fraction of answers that equal the speculative one
    accuracy = {}
    for mode in ("target", "target_same_shape", "speculative"):
        speed[mode] = tokens_per_second(rows, mode)
        equal = [row["speculative"]["tokens"] == row[mode]["tokens"] for row in rows]
        identical[mode] = sum(equal) / len(rows)
        texts = [tokenizer.decode(row[mode]["tokens"], skip_special_tokens=True) for row in graded]
        accuracy[mode] = fraction_correct(texts, [row["answer"] for row in graded])
    return {"prompts": len(rows)} | figures | {
        "identical": identical["target_same_shape"], "identical_to_steps": identical["target"],
        "accuracy": {mode: accuracy[mode] for mode in ("target", "speculative")},
        "tokens_per_s": speed, "speedup": speed["speculative"] / max(1e-9, speed["target"])}


def print_figures(report):
    """The figures of a report, without its long lists."""
    for name, value in report.items():
        if name not in ("transcript", "rounds_of_length"):
            print(f"{name:20} {text_of(value)}")
    if report["accuracy"]["target"] is None:
        print("no accuracy: the answers are not known, or pip install math-verify")
