r"""
The nano task's data set: questions with worked solutions. Nothing is downloaded. A problem is a
pure function of its seed, and its split is a pure function of its text. There are three tasks:

    words       word problems of 13 kinds (words.py)
    plain       arithmetic and equations as people type them first (plain.py)
    refusals    texts that are neither, all answered with the same sentence (refusals.py)

A solution of words or plain is a list of small steps and ends in "The answer is \boxed{161}."
"""
import itertools
import random
import zlib

from data.nano import plain, words
from data.nano.plain import pick
from data.nano.refusals import REFUSAL, refused_text

KINDS = {"words": words.KINDS, "plain": plain.KINDS}
# The tasks of 20 consecutive seeds, repeated, for tokenizer, target, and drafter. The target needs
# most practice in plain arithmetic. Its drafter needs most practice in word problems, because they
# have the most kinds and the longest answers.
MIXES = {
    "tokenizer": ("words",) * 9 + ("plain",) * 7 + ("refusals",) * 4,
    "target": ("words",) * 7 + ("plain",) * 10 + ("refusals",) * 3,
    "drafter": ("words",) * 13 + ("plain",) * 5 + ("refusals",) * 2}


def problems(split: str, count: int, start: int = 0, task: str = "target"):
    """Yields (question, solution, answer) number start .. start + count - 1 of a split's problems.

    split is train, val, or test. task is one of the three or a mix of them, a key of MIXES. The
    answer is the text in the box, or None for refusals, which have no box. The stream of a split
    and task is fixed and never repeats a question, so adjoining ranges share none. Skipping costs
    as much as generating. A val or test problem costs as much as 50 training problems, because only
    2 % of all seeds are in that split.
    """
    seen = set()
    for seed in itertools.count():
        if len(seen) == start + count:
            return
        question, solution, answer = problem(seed, task)
        if question not in seen and split_of(question) == split:
            seen.add(question)
            if len(seen) > start:
                yield question, solution, answer


def problem(seed: int, task: str = "target") -> tuple[str, str, str | None]:
    """(question, worked solution, answer or None), a pure function of the seed and the task."""
    r = random.Random(f"nano-{seed}")
    mix = MIXES.get(task, (task,))
    task = mix[seed % len(mix)]
    if task == "refusals":
        return refused_text(r), REFUSAL, None
    kind = pick(r, KINDS[task])
    question, steps, answer = kind(r)
    lines = [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
    lines.append(f"The answer is \\boxed{{{answer}}}.")
    return question, "\n".join(lines), str(answer)


def split_of(question: str) -> str:
    """The split of a question, from its text alone: 2 % val, 2 % test, the rest train.

    So no question is in two splits, even if two seeds or two tasks ask it.
    """
    splits = ["val"] * 2 + ["test"] * 2 + ["train"] * 96
    return splits[zlib.crc32(question.encode()) % 100]


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, or None if its braces do not balance."""
    _, opening, rest = text.rpartition("\\boxed{")
    for end, letter in enumerate(rest):
        content = rest[:end]
        if opening and letter == "}" and content.count("{") == content.count("}"):
            return content
    return None
