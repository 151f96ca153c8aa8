"""The one exception for bad input: the command line prints it as one line and exits with status 2."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input: a folder, file, name or setting that cannot be used. One line, with the offending value."""


def tell_launcher(error: InputError) -> None:
    """Let torchrun, if it has started this process, name the error as the cause in the report that it ends with."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and str(error):
        # The earliest second is the cause: what follows from this error, the end of all processes, comes within it.
        Path(file).write_text(json.dumps({"message": f"error: {error}", "timestamp": int(time.time()) - 1}))


def let_others_speak(seconds: float = 60) -> None:
    """In a process that ends with nothing to say: torchrun, if it has started this process, ends all others as soon
    as one has ended, also the one that is about to name the cause. That one's end is this one's then; `seconds`: at
    most."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        time.sleep(seconds)


def user_input(function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call a function whose arguments come from the user alone: its ValueErrors are bad input."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise InputError(str(error)) from error


def reason(error: Exception) -> str:
    """What an exception says, in one line that may quote a file, but not a kilobyte of it."""
    words = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return words if len(words) <= 200 else f"{words[:197]}..."
