"""
Puts one wrong line into the real code for the length of a `with` block.

    with inject_bug(count_accepted, "right.long().cumprod(-1)", "right.long()"):
        ...     # here correct guesses count even if they follow a wrong one
"""
import contextlib
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple


class Edit(NamedTuple):
    """In the source of `function`, the text `right` becomes `wrong`."""
    function: Callable
    right: str
    wrong: str


class Bug:
    """A named bug of one or more edits.

    caught_by: the test that fails while the bug is on; tests/test_bugs.py checks that it does.
    temperature: the temperature at which the bug's cost is measured.
    """

    def __init__(self, name, caught_by, *edits, temperature=0.0):
        self.name = name
        self.caught_by = caught_by
        self.edits = edits
        self.temperature = temperature

    @contextlib.contextmanager
    def injected(self):
        """The bug is on inside of the `with` block."""
        with contextlib.ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(inject_bug(*edit))
            yield


@contextlib.contextmanager
def inject_bug(function, right, wrong):
    """Replaces the text `right` in a function's source by `wrong`.

    The function object stays and only its code changes, so the bug also reaches modules that
    imported the function by name. Raises ValueError if the source does not contain `right` exactly
    once.
    """
    function = inspect.unwrap(function)  # without decorators such as torch.no_grad
    source = textwrap.dedent(inspect.getsource(function))
    count = source.count(right)
    if count != 1:
        raise ValueError(f"{function.__qualname__} contains {right!r} {count} times instead of "
                         "once: adapt the bug to the changed code")
    right_code = function.__code__
    function.__code__ = code_of(source.replace(right, wrong), function.__name__)
    try:
        yield
    finally:
        function.__code__ = right_code


def code_of(source, name):
    """The code object of the function `name` in a source."""
    for constant in compile(source, "<a bug>", "exec").co_consts:
        if isinstance(constant, CodeType) and constant.co_name == name:
            return constant
