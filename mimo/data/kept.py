"""Frames that were decoded once and are read again, held in memory up to a limit."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any

from torch.utils.data import get_worker_info

_ENTRY = 256  # bytes of an entry besides its content, about


class KeptFrames:
    """What was read of files, by key, as long as there is room.

    What is kept stays: as every clip of a dataset comes once per epoch, dropping the oldest for the newest would drop
    each clip just before it is read again. Reading gives the same with or without it.

    Args:
        limit: bytes, of all worker processes of one loader together.

    Attributes:
        decoded: frames that came out of decoders so far, kept or not.
    """

    def __init__(self, limit: int):
        self.limit, self.used, self.decoded = limit, 0, 0
        self._entries: dict[Hashable, Any] = {}

    def get(self, key: Hashable) -> Any:
        return self._entries.get(key)

    def has_room(self, size: int, entries: int = 1) -> bool:
        """Whether so many bytes more fit into this process's share."""
        worker = get_worker_info()
        return self.used + size + entries * _ENTRY <= self.limit // (worker.num_workers if worker else 1)

    def add(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value of so many bytes, if there is room."""
        if key not in self._entries and self.has_room(size):
            self._entries[key] = value
            self.used += size + _ENTRY

    def __getstate__(self) -> dict:
        return {"limit": self.limit}

    def __setstate__(self, state: dict) -> None:
        KeptFrames.__init__(self, **state)


def identity(path: os.PathLike, status: os.stat_result) -> tuple:
    """A key for a file's content: another size or time is another file."""
    return os.fspath(path), status.st_size, status.st_mtime_ns
