"""How numbers of Python are read: lists of lists, or what has a `tolist` that gives them, arrays and tensors.

Reading an item may run code (`__index__`, `tolist`) that changes the list it stands in: a snapshot of it is read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

MAX_TOKENS = 2**31 - 1

T = TypeVar("T")


def listed(value: Any) -> tuple | None:
    """The items of a list, or of the list that an array stands for; None for anything else."""
    if not isinstance(value, (list, tuple)) and hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, (list, tuple)) else None


def read_frames(value: Any, name: str, inner: str, read: Callable[[Any, int, int], T]) -> list[list[T]]:
    """One value per frame, clip after clip. read(item, clip, frame) makes it, or refuses it."""
    clips = listed(value)
    if clips is None:
        raise ValueError(f"{name} is {value!r}; expected a list of clips, each a list of {inner}")
    frames = []
    for c, clip in enumerate(clips):
        items = listed(clip)
        if items is None:
            raise ValueError(f"{name}[{c}] is {clip!r}; expected a list of {inner}, one per frame of the clip")
        frames.append([read(item, c, t) for t, item in enumerate(items)])
    return frames


def to_count(value: Any) -> int:
    """-1 for what is not a count."""
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(type(value), "__index__"):
            return -1
        value = operator.index(value)
    return max(value, -1)


class Counts:
    """Reads token counts of arguments, whose sum is the size of a mask."""

    def __init__(self):
        self.total = 0

    def read(self, item: Any, name: str, place: str) -> int:
        """The count that `place` names, one of those called `name`."""
        count = to_count(item)
        if count < 0:
            raise ValueError(f"{place} is {item!r}; expected a token count, an int >= 0")
        if count > MAX_TOKENS - self.total:
            raise ValueError(
                f"{name} brings the mask to more than {MAX_TOKENS} tokens at {place}; rows are numbered in int32"
            )
        self.total += count
        return count

    def lens(self, value: Any, name: str) -> list[list[int]]:
        return read_frames(value, name, "token counts", lambda item, c, t: self.read(item, name, f"{name}[{c}][{t}]"))


def read_drops(value: Any, name: str) -> list[list[bool]]:
    def read(item: Any, clip: int, frame: int) -> bool:
        if not isinstance(item, bool):
            raise ValueError(f"{name}[{clip}][{frame}] is {item!r}; expected a bool")
        return item

    return read_frames(value, name, "bools", read)


def read_cells(value: Any, name: str) -> list[list[int]]:
    def read(item: Any, group: int, _: int) -> int:
        if not isinstance(item, int) or isinstance(item, bool) or not -(2**63) <= item < 2**63:
            raise ValueError(f"{name}[{group}] holds {item!r}; expected an int of 64 bits")
        return item

    return read_frames(value, name, "cells", read)


def read_ends(value: Any, name: str) -> list[int]:
    """Counts one after another, and where each begins: [0, n0, n0 + n1, ..]."""
    items = listed(value)
    if items is None:
        raise ValueError(f"{name} is {value!r}; expected a list of token counts, one per clip")
    counts, ends = Counts(), [0]
    for c, item in enumerate(items):
        counts.read(item, name, f"{name}[{c}]")
        ends.append(counts.total)
    return ends


def read_ranges(value: Any, name: str, count: int, count_name: str) -> list[tuple[int, int]]:
    """(start, end) pairs inside [0, count)."""
    items = listed(value)
    if items is None:
        raise ValueError(f"{name} is {value!r}; expected a list of (start, end)")
    ranges = []
    for i, item in enumerate(items):
        pair = listed(item)
        start, end = map(to_count, pair) if pair is not None and len(pair) == 2 else (-1, -1)
        if not 0 <= start <= end <= count:
            raise ValueError(
                f"{name}[{i}] is {item!r}; expected (start, end) with 0 <= start <= end <= {count},"
                f" which is {count_name}"
            )
        ranges.append((start, end))
    return ranges


def read_size(value: Any, name: str) -> int:
    count = to_count(value)
    if not 0 <= count <= MAX_TOKENS:
        raise ValueError(f"{name} is {value!r}; expected a token count, an int in 0..{MAX_TOKENS}")
    return count
