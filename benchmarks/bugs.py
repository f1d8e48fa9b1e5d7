"""
What each silent bug costs. Each bug is injected into the real code, and the same figures are
measured with and without it.

    python bench.py bugs                        # all of them, about an hour on two cores
    python bench.py bugs --only=decoding        # a few minutes; or training, or names of bugs

Bugs of decoding run on the shipped pair, or on the pair of the keys `target` and `drafter`. Bugs of
training run on a drafter that is trained for a short while with three seeds, next to clean runs.
They are off again when that drafter decodes, because only its training is wrong.

Each output is compared with the output of the target alone, whose forwards have the same shape and
not the bug. Training needs the rows of data/nano, so the target must be nano's.
"""
import contextlib
import io
import os
import time
from typing import NamedTuple

import torch

import train
from benchmarks import bugs_page, pictures
from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.common import load, pairs_of, round_figures, setup_of, share, write_rows
from benchmarks.exactness import margin_of
from benchmarks.inject_bug import Bug
from benchmarks.prompts import is_correct
from configurator import configure
from data.nano import prepare
from draft_decode import collect, first_difference, generate
from sampling import Sampling

PROMPTS = 24                # of the test split, if the key limit does not say how many
TRAINED_PROMPTS = 12        # of them for a drafter that was trained here
SEEDS = (0, 1, 2)           # of training
SHIFTS = (-1, 0, 1)         # is a guess right one token early, in its place, one token late?
STEPS = 1200                # of training
ROWS = 800                  # of training data; each is read three times
# Nano's settings with a smaller drafter, smaller steps, AdamW, which needs less time per step, and
# the paper's weights of slots, because some bugs change them
FLAGS = ("config/nano.py", "--num_layers=2", "--batch_size=2", "--optimizer=adamw", "--lr=1.8e-3",
         "--weighting=decay", "--max_length=192", "--pad_to_multiple_of=192")


def run(config):
    decoding, training = chosen_bugs(config.only)
    began = time.perf_counter()
    museum = Museum(config, load(config, PROMPTS))
    rows = []
    for bug in decoding:
        rows.append(museum.of_decoding(bug))
        print_row(rows[-1])
    for bug in training:
        for seed in SEEDS:
            rows.append(museum.of_training(bug, seed))
            print_row(rows[-1])
    report = {"command": "bugs", "rows": rows, "seconds": time.perf_counter() - began}
    pictures.bugs(os.path.join(config.out_dir, "bugs.png"), bugs_page.summaries(report))
    write_rows(config, "bugs", rows)
    print(f"{report['seconds'] / 60:.1f} minutes; wrote {config.out_dir}/bugs.png")
    setup = setup_of(config, museum.workload.prompts, museum.workload.stops)
    return report, setup | {"seeds": SEEDS, "steps": STEPS, "rows": ROWS, "flags": FLAGS}


def chosen_bugs(only):
    """(bugs of decoding, bugs of training) that the key `only` names, each with its clean runs."""
    names = {bug.name for bug in (*DECODING, *TRAINING)}
    unknown = set(only) - names - {"decoding", "training"}
    if unknown:
        unknown_names = ",".join(sorted(unknown))
        raise ValueError(f"--only={unknown_names} is not a bug: use decoding, training, "
                         "or names in docs/bugs.md")
    chosen = {}
    for kind, bugs in (("decoding", DECODING), ("training", TRAINING)):
        chosen[kind] = list(bugs)
        if only and kind not in only:
            chosen[kind] = [bug for bug in bugs if bug.name in only]
        temperatures = sorted({bug.temperature for bug in chosen[kind]})
        clean = [Bug("clean", None, temperature=temperature) for temperature in temperatures]
        chosen[kind] = clean + chosen[kind]
    return chosen["decoding"], chosen["training"]


def print_row(row):
    line = f"{row['bug']:32} tau {row['tau']:5.2f} | identical {row['identical']:.0%}"
    if row["kind"] == "training":
        line += f" | seed {row['seed']}, estimate {row['estimate']:.2f}"
    print(line, flush=True)


# --------------------------------------------------------------------------------------------------
# one bug


