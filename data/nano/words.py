"""
Thirteen kinds of word problem. Each function takes a random generator r and returns (question,
steps, answer). format_map(locals()) fills the {fields} of a wording with the function's variables
of the same names.

Questions vary in names, things, and wordings (words.txt). Solutions have one fixed wording per
kind, one small calculation per step, and they repeat every quantity where they use it. A target of
3M parameters can learn such solutions. They are also worth drafting, because the fixed wording is
easy to guess and the digits are not.
"""
from data.nano.common import (
    between, multiply, pick, pick_two, read_lists, running, several_between)

LISTS = read_lists("words.txt")
LETTERS = "abkmnpxyz"
BILLS = (20, 40, 50, 60, 80, 90, 100)


def names_and_things(r):
    name, friend = pick_two(r, LISTS["names"])
    return name, friend, pick(r, LISTS["things"])


def total(r):
    name = pick(r, LISTS["names"])
    things = pick(r, LISTS["things"])
    a, b, c = several_between(r, 3, 5, 60)
    wording = pick(r, LISTS["total"])
    steps = [f"Monday and Tuesday give {a} + {b} = {a + b}.",
             f"With Friday it is {a + b} + {c} = {a + b + c}."]
    return wording.format_map(locals()), steps, a + b + c


def purchase(r):
    things, others = pick_two(r, LISTS["things"])
    a, b, p, q = several_between(r, 4, 2, 9)
    wording = pick(r, LISTS["purchase"])
    name = pick(r, LISTS["names"])
    steps = [f"The first {a} cost {a} * {p} = {a * p} dollars.",
             f"The other {b} cost {b} * {q} = {b * q} dollars.",
             f"Together they cost {a * p} + {b * q} = {a * p + b * q} dollars."]
    return wording.format_map(locals()), steps, a * p + b * q


def change(r):
    name, friend, things = names_and_things(r)
    a, p = several_between(r, 2, 2, 9)
    bill = pick(r, [bill for bill in BILLS if bill > a * p])
    wording = pick(r, LISTS["change"])
    steps = [f"All {a} cost {a} * {p} = {a * p} dollars.",
             f"The change is {bill} - {a * p} = {bill - a * p} dollars."]
    return wording.format_map(locals()), steps, bill - a * p


def giving(r):
    name, friend, things = names_and_things(r)
    other = "a friend"
    b, c = several_between(r, 2, 3, 40)
    left = between(r, 2, 60)
    a = b + c + left
    wording = pick(r, LISTS["giving"])
    steps = [f"{name} gives away {b} + {c} = {b + c}.",
             f"{name} has {a} - {b + c} = {left} left."]
    return wording.format_map(locals()), steps, left


def sharing(r):
    name, friend, things = names_and_things(r)
    parts = between(r, 2, 9)
    each = between(r, 3, 9)
    a = between(r, 2, parts * each - 2)
    b = parts * each - a
    wording = pick(r, LISTS["sharing"])
    steps = [f"There are {a} + {b} = {a + b} in all.",
             f"Each of the {parts} parts is {a + b} / {parts} = {each}."]
    return wording.format_map(locals()), steps, each


def product(r):
    name, friend = pick_two(r, LISTS["names"])
    box = pick(r, LISTS["boxes"])
    boxes = "boxes" if box == "box" else box + "s"
    a = between(r, 2, 9)
    b = 10 * between(r, 1, 9) + between(r, 1, 9)
    wording = pick(r, LISTS["product"])
    things = pick(r, LISTS["things"])
    return wording.format_map(locals()), multiply(a, b), a * b


def rectangle(r):
    name = pick(r, LISTS["names"])
    place = pick(r, LISTS["places"])
    a = 10 * between(r, 1, 9) + between(r, 1, 9)
    if r.random() < 0.5:
        b = between(r, 2, 9)
        wording = pick(r, LISTS["area"])
        steps = ["The area is length times width."] + multiply(b, a)
        return wording.format_map(locals()), steps, a * b
    b = between(r, 2, a - 1)
    wording = pick(r, LISTS["perimeter"])
    half = a + b
    steps = [f"One long side and one short side give {a} + {b} = {half} meters.",
             f"The perimeter is {half} + {half} = {2 * half} meters."]
    return wording.format_map(locals()), steps, 2 * half


def distance(r):
    first, second = pick_two(r, LISTS["rides"])
    a, b = several_between(r, 2, 2, 5)
    p = 10 * between(r, 1, 9)
    q = 10 * between(r, 1, 9)
    wording = pick(r, LISTS["distance"])
    name = pick(r, LISTS["names"])
    steps = [f"The first goes {a} * {p} = {a * p} km.",
             f"The second goes {b} * {q} = {b * q} km.",
             f"Together it is {a * p} + {b * q} = {a * p + b * q} km."]
    return wording.format_map(locals()), steps, a * p + b * q


def equation(r):
    name = pick(r, LISTS["names"])
    x = pick(r, LETTERS)
    a = between(r, 2, 9)
    b = between(r, 1, 99)
    value = between(r, 2, 9)
    c = a * value + b
    wording = pick(r, LISTS["equation"])
    steps = [f"Subtract {b} from both sides: {a}{x} = {c} - {b} = {a * value}.",
             f"Divide both sides by {a}: {x} = {a * value} / {a} = {value}."]
    return wording.format_map(locals()), steps, value


def sequence(r):
    first = between(r, 1, 60)
    difference = between(r, 2, 12)
    terms = [first + difference * i for i in range(between(r, 4, 5))]
    following = terms[-1] + difference
    numbers = ", ".join(map(str, terms))
    wording = pick(r, LISTS["sequence"])
    name = pick(r, LISTS["names"])
    things = pick(r, LISTS["things"])
    steps = [f"The first difference is {terms[1]} - {first} = {difference}.",
             f"The second difference is {terms[2]} - {terms[1]} = {difference}.",
             f"The next term is {terms[-1]} + {difference} = {following}."]
    return wording.format_map(locals()), steps, following


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
    steps = running(first, "+", others + [last])
    steps.append(f"The average of {count} numbers is {count * mean} / {count} = {mean}.")
    numbers = ", ".join(map(str, [first] + others)) + f" and {last}"
    wording = pick(r, LISTS["average"])
    name = pick(r, LISTS["names"])
    things = pick(r, LISTS["things"])
    return wording.format_map(locals()), steps, mean


def percent(r):
    name, friend, things = names_and_things(r)
    a = 10 * between(r, 2, 9)
    p = 10 * between(r, 1, 9)
    tenth = a // 10
    part = p * a // 100
    wording = pick(r, LISTS["percent"])
    steps = [f"10% of {a} is {a} / 10 = {tenth}.",
             f"{p}% of {a} is {p // 10} * {tenth} = {part}.",
             f"The rest is {a} - {part} = {a - part}."]
    return wording.format_map(locals()), steps, a - part


def compare(r):
    name, friend, things = names_and_things(r)
    a, b, c, d = several_between(r, 4, 5, 50)
    if a + b == c + d:  # in a tie nobody has more
        d += 1
    wording = pick(r, LISTS["compare"])
    less, more = sorted((a + b, c + d))
    steps = [f"{name} has {a} + {b} = {a + b}.",
             f"{friend} has {c} + {d} = {c + d}.",
             f"{more} is more than {less}, by {more} - {less} = {more - less}."]
    return wording.format_map(locals()), steps, more - less


KINDS = (total, purchase, change, giving, sharing, product, rectangle, distance, equation, sequence,
         average, percent, compare)
