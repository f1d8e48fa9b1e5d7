"""
Thirteen kinds of word problem. Each function takes a random generator r and returns (question,
steps, answer).

Questions vary in names, things, and wordings (words.txt). Solutions have one fixed wording per
kind, one small calculation per step, and they repeat every quantity where they use it. A target of
3M parameters can learn such solutions. They are also worth drafting: the frame is easy to guess,
and the digits are not.
"""
from data.nano.common import (
    between, multiply, pick, pick_two, read_lists, running, several_between)

LISTS = read_lists("words.txt")
NAMES = LISTS["names"]
THINGS = LISTS["things"]
LETTERS = "abkmnpxyz"
BILLS = (20, 40, 50, 60, 80, 90, 100)


def total(r):
    name = pick(r, NAMES)
    things = pick(r, THINGS)
    a, b, c = several_between(r, 3, 5, 60)
    question = pick(r, LISTS["total"]).format(name=name, things=things, a=a, b=b, c=c)
    steps = [f"Monday and Tuesday give {a} + {b} = {a + b}.",
             f"With Friday it is {a + b} + {c} = {a + b + c}."]
    return question, steps, a + b + c


def purchase(r):
    things, others = pick_two(r, THINGS)
    a, b, p, q = several_between(r, 4, 2, 9)
    question = pick(r, LISTS["purchase"]).format(
        name=pick(r, NAMES), things=things, others=others, a=a, b=b, p=p, q=q)
    steps = [f"The first {a} cost {a} * {p} = {a * p} dollars.",
             f"The other {b} cost {b} * {q} = {b * q} dollars.",
             f"Together they cost {a * p} + {b * q} = {a * p + b * q} dollars."]
    return question, steps, a * p + b * q


