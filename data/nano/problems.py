r"""
The nano task: arithmetic and word problems, each with a worked solution in steps. Nothing is downloaded; problem
number `seed` is a pure function of `seed`, and its split a pure function of its text.

    python data/nano/problems.py        # three samples of each kind

Questions vary (names, things, wordings); solutions do not: one rigid wording a kind, one small calculation a step,
every quantity repeated where it is used. That is what a 3M-parameter target can learn to do right, and what makes
its answers worth drafting: the frame is easy to guess, the digits are not. Every solution ends in
"The answer is \boxed{161}."
"""

import random
import zlib

NAMES = ("Ana", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jade",
         "Kai", "Lena", "Max", "Nora", "Omar", "Pia", "Ravi", "Sam", "Tara", "Zoe")
THINGS = ("apples", "balls", "beads", "books", "cards", "coins", "cups", "eggs",
          "hats", "lamps", "pears", "pens", "plums", "shells", "stamps", "toys")
BOXES = ("bag", "box", "crate", "jar", "tray")
PLACES = ("field", "garden", "hall", "park", "room", "rug", "wall", "yard")
RIDES = ("bike", "boat", "bus", "car", "train", "truck")
LETTERS = "abkmnpxyz"

# what the wordings of one kind have in common is its numbers and its question, never the order of the words
TOTAL = (
    "{n} finds {a} {t} on Monday, {b} on Tuesday and {c} on Friday. How many {t} does {n} find in all?",
    "On Monday {n} makes {a} {t}, on Tuesday {b} and on Friday {c}. How many {t} is that in all?",
    "A shop sells {a} {t} on Monday, {b} {t} on Tuesday and {c} {t} on Friday. {n} adds them up. What is the total?",
    "How many {t} does {n} get in three days, with {a} on Monday, {b} on Tuesday and {c} on Friday?",
)
PURCHASE = (
    "{n} buys {a} {t} at {p} dollars each and {b} {u} at {q} dollars each. How much does {n} pay?",
    "In a shop one of the {t} costs {p} dollars and one of the {u} costs {q} dollars. "
    "What do {a} {t} and {b} {u} cost {n}?",
    "How many dollars does {n} need for {a} {t} at {p} dollars each and {b} {u} at {q} dollars each?",
)
CHANGE = (
    "{n} buys {a} {t} at {p} dollars each and pays with {m} dollars. How much change does {n} get?",
    "{n} has {m} dollars and buys {a} {t}. Each costs {p} dollars. How many dollars are left?",
    "At {p} dollars each, {n} takes {a} {t} and hands {o} a bill of {m} dollars. How much does {n} get back?",
)
GIVING = (
    "{n} has {a} {t}. {n} gives {b} to {m} and {c} to {o}. How many {t} does {n} have left?",
    "{n} gives {b} {t} to {m} and {c} {t} to {o}. At first {n} had {a} {t}. How many are left?",
    "Of the {a} {t} that {n} has, {m} takes {b} and {o} takes {c}. How many {t} are left?",
)
SHARING = (
    "{n} has {a} {t} and {m} has {b}. They share all {t} equally among {k} friends. How many does each friend get?",
    "{n} finds {a} {t} and {m} finds {b} {t}. They put them in {k} bags, the same in each bag. How many are in a bag?",
    "{k} friends share the {a} {t} of {n} and the {b} {t} of {m} equally. How many {t} does each get?",
)
PRODUCT = (
    "{n} has {k} {x} of {t}. There are {a} {t} in each {y}. How many {t} does {n} have?",
    "Each {y} holds {a} {t}. How many {t} are in the {k} {x} of {n}?",
    "{n} fills {k} {x} with {a} {t} each. How many {t} does {n} need?",
    "{n} asks {m}: what is {k} * {a}?",
)
PERIMETER = (
    "The {y} of {n} is {a} meters long and {b} meters wide. What is its perimeter in meters?",
    "{n} walks once around a {y} that is {a} meters long and {b} meters wide. How many meters does {n} walk?",
    "What is the perimeter of a {y} of {a} by {b} meters that {n} draws?",
)
AREA = (
    "The {y} of {n} is {a} meters long and {b} meters wide. What is its area in square meters?",
    "{n} paints a {y} that is {a} meters long and {b} meters wide. How many square meters does {n} paint?",
    "What is the area of a {y} of {a} by {b} meters that {n} draws?",
)
DISTANCE = (
    "{n} takes a {x} for {a} hours at {p} km per hour and a {y} for {b} hours at {q} km per hour. How far is that?",
    "The {x} of {n} goes {p} km in an hour, the {y} {q} km in an hour. "
    "{n} spends {a} hours in the {x} and {b} hours in the {y}. How many km is that?",
    "How many km does {n} travel in {a} hours by {x} at {p} km per hour and {b} hours by {y} at {q} km per hour?",
)
EQUATION = (
    "Solve {a}{x} + {b} = {c} for {x}.",
    "If {a}{x} + {b} = {c}, what is {x}?",
    "Find the number {x} with {a}{x} + {b} = {c}.",
    "{n} knows that {a}{x} + {b} = {c}. What is {x}?",
    "{n} thinks of a number {x}. {a} times the number plus {b} is {c}. What is {x}?",
)
SEQUENCE = (
    "{n} writes {s}. What number comes next?",
    "What is the next term after {s} in the list of {n}?",
    "The {t} of {n} grow each day like this: {s}. How many are there on the next day?",
    "{n} counts {t}: {s}. What comes next?",
)
AVERAGE = (
    "{n} finds {s} {t} in {k} days. What is the average in a day?",
    "What is the average of the numbers {s} that {n} writes?",
    "In {k} games {n} scores {s} points. What is the average score of {n}?",
)
PERCENT = (
    "{n} has {a} {t} and gives {p}% of them to {m}. How many {t} does {n} have left?",
    "{p}% of the {a} {t} of {n} are red. How many {t} are not red?",
    "A shop has {a} {t} and sells {p}% of them to {n}. How many {t} are left?",
)
COMPARE = (
    "{n} has {a} red {t} and {b} blue {t}. {m} has {c} red {t} and {d} blue {t}. "
    "How many more {t} does the one with more have?",
    "{n} finds {a} {t} on Monday and {b} on Friday. {m} finds {c} on Monday and {d} on Friday. "
    "By how many {t} do their totals differ?",
    "What is the difference in {t} if {n} has {a} here and {b} at home, and {m} has {c} here and {d} at home?",
)

