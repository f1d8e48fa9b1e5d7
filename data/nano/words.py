"""
Thirteen kinds of word problem. Each function draws the numbers and nouns of one with a random
generator r and returns (question, steps, answer).

Questions vary in names, things, and wordings. Solutions have one fixed wording per kind, one small
calculation per step, and they repeat every quantity where they use it. A target of 3M parameters
can learn such solutions. They are also worth drafting, because the fixed wording is easy to guess
and the digits are not. words.txt has all wordings.
"""
import functools
import re

from data.nano.plain import (
    between, multiply, pick, pick_two, read_lists, running, several_between)

LISTS = read_lists("words.txt")
LETTERS = "abkmnpxyz"
BILLS = (20, 40, 50, 60, 80, 90, 100)


def total(r):
    name = pick(r, LISTS["name"])
    things = pick(r, LISTS["things"])
    a, b, c = several_between(r, 3, 5, 60)
    return worded(r, "total", locals())


def purchase(r):
    things, others = pick_two(r, LISTS["things"])
    a, b, p, q = several_between(r, 4, 2, 9)
    return worded(r, "purchase", locals(), "name")


def change(r):
    name, friend, things = names_and_things(r)
    a, p = several_between(r, 2, 2, 9)
    bill = pick(r, [bill for bill in BILLS if bill > a * p])
    return worded(r, "change", locals())


def giving(r):
    name, friend, things = names_and_things(r)
    b, c = several_between(r, 2, 3, 40)
    left = between(r, 2, 60)
    a = b + c + left
    return worded(r, "giving", locals())


def sharing(r):
    name, friend, things = names_and_things(r)
    parts = between(r, 2, 9)
    each = between(r, 3, 9)
    a = between(r, 2, parts * each - 2)
    b = parts * each - a
    return worded(r, "sharing", locals())


def product(r):
    name, friend = pick_two(r, LISTS["name"])
    box = pick(r, LISTS["box"])
    boxes = "boxes" if box == "box" else box + "s"
    a = between(r, 2, 9)
    b = 10 * between(r, 1, 9) + between(r, 1, 9)
    products = " | ".join(multiply(a, b))
    return worded(r, "product", locals(), "things")


def rectangle(r):
    name = pick(r, LISTS["name"])
    place = pick(r, LISTS["place"])
    a = 10 * between(r, 1, 9) + between(r, 1, 9)
    if r.random() < 0.5:
        b = between(r, 2, 9)
        products = " | ".join(multiply(b, a))
        return worded(r, "area", locals())
    b = between(r, 2, a - 1)
    return worded(r, "perimeter", locals())


def distance(r):
    first, second = pick_two(r, LISTS["rides"])
    a, b = several_between(r, 2, 2, 5)
    p = 10 * between(r, 1, 9)
    q = 10 * between(r, 1, 9)
    return worded(r, "distance", locals(), "name")


def equation(r):
    name = pick(r, LISTS["name"])
    x = pick(r, LETTERS)
    a = between(r, 2, 9)
    b = between(r, 1, 99)
    value = between(r, 2, 9)
    c = a * value + b
    return worded(r, "equation", locals())


def sequence(r):
    first = between(r, 1, 60)
    difference = between(r, 2, 12)
    terms = [first + difference * i for i in range(between(r, 4, 5))]
    numbers = ", ".join(map(str, terms))
    last = terms[-1]
    return worded(r, "sequence", locals(), "name", "things")


def average(r):
    count = between(r, 3, 4)
    mean = between(r, 6, 15)
    first, *others = several_between(r, count - 1, mean - 4, mean + 4)
    # The last number makes the mean whole. If it would be less than 1, it becomes 1, and the first
    # number makes up for the difference.
    last = count * mean - first - sum(others)
    if last < 1:
        first += last - 1
        last = 1
    sums = " | ".join(running(first, "+", others + [last]))
    numbers = ", ".join(map(str, [first] + others)) + f" and {last}"
    return worded(r, "average", locals(), "name", "things")


def percent(r):
    name, friend, things = names_and_things(r)
    a = 10 * between(r, 2, 9)
    p = 10 * between(r, 1, 9)
    part = p * a // 100
    return worded(r, "percent", locals())


def compare(r):
    name, friend, things = names_and_things(r)
    a, b, c, d = several_between(r, 4, 5, 50)
    if a + b == c + d:  # in a tie nobody has more
        d += 1
    less, more = sorted((a + b, c + d))
    return worded(r, "compare", locals())


KINDS = (total, purchase, change, giving, sharing, product, rectangle, distance, equation, sequence,
         average, percent, compare)


def names_and_things(r):
    name, friend = pick_two(r, LISTS["name"])
    return name, friend, pick(r, LISTS["things"])


def worded(r, kind, fields, *drawn_last):
    """(question, steps, answer) of a kind in the wordings of words.txt. drawn_last: the names of
    lists. One item of each becomes a field of that name, and it is drawn after the wording."""
    fields = Fields(fields)
    *wordings, solution = LISTS[kind]
    wording = pick(r, wordings)
    for name in drawn_last:
        fields[name] = pick(r, LISTS[name])
    steps = solution.format_map(fields).split(" | ")
    answer = re.findall("[0-9]+", steps[-1])[-1]  # the last number of the last step
    return wording.format_map(fields), steps, answer


class Fields(dict):
    """The fields of a wording. A missing one is a calculation with the others, such as a + b."""
    def __missing__(self, calculation):
        return eval(compiled(calculation, "words.txt", "eval"), {}, self)


compiled = functools.cache(compile)
