"""Both planners at once: whatever is asked, the answers of C++ and of Python are compared byte for byte, refusals
too."""

import contextlib
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mimo_kernels import planner as python
from mimo_kernels.attention import frame
from mimo_kernels.core import backends, host, launch

PLANNERS = [module for module in (backends.extension(), python) if module is not None]


class BothPlanners:
    """Answers like the extension. `compared`: how many answers and refusals were the same."""

    def __init__(self):
        self.__name__ = host.PYTHON if backends.extension() is None else "mimo_kernels._C"
        self.schedule_layout = python.schedule_layout
        self.compared = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            answers = [_answer(getattr(module, name), arguments, options) for module in PLANNERS]
            kind, answer = answers[0]
            # pybind11 refuses types before anything is looked at, and in words of its own.
            same = answers[-1][0] is not None if kind is TypeError else answers[0] == answers[-1]
            if not same:
                told = (textwrap.shorten(repr(x), 500) for x in ((arguments, options), *answers))
                pytest.fail("{}{}: C++ answers {}, Python {}".format(name, *told))
            self.compared += 1
            if kind is not None:
                raise answer if kind is TypeError else kind(answer)
            return answer

        return call


def _answer(function: Callable, arguments: tuple, options: dict) -> tuple:
    """(None, what it returns), or the kind of refusal and its words."""
    try:
        return None, function(*arguments, **options)
    except TypeError as error:
        return TypeError, error
    except ValueError as error:
        return ValueError, str(error)


@contextlib.contextmanager
def comparing() -> Iterator[BothPlanners]:
    """Inside, masks are made and planned twice."""
    with pytest.MonkeyPatch.context() as patch:
        both = BothPlanners()
        patch.setattr(host, "_planner", both)
        yield both


@pytest.fixture(scope="module", autouse=True)
def both_planners():
    """For all tests of the file that imports it."""
    with comparing() as both:
        yield both


@contextlib.contextmanager
def without_extension() -> Iterator[None]:
    """As if mimo_kernels._C were not there, and its absence not yet told."""
    remembered = launch._remembered, frame._choose  # what serves, and why not
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for cached in remembered:
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        patch.setattr(backends, "_extension", None)
        patch.setattr(backends, "_extension_reason", "mimo_kernels._C does not load (hidden by a test)")
        patch.setattr(host, "_planner", python)
        patch.setattr(host, "_noted", False)
        yield