# ---------------------------------------------------------------------------------------------------------------------
# kinds: a random generator in, (question, steps, answer) out


def between(r, low, high):
    """A whole number from low to high, both included; random.randint would take three times as long."""
    return low + int(r.random() * (high - low + 1))


def pick(r, items):
    return items[int(r.random() * len(items))]


def two(r, items):
    """Two different items."""
    i = int(r.random() * len(items))
    return items[i], items[i - 1 - int(r.random() * (len(items) - 1))]


def times(a, b):
    """The steps of a * b for one digit a and two digits b = 10 s + t: each needs the table or one sum."""
    s, t = b - b % 10, b % 10
    return [f"{a} * {b} = {a} * {s} + {a} * {t}.", f"{a} * {s} = {a * s}.", f"{a} * {t} = {a * t}.",
            f"{a * s} + {a * t} = {a * b}."]


def total(r):
    n, t, a, b, c = pick(r, NAMES), pick(r, THINGS), between(r, 5, 60), between(r, 5, 60), between(r, 5, 60)
    return pick(r, TOTAL).format(n=n, t=t, a=a, b=b, c=c), [
        f"Monday and Tuesday give {a} + {b} = {a + b}.",
        f"With Friday it is {a + b} + {c} = {a + b + c}."], a + b + c


def purchase(r):
    (t, u), a, b, p, q = two(r, THINGS), between(r, 2, 9), between(r, 2, 9), between(r, 2, 9), between(r, 2, 9)
    return pick(r, PURCHASE).format(n=pick(r, NAMES), t=t, u=u, a=a, b=b, p=p, q=q), [
        f"The first {a} cost {a} * {p} = {a * p} dollars.",
        f"The other {b} cost {b} * {q} = {b * q} dollars.",
        f"Together they cost {a * p} + {b * q} = {a * p + b * q} dollars."], a * p + b * q


