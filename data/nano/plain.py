"""
Plain arithmetic and linear equations, asked as people type them first: "12*34", "What is 12 + 30?",
"3x+4=19". Each function takes a random generator r and returns (question, steps, answer).

readme.md lists the ranges of the numbers. The target refuses everything else (refusals.py). Every
step is an equation that a reader can check: a sum takes one digit of its second number at a time, a
product one fact of the table, a quotient one digit of the result.

The other problems use the helpers at the end too. The order in which numbers and words are drawn is
part of the data set: a different order makes different problems.
"""
import itertools
import os


def read_lists(name):
    """{list name: items} of a text file in this folder.

    A line "## fruits" begins a list of one item per line, "## fruits (words)" a list of words.
    """
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as f:
        blocks = f.read().split("\n## ")
    lists = {}
    for block in blocks[1:]:  # the text before the first list says what the file is
        title, *items = block.strip().split("\n")
        title, has_words, _ = title.partition(" (words)")
        if has_words:
            items = " ".join(items).split()
        lists[title] = items
    return lists


LISTS = read_lists("plain.txt")
LETTERS = "xxxxxyyyzznabcdefghijklmopqrstuvw"  # x, y, z, and n are likelier than the others

# digits of a number, and of both factors
DIGITS = (1, 2, 2, 3)
FACTORS = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 2), (2, 2))


def addition(r):
    a = number(r, pick(r, DIGITS))
    b = number(r, pick(r, DIGITS))
    # 57 + 38: 57 + 30 = 87, 87 + 8 = 95
    return ask(r, "+", a, b), running(a, "+", parts(b)), a + b


def subtraction(r):
    a = number(r, pick(r, DIGITS))
    b = number(r, pick(r, DIGITS))
    if a < b and r.random() < 0.7:  # people ask for negative results less often
        a, b = b, a
    steps = running(max(a, b), "-", parts(min(a, b)))
    if a < b:
        steps.insert(0, f"{a} is less than {b}, so the result is negative.")
    return ask(r, "-", a, b), steps, a - b


def multiplication(r):
    a_digits, b_digits = pick(r, FACTORS)
    a = number(r, a_digits)
    b = number(r, b_digits)
    return ask(r, "*", a, b), multiply(a, b), a * b


def division(r):
    """Long division: each step brings down a digit and says how often the divisor goes into it."""
    b = between(r, 1, 12)
    a = between(r, b, 999)
    if r.random() < 0.3:
        a = b * between(r, 0, 12)  # from the multiplication table
    elif r.random() < 0.5:
        a -= a % b
    steps = []
    rest = 0
    for digit in str(a):
        rest = 10 * rest + int(digit)
        if rest < b <= a and not steps:
            continue  # the first digit alone is too small: 156 / 12 begins with 15
        times, after = divmod(rest, b)
        steps.append(f"{rest} = {times} * {b} + {after}.")
        rest = after
    answer = f"{a // b} remainder {rest}" if rest else a // b
    return ask(r, "/", a, b), steps, answer


def equation(r):
    """ax + b = c and its simpler forms. The solution is worded like that of a word problem."""
    x = pick(r, LETTERS)
    if r.random() < 0.1:
        x = x.upper()
    sign = pick(r, "++-")
    b = between(r, 1, 99)
    if r.random() < 0.5:
        b = between(r, 1, 12)
    a = between(r, 2, 12)
    chance = r.random()
    product = a * between(r, 0, 12)
    if chance < 0.15:
        product += between(r, 0, a - 1)  # x is usually a fraction
    elif chance < 0.3:
        product = a * between(r, 13, 25)
    form = pick(r, ("ax + b", "ax + b", "ax + b", "b + ax", "ax", "x + b"))
    if form == "x + b":
        a = 1
        product = between(r, 0, 99)
    if form == "b + ax" or product < b:  # no negative numbers in a question
        sign = "+"

    ax = x if a == 1 else f"{a}{x}"
    steps = []
    if form == "ax":
        c = product
    elif sign == "+":
        c = product + b
        steps.append(f"Subtract {b} from both sides: {ax} = {c} - {b} = {product}.")
    else:
        c = product - b
        steps.append(f"Add {b} to both sides: {ax} = {c} + {b} = {product}.")
    answer = product
    if a > 1 and product % a == 0:
        answer = product // a
        steps.append(f"Divide both sides by {a}: {x} = {product} / {a} = {answer}.")
    elif a > 1:
        answer = f"{product}/{a}"
        steps.append(f"Divide both sides by {a}: {x} = {product} / {a}.")

    # one of the many ways to write the equation and to ask for its unknown
    if a > 1:
        ax = pick(r, ("{a}{x}", "{a}{x}", "{a} {x}", "{a}*{x}", "{a} * {x}")).format(a=a, x=x)
    terms = {"ax": ax, "x": x, "+": sign, "b": str(b)}
    space = pick(r, ("", " "))
    left = space.join(terms[term] for term in form.split())
    frame = loosely(r, pick(r, LISTS["equation frames"]))
    return frame.format(e=f"{left}{space}={space}{c}", x=x), steps, answer


KINDS = (addition, subtraction, multiplication, division, equation)


def ask(r, sign, a, b):
    """One of the many ways to ask for a calculation."""
    if r.random() < 0.15:
        return loosely(r, pick(r, LISTS[f"sentences {sign}"])).format(a=a, b=b)
    expression = pick(r, LISTS[f"expressions {sign}"]).format(a=a, b=b)
    return loosely(r, pick(r, LISTS["frames"])).format(e=expression)


def loosely(r, frame):
    """A wording as people type it: sometimes without capitals, or without its last mark."""
    if r.random() < 0.3:
        frame = frame.lower()
    if r.random() < 0.2:
        frame = frame.rstrip("?. ")
    return frame


def parts(n):
    """The round numbers that add up to a number: 457 is 400, 50, and 7, and 30 is 30 alone."""
    zeros = reversed(range(len(str(n))))
    return [int(digit) * 10 ** z for digit, z in zip(str(n), zeros) if digit != "0"] or [0]


def running(total, sign, numbers):
    """The steps that add numbers to a total, or subtract them, one at a time."""
    steps = []
    for number in numbers:
        after = total + number if sign == "+" else total - number
        steps.append(f"{total} {sign} {number} = {after}.")
        total = after
    return steps


def multiply(a, b):
    """The steps of a * b: each part of a times each part of b, and the running sum. A product of
    two parts is one fact of the multiplication table, followed by zeros."""
    steps = []
    total = 0
    for part, other in itertools.product(parts(a), parts(b)):
        product = part * other
        steps.append(f"{part} * {other} = {product}.")
        if len(steps) > 1:
            steps += running(total, "+", [product])
        total += product
    return steps


def between(r, low, high):
    """A whole number from low to high, both included. random.randint takes three times as long."""
    return low + int(r.random() * (high - low + 1))


def several_between(r, count, low, high):
    return [between(r, low, high) for _ in range(count)]


def pick(r, items):
    return items[between(r, 0, len(items) - 1)]


def pick_two(r, items):
    """Two different items."""
    first = between(r, 0, len(items) - 1)
    distance = between(r, 1, len(items) - 1)
    return items[first], items[first - distance]


def number(r, digits):
    """A whole number of so many digits. One of six is round, for example 40 or 700."""
    if digits == 1:
        return between(r, 0, 9)
    size = 10 ** (digits - 1)
    if r.random() < 1 / 6:
        return size * between(r, 1, 9)
    return between(r, size, 10 * size - 1)
