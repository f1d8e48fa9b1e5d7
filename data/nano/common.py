"""
What all kinds of nano problems share: random draws, and the steps of a product.

A random generator r comes from a problem's seed. The order in which numbers and words are drawn is
part of the data set: another order makes other problems.
"""


def between(r, low, high):
    """A whole number from low to high, both included. random.randint takes three times as long."""
    return low + int(r.random() * (high - low + 1))


def pick(r, items):
    return items[int(r.random() * len(items))]


def pick_two(r, items):
    """Two different items."""
    first = int(r.random() * len(items))
    distance = 1 + int(r.random() * (len(items) - 1))
    return items[first], items[first - distance]


def parts(n):
    """The round numbers that a number is the sum of: 457 is 400, 50 and 7, 30 is 30 alone."""
    digits = str(n)
    result = []
    for place, digit in enumerate(digits):
        if digit != "0":
            result.append(int(digit) * 10 ** (len(digits) - 1 - place))
    return result or [0]


def multiply(a, b):
    """The steps of a * b: each part of a times each part of b, added up as they come.

    A product of two parts is one fact of the multiplication table, with zeros behind it.
    """
    steps = []
    total = None
    for part in parts(a):
        for other in parts(b):
            product = part * other
            steps.append(f"{part} * {other} = {product}.")
            if total is None:
                total = product
            else:
                steps.append(f"{total} + {product} = {total + product}.")
                total += product
    return steps