class Museum:
    """Measures bugs on one set of prompts. It keeps the target's own answers to them."""

    def __init__(self, config, workload):
        self.config = config
        self.workload = workload
        self.answers = {}

    def of_decoding(self, bug):
        """The row of a bug of decoding. The broken code also loads the pair and the prompts."""
        sampling = Sampling(bug.temperature)
        with bug.injected():
            workload = load(self.config, PROMPTS)
        answers = [self.answer(prompt, sampling) for prompt in workload.prompts]
        with bug.injected():
            torch.manual_seed(0)  # for a bug that samples
            outputs = decode(workload, workload.prompts, answers, sampling)
        row = {"kind": "decoding", "bug": bug.name, "temperature": bug.temperature}
        return row | self.figures(workload.prompts, answers, outputs, sampling)

    def of_training(self, bug, seed):
        """The row of one training run with a bug."""
        with bug.injected():
            run, estimate = train_briefly(self.config, seed)
        prompts = self.workload.prompts[:TRAINED_PROMPTS]
        answers = [self.answer(prompt, Sampling()) for prompt in prompts]
        drafter = run.drafter.requires_grad_(False).eval()
        workload = self.workload._replace(drafter=drafter)
        outputs = decode(workload, prompts, answers, Sampling())
        row = {"kind": "training", "bug": bug.name, "seed": seed, "estimate": estimate["tau"],
               "estimated_loss": estimate["loss"]}
        return row | self.figures(prompts, answers, outputs, Sampling())

    def answer(self, prompt, sampling):
        """The target's own answer, from forwards with the same shape and without a bug."""
        key = (tuple(prompt.ids), sampling)
        if key not in self.answers:
            self.answers[key] = collect(generate(
                self.workload.target, None, prompt.ids, max_new_tokens=self.config.max_new_tokens,
                stop_token_ids=self.workload.stops,
                tokens_per_forward=self.workload.drafter.block_size, sampling=sampling))
        return self.answers[key]

    def figures(self, prompts, answers, outputs, sampling):
        """Figures of outputs next to the target's own answers to the same prompts."""
        of_prompts = []
        verdicts = []
        margins = []  # [position, margin] if an output differs from the target's answer
        for prompt, answer, output in zip(prompts, answers, outputs.generations):
            of_prompts.append(pairs_of(output.rounds))
            if prompt.answer is not None:
                text = self.workload.tokenizer.decode(output.tokens, skip_special_tokens=True)
                verdicts.append(is_correct(text, prompt.answer))
            position = first_difference(output.tokens, answer.tokens)
            if position is not None:
                margin = margin_of(self.workload.target, sampling, prompt.ids, output.tokens,
                                   answer.tokens)
                margins.append([position, margin])
        figures = round_figures(of_prompts, self.workload.drafter.block_size)
        return {
            "prompts": len(prompts), "rounds": figures["rounds"], "tokens": figures["tokens"],
            "tau": figures["tau_micro"], "accepted_up_to_slot": figures["accepted_up_to_slot"],
            "right_at_shift": outputs.right_at_shift, "margins": margins,
            "identical": 1 - len(margins) / len(prompts), "accuracy": share(verdicts)}


class Outputs(NamedTuple):
    generations: list           # of the prompts
    right_at_shift: list        # for each of SHIFTS, the fraction of guesses that are right there


def decode(workload, prompts, answers, sampling):
    """The Outputs of a workload's pair. An output is not longer than the target's answer, because
    a wrong output may never end."""
    generations = []
    right = dict.fromkeys(SHIFTS, 0)
    compared = dict.fromkeys(SHIFTS, 0)
    for prompt, answer in zip(prompts, answers):
        generation = collect(generate(
            workload.target, workload.drafter, prompt.ids, max_new_tokens=len(answer.tokens),
            stop_token_ids=workload.stops, tokens_per_forward=workload.drafter.block_size,
            sampling=sampling))
        generations.append(generation)

        # compare all guesses of each round with the target's answer
        first = 1  # the place of a round's first token in the answer
        for output in generation.rounds:
            guesses = output.tokens[:output.accepted] + output.rejected
            for place, guess in enumerate(guesses, first):
                for shift in SHIFTS:
                    if place + shift < len(answer.tokens):
                        compared[shift] += 1
                        right[shift] += guess == answer.tokens[place + shift]
            first += len(output.tokens)
    shares = [right[shift] / max(1, compared[shift]) for shift in SHIFTS]
    return Outputs(generations, shares)


# --------------------------------------------------------------------------------------------------
# a short training


def train_briefly(config, seed):
    """(run, estimate) of a new drafter, on rows that are written here, because a bug can be in
    them."""
    folder = os.path.join(config.out_dir, "bugs")
    rows_folder = os.path.join(folder, "rows")
    flags = [*FLAGS, f"--target={config.target}", f"--device={config.device}", "--dtype=float32",
             f"--out_dir={folder}", f"--data={rows_folder}", f"--seed={seed}"]
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main([f"--target={config.target}", f"--out_dir={rows_folder}"])
        settings = configure(vars(train), flags)
        run, held_out, _ = train.setup(settings)
    samples = run.micro_batches.samples
    run.micro_batches = train.MicroBatches([samples[i] for i in range(ROWS)], settings)
    run.total_steps = STEPS
    while run.step < run.total_steps:
        train.train_step(run)
    return run, train.evaluate(run, held_out)
