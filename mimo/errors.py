"""The one exception for bad input: the command line prints it as one line and exits with status 2."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input: a folder, file, name or setting that cannot be used. One line, with the offending value."""


def user_input(function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call a function whose arguments come from the user alone: its ValueErrors are bad input."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise InputError(str(error)) from error
