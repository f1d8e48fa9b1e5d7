"""
What each silent bug costs. Every bug is made on purpose, in the real code, and the same figures are
taken with and without it.

    python bench.py bugs                        # all, about forty minutes; --resume goes on
    python bench.py bugs --only=decoding        # a few minutes; or training, or names of bugs

Bugs of decoding act on the shipped pair, or on that of the keys `target` and `drafter`. Bugs of
training act on a drafter that is trained for a fixed short while, with three seeds, beside clean
ones. They are off again when that drafter decodes: training was wrong, and serving is right.

Every output is compared with that of the target alone, at the same shape and without the bug. The
rows of data/nano are needed, so the target must be one that they were made for.
"""
import contextlib
import functools
import io
import os
import time
from typing import NamedTuple

import torch

import train
from benchmarks import bugs_page, pictures
from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.common import arm_row, load, setup_of, summarize
from benchmarks.drafters import Oracle
from benchmarks.exactness import Comparison
from benchmarks.journal import Journal
from benchmarks.slips import Bug
from checkpoint import write_whole
from configurator import configure
from data.nano import prepare
from draft_decode import first_difference, timed_generate
from sampling import Sampling

PROMPTS = 24                # of the test split, if the key limit does not say how many
TRAINED_PROMPTS = 12        # of them for a drafter that was trained here
ORACLE_PROMPTS = 6          # of them for drafters that are always right or always wrong
SEEDS = (0, 1, 2)           # of training
SHIFTS = (-1, 0, 1)         # tokens by which guesses are moved to see whether they are right there
STEPS = 1200                # of training, on
ROWS = 800                  # samples, each of them read three times
# Nano's settings, but a smaller drafter, smaller steps, by AdamW, which takes less time for a step,
# and the paper's weights of slots, as some bugs are in them. All rows are padded to one length, as
# the features of a row are kept: see RememberedFeatures.
FLAGS = ("config/nano.py", "--num_layers=2", "--batch_size=2", "--optimizer=adamw", "--lr=1.8e-3",
         "--weighting=decay", "--max_length=192", "--pad_to_multiple_of=192")


def clean():
    """No bug."""
    return contextlib.nullcontext()


CLEAN = Bug(clean, None, "")


def run(config):
    decoding, training = chosen_bugs(config.only)
    workload = load(config, PROMPTS)
    setup = setup_of(config, workload.prompts, workload.stops)
    setup |= {"seeds": SEEDS, "steps": STEPS, "rows": ROWS, "flags": FLAGS,
              "trained_prompts": TRAINED_PROMPTS}
    journal = Journal(config, "bugs", setup)
    trial = Trial(config, workload)
    rows = []

    def record(name, measure):
        row = journal.row(name, functools.partial(timed, measure))
        rows.append(row)
        print(line_of(row), flush=True)

    if decoding:
        if workload.tokenizer is not None:  # a random target has no rows
            record("estimate", trial.estimate_of_the_pair)
        for temperature in sorted({bug.temperature for bug in decoding}):
            bug = CLEAN._replace(temperature=temperature)
            record(f"clean at {temperature}", functools.partial(trial.of_decoding, bug))
    for bug in decoding:
        record(bug.name, functools.partial(trial.of_decoding, bug))
    for bug in training:
        features = {}
        for seed in SEEDS:
            measure = functools.partial(trial.of_training, bug, seed, features)
            record(f"{bug.name} in training, seed {seed}", measure)

    report = {"command": "bugs", "rows": rows}
    for clock in ("seconds", "cpu_seconds"):
        report[clock] = sum(row[clock] for row in rows)
    write_whole(os.path.join(config.out_dir, "bugs.md"), bugs_page.tables(report) + "\n")
    pictures.bugs(os.path.join(config.out_dir, "bugs.png"), bugs_page.summaries(report))
    journal.close(rows)
    print(f"{report['cpu_seconds'] / 60:.1f} minutes of processor time, "
          f"{report['seconds'] / 60:.1f} on the clock\n"
          f"wrote {config.out_dir}/bugs.png and the tables, {config.out_dir}/bugs.md")
    return report, setup


def chosen_bugs(only):
    """(bugs of decoding, bugs of training) by the key `only`: names, or decoding or training. With
    bugs of training there are clean runs. ValueError for names of no bug."""
    names = {bug.name for bug in (*DECODING, *TRAINING)}
    unknown = set(only) - names - {"decoding", "training"}
    if unknown:
        raise ValueError(f"--only={','.join(sorted(unknown))} is no bug: use decoding, training, "
                         f"or of {', '.join(sorted(names))}")
    chosen = []
    for kind, bugs in (("decoding", DECODING), ("training", TRAINING)):
        if not only or kind in only:
            chosen.append(bugs)
        else:
            chosen.append([bug for bug in bugs if bug.name in only])
    decoding, training = chosen
    if training:
        training = [CLEAN, *training]
    return decoding, training


