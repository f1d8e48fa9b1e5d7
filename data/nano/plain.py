r"""
Plain arithmetic and linear equations, asked in the ways that people type them first: "12*34", "What
is 12 + 30?", "3x+4=19". A random generator r goes in, (question, steps, answer) comes out.

Whole numbers only, in these ranges; what lies outside is refused (refusals.py):

    a + b       both 0 .. 999
    a - b       both 0 .. 999; the result may be negative
    a * b       two numbers of two digits, or one of one digit and one of up to three
    a / b       a of 0 .. 999, b of 1 .. 12, a not less than b unless it is 0; "14 remainder 2"
                where it does not come out even
    equations   ax + b = c, ax - b = c, x + b = c, x - b = c, ax = c: a of 2 .. 12, b of 1 .. 99, x
                of 0 .. 25 (to 99 where a is missing) or a fraction as 16/3; any letter

Every step is an equation that one can check: a sum takes one digit of its second number at a time,
a product one fact of the table, a quotient one digit of the result.
"""
from data.nano.common import between, multiply, parts, pick

# How a calculation is written,
EXPRESSIONS = {
    "+": ("{a} + {b}", "{a}+{b}", "{a} + {b}", "{a}+{b}", "{a} plus {b}", "{a} +{b}"),
    "-": ("{a} - {b}", "{a}-{b}", "{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} − {b}"),
    "*": ("{a} * {b}", "{a}*{b}", "{a} x {b}", "{a}x{b}", "{a} × {b}", "{a}×{b}",
          "{a} times {b}", "{a} multiplied by {b}"),
    "/": ("{a} / {b}", "{a}/{b}", "{a} / {b}", "{a}/{b}", "{a} ÷ {b}", "{a}÷{b}",
          "{a} divided by {b}"),
}
# what may stand around it,
FRAMES = (
    "{e}", "{e}=", "{e} =", "{e} = ?", "{e}=?", "{e}?", "{e} ?",
    "What is {e}?", "What is {e}?", "What is {e}?", "What's {e}?", "whats {e}", "WHAT IS {e}?",
    "How much is {e}?", "How much is {e}?", "What does {e} make?", "What does {e} equal?",
    "Compute {e}.", "Calculate {e}.", "Evaluate {e}.", "Solve {e}.", "Work out {e}.", "Find {e}.",
    "Compute: {e}", "Calculate: {e}", "Question: {e}", "Tell me {e}.", "What is the result of {e}?",
    "Please compute {e}.", "Please calculate {e}.", "Can you calculate {e}?", "Can you solve {e}?",
    "Hi, what is {e}?", "Hello! What is {e}?", "Do you know what {e} is?", "I need {e}.",
    "What is the value of {e}?", "What is the answer to {e}?", "{e} please", "{e} is what?",
)
# and how it is said without a sign.
SENTENCES = {
    "+": ("Add {a} and {b}.", "Add {b} to {a}.", "What is the sum of {a} and {b}?",
          "Compute the sum of {a} and {b}.", "{b} added to {a}", "{a} and {b} together"),
    "-": ("Subtract {b} from {a}.", "What is the difference between {a} and {b}?",
          "Take {b} from {a}.", "Compute the difference of {a} and {b}.", "{a} take away {b}",
          "{a} less {b}"),
    "*": ("Multiply {a} by {b}.", "Multiply {a} and {b}.", "What is the product of {a} and {b}?",
          "Compute the product of {a} and {b}.", "{a} multiplied with {b}"),
    "/": ("Divide {a} by {b}.", "What is the quotient of {a} and {b}?",
          "How often does {b} go into {a}?", "Compute the quotient of {a} and {b}.",
          "{a} over {b}"),
}

# The same for equations: {x} is the letter.
EQUATION_FRAMES = (
    "{e}", "{e}", "Solve {e}.", "Solve {e}", "Solve {e} for {x}.", "Solve for {x}: {e}",
    "Solve: {e}", "What is {x} if {e}?", "If {e}, what is {x}?", "Find {x}: {e}",
    "Find {x} if {e}.", "{e}, {x} = ?", "{e}. What is {x}?", "{e}, what is {x}?",
    "What is {x} in {e}?", "Solve the equation {e}.", "Please solve {e}.", "Can you solve {e}?",
    "Calculate {x}: {e}", "{e} find {x}", "{e} solve for {x}", "For which {x} is {e}?",
)
LETTERS = "xxxxxyyyzznabcdefghijklmopqrstuvw"  # some are likelier than others

# digits of a number, and of both factors
DIGITS = (1, 2, 2, 3)
FACTORS = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 2), (2, 2))

# --------------------------------------------------------------------------------------------------
# arithmetic


