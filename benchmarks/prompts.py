"""
The prompts of the benchmarks: held-out texts of the nano task, three public data sets, a file of
JSON lines, or random token ids. Also whether an answer is right.
"""
import itertools
import os
import random
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.nano.problems import boxed, problems
from data.nano.refusals import REFUSAL, REFUSED_EXAMPLES
from data.questions import SUFFIX
from data.rows import (
    Dropped, UnusableRow, UnwantedRow, prompt_ids, read_conversations, read_rows)
from formats.files import one_line, where

BLOCK_ROOM = 16  # tokens of the context that decoding keeps for a block
NOT_GRADED = "not graded"
NUMBER = re.compile("[+-]?[0-9]+(/0*[1-9][0-9]*)?")  # "-7" or "16/3"


@dataclass
class Prompt:
    """The token ids that a decoder continues, the question as text, and the known answer."""
    ids: list
    answer: str | None = None     # None: not known
    question: str | None = None   # None: random ids have no text


def load_prompts(config, count, target, tokenizer):
    """Prompts of config.prompts as token ids. A target with random weights has no tokenizer, so it
    needs random ids."""
    if config.prompts.startswith("random:"):
        return random_prompts(config.prompts, count, target.config.vocab_size)
    questions = load_questions(config.prompts, count)
    if tokenizer is None:
        raise ValueError(f"the target {config.target!r} has no tokenizer: "
                         "use --prompts=random:64:256")
    prompts = []
    dropped = Dropped(config.prompts, "prompt")
    context = target.config.max_position_embeddings
    for number, (question, answer) in dropped.usable(enumerate(questions, 1)):
        messages, tools = messages_of(question)
        try:
            ids = prompt_ids(tokenizer, messages, tools, config.thinking, context)
            if len(ids) + BLOCK_ROOM >= context:
                raise UnwantedRow("longer than the target's context")
            prompts.append(Prompt(ids, answer, messages[-1]["content"]))
        except UnusableRow as reason:
            dropped.add(reason, number)
    dropped.finish()
    return prompts


def messages_of(question):
    """(messages, tools) of a question, which is a text or such a pair."""
    if isinstance(question, str):
        return [{"role": "user", "content": question}], None
    return question


def random_prompts(name, count, vocab_size):
    """Prompts of random ids for "random:SHORTEST:LONGEST". Their lengths form a geometric
    sequence."""
    try:
        shortest, longest = map(int, name.split(":")[1:])
    except ValueError:
        raise ValueError(f"prompts = {name!r}: write random:SHORTEST:LONGEST, "
                         "both in tokens") from None
    generator = random.Random(0)
    lengths = np.geomspace(shortest, longest, count).round().astype(int)
    return [Prompt(generator.choices(range(vocab_size), k=length)) for length in lengths]


PUBLIC = {  # name of the prompts: (hub id, configuration)
    "math500": ("HuggingFaceH4/MATH-500", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "humaneval": ("openai/openai_humaneval", None),
}


def load_questions(name, count):
    """The first `count` questions of a source: [(question, known answer or None)]. A question is a
    text, or a pair (messages, tools) if it has more than one message.

    "nano" and "plain" are test splits of the nano task. "refusals" are the hand-written texts that
    nano must refuse. math500, gsm8k and humaneval come from the hub, or with ":PATH" from a copy of
    their files. Any other name is a file of conversations that data/rows.py can read.
    """
    if name in ("nano", "plain"):
        rows = problems("test", count, task="words" if name == "nano" else "plain")
        return [(question, answer) for question, _, answer in rows]
    if name == "refusals":
        return [(text, REFUSAL) for text in REFUSED_EXAMPLES[:count]]
    if os.path.isfile(name):
        return list(questions_of_file(name, count))
    data_set, _, path = name.partition(":")
    if data_set not in PUBLIC:
        raise ValueError(f"prompts = {name!r} must be one of nano, plain, refusals, "
                         f"{', '.join(PUBLIC)}, a file of JSON lines, or random:64:256")
    if path and not os.path.exists(path):
        raise ValueError(f"prompts = {name!r}: there is no file or folder {path!r}")
    hub_id, configuration = PUBLIC[data_set]
    source = path or hub_id
    questions = []
    for place, row in itertools.islice(read_rows(source, "test", configuration), count):
        try:
            questions.append(question_of(data_set, row))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{where(source)}, row {place} does not look like {data_set}: "
                             f"{one_line(repr(error))}") from None
    if not questions:
        raise ValueError(f"{source} contains no prompts")
    return questions


def questions_of_file(path, count):
    """(question, known answer or None) of conversations, each cut before its last answer. If a user
    has the last word, nothing is cut."""
    dropped = Dropped(path)
    rows = dropped.usable(read_conversations(path))
    for _, conversation in itertools.islice(rows, count):
        messages = conversation.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        question = (messages, conversation.tools)
        if len(messages) == 1 and not conversation.tools:
            question = messages[0]["content"]
        yield question, conversation.answer
    dropped.finish()


def question_of(data_set, row):
    """(question, known answer or None) of a data set's row, in the wording of published figures."""
    if data_set == "math500":
        return row["problem"] + SUFFIX, row["answer"]
    if data_set == "gsm8k":
        result = row["answer"].split("####")[1]
        return row["question"] + SUFFIX, result.strip().replace(",", "")
    question = ("Write a solution to the following problem and make sure that it passes the "
                f"tests:\n```python\n{row['prompt']}\n```")
    return question, None


def fraction_correct(texts, answers):
    """The fraction of texts with the known answer. None if no answer is known, or if math-verify is
    needed and not installed. Texts on which the grader fails are left out and counted."""
    pairs = [pair for pair in zip(texts, answers, strict=True) if pair[1] is not None]
    verdicts = [is_correct(text, answer) for text, answer in pairs]
    failures = verdicts.count(NOT_GRADED)
    if failures:
        print(f"{failures} of {len(verdicts)} answers are not graded: the grader failed")
    if len(verdicts) == failures or None in verdicts:
        return None
    return verdicts.count(True) / (len(verdicts) - failures)


def is_correct(text, answer):
    """Whether the boxed result of a text is the known answer: the same text, number, or
    mathematical expression. None: only the package math-verify can tell, and it is not installed.
    NOT_GRADED: the grader failed.

    A text that must be refused is answered correctly only by the exact refusal.
    """
    try:
        return grade(text, answer)
    except KeyboardInterrupt:
        raise
    except BaseException:  # math-verify's TimeoutException is not an Exception
        return NOT_GRADED


def grade(text, answer):
    if answer == REFUSAL:
        return text.strip() == REFUSAL
    result = boxed(text)
    if result is None:
        return False
    result = result.strip()
    answer = str(answer).strip()
    if result == answer:
        return True
    if "remainder" in answer:
        return False  # two numbers and a word, which were compared as text
    if NUMBER.fullmatch(result) and NUMBER.fullmatch(answer):
        return Fraction(result) == Fraction(answer)
    try:  # imported here, because it takes a second that most runs do not need
        from math_verify import parse, verify
    except ImportError:
        return None
    return bool(verify(parse(f"${answer}$"), parse(f"${result}$")))
