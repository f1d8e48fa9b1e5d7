r"""
The nano task's data set: questions with worked solutions. Nothing is downloaded: a problem is a
pure function of its seed, and its split a pure function of its text.

    python data/nano/problems.py        # some samples of each task

There are three tasks:

    words       word problems of 13 kinds (words.py)
    plain       arithmetic and equations as people type them first (plain.py)
    refusals    texts that are neither, all answered with the same sentence (refusals.py)

A solution of words or plain is a list of small steps and ends in "The answer is \boxed{161}."
"""
import os
import random
import sys
import zlib

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from whatever folder this is run
from data.nano import plain, words
from data.nano.common import pick
from data.nano.refusals import REFUSAL, refused_text

KINDS = {"words": words.KINDS, "plain": plain.KINDS}
# The tasks of 20 seeds in a row, over and over, for each of those that learn. The target needs the
# most practice in plain arithmetic, its drafter in word problems: they have the most kinds and the
# longest answers.
MIXES = {
    "tokenizer": ("words",) * 9 + ("plain",) * 7 + ("refusals",) * 4,
    "target": ("words",) * 7 + ("plain",) * 10 + ("refusals",) * 3,
    "drafter": ("words",) * 13 + ("plain",) * 5 + ("refusals",) * 2}
TASKS = ("words", "plain", "refusals")


def problems(split: str, count: int, start: int = 0, task: str = "target"):
    """Yields (question, solution, answer) number start .. start + count - 1 of a split's problems.

    task is words, plain, refusals, or a mix of them, a key of MIXES. The answer is the text in
    the box; it is None for refusals, which have no box. The stream of a split and task is fixed and
    has no question twice, so calls with adjoining ranges never share a question. Skipping costs as
    much as generating. One val or test problem costs fifty, as the other seeds belong to the
    training split.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split is {split!r}; use train, val or test")
    if task not in MIXES and task not in TASKS:
        raise ValueError(f"task is {task!r}; use one of {', '.join((*TASKS, *MIXES))}")
    seen = set()
    seed = 0
    while len(seen) < start + count:
        question, solution, answer = problem(seed, task)
        seed += 1
        if question in seen or split_of(question) != split:
            continue
        seen.add(question)
        if len(seen) > start:
            yield question, solution, answer


def problem(seed: int, task: str = "target") -> tuple[str, str, str | None]:
    """(question, worked solution, answer or None), a pure function of the seed and the task."""
    r = random.Random(f"nano-{seed}")
    if task in MIXES:
        mix = MIXES[task]
        task = mix[seed % len(mix)]
    if task == "refusals":
        return refused_text(r), REFUSAL, None
    kind = pick(r, KINDS[task])
    question, steps, answer = kind(r)
    solution = ""
    for number, step in enumerate(steps, 1):
        solution += f"Step {number}: {step}\n"
    solution += f"The answer is \\boxed{{{answer}}}."
    return question, solution, str(answer)


def split_of(question: str) -> str:
    """The split of a question, by its text alone: 2 % are "val", 2 % "test", the others "train".

    So no question is in two splits, whatever its seed and task.
    """
    percentile = zlib.crc32(question.encode()) % 100
    if percentile < 2:
        return "val"
    if percentile < 4:
        return "test"
    return "train"


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, whose braces must balance; None if there is none."""
    opening = "\\boxed{"
    begin = text.rfind(opening)
    if begin < 0:
        return None
    begin += len(opening)
    depth = 1
    for end in range(begin, len(text)):
        if text[end] == "{":
            depth += 1
        elif text[end] == "}":
            depth -= 1
        if depth == 0:
            return text[begin:end]
    return None


def main():
    for task in ("words", "plain", "refusals"):
        print(f"--- {task}\n")
        for question, solution, _ in problems("train", 30, task=task):
            print(f"{question}\n{solution}\n")


if __name__ == "__main__":
    main()
