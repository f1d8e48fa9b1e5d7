"""
The prompts that are measured: held-out texts of the nano task, three public data sets, a file of
JSON lines, or random token ids. And whether an answer is right.
"""
import itertools
import json
import os
import random
import re
from dataclasses import dataclass
from fractions import Fraction

from tokenizer import chat_prompt
from data.nano.problems import boxed, problems
from data.nano.refusals import REFUSAL, REFUSED_EXAMPLES
from data.questions import SUFFIX
from data.samples import read_source


@dataclass
class Prompt:
    """The token ids that a decoder continues, the question as text, and the known answer."""
    ids: list
    answer: str | None = None     # None: nobody knows it
    question: str | None = None   # None: random ids have no text


def load_prompts(config, count, target, tokenizer):
    """Prompts of config.prompts as token ids. A target without a tokenizer, as those with random
    weights are, can only continue random ids."""
    if config.prompts.startswith("random:") and count > 0:
        return random_prompts(config.prompts, count, target.config.vocab_size)
    questions = load_questions(config.prompts, count)
    if tokenizer is None:
        raise ValueError(f"the target {config.target!r} has no tokenizer: "
                         "use --prompts=random:64:256")
    prompts = []
    for question, answer in questions:
        ids = chat_prompt(tokenizer, question, config.thinking)
        prompts.append(Prompt(ids, answer, question))
    return prompts


def random_prompts(name, count, vocab_size):
    """Prompts of random ids whose lengths grow by equal factors, for "random:SHORTEST:LONGEST"."""
    try:
        shortest, longest = map(int, name.split(":")[1:])
    except ValueError:
        raise ValueError(f"prompts = {name!r}: write random:SHORTEST:LONGEST, "
                         "both in tokens") from None
    generator = random.Random(0)
    prompts = []
    for i in range(count):
        progress = i / max(1, count - 1)  # from 0 to 1
        length = round(shortest * (longest / shortest) ** progress)
        prompts.append(Prompt([generator.randrange(vocab_size) for _ in range(length)]))
    return prompts


# ------------------------------------------------------------------------------------------------
# questions by name

# the nano task, by name of the prompts: word problems, arithmetic and equations
NANO = {"nano": "words", "plain": "plain"}
PUBLIC = {  # name: (hub id, its configuration)
    "math500": ("HuggingFaceH4/MATH-500", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "humaneval": ("openai/openai_humaneval", None),
}


def load_questions(name, count):
    """[(question, known answer or None)]: "nano" and "plain" are the test split of these two parts
    of the nano task, and "refusals" the hand-written texts to be refused, at most all of them;
    math500, gsm8k and humaneval come from the hub, or with ":PATH" from a copy of their files; all
    else is a file of JSON lines. ValueError names what cannot be read."""
    if count < 1:
        raise ValueError(f"limit = {count}: measure at least one prompt")
    if name in NANO:
        rows = problems("test", count, task=NANO[name])
        return [(question, answer) for question, _, answer in rows]
    if name == "refusals":
        return [(text, REFUSAL) for text in REFUSED_EXAMPLES[:count]]
    if os.path.isfile(name):
        return read_questions(name, count)
    return public_questions(name, count)


def public_questions(name, count):
    """The first questions of a public data set: "math500", or "math500:PATH" of a copy."""
    data_set, _, copy = name.partition(":")
    if data_set not in PUBLIC:
        raise ValueError(f"prompts = {name!r} is none of nano, plain, refusals, "
                         f"{', '.join(PUBLIC)}, nor a file of JSON lines nor random:64:256")
    if copy and not os.path.exists(copy):
        raise ValueError(f"prompts = {name!r}: there is no file or folder {copy!r}")
    hub_id, configuration = PUBLIC[data_set]
    source = copy or hub_id
    questions = []
    try:
        rows = read_source(source, "test", configuration)
        for row in itertools.islice(rows, count):
            questions.append(public_question(data_set, row))
    except (LookupError, TypeError, AttributeError) as error:
        number = len(questions) + 1
        raise ValueError(f"{source}, row {number} is none of {data_set}: {error!r}") from None
    return questions


def public_question(data_set, row):
    """(question, known answer or None) of a data set's row, asked as published figures were."""
    if data_set == "math500":
        return row["problem"] + SUFFIX, row["answer"]
    if data_set == "gsm8k":
        result = row["answer"].split("####")[1]
        return row["question"] + SUFFIX, result.strip().replace(",", "")
    question = ("Write a solution to the following problem and make sure that it passes the tests:"
                f"\n```python\n{row['prompt']}\n```")
    return question, None


def read_questions(path, count):
    """Questions from a file of JSON lines with "question" and, if known, "answer". ValueError names
    the line that has none."""
    questions = []
    with open(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip() or len(questions) == count:
                continue
            try:
                row = json.loads(line)
                question = row.get("question") or row.get("problem") or row["prompt"]
                questions.append((question, row.get("answer")))
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object with a "
                                 f'"question" ({error!r})') from None
    if not questions:
        raise ValueError(f"{path} holds no prompts")
    return questions


# ------------------------------------------------------------------------------------------------
# answers


def is_correct(text, answer):
    """Whether the boxed result of a text is the known answer, as text, as a number or as
    mathematics. None: only math-verify can tell, and it is not installed.

    A text to be refused is answered rightly by the refusal alone, word for word.
    """
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
    if is_number(result) and is_number(answer):
        return Fraction(result) == Fraction(answer)
    try:  # imported here, as it costs a second that most runs need not pay
        from math_verify import parse, verify
    except ImportError:
        return None
    return bool(verify(parse(f"${answer}$"), parse(f"${result}$")))


def is_number(text):
    """Whether a text is a whole number or a fraction of two, as "-7" and "16/3"."""
    return re.fullmatch(r"[+-]?[0-9]+(/0*[1-9][0-9]*)?", text) is not None