def change(r):
    (n, o), t, a, p = two(r, NAMES), pick(r, THINGS), between(r, 2, 9), between(r, 2, 9)
    m = pick(r, [bill for bill in (20, 40, 50, 60, 80, 90, 100) if bill > a * p])
    return pick(r, CHANGE).format(n=n, o=o, t=t, a=a, p=p, m=m), [
        f"All {a} cost {a} * {p} = {a * p} dollars.",
        f"The change is {m} - {a * p} = {m - a * p} dollars."], m - a * p


def giving(r):
    (n, m), o, t = two(r, NAMES), "a friend", pick(r, THINGS)
    b, c = between(r, 3, 40), between(r, 3, 40)
    a = b + c + between(r, 2, 60)
    return pick(r, GIVING).format(n=n, m=m, o=o, t=t, a=a, b=b, c=c), [
        f"{n} gives away {b} + {c} = {b + c}.",
        f"{n} has {a} - {b + c} = {a - b - c} left."], a - b - c


def sharing(r):
    (n, m), t, k, each = two(r, NAMES), pick(r, THINGS), between(r, 2, 9), between(r, 3, 9)
    a = between(r, 2, k * each - 2)
    return pick(r, SHARING).format(n=n, m=m, t=t, k=k, a=a, b=k * each - a), [
        f"There are {a} + {k * each - a} = {k * each} in all.",
        f"Each of the {k} parts is {k * each} / {k} = {each}."], each


def product(r):
    (n, m), y, k, a = two(r, NAMES), pick(r, BOXES), between(r, 2, 9), 10 * between(r, 1, 9) + between(r, 1, 9)
    x = y + ("es" if y == "box" else "s")
    return pick(r, PRODUCT).format(n=n, m=m, y=y, x=x, t=pick(r, THINGS), k=k, a=a), times(k, a), k * a


def rectangle(r):
    n, y, a = pick(r, NAMES), pick(r, PLACES), 10 * between(r, 1, 9) + between(r, 1, 9)
    if r.random() < 0.5:
        b = between(r, 2, 9)
        return pick(r, AREA).format(n=n, y=y, a=a, b=b), ["The area is length times width."] + times(b, a), a * b
    b = between(r, 2, a - 1)
    return pick(r, PERIMETER).format(n=n, y=y, a=a, b=b), [
        f"One long side and one short side give {a} + {b} = {a + b} meters.",
        f"The perimeter is {a + b} + {a + b} = {2 * (a + b)} meters."], 2 * (a + b)


def distance(r):
    (x, y), a, b = two(r, RIDES), between(r, 2, 5), between(r, 2, 5)
    p, q = 10 * between(r, 1, 9), 10 * between(r, 1, 9)
    return pick(r, DISTANCE).format(n=pick(r, NAMES), x=x, y=y, a=a, b=b, p=p, q=q), [
        f"The first goes {a} * {p} = {a * p} km.",
        f"The second goes {b} * {q} = {b * q} km.",
        f"Together it is {a * p} + {b * q} = {a * p + b * q} km."], a * p + b * q


def equation(r):
    n, x, a, b, value = pick(r, NAMES), pick(r, LETTERS), between(r, 2, 9), between(r, 1, 99), between(r, 2, 9)
    return pick(r, EQUATION).format(n=n, x=x, a=a, b=b, c=a * value + b), [
        f"Subtract {b} from both sides: {a}{x} = {a * value + b} - {b} = {a * value}.",
        f"Divide both sides by {a}: {x} = {a * value} / {a} = {value}."], value


def sequence(r):
    first, d, shown = between(r, 1, 60), between(r, 2, 12), between(r, 4, 5)
    terms = [first + d * i for i in range(shown)]
    s = ", ".join(map(str, terms))
    return pick(r, SEQUENCE).format(n=pick(r, NAMES), t=pick(r, THINGS), s=s), [
        f"The first difference is {terms[1]} - {first} = {d}.",
        f"The second difference is {terms[2]} - {terms[1]} = {d}.",
        f"The next term is {terms[-1]} + {d} = {terms[-1] + d}."], terms[-1] + d


