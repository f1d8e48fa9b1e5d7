"""
Texts that ask for nothing that the nano target can do. One honest sentence answers all of them.

The target cannot learn from these lists what language is. It can learn what its own questions look
like, and to refuse everything else. So variety counts, not truth: openers, requests, and questions
with a random word in them, real and invented words of many scripts, punctuation, code, numbers
that ask for nothing, halves of word problems, and calculations that plain.py does not teach.
refusals.txt has the lists.
"""
import re
from string import ascii_lowercase

from data.nano import plain, words
from data.nano.plain import between, pick, read_lists

REFUSAL = ("I only solve word problems and short arithmetic with small whole numbers, "
           "for example: What is 12 + 30?")
LISTS = read_lists("refusals.txt")
# Texts for tests and benchmarks. Training sees none of them, and none that differs from one of
# them in capitals and punctuation only, because refused_text draws again.
REFUSED_EXAMPLES = tuple(LISTS["held out"])

# A sort is listed more than once if it is common, or hard to tell from questions that the target
# should answer.
SORTS = ("openers", "openers", "two openers", "requests", "requests", "facts", "facts", "numbers",
         "numbers", "code", "beyond", "beyond", "beyond", "fragment", "fragment", "word", "english",
         "english", "foreign", "script", "letters", "marks")
AS_IS = ("two openers", "code", "beyond", "fragment", "script", "marks")  # typed() gets the others
RANGES = {"digit": (1, 9), "tens": (13, 99), "hundreds": (100, 999), "year": (1500, 2050)}


def refused_text(r):
    """A text of a random sort, as people type it, but none of REFUSED_EXAMPLES."""
    while True:
        sort = pick(r, SORTS)
        text = drawn(r, sort)
        if sort not in AS_IS:
            text = typed(r, text)
        if text and normal_form(text) not in HELD_OUT:
            return text


def normal_form(text):
    """The letters and digits of a text in lower case, or the text itself if it has none."""
    return "".join(filter(str.isalnum, text.lower())) or text.strip()


HELD_OUT = {normal_form(example) for example in REFUSED_EXAMPLES}


def typed(r, text):
    """A text with a different last mark, with or without capitals."""
    chance = r.random()
    if chance < 0.3:
        text = text.lower()
    elif chance < 0.4:
        text = text.upper()
    elif chance < 0.7:
        text = text[:1].upper() + text[1:]
    if r.random() < 0.4:
        text = text.rstrip("?.!") + pick(r, ("?", "!", ".", "", "", "??", "...", " ?", "!!", ","))
    return text


def drawn(r, name):
    """A text of the sort or for the {field} of this name. Most are lists of wordings, whose own
    {fields} are filled in."""
    if name == "two openers":
        first = typed(r, drawn(r, "openers"))
        return first + pick(r, (" ", ", ", ". ", "\n")) + typed(r, drawn(r, "openers"))
    if name in RANGES:
        return str(between(r, *RANGES[name]))
    if name == "n":
        return str(plain.number(r, pick(r, plain.DIGITS)))
    if name == "long":
        return str(plain.number(r, between(r, 4, 7)))
    if name == "letter":
        return pick(r, "abcdefghijmnopqrstuvwxyz")
    if name == "letters":
        return several(r, ascii_lowercase, between(r, 1, 10))
    if name == "sentence":
        return several(r, LISTS["english"], 4, " ")
    if name == "foreign":
        return several(r, pick(r, LISTS["foreign"]).split(), between(r, 1, 8), " ")
    if name == "english":  # one or two sentences of words in random order
        text = several(r, LISTS["english"], between(r, 2, 12), " ")
        if r.random() < 0.3:
            text += pick(r, (". ", ", ", " / ", "\n"))
            text += several(r, LISTS["english"], between(r, 2, 13), " ")
        return text
    if name == "marks":  # punctuation, all the same or mixed
        count = between(r, 1, 8)
        if r.random() < 0.5:
            return pick(r, LISTS["marks"]) * count
        return several(r, LISTS["marks"], count, pick(r, ("", "", " ")))
    if name == "word" or name == "topic" and r.random() < 0.25:
        return word(r)
    if name == "fragment":
        return fragment(r)
    if name == "script":
        return other_script(r)
    text = re.sub(r"\{(\w+)\}", lambda match: drawn(r, match[1]), pick(r, LISTS[name]))
    return beyond(r, text) if name == "beyond" else text


def several(r, items, count, separator=""):
    return separator.join(pick(r, items) for _ in range(count))


def beyond(r, text):
    """A calculation that plain.py does not teach, in the wording of one that it teaches."""
    if r.random() < 0.3:
        text = text.replace(" ", "")
    if r.random() < 0.5 and not text.endswith("?"):
        text = pick(r, plain.LISTS["frames"]).format(e=text)
    return plain.loosely(r, text)


def fragment(r):
    """A word problem that asks nothing: the first half of its words, or some of them shuffled."""
    question, _, _ = pick(r, words.KINDS)(r)
    pieces = question.split()
    if r.random() < 0.5:
        return " ".join(pieces[:between(r, 1, len(pieces) // 2)])
    r.shuffle(pieces)
    return " ".join(pieces[:between(r, 2, 12)])


def other_script(r):
    """Random letters of one script, in up to five groups."""
    first, last = pick(r, LISTS["scripts"])
    script = [chr(code) for code in range(ord(first), ord(last) + 1)]
    groups = [several(r, script, between(r, 1, 6)) for _ in range(between(r, 1, 5))]
    ending = pick(r, ("", "", "?", "!", ".", "。", "？"))
    return pick(r, (" ", " ", "")).join(groups) + ending


def word(r):
    """An English word or an invented one, so that the target refuses unknown words too."""
    if r.random() < 0.6:
        return pick(r, LISTS["english"])
    text = ""
    for _ in range(between(r, 1, 3)):
        text += pick(r, LISTS["syllable start"]) + pick(r, LISTS["vowel"])
        text += pick(r, ("", "", "n", "r", "s", "t", "l", "ck", "x"))
    return text