def change(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    a, p = several_between(r, 2, 2, 9)
    bill = pick(r, [bill for bill in BILLS if bill > a * p])
    question = pick(r, LISTS["change"]).format(
        name=name, friend=friend, things=things, a=a, p=p, bill=bill)
    steps = [f"All {a} cost {a} * {p} = {a * p} dollars.",
             f"The change is {bill} - {a * p} = {bill - a * p} dollars."]
    return question, steps, bill - a * p


def giving(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    b, c = several_between(r, 2, 3, 40)
    left = between(r, 2, 60)
    a = b + c + left
    question = pick(r, LISTS["giving"]).format(
        name=name, friend=friend, other="a friend", things=things, a=a, b=b, c=c)
    steps = [f"{name} gives away {b} + {c} = {b + c}.",
             f"{name} has {a} - {b + c} = {left} left."]
    return question, steps, left


def sharing(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    parts = between(r, 2, 9)
    each = between(r, 3, 9)
    a = between(r, 2, parts * each - 2)
    b = parts * each - a
    question = pick(r, LISTS["sharing"]).format(
        name=name, friend=friend, things=things, parts=parts, a=a, b=b)
    steps = [f"There are {a} + {b} = {a + b} in all.",
             f"Each of the {parts} parts is {a + b} / {parts} = {each}."]
    return question, steps, each


def product(r):
    name, friend = pick_two(r, NAMES)
    box = pick(r, LISTS["boxes"])
    boxes = "boxes" if box == "box" else box + "s"
    a = between(r, 2, 9)
    b = 10 * between(r, 1, 9) + between(r, 1, 9)
    question = pick(r, LISTS["product"]).format(
        name=name, friend=friend, box=box, boxes=boxes, things=pick(r, THINGS), a=a, b=b)
    return question, multiply(a, b), a * b


def rectangle(r):
    name = pick(r, NAMES)
    place = pick(r, LISTS["places"])
    a = 10 * between(r, 1, 9) + between(r, 1, 9)
    is_area = r.random() < 0.5
    if is_area:
        b = between(r, 2, 9)
        question = pick(r, LISTS["area"]).format(name=name, place=place, a=a, b=b)
        steps = ["The area is length times width."] + multiply(b, a)
        return question, steps, a * b
    b = between(r, 2, a - 1)
    question = pick(r, LISTS["perimeter"]).format(name=name, place=place, a=a, b=b)
    half = a + b
    steps = [f"One long side and one short side give {a} + {b} = {half} meters.",
             f"The perimeter is {half} + {half} = {2 * half} meters."]
    return question, steps, 2 * half


def distance(r):
    first, second = pick_two(r, LISTS["rides"])
    a, b = several_between(r, 2, 2, 5)
    p = 10 * between(r, 1, 9)
    q = 10 * between(r, 1, 9)
    question = pick(r, LISTS["distance"]).format(
        name=pick(r, NAMES), first=first, second=second, a=a, b=b, p=p, q=q)
    steps = [f"The first goes {a} * {p} = {a * p} km.",
             f"The second goes {b} * {q} = {b * q} km.",
             f"Together it is {a * p} + {b * q} = {a * p + b * q} km."]
    return question, steps, a * p + b * q


def equation(r):
    name = pick(r, NAMES)
    x = pick(r, LETTERS)
    a = between(r, 2, 9)
    b = between(r, 1, 99)
    value = between(r, 2, 9)
    c = a * value + b
    question = pick(r, LISTS["equation"]).format(name=name, x=x, a=a, b=b, c=c)
    steps = [f"Subtract {b} from both sides: {a}{x} = {c} - {b} = {a * value}.",
             f"Divide both sides by {a}: {x} = {a * value} / {a} = {value}."]
    return question, steps, value


def sequence(r):
    first = between(r, 1, 60)
    difference = between(r, 2, 12)
    count = between(r, 4, 5)
    terms = [first + difference * i for i in range(count)]
    following = terms[-1] + difference
    question = pick(r, LISTS["sequence"]).format(
        name=pick(r, NAMES), things=pick(r, THINGS), numbers=", ".join(map(str, terms)))
    steps = [f"The first difference is {terms[1]} - {first} = {difference}.",
             f"The second difference is {terms[2]} - {terms[1]} = {difference}.",
             f"The next term is {terms[-1]} + {difference} = {following}."]
    return question, steps, following


def average(r):
    count = between(r, 3, 4)
    mean = between(r, 6, 15)
    numbers = several_between(r, count - 1, mean - 4, mean + 4)
    # The last number makes the mean whole. If it would be less than 1, it becomes 1, and the first
    # number makes up for the difference.
    last = count * mean - sum(numbers)
    if last < 1:
        numbers[0] += last - 1
        last = 1
    steps = running(numbers[0], "+", numbers[1:] + [last])
    steps.append(f"The average of {count} numbers is {count * mean} / {count} = {mean}.")
    listed = ", ".join(map(str, numbers)) + f" and {last}"
    question = pick(r, LISTS["average"]).format(
        name=pick(r, NAMES), things=pick(r, THINGS), count=count, numbers=listed)
    return question, steps, mean


def percent(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    a = 10 * between(r, 2, 9)
    tens = between(r, 1, 9)
    p = 10 * tens
    part = tens * a // 10
    question = pick(r, LISTS["percent"]).format(
        name=name, friend=friend, things=things, a=a, p=p)
    steps = [f"10% of {a} is {a} / 10 = {a // 10}.",
             f"{p}% of {a} is {tens} * {a // 10} = {part}.",
             f"The rest is {a} - {part} = {a - part}."]
    return question, steps, a - part


def compare(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    a, b, c, d = several_between(r, 4, 5, 50)
    if a + b == c + d:  # in a tie nobody has more
        d += 1
    question = pick(r, LISTS["compare"]).format(
        name=name, friend=friend, things=things, a=a, b=b, c=c, d=d)
    less, more = sorted((a + b, c + d))
    steps = [f"{name} has {a} + {b} = {a + b}.",
             f"{friend} has {c} + {d} = {c + d}.",
             f"{more} is more than {less}, by {more} - {less} = {more - less}."]
    return question, steps, more - less


KINDS = (total, purchase, change, giving, sharing, product, rectangle, distance, equation, sequence,
         average, percent, compare)
