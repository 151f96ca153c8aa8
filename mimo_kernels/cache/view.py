"""What attention sees of a FrameCache: page tables on the device, and for plain PyTorch a copy without pages."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimo_kernels.cache.book import Book, Frame, Hold
from mimo_kernels.core import checks, page_tables


class Joined(NamedTuple):
    """Keys and values of neighbouring sequences of a view, each ``[sequences, length + room, heads, head_dim]``."""

    sequences: slice  # in the view
    keys: Tensor
    values: Tensor


@dataclass
class _Copy:
    """One layer of a view without pages: as of which refresh, with how much room, the memory, and what it shows."""

    version: int
    room: int
    memory: Tensor  # [2, sequences, tokens, heads, head_dim]
    joined: list[Joined]


Times = Sequence[int] | Sequence[Sequence[int] | None] | None  # of frames: of all sequences alike, or of each


class CacheView:
    """What attention sees of some sequences, in a device buffer whose address never changes.

    ``tables`` int32 ``[S, 1 + 3 * max_pages]`` (core/page_tables.py) has as parts ``num_pages`` ``[S]``,
    ``page_table`` ``[S, max_pages]`` and ``page_rows`` ``[S, max_pages]`` (rows in use in that page). Entries past
    ``num_pages`` are meaningless. Made by `FrameCache.view`; a sequence of ``None`` has no history.

    The view does not follow the cache by itself: call `refresh` after a commit or an evict. One that is older than its
    sequences is refused wherever it is used. A pinned view shows for good what it showed first, and its pages are given
    to nobody else as long as it lives.
    """

    def __init__(self, book: Book, pool: Tensor, seqs: tuple[int | None, ...], max_pages: int):
        self.book, self.pool = book, pool
        self.seqs = seqs
        self.max_pages = max_pages
        self.tables = page_tables.empty_tables(len(seqs), max_pages, pool.device)
        self.num_pages, self.page_table, self.page_rows, _ = page_tables.parts_of(self.tables)
        self.number = page_tables.enroll(self)
        self.lengths: list[int] = []  # cached tokens per sequence, on the host
        self.most_frames = 0  # of a sequence
        self.pinned: Hold | None = None
        self._held: weakref.ref[Hold] | None = None  # by those who use the view as it is now
        self._times: list[frozenset[int] | None] = [None] * len(seqs)  # of the frames that are shown; None: of all
        self._tables: list[Tensor] = []
        self._rows: Tensor | None = None
        self._frames: list[list[Frame]] = [[] for _ in seqs]
        self._kept: list[int] = []  # tokens per sequence that stand where they stood before the latest refresh
        self._version = 0  # counts refreshes
        self._changes = -1  # the book's count at the latest refresh, or check
        self._changed: list[int | None] = []  # per sequence, the count at which it had changed last
        self._copies: dict[int, _Copy] = {}  # by layer

    def refresh(self, seqs: Sequence[int | None] | None = None, frames: Times = None) -> CacheView:
        """Read the page tables of the sequences again: one upload, no sync.

        seqs: others, as many as before; None: the same. frames: other times, as in `FrameCache.view`; None: the same,
        so that ``[None] * S`` is what shows all frames again. A frame that is no longer resident is refused.
        """
        op = "CacheView.refresh"
        if self.pinned is not None:
            raise ValueError(f"{op}: the view is pinned and stays as it is, expected a view of its own for what is new")
        wanted = self.seqs if seqs is None else tuple(seqs)
        if len(wanted) != len(self.seqs):
            checks.refuse(op, "seqs", f"has length {len(wanted)}", f"{len(self.seqs)}, one per row")
        times = self._times if frames is None else _chosen_times(op, frames, len(wanted))
        shown = [self._shown(op, *pair) for pair in zip(wanted, times, strict=True)]
        tables = [
            self.book.table(seq) if some is None else self.book.table_of(chosen)
            for seq, some, chosen in zip(wanted, times, shown, strict=True)
        ]
        counts = [table.shape[1] for table in tables]
        if max(counts, default=0) > self.max_pages:
            raise ValueError(
                f"a sequence of {max(counts)} pages does not fit into a view of max_pages = {self.max_pages}"
            )
        host = torch.zeros_like(self.tables, device="cpu", pin_memory=self.tables.is_cuda)
        host[:, 0] = torch.tensor(counts, device="cpu")
        for row, table in zip(host[:, 1:].unflatten(1, (page_tables.PARTS, -1)), tables, strict=True):
            row[:, : table.shape[1]] = table
        self.tables.copy_(host, non_blocking=True)
        self.seqs, self._times, self._tables = wanted, times, tables
        # On the CPU at once: it takes a data-dependent operation, which torch.compile could not trace in `joined`.
        self._rows = self._make_rows() if self.pool.device.type == "cpu" else None
        before, self._frames = self._frames, shown
        self.lengths = [sum(frame.num_tokens for frame in some) for some in shown]
        self.most_frames = max(map(len, shown), default=0)
        self._kept = [_same_tokens(*pair) for pair in zip(before, self._frames, strict=True)]
        self._held = None
        self._version += 1
        self._changes, self._changed = self.book.changes, [self.book.changed(seq) for seq in wanted]
        return self

    def _shown(self, op: str, seq: int | None, times: frozenset[int] | None) -> list[Frame]:
        frames = self.book.frames(seq)
        if times is None or seq is None:
            return frames
        if missing := times - {frame.index for frame in frames}:
            resident = [frame.index for frame in frames]
            raise ValueError(f"{op}: frame {min(missing)} of sequence {seq} is not resident, only {resident}")
        return [frame for frame in frames if frame.index in times]

    def hold(self) -> Hold:
        """What keeps the pages that the view shows now, as long as somebody refers to it."""
        held = None if self._held is None else self._held()
        if held is None:
            held = Hold(self.book, [frame for frames in self._frames for frame in frames])
            self._held = weakref.ref(held)
        return held

    def pin(self) -> CacheView:
        """The view stays as it is from now on: it is never out of date, and cannot be refreshed."""
        self.check_current()
        self.pinned = self.hold()
        return self

    def check_current(self, count: int | None = None) -> None:
        """ValueError when one of the sequences (of the first `count`) was freed or got other frames since `refresh`; of
        one whose frames were chosen, when one of those went."""
        if self._changes == self.book.changes or self.pinned is not None:
            return
        for place, (seq, changed) in enumerate(zip(self.seqs[:count], self._changed)):
            now = self.book.changed(seq)
            if now != changed and (now is None or self._times[place] is None or not self._resident(place)):
                what = "was freed" if now is None else "has other frames"
                raise ValueError(f"the view is older than the cache: sequence {seq} {what} since; call view.refresh()")
        if count is None:
            self._changes = self.book.changes  # whatever has changed, it is none of these sequences

    def _resident(self, place: int) -> bool:
        """Whether the frames that are shown still belong to their sequence."""
        now = {id(frame) for frame in self.book.frames(self.seqs[place])}
        return all(id(frame) in now for frame in self._frames[place])

    def first(self, count: int) -> ViewHead:
        """The first `count` sequences of this view as a view that follows it."""
        if not 0 <= count <= len(self.seqs):
            expected = f"0 to {len(self.seqs)}, the sequences of the view"
            checks.refuse("CacheView.first", "count", f"is {count}", expected)
        return ViewHead(self, count)

    def rows(self) -> Tensor:
        """Pool rows of all cached tokens of the view, sequence after sequence: int64 ``[sum(lengths)]``."""
        if self._rows is None:
            self._rows = self._make_rows()
        return self._rows

    def _make_rows(self) -> Tensor:
        size = self.book.page_size
        pages, used, _ = torch.cat([torch.zeros(3, 0, dtype=torch.int32, device="cpu"), *self._tables], 1)
        offsets = torch.arange(size, device="cpu")
        return upload((pages.long()[:, None] * size + offsets)[offsets < used[:, None]], self.pool.device)

    def joined(self, layer: int, room: int) -> list[Joined]:
        """A layer's cached keys and values without pages; `room` rows behind them are free, for the frame's own.

        They are copied out of the pages once per refresh, as far as it changed them, so all denoising steps of a frame
        share one copy. It takes as much memory again as the tokens in the view, up to twice that while they become
        more. Neighbours of equal length are one entry.
        """
        copy = self._copies.get(layer)
        if copy is None or (copy.version, copy.room) != (self._version, room):
            copy = self._copies[layer] = self._copy(layer, room, copy)
        return copy.joined

    def _copy(self, layer: int, room: int, old: _Copy | None) -> _Copy:
        pools = self.pool[layer].flatten(1, 2)
        need, most = max([0, *self.lengths]) + room, self.max_pages * self.book.page_size + room
        kept = [0] * len(self.seqs)
        if old is None or old.memory.shape[2] < need:
            tokens = min(1 << (need - 1).bit_length(), most)
            with torch.inference_mode(False):  # a tensor made in it could not be written to outside it
                memory = pools.new_empty(2, len(self.seqs), tokens, *pools.shape[2:])
        else:
            memory = old.memory
            if old.version == self._version - 1:
                kept = self._kept
        for place, (rows, first) in enumerate(zip(self.rows().split(self.lengths), kept, strict=True)):
            if first < len(rows):
                targets = memory[:, place, first : len(rows)]
                for pool, target in zip(pools.unbind(), targets.unbind(), strict=True):
                    torch.index_select(pool, 0, rows[first:], out=target)
        joined, first = [], 0
        for length, same in groupby(self.lengths):
            sequences = slice(first, first + len(list(same)))
            joined.append(Joined(sequences, *memory[:, sequences, : length + room]))
            first = sequences.stop
        return _Copy(self._version, room, memory, joined)


class ViewHead:
    """The first sequences of a `CacheView`, in its buffer: refreshed with it, at no cost of its own."""

    def __init__(self, view: CacheView, count: int):
        self.book, self.number, self._view, self._count = view.book, view.number, view, count
        self.tables = view.tables[:count]
        self.num_pages, self.page_table, self.page_rows, _ = page_tables.parts_of(self.tables)

    @property
    def seqs(self) -> tuple[int | None, ...]:
        return self._view.seqs[: self._count]

    @property
    def most_frames(self) -> int:
        return self._view.most_frames

    @property
    def pinned(self) -> Hold | None:
        return self._view.pinned

    def check_current(self) -> None:
        """As `CacheView.check_current`, for these sequences."""
        self._view.check_current(self._count)

    def joined(self, layer: int, room: int) -> list[Joined]:
        """As `CacheView.joined`, in the same memory."""
        heads = []
        for sequences, *both in self._view.joined(layer, room):
            size = min(sequences.stop, self._count) - sequences.start
            if size > 0:
                heads.append(Joined(slice(sequences.start, sequences.start + size), *(x[:size] for x in both)))
        return heads


def _chosen_times(op: str, frames: Times, count: int) -> list[frozenset[int] | None]:
    """Per sequence the times of the frames that are shown, None for all of them."""
    if frames is None:
        return [None] * count
    given: list[Any] = list(frames)
    if not any(some is None or isinstance(some, (Sequence, Tensor)) for some in given):
        given = [given] * count
    elif len(given) != count:
        checks.refuse(op, "frames", f"has length {len(given)}", f"{count}, the times of each sequence, or None for all")
    return [None if some is None else _times_of(op, some) for some in given]


def _times_of(op: str, some: Any) -> frozenset[int]:
    try:
        times = [operator.index(time) for time in some]
    except TypeError:
        checks.refuse(op, "frames", f"has {some!r} for a sequence", "the times of frames, whole numbers, or None")
    if len(set(times)) != len(times):
        checks.refuse(op, "frames", f"has {times} for a sequence", "every time once")
    return frozenset(times)


def _same_tokens(before: list, now: list) -> int:
    """Tokens of the frames that both lists begin with. Page numbers would not tell: they come back with other
    content."""
    same = takewhile(lambda pair: pair[0] is pair[1], zip(before, now, strict=False))
    return sum(frame.num_tokens for frame, _ in same)


def upload(host: Tensor, device: torch.device, out: Tensor | None = None) -> Tensor:
    """A copy that never waits: a pinned block is not given to anyone else before its copy is done."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True) if out is None else out.copy_(host, non_blocking=True)
