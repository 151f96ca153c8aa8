"""What can be wrong with data."""

from pathlib import Path

from mimo.errors import InputError


class DataError(InputError):
    """A dataset that cannot be used, in one line."""


class UnreadableVideo(InputError):
    """A clip that cannot be used: `path` and, in one line, `why`."""

    def __init__(self, path: str | Path, why: str):
        super().__init__(str(path), why)
        self.path = str(path)
        self.why = why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


class DamagedVideo(UnreadableVideo):
    """A clip with frames that do not decode: those before them may be used; see VideoReader.shorten."""


class OutOfRange(UnreadableVideo):
    """A clip with actions that the network has no place for: more likely a wrong setting than a damaged file."""
