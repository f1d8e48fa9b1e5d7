"""
Measures what each silent bug costs: it injects the bug into the real code, and measures the same
figures with and without it.

    python bench.py bugs                        # all of them, about an hour on two cores
    python bench.py bugs --only=decoding        # a few minutes; or training, or names of bugs

Decoding bugs run on the pair of the keys `target` and `drafter`. Training bugs run on a drafter
that is trained briefly with three seeds, next to clean runs. When that drafter decodes, the bug is
off, because only its training is wrong. Its data is data/nano, so it needs nano's target.

Each output is compared with the output of the target alone, without the bug and with
16-token forwards.
"""
import contextlib
import io
import os

import torch

import train
from benchmarks import bugs_page, figures
from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.common import load, mean_round_length, pairs_of, print_table
from benchmarks.exactness import margin_of
from benchmarks.inject_bug import Bug
from configurator import configure
from data.nano import prepare
from draft_decode import collect, first_difference, generate
from sampling import Sampling

PROMPTS = 24                # of the test split, unless the key `limit` is set
TRAINED_PROMPTS = 12        # of them for a drafter that was trained here
SEEDS = (0, 1, 2)           # of training
COLUMNS = ("bug", "seed", "tau", "estimate", "identical")
SHIFTS = (-1, 0, 1)         # is a guess right one token early, in its place, one token late?
STEPS = 1200                # of training
ROWS = 800                  # of training data; each is read three times
# nano's settings with a smaller drafter, faster steps, and the paper's weights of positions
FLAGS = ("config/nano.py", "--num_layers=2", "--batch_size=2", "--optimizer=adamw", "--lr=1.8e-3",
         "--weighting=decay", "--max_length=192", "--pad_to_multiple_of=192")


def run(config):
    decoding, training = chosen_bugs(config.only)
    museum = Museum(config)
    rows = []
    for bug in decoding:
        with bug.injected():  # the broken code also loads the pair and the prompts
            workload = load(config, PROMPTS)
        row = {"kind": "decoding", "bug": bug.name, "temperature": bug.temperature}
        rows.append(row | museum.figures(workload, bug))
        print_table(rows[-1:], COLUMNS, header=len(rows) == 1)
    for bug in training:
        for seed in SEEDS:
            with bug.injected():
                drafter, estimate = train_briefly(config, seed)
            workload = museum.right._replace(
                drafter=drafter, prompts=museum.right.prompts[:TRAINED_PROMPTS])
            row = {"kind": "training", "bug": bug.name, "seed": seed, "estimate": estimate["tau"],
                   "estimated_loss": estimate["loss"]}
            rows.append(row | museum.figures(workload, Bug("clean", None)))
            print_table(rows[-1:], COLUMNS, header=len(rows) == 1)
    report = {"rows": rows, "seeds": SEEDS, "steps": STEPS, "training_rows": ROWS, "flags": FLAGS}
    figures.bugs(os.path.join(config.out_dir, "bugs.png"), bugs_page.summaries(report))
    return report


def chosen_bugs(only):
    """(decoding bugs, training bugs) that the key `only` names, each with its clean runs."""
    names = {bug.name for bug in (*DECODING, *TRAINING)}
    unknown = set(only) - names - {"decoding", "training"}
    if unknown:
        unknown_names = ",".join(sorted(unknown))
        raise ValueError(f"--only={unknown_names} is not a bug: use decoding, training, "
                         "or names in docs/bugs.md")
    chosen = []
    for kind, bugs in (("decoding", DECODING), ("training", TRAINING)):
        if only and kind not in only:
            bugs = [bug for bug in bugs if bug.name in only]
        temperatures = sorted({bug.temperature for bug in bugs})
        clean = [Bug("clean", None, temperature=temperature) for temperature in temperatures]
        chosen.append([*clean, *bugs])
    return chosen


class Museum:
    """Measures bugs next to the right code, and keeps the target's own answers."""

    def __init__(self, config):
        self.max_new_tokens = config.max_new_tokens
        self.right = load(config, PROMPTS)
        self.answers = {}

    def answer(self, prompt, sampling):
        """The target's own answer, without a bug."""
        key = (tuple(prompt.ids), sampling)
        if key not in self.answers:
            self.answers[key] = decode(self.right, None, prompt, self.max_new_tokens, sampling)
        return self.answers[key]

    def figures(self, workload, bug):
        """Decodes the prompts of a workload with the bug. Returns figures of the outputs, next to
        the target's own answers."""
        sampling = Sampling(bug.temperature)
        answers = [self.answer(prompt, sampling) for prompt in workload.prompts]
        outputs = []
        with bug.injected():
            torch.manual_seed(0)  # for a bug that samples
            for prompt, answer in zip(workload.prompts, answers):
                longest = len(answer.tokens)  # because a wrong output may never end
                outputs.append(decode(workload, workload.drafter, prompt, longest, sampling))

        rounds = []
        margins = []  # [position, margin] if an output differs from the target's answer
        for prompt, answer, output in zip(workload.prompts, answers, outputs):
            rounds += pairs_of(output.rounds)
            position = first_difference(output.tokens, answer.tokens)
            if position is not None:
                margin = margin_of(
                    self.right.target, sampling, prompt.ids, output.tokens, answer.tokens)
                margins.append([position, margin])
        return {"prompts": len(outputs), "tau": mean_round_length(rounds),
                "right_at_shift": right_at_shift(outputs, answers), "margins": margins,
                "identical": 1 - len(margins) / len(outputs)}


def decode(workload, drafter, prompt, max_new_tokens, sampling):
    """The Generation of a prompt. All forwards have the same shape, even without a drafter."""
    return collect(generate(
        workload.target, drafter, prompt.ids, max_new_tokens=max_new_tokens,
        stop_token_ids=workload.stops, tokens_per_forward=workload.drafter.block_size,
        sampling=sampling))


def right_at_shift(outputs, answers):
    """For each of SHIFTS, the fraction of guesses that equal the answer's token at that shift from
    their own place. Guesses after a wrong one count too."""
    right = dict.fromkeys(SHIFTS, 0)
    compared = dict.fromkeys(SHIFTS, 0)
    for output, answer in zip(outputs, answers):
        first = 1  # the place of a round's first token in the answer
        for one_round in output.rounds:
            guesses = one_round.tokens[:one_round.accepted] + one_round.rejected
            for place, guess in enumerate(guesses, first):
                for shift in SHIFTS:
                    if place + shift < len(answer.tokens):
                        compared[shift] += 1
                        right[shift] += guess == answer.tokens[place + shift]
            first += len(one_round.tokens)
    return [right[shift] / max(1, compared[shift]) for shift in SHIFTS]


def train_briefly(config, seed):
    """(drafter, estimate) after a short training, on rows that are written here, because a bug can
    be in them."""
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
    estimate = train.evaluate(run, held_out)
    return run.drafter.requires_grad_(False).eval(), estimate
