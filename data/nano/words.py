"""
Thirteen kinds of word problem: a random generator r goes in, (question, steps, answer) comes out.

Questions vary in names, things and wordings. Solutions do not: one rigid wording for each kind, one
small calculation a step, every quantity repeated where it is used. That is what a target of 3M
parameters can learn to do right. It is also what makes its answers worth drafting: the frame is
easy to guess, the digits are not.
"""
from data.nano.common import between, multiply, pick, pick_two

NAMES = ("Ana", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jade",
         "Kai", "Lena", "Max", "Nora", "Omar", "Pia", "Ravi", "Sam", "Tara", "Zoe")
THINGS = ("apples", "balls", "beads", "books", "cards", "coins", "cups", "eggs",
          "hats", "lamps", "pears", "pens", "plums", "shells", "stamps", "toys")
BOXES = ("bag", "box", "crate", "jar", "tray")
PLACES = ("field", "garden", "hall", "park", "room", "rug", "wall", "yard")
RIDES = ("bike", "boat", "bus", "car", "train", "truck")
LETTERS = "abkmnpxyz"
BILLS = (20, 40, 50, 60, 80, 90, 100)

# Wordings of each kind. They share the numbers and the question, never the order of the words.
# {a} to {d} are numbers; {p} and {q} are prices, speeds or percents.
TOTAL = (
    "{name} finds {a} {things} on Monday, {b} on Tuesday and {c} on Friday. "
    "How many {things} does {name} find in all?",
    "On Monday {name} makes {a} {things}, on Tuesday {b} and on Friday {c}. "
    "How many {things} is that in all?",
    "A shop sells {a} {things} on Monday, {b} {things} on Tuesday and {c} {things} on Friday. "
    "{name} adds them up. What is the total?",
    "How many {things} does {name} get in three days, with {a} on Monday, {b} on Tuesday and {c} "
    "on Friday?",
)
PURCHASE = (
    "{name} buys {a} {things} at {p} dollars each and {b} {others} at {q} dollars each. "
    "How much does {name} pay?",
    "In a shop one of the {things} costs {p} dollars and one of the {others} costs {q} dollars. "
    "What do {a} {things} and {b} {others} cost {name}?",
    "How many dollars does {name} need for {a} {things} at {p} dollars each and {b} {others} at "
    "{q} dollars each?",
)
CHANGE = (
    "{name} buys {a} {things} at {p} dollars each and pays with {bill} dollars. "
    "How much change does {name} get?",
    "{name} has {bill} dollars and buys {a} {things}. Each costs {p} dollars. "
    "How many dollars are left?",
    "At {p} dollars each, {name} takes {a} {things} and hands {friend} a bill of {bill} dollars. "
    "How much does {name} get back?",
)
GIVING = (
    "{name} has {a} {things}. {name} gives {b} to {friend} and {c} to {other}. "
    "How many {things} does {name} have left?",
    "{name} gives {b} {things} to {friend} and {c} {things} to {other}. "
    "At first {name} had {a} {things}. How many are left?",
    "Of the {a} {things} that {name} has, {friend} takes {b} and {other} takes {c}. "
    "How many {things} are left?",
)
SHARING = (
    "{name} has {a} {things} and {friend} has {b}. They share all {things} equally among {parts} "
    "friends. How many does each friend get?",
    "{name} finds {a} {things} and {friend} finds {b} {things}. They put them in {parts} bags, the "
    "same in each bag. How many are in a bag?",
    "{parts} friends share the {a} {things} of {name} and the {b} {things} of {friend} equally. "
    "How many {things} does each get?",
)
PRODUCT = (
    "{name} has {a} {boxes} of {things}. There are {b} {things} in each {box}. "
    "How many {things} does {name} have?",
    "Each {box} holds {b} {things}. How many {things} are in the {a} {boxes} of {name}?",
    "{name} fills {a} {boxes} with {b} {things} each. How many {things} does {name} need?",
    "{name} asks {friend}: what is {a} * {b}?",
)
PERIMETER = (
    "The {place} of {name} is {a} meters long and {b} meters wide. "
    "What is its perimeter in meters?",
    "{name} walks once around a {place} that is {a} meters long and {b} meters wide. "
    "How many meters does {name} walk?",
    "What is the perimeter of a {place} of {a} by {b} meters that {name} draws?",
)
AREA = (
    "The {place} of {name} is {a} meters long and {b} meters wide. "
    "What is its area in square meters?",
    "{name} paints a {place} that is {a} meters long and {b} meters wide. "
    "How many square meters does {name} paint?",
    "What is the area of a {place} of {a} by {b} meters that {name} draws?",
)
DISTANCE = (
    "{name} takes a {first} for {a} hours at {p} km per hour and a {second} for {b} hours at {q} "
    "km per hour. How far is that?",
    "The {first} of {name} goes {p} km in an hour, the {second} {q} km in an hour. "
    "{name} spends {a} hours in the {first} and {b} hours in the {second}. How many km is that?",
    "How many km does {name} travel in {a} hours by {first} at {p} km per hour and {b} hours by "
    "{second} at {q} km per hour?",
)
EQUATION = (
    "Solve {a}{x} + {b} = {c} for {x}.",
    "If {a}{x} + {b} = {c}, what is {x}?",
    "Find the number {x} with {a}{x} + {b} = {c}.",
    "{name} knows that {a}{x} + {b} = {c}. What is {x}?",
    "{name} thinks of a number {x}. {a} times the number plus {b} is {c}. What is {x}?",
)
SEQUENCE = (
    "{name} writes {numbers}. What number comes next?",
    "What is the next term after {numbers} in the list of {name}?",
    "The {things} of {name} grow each day like this: {numbers}. "
    "How many are there on the next day?",
    "{name} counts {things}: {numbers}. What comes next?",
)
AVERAGE = (
    "{name} finds {numbers} {things} in {count} days. What is the average in a day?",
    "What is the average of the numbers {numbers} that {name} writes?",
    "In {count} games {name} scores {numbers} points. What is the average score of {name}?",
)
PERCENT = (
    "{name} has {a} {things} and gives {p}% of them to {friend}. "
    "How many {things} does {name} have left?",
    "{p}% of the {a} {things} of {name} are red. How many {things} are not red?",
    "A shop has {a} {things} and sells {p}% of them to {name}. How many {things} are left?",
)
COMPARE = (
    "{name} has {a} red {things} and {b} blue {things}. "
    "{friend} has {c} red {things} and {d} blue {things}. "
    "How many more {things} does the one with more have?",
    "{name} finds {a} {things} on Monday and {b} on Friday. "
    "{friend} finds {c} on Monday and {d} on Friday. "
    "By how many {things} do their totals differ?",
    "What is the difference in {things} if {name} has {a} here and {b} at home, "
    "and {friend} has {c} here and {d} at home?",
)

