"""
Shared by all kinds of nano problems: random draws, lists to draw from, and the steps of a product.

The order in which numbers and words are drawn is part of the data set. A different order makes
different problems. The random generator r comes from a problem's seed.
"""
import os


def read_lists(name):
    """{list name: items} of a text file in this folder.

    A line "## fruits" begins a list of one item per line, "## fruits (words)" a list of words.
    """
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as f:
        blocks = f.read().split("\n## ")
    lists = {}
    for block in blocks[1:]:  # the text before the first list says what the file is
        title, *lines = block.strip().split("\n")
        if title.endswith(" (words)"):
            title = title.removesuffix(" (words)")
            lines = " ".join(lines).split()
        lists[title] = lines
    return lists


def between(r, low, high):
    """A whole number from low to high, both included. random.randint takes three times as long."""
    return low + int(r.random() * (high - low + 1))


def several_between(r, count, low, high):
    return [between(r, low, high) for _ in range(count)]


def pick(r, items):
    return items[int(r.random() * len(items))]


def pick_several(r, items, count):
    return [pick(r, items) for _ in range(count)]


def pick_two(r, items):
    """Two different items."""
    first = int(r.random() * len(items))
    distance = 1 + int(r.random() * (len(items) - 1))
    return items[first], items[first - distance]


def parts(n):
    """The round numbers that add up to a number: 457 is 400, 50, and 7, and 30 is 30 alone."""
    digits = str(n)
    zeros = range(len(digits) - 1, -1, -1)
    return [int(digit) * 10 ** z for digit, z in zip(digits, zeros) if digit != "0"] or [0]


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
    for part in parts(a):
        for other in parts(b):
            product = part * other
            steps.append(f"{part} * {other} = {product}.")
            if len(steps) > 1:
                steps += running(total, "+", [product])
            total += product
    return steps