def average(r):
    k, mean = between(r, 3, 4), between(r, 6, 15)
    rows = [between(r, mean - 4, mean + 4) for _ in range(k - 1)]
    # the last number makes the mean whole; a far-off one would be negative, so its sum is moved to the first
    last = k * mean - sum(rows)
    rows, last = ([rows[0] + last - 1] + rows[1:], 1) if last < 1 else (rows, last)
    rows.append(last)
    steps, running = [], rows[0]
    for value in rows[1:]:
        steps.append(f"{running} + {value} = {running + value}.")
        running += value
    s = ", ".join(map(str, rows[:-1])) + f" and {last}"
    question = pick(r, AVERAGE).format(n=pick(r, NAMES), t=pick(r, THINGS), k=k, s=s)
    return question, steps + [f"The average of {k} numbers is {running} / {k} = {mean}."], mean


def percent(r):
    (n, m), t, a, tens = two(r, NAMES), pick(r, THINGS), 10 * between(r, 2, 9), between(r, 1, 9)
    part = tens * a // 10
    return pick(r, PERCENT).format(n=n, m=m, t=t, a=a, p=10 * tens), [
        f"10% of {a} is {a} / 10 = {a // 10}.",
        f"{10 * tens}% of {a} is {tens} * {a // 10} = {part}.",
        f"The rest is {a} - {part} = {a - part}."], a - part


def compare(r):
    (n, m), t = two(r, NAMES), pick(r, THINGS)
    a, b, c, d = between(r, 5, 50), between(r, 5, 50), between(r, 5, 50), between(r, 5, 50)
    d += a + b == c + d  # a tie has no one with more
    high, low = max(a + b, c + d), min(a + b, c + d)
    return pick(r, COMPARE).format(n=n, m=m, t=t, a=a, b=b, c=c, d=d), [
        f"{n} has {a} + {b} = {a + b}.",
        f"{m} has {c} + {d} = {c + d}.",
        f"{high} is more than {low}, by {high} - {low} = {high - low}."], high - low


KINDS = (total, purchase, change, giving, sharing, product, rectangle, distance, equation, sequence, average, percent,
         compare)

# ---------------------------------------------------------------------------------------------------------------------
# the data set


def problem(seed: int) -> tuple[str, str, str]:
    """(question, worked solution, answer), a pure function of the seed."""
    r = random.Random(f"nano-{seed}")
    question, steps, answer = pick(r, KINDS)(r)
    lines = [f"Step {i}: {step}\n" for i, step in enumerate(steps, 1)]
    return question, "".join(lines) + f"The answer is \\boxed{{{answer}}}.", str(answer)


def split_of(question: str) -> str:
    """ "train", "val" (2 %) or "test" (2 %), by the text alone: no question is in two splits, whatever its seed."""
    slot = zlib.crc32(question.encode()) % 100
    return "val" if slot < 2 else "test" if slot < 4 else "train"


def problems(split: str, count: int, start: int = 0):
    """Yields (question, solution, answer) number start .. start + count - 1 of the split's distinct problems.

    The stream of a split is fixed, so calls with adjoining ranges never share a question. Skipping costs as much as
    generating, and one val or test problem costs fifty, as the other seeds belong to the training split.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split is {split!r}; use train, val or test")
    seen, seed = set(), 0
    while len(seen) < start + count:
        row, seed = problem(seed), seed + 1
        if row[0] in seen or split_of(row[0]) != split:
            continue
        seen.add(row[0])
        if len(seen) > start:
            yield row


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with its braces balanced; None if there is none or it never closes."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin, depth = begin + len("\\boxed{"), 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


if __name__ == "__main__":
    for kind in KINDS:
        print(f"--- {kind.__name__}\n")
        for number in range(3):
            question, steps, answer = kind(random.Random(f"sample-{number}"))
            print(question, *(f"Step {i}: {step}" for i, step in enumerate(steps, 1)), f"[{answer}]\n", sep="\n")
