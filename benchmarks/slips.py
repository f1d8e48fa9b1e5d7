"""
One wrong line in the real code, for the length of a `with` block.

    with slip(count_accepted, "right.long().cumprod(-1)", "right.long()"):
        ...     # here guesses count that stand after a wrong one
"""
import contextlib
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple


class Bug(NamedTuple):
    """A bug that is made on purpose. Its switch says in its docstring what it is."""
    switch: Callable            # returns a context manager; the code is wrong inside of its block
    failure: int | None         # its number in docs/troubleshooting.md
    caught_by: str              # a test that fails while it is on, see tests/test_bugs.py
    temperature: float = 0.0    # at which it is measured

    @property
    def name(self):
        return self.switch.__name__


@contextlib.contextmanager
def slip(function, right, wrong):
    """`function` has the text `wrong` in place of `right` in its source.

    The function itself gets other code, and its name stays where it is. So the bug also reaches
    whoever imported the function, and a bug goes with the code: ValueError if the function's source
    does not hold `right` just once.
    """
    function = inspect.unwrap(function)  # without decorators such as torch.no_grad
    source = textwrap.dedent(inspect.getsource(function))
    count = source.count(right)
    if count != 1:
        raise ValueError(f"{function.__qualname__} holds {right!r} {count} times, not once: "
                         "the code has changed, change the bug with it")
    right_code = function.__code__
    function.__code__ = code_of(source.replace(right, wrong), function.__name__)
    try:
        yield
    finally:
        function.__code__ = right_code


def code_of(source, name):
    """The code object of a function, from its source."""
    for constant in compile(source, "<a bug>", "exec").co_consts:
        if isinstance(constant, CodeType) and constant.co_name == name:
            return constant


@contextlib.contextmanager
def both(first, second):
    """Two context managers as one: some bugs need two lines."""
    with first, second:
        yield
