"""What a paged cache and attention agree on: how page tables lie in memory, and who keeps pages from being given away.

Tables are one int32 tensor ``[sequences, 1 + 3 * max_pages]``, a row per sequence:

    [ pages in use | numbers of the pages ... | rows in use of each ... | which frame each belongs to ... ]

Entries past the pages in use are meaningless. Frames are counted as the sequence is shown, oldest first.
"""

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

PARTS = 3  # of a row, each of max_pages entries, behind the number of pages


class PageTables(NamedTuple):
    """The parts of the tables, as views: int32 ``[sequences]`` and three times ``[sequences, max_pages]``."""

    num_pages: Tensor
    pages: Tensor
    rows: Tensor
    frames: Tensor


def empty_tables(sequences: int, max_pages: int, device: torch.device) -> Tensor:
    return torch.zeros(sequences, 1 + PARTS * max_pages, dtype=torch.int32, device=device)


def parts_of(tables: Tensor) -> PageTables:
    return PageTables(tables[:, 0], *tables[:, 1:].unflatten(1, (PARTS, -1)).unbind(1))


# An operator is told by a number whose pages it needs until its backward has run: it takes tensors and numbers alone.
_numbers = itertools.count()
_holders: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def enroll(holder: Any) -> int:
    """The number of a view, whose ``hold()`` returns an object that keeps the pages it shows as long as it lives."""
    number = next(_numbers)
    _holders[number] = holder
    return number


def held_copy(tables: Tensor, holder: int) -> Tensor:
    """A copy of the tables that follows nobody and keeps its pages: they are given away no earlier than it is freed.

    Autograd frees what a backward has saved once it has run, so that this is all the care that pages need.
    `holder`: the number of the view that the tables belong to; negative: an empty tensor, for who needs none.
    """
    if holder < 0:
        return tables.new_empty(0)
    copy: Any = tables.clone()
    view = _holders.get(holder)
    if view is not None:
        copy.pages = view.hold()  # lives as long as the values, wherever autograd keeps them
    return copy
