"""
Puts one wrong line into the real code for the length of a `with` block.

    with inject_bug(count_accepted, "right.long().cumprod(-1)", "right.long()"):
        ...     # here correct guesses count even if they follow a wrong one
"""
import contextlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType


@dataclass
class Bug:
    """In the source of `function`, the text `right` becomes `wrong`.

    caught_by: the test that fails while the bug is on; tests/test_bugs.py checks that it does.
    also: a second edit (function, right, wrong). temperature: that of the measurement.
    """
    name: str
    caught_by: str | None
    function: Callable | None = None    # None: no bug, to measure the correct code
    right: str = ""
    wrong: str = ""
    also: tuple | None = None
    temperature: float = 0.0

    @contextlib.contextmanager
    def injected(self):
        """The bug is on inside the `with` block."""
        with contextlib.ExitStack() as stack:
            if self.function is not None:
                stack.enter_context(inject_bug(self.function, self.right, self.wrong))
            if self.also is not None:
                stack.enter_context(inject_bug(*self.also))
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
    module_code = compile(source.replace(right, wrong), "<a bug>", "exec")
    for constant in module_code.co_consts:
        if isinstance(constant, CodeType) and constant.co_name == function.__name__:
            function.__code__ = constant
    try:
        yield
    finally:
        function.__code__ = right_code
