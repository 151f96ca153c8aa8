"""Where a command's words go: a reader that has left, or a full disk under a log, costs the words and not the work."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Survivor(io.FileIO):
    """A file descriptor that takes every write. What the system refuses is dropped, and the first refusal kept in
    `refused`: the next write is tried again, as a full disk may have room by then."""

    refused: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = self.refused or error
            return memoryview(data).nbytes


class Streams:
    """sys.stdout and sys.stderr of a command, each with a `_Survivor` at its bottom; a test's stay as they are."""

    def __init__(self) -> None:
        self.before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
        self.ours: dict[str, _Survivor] = {}
        for name, stream in self.before.items():
            if stream is not getattr(sys, f"__{name}__"):
                continue
            if (
                stream is None
            ):  # closed (>&-): hold its number, or the next file to be opened gets it, and others' words
                descriptor = os.open(os.devnull, os.O_WRONLY)
            else:
                stream.flush()
                descriptor = stream.fileno()
            self.ours[name] = raw = _Survivor(descriptor, "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",  # nor does a path that the terminal has no letters for stop anything
                line_buffering=name == "stderr" or raw.isatty(),
            )
            setattr(sys, name, text)

    def refused(self) -> OSError | None:
        """The first write to stdout that failed for another reason than that nobody reads."""
        sys.stdout.flush()
        error = self.ours["stdout"].refused if "stdout" in self.ours else None
        return None if error is None or error.errno == errno.EPIPE else error

    def restore(self) -> None:
        for name in self.ours:
            getattr(sys, name).flush()
            getattr(sys, name).detach()
            setattr(sys, name, self.before[name])


@contextmanager
def surviving_streams() -> Iterator[Streams]:
    """Around a command: nothing that it prints can fail."""
    streams = Streams()
    try:
        yield streams
    finally:
        streams.restore()