def addition(r):
    a = number(r, pick(r, DIGITS))
    b = number(r, pick(r, DIGITS))
    steps = []
    total = a
    for part in parts(b):  # 57 + 38: 57 + 30 = 87, 87 + 8 = 95
        steps.append(f"{total} + {part} = {total + part}.")
        total += part
    return ask(r, "+", a, b), steps, a + b


def subtraction(r):
    a = number(r, pick(r, DIGITS))
    b = number(r, pick(r, DIGITS))
    if a < b and r.random() < 0.7:  # people ask for negative results less often
        a, b = b, a
    steps = []
    rest = max(a, b)
    if a < b:
        steps.append(f"{a} is less than {b}, so the result is negative.")
    for part in parts(min(a, b)):
        steps.append(f"{rest} - {part} = {rest - part}.")
        rest -= part
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
        a = b * between(r, 0, 12)  # of the multiplication table
    elif r.random() < 0.5:
        a -= a % b
    steps = []
    quotient = 0
    rest = 0
    for digit in str(a):
        rest = 10 * rest + int(digit)
        is_first = not steps
        if rest < b and is_first and a >= b:
            continue  # the first digit is too small alone: 156 / 12 begins with 15
        times = rest // b
        steps.append(f"{rest} = {times} * {b} + {rest - times * b}.")
        quotient = 10 * quotient + times
        rest -= times * b
    answer = str(quotient)
    if rest:
        answer += f" remainder {rest}"
    return ask(r, "/", a, b), steps, answer


def number(r, digits):
    """A whole number of so many digits; one of six is round, as 40 or 700."""
    size = 10 ** (digits - 1)
    if digits > 1 and r.random() < 1 / 6:
        return size * between(r, 1, 9)
    smallest = size if digits > 1 else 0
    return between(r, smallest, 10 * size - 1)


def ask(r, sign, a, b):
    """One of the many ways to ask for a calculation."""
    if r.random() < 0.15:
        return loosely(r, pick(r, SENTENCES[sign])).format(a=a, b=b)
    expression = pick(r, EXPRESSIONS[sign]).format(a=a, b=b)
    return loosely(r, pick(r, FRAMES)).format(e=expression)


def loosely(r, frame):
    """A wording as people type it: now and then without capitals, or without its last mark."""
    if r.random() < 0.3:
        frame = frame.lower()
    if r.random() < 0.2:
        frame = frame.rstrip("?. ")
    return frame

# --------------------------------------------------------------------------------------------------
# equations


def equation(r):
    """ax + b = c and its simpler forms, solved as the word problem of that name is."""
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
        product += between(r, 0, a - 1)  # x is a fraction, mostly
    elif chance < 0.3:
        product = a * between(r, 13, 25)
    form = pick(r, ("ax + b", "ax + b", "ax + b", "b + ax", "ax", "x + b"))
    if form == "x + b":
        a = 1
        product = between(r, 0, 99)
    if form == "ax":
        b = 0
        sign = "+"
    if form == "b + ax":
        sign = "+"
    c = product + b if sign == "+" else product - b
    if c < 0:  # no negative numbers in a question
        sign = "+"
        c = product + b

    ax = x if a == 1 else f"{a}{x}"
    steps = []
    if form != "ax" and sign == "+":
        steps.append(f"Subtract {b} from both sides: {ax} = {c} - {b} = {product}.")
    if form != "ax" and sign == "-":
        steps.append(f"Add {b} to both sides: {ax} = {c} + {b} = {product}.")
    answer = str(product)
    if a > 1 and product % a == 0:
        answer = str(product // a)
        steps.append(f"Divide both sides by {a}: {x} = {product} / {a} = {answer}.")
    elif a > 1:
        answer = f"{product}/{a}"
        steps.append(f"Divide both sides by {a}: {x} = {product} / {a}.")
    return ask_equation(r, form, x, a, sign, b, c), steps, answer


def ask_equation(r, form, x, a, sign, b, c):
    """One of the many ways to write an equation, and to ask for its unknown."""
    ax = x
    if a > 1:
        ax = pick(r, ("{a}{x}", "{a}{x}", "{a} {x}", "{a}*{x}", "{a} * {x}")).format(a=a, x=x)
    sides = {"ax + b": [ax, sign, b, "=", c], "x + b": [x, sign, b, "=", c], "ax": [ax, "=", c],
             "b + ax": [b, sign, ax, "=", c]}
    space = pick(r, ("", " "))
    equation = space.join(map(str, sides[form]))
    return loosely(r, pick(r, EQUATION_FRAMES)).format(e=equation, x=x)


KINDS = (addition, subtraction, multiplication, division, equation)