def timed(measure):
    """The row that measure() returns, with its seconds on the clock and of the processor."""
    began = time.perf_counter()
    cpu_began = time.process_time()
    row = measure()
    return row | {"seconds": time.perf_counter() - began,
                  "cpu_seconds": time.process_time() - cpu_began}


def line_of(row):
    """What is printed of a row as soon as it is there."""
    name = row["prompt"]  # the journal's word for what a row is of
    if row["kind"] == "estimate":
        return f"{name:45} tau {row['tau']:5.2f}"
    line = f"{name:45} tau {row['tau']:5.2f} | identical {row['identical']:.0%}"
    if row["kind"] == "training":
        line += f" | estimate {row['estimate']:.2f}"
    return line


# --------------------------------------------------------------------------------------------------
# one trial


class Trial:
    """Tries bugs on one set of prompts, and knows what the target alone answers to them."""

    def __init__(self, config, workload):
        self.config = config
        self.workload = workload
        self.answers = {}  # of the target alone

    def of_decoding(self, bug):
        """The row of a bug of decoding. Pair and prompts too are loaded by the broken code."""
        sampling = Sampling(bug.temperature)
        with bug.switch():
            workload = load(self.config, PROMPTS)
        answers = [self.answer(prompt, sampling) for prompt in workload.prompts]
        with bug.switch():
            torch.manual_seed(0)  # of a bug that draws
            outputs = decode(workload, workload.prompts, answers, sampling)
        row = {"kind": "decoding", "bug": bug.name, "temperature": bug.temperature}
        row["dtype"] = str(workload.target.embed_tokens.weight.dtype).removeprefix("torch.")
        row |= self.figures(workload.prompts, answers, outputs, sampling)
        if row["identical"] < 1:
            row["identical_by_oracle"] = self.of_oracles(bug, workload, answers, sampling)
        return row

    def of_oracles(self, bug, workload, answers, sampling):
        """The shares of outputs that are the target's own, if all guesses are right and if all are
        wrong."""
        prompts = workload.prompts[:ORACLE_PROMPTS]
        oracle = Oracle(workload.target, block_size=workload.drafter.block_size)
        workload = workload._replace(drafter=oracle)
        shares = []
        for probability in (1.0, 0.0):
            identical = 0
            for prompt, answer in zip(prompts, answers):
                oracle.learn(prompt.ids, answer.tokens, probability)
                with bug.switch():
                    outputs = decode(workload, [prompt], [answer], sampling)
                identical += outputs.generations[0].tokens == answer.tokens
            shares.append(identical / len(prompts))
        return shares

    def of_training(self, bug, seed, features):
        """The row of one run of training with a bug. features: of the bug's earlier runs."""
        with bug.switch():
            run, estimate = train_briefly(self.config, seed, features)
        sampling = Sampling()
        prompts = self.workload.prompts[:TRAINED_PROMPTS]
        answers = [self.answer(prompt, sampling) for prompt in prompts]
        drafter = run.drafter.requires_grad_(False).eval()
        outputs = decode(self.workload._replace(drafter=drafter), prompts, answers, sampling)
        row = {"kind": "training", "bug": bug.name, "seed": seed, "dtype": self.config.dtype,
               "estimate": estimate["tau"], "estimated_loss": estimate["loss"],
               "estimated_up_to_slot": estimate["accepted_up_to_slot"]}
        return row | self.figures(prompts, answers, outputs, sampling)

    def estimate_of_the_pair(self):
        """The row with what training estimates of the pair's drafter, which was trained well."""
        with contextlib.redirect_stdout(io.StringIO()):
            settings = training_settings(self.config, "config/nano.py")
            run, held_out, _ = train.setup(settings)
        run.drafter = self.workload.drafter
        return {"kind": "estimate"} | train.estimate(run, held_out)

    def answer(self, prompt, sampling):
        """What the target alone returns, at the same shape and by the right code."""
        key = (tuple(prompt.ids), sampling)
        if key not in self.answers:
            self.answers[key] = timed_generate(
                self.workload.target, None, prompt.ids, self.config.max_new_tokens,
                self.workload.stops, self.workload.drafter.block_size, sampling)
        return self.answers[key]

    def figures(self, prompts, answers, outputs, sampling):
        """What is said of outputs, beside the target's answers to the same prompts."""
        config = self.config
        tokenizer = self.workload.tokenizer
        comparison = Comparison(config, self.workload, {}, None, sampling)
        rows = []
        margins = []  # [position, margin] where an output leaves the target's answer
        for prompt, answer, output in zip(prompts, answers, outputs.generations):
            alone = arm_row([answer])
            rows.append({"answer": prompt.answer, "speculative": arm_row([output]),
                         "target_same_shape": alone, "target": alone})
            position = first_difference(output.tokens, answer.tokens)
            if position is not None:
                margin = comparison.margin(prompt.ids, output.tokens, answer.tokens, position)
                margins.append([position, margin])
        summary = summarize(rows, tokenizer, self.workload.drafter.block_size)
        return {
            "prompts": summary["prompts"], "rounds": summary["rounds"],
            "tokens": summary["tokens"], "tau": summary["tau_micro"],
            "accepted_up_to_slot": summary["accepted_up_to_slot"],
            "right_at_shift": outputs.right_at_shift,
            "identical": summary["identical"], "margins": margins,
            "accuracy": summary["accuracy"]["speculative"],
            "accuracy_alone": summary["accuracy"]["target"]}