# --------------------------------------------------------------------------------------------------
# the kinds


def total(r):
    name = pick(r, NAMES)
    things = pick(r, THINGS)
    a = between(r, 5, 60)
    b = between(r, 5, 60)
    c = between(r, 5, 60)
    question = pick(r, TOTAL).format(name=name, things=things, a=a, b=b, c=c)
    steps = [
        f"Monday and Tuesday give {a} + {b} = {a + b}.",
        f"With Friday it is {a + b} + {c} = {a + b + c}.",
    ]
    return question, steps, a + b + c


def purchase(r):
    things, others = pick_two(r, THINGS)
    a = between(r, 2, 9)
    b = between(r, 2, 9)
    p = between(r, 2, 9)
    q = between(r, 2, 9)
    wording = pick(r, PURCHASE)
    name = pick(r, NAMES)
    question = wording.format(name=name, things=things, others=others, a=a, b=b, p=p, q=q)
    steps = [
        f"The first {a} cost {a} * {p} = {a * p} dollars.",
        f"The other {b} cost {b} * {q} = {b * q} dollars.",
        f"Together they cost {a * p} + {b * q} = {a * p + b * q} dollars.",
    ]
    return question, steps, a * p + b * q


def change(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    a = between(r, 2, 9)
    p = between(r, 2, 9)
    bill = pick(r, [bill for bill in BILLS if bill > a * p])
    question = pick(r, CHANGE).format(
        name=name, friend=friend, things=things, a=a, p=p, bill=bill)
    steps = [
        f"All {a} cost {a} * {p} = {a * p} dollars.",
        f"The change is {bill} - {a * p} = {bill - a * p} dollars.",
    ]
    return question, steps, bill - a * p


def giving(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    b = between(r, 3, 40)
    c = between(r, 3, 40)
    left = between(r, 2, 60)
    a = b + c + left
    question = pick(r, GIVING).format(
        name=name, friend=friend, other="a friend", things=things, a=a, b=b, c=c)
    steps = [
        f"{name} gives away {b} + {c} = {b + c}.",
        f"{name} has {a} - {b + c} = {left} left.",
    ]
    return question, steps, left


def sharing(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    parts = between(r, 2, 9)
    each = between(r, 3, 9)
    a = between(r, 2, parts * each - 2)
    b = parts * each - a
    question = pick(r, SHARING).format(
        name=name, friend=friend, things=things, parts=parts, a=a, b=b)
    steps = [
        f"There are {a} + {b} = {a + b} in all.",
        f"Each of the {parts} parts is {a + b} / {parts} = {each}.",
    ]
    return question, steps, each


def product(r):
    name, friend = pick_two(r, NAMES)
    box = pick(r, BOXES)
    boxes = "boxes" if box == "box" else box + "s"
    a = between(r, 2, 9)
    b = 10 * between(r, 1, 9) + between(r, 1, 9)
    wording = pick(r, PRODUCT)
    things = pick(r, THINGS)
    question = wording.format(
        name=name, friend=friend, box=box, boxes=boxes, things=things, a=a, b=b)
    return question, multiply(a, b), a * b


def rectangle(r):
    name = pick(r, NAMES)
    place = pick(r, PLACES)
    a = 10 * between(r, 1, 9) + between(r, 1, 9)
    is_area = r.random() < 0.5
    if is_area:
        b = between(r, 2, 9)
        question = pick(r, AREA).format(name=name, place=place, a=a, b=b)
        steps = ["The area is length times width."] + multiply(b, a)
        return question, steps, a * b
    b = between(r, 2, a - 1)
    question = pick(r, PERIMETER).format(name=name, place=place, a=a, b=b)
    half = a + b
    steps = [
        f"One long side and one short side give {a} + {b} = {half} meters.",
        f"The perimeter is {half} + {half} = {2 * half} meters.",
    ]
    return question, steps, 2 * half


def distance(r):
    first, second = pick_two(r, RIDES)
    a = between(r, 2, 5)
    b = between(r, 2, 5)
    p = 10 * between(r, 1, 9)
    q = 10 * between(r, 1, 9)
    wording = pick(r, DISTANCE)
    name = pick(r, NAMES)
    question = wording.format(name=name, first=first, second=second, a=a, b=b, p=p, q=q)
    steps = [
        f"The first goes {a} * {p} = {a * p} km.",
        f"The second goes {b} * {q} = {b * q} km.",
        f"Together it is {a * p} + {b * q} = {a * p + b * q} km.",
    ]
    return question, steps, a * p + b * q


def equation(r):
    name = pick(r, NAMES)
    x = pick(r, LETTERS)
    a = between(r, 2, 9)
    b = between(r, 1, 99)
    value = between(r, 2, 9)
    c = a * value + b
    question = pick(r, EQUATION).format(name=name, x=x, a=a, b=b, c=c)
    steps = [
        f"Subtract {b} from both sides: {a}{x} = {c} - {b} = {a * value}.",
        f"Divide both sides by {a}: {x} = {a * value} / {a} = {value}.",
    ]
    return question, steps, value


def sequence(r):
    first = between(r, 1, 60)
    difference = between(r, 2, 12)
    count = between(r, 4, 5)
    terms = [first + difference * i for i in range(count)]
    following = terms[-1] + difference
    wording = pick(r, SEQUENCE)
    name = pick(r, NAMES)
    things = pick(r, THINGS)
    question = wording.format(name=name, things=things, numbers=", ".join(map(str, terms)))
    steps = [
        f"The first difference is {terms[1]} - {first} = {difference}.",
        f"The second difference is {terms[2]} - {terms[1]} = {difference}.",
        f"The next term is {terms[-1]} + {difference} = {following}.",
    ]
    return question, steps, following


def average(r):
    count = between(r, 3, 4)
    mean = between(r, 6, 15)
    numbers = [between(r, mean - 4, mean + 4) for _ in range(count - 1)]
    # The last number makes the mean whole. Where it would be less than 1, it becomes 1, and the
    # first number gives what is missing.
    last = count * mean - sum(numbers)
    if last < 1:
        numbers[0] += last - 1
        last = 1
    steps = []
    running = numbers[0]
    for number in numbers[1:] + [last]:
        steps.append(f"{running} + {number} = {running + number}.")
        running += number
    steps.append(f"The average of {count} numbers is {running} / {count} = {mean}.")
    wording = pick(r, AVERAGE)
    name = pick(r, NAMES)
    things = pick(r, THINGS)
    listed = ", ".join(map(str, numbers)) + f" and {last}"
    question = wording.format(name=name, things=things, count=count, numbers=listed)
    return question, steps, mean


def percent(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    a = 10 * between(r, 2, 9)
    tens = between(r, 1, 9)
    p = 10 * tens
    part = tens * a // 10
    question = pick(r, PERCENT).format(name=name, friend=friend, things=things, a=a, p=p)
    steps = [
        f"10% of {a} is {a} / 10 = {a // 10}.",
        f"{p}% of {a} is {tens} * {a // 10} = {part}.",
        f"The rest is {a} - {part} = {a - part}.",
    ]
    return question, steps, a - part


def compare(r):
    name, friend = pick_two(r, NAMES)
    things = pick(r, THINGS)
    a = between(r, 5, 50)
    b = between(r, 5, 50)
    c = between(r, 5, 50)
    d = between(r, 5, 50)
    if a + b == c + d:  # in a tie nobody has more
        d += 1
    more = max(a + b, c + d)
    less = min(a + b, c + d)
    question = pick(r, COMPARE).format(
        name=name, friend=friend, things=things, a=a, b=b, c=c, d=d)
    steps = [
        f"{name} has {a} + {b} = {a + b}.",
        f"{friend} has {c} + {d} = {c + d}.",
        f"{more} is more than {less}, by {more} - {less} = {more - less}.",
    ]
    return question, steps, more - less


KINDS = (total, purchase, change, giving, sharing, product, rectangle, distance, equation, sequence,
         average, percent, compare)