class Outputs(NamedTuple):
    generations: list           # of the prompts
    right_at_shift: list        # for each of SHIFTS the share of guesses that are right so far away


def decode(workload, prompts, answers, sampling):
    """The Outputs of a workload's pair. None gets longer than the target's answer to its prompt: an
    output that is wrong may never end."""
    generations = []
    right = dict.fromkeys(SHIFTS, 0)
    compared = dict.fromkeys(SHIFTS, 0)
    for prompt, answer in zip(prompts, answers):
        decoders = {}

        def compare_guesses(tokens, piece):
            """Compare all guesses of a round with the target's answer."""
            anchor = len(tokens) - len(piece.tokens) - 1  # its place in the answer
            if anchor < 0:  # the token of the prompt's forward, which is in no round
                return
            decoder, = decoders.values()
            guesses = decoder.block[0, 1:].tolist()  # of this round: the next has not begun
            for place, guess in enumerate(guesses, anchor + 1):
                for shift in SHIFTS:
                    if place + shift < len(answer.tokens):
                        compared[shift] += 1
                        right[shift] += guess == answer.tokens[place + shift]

        generations.append(timed_generate(
            workload.target, workload.drafter, prompt.ids, len(answer.tokens), workload.stops,
            workload.drafter.block_size, sampling, decoders, compare_guesses))
    shares = [right[shift] / max(1, compared[shift]) for shift in SHIFTS]
    return Outputs(generations, shares)


# --------------------------------------------------------------------------------------------------
# a short training


def training_settings(config, *flags):
    """The settings of train.py by flags, for the target and device of this command."""
    folder = os.path.join(config.out_dir, "bugs")
    flags = [*flags, f"--target={config.target}", f"--device={config.device}", "--dtype=float32",
             "--attention=grouped", f"--out_dir={folder}"]
    return configure(vars(train), flags)


def train_briefly(config, seed, features):
    """(run, estimate) of a new drafter. features: a dict that keeps those of rows for later runs;
    empty for the first run with a bug, which also writes the rows."""
    rows_folder = os.path.join(config.out_dir, "bugs", "rows")
    with contextlib.redirect_stdout(io.StringIO()):
        if not features:
            prepare.main([f"--target={config.target}", f"--out_dir={rows_folder}"])
        settings = training_settings(config, *FLAGS, f"--data={rows_folder}", f"--seed={seed}")
        run, held_out, _ = train.setup(settings)
    samples = run.micro_batches.samples
    run.micro_batches = train.MicroBatches([samples[i] for i in range(ROWS)], settings)
    run.total_steps = STEPS
    run.target = RememberedFeatures(run.target, features)
    while run.step < run.total_steps:
        train.train_step(run)
    return run, train.estimate(run, held_out)


class RememberedFeatures:
    """A target that reads each row once. Its features cost three times as much as the rest of such
    a step, and many steps read the same rows."""

    def __init__(self, target, features):
        self.target = target
        self.features = features  # by the bytes of the row

    def __getattr__(self, name):
        return getattr(self.target, name)

    def __call__(self, tokens, target_layer_ids, features_only):
        rows = []
        for row in tokens:
            key = row.cpu().numpy().tobytes()
            if key not in self.features:
                features, _ = self.target(row[None], None, target_layer_ids, features_only)
                self.features[key] = features[0]
            rows.append(self.features[key])
        return torch.stack(rows), None
