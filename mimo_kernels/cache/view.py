"""What attention sees of a FrameCache: page tables on the device, and for plain PyTorch a copy without pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels.cache.book import Book, Frame
from mimo_kernels.core import checks


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


class CacheView:
    """What the attention kernel sees of some sequences, in device buffers whose addresses never change.

    ``page_table`` int32 ``[S, max_pages]``, ``page_rows`` int32 ``[S, max_pages]`` (rows in use in that page) and
    ``num_pages`` int32 ``[S]``. Entries past ``num_pages`` are meaningless. Made by `FrameCache.view`; a sequence of
    ``None`` has no history. The view does not follow the cache by itself: call `refresh` after a commit or an evict.
    One that is older than its sequences is refused wherever it is used.
    """

    def __init__(self, book: Book, pool: Tensor, seqs: tuple[int | None, ...], max_pages: int):
        self.book, self.pool = book, pool
        self.seqs = seqs
        self.max_pages = max_pages
        # One buffer, so that a refresh is a single copy. Its parts begin at whole 16 bytes, whatever their sizes:
        # Triton compiles a kernel anew for pointers that do not.
        self._width = 4 * (max_pages // 4 + 1)
        self._buffer = torch.zeros(len(seqs), 4 + 2 * self._width, dtype=torch.int32, device=pool.device)
        self.num_pages = self._buffer[:, 0]
        self.page_table, self.page_rows = (x[:, :max_pages] for x in self._buffer[:, 4:].split(self._width, dim=1))
        self.lengths: list[int] = []  # cached tokens per sequence, on the host
        self._tables: list[Tensor] = []
        self._rows: Tensor | None = None
        self._frames: list[list[Frame]] = [[] for _ in seqs]
        self._kept: list[int] = []  # tokens per sequence that stand where they stood before the latest refresh
        self._version = 0  # counts refreshes
        self._changes = -1  # the book's count at the latest refresh, or check
        self._changed: list[int | None] = []  # per sequence, the count at which it had changed last
        self._copies: dict[int, _Copy] = {}  # by layer

    def refresh(self, seqs: Sequence[int | None] | None = None) -> CacheView:
        """Read the page tables of the sequences again (of `seqs`, as many as before, if given): one upload, no sync."""
        wanted = self.seqs if seqs is None else tuple(seqs)
        if len(wanted) != len(self.seqs):
            checks.refuse("CacheView.refresh", "seqs", f"has length {len(wanted)}", f"{len(self.seqs)}, one per row")
        tables = [self.book.table(seq) for seq in wanted]
        counts = [table.shape[1] for table in tables]
        if max(counts, default=0) > self.max_pages:
            raise ValueError(
                f"a sequence of {max(counts)} pages does not fit into a view of max_pages = {self.max_pages}"
            )
        host = torch.zeros_like(self._buffer, device="cpu", pin_memory=self._buffer.is_cuda)
        host[:, 0] = torch.tensor(counts, device="cpu")
        for row, table in zip(host[:, 4:].unflatten(1, (2, self._width)), tables, strict=True):
            row[:, : table.shape[1]] = table
        self._buffer.copy_(host, non_blocking=True)
        self.seqs, self._tables = wanted, tables
        # On the CPU at once: it takes a data-dependent operation, which torch.compile could not trace in `joined`.
        self._rows = self._make_rows() if self.pool.device.type == "cpu" else None
        before, self._frames = self._frames, [self.book.frames(seq) for seq in wanted]
        self.lengths = [sum(frame.num_tokens for frame in frames) for frames in self._frames]
        self._kept = [_same_tokens(*pair) for pair in zip(before, self._frames, strict=True)]
        self._version += 1
        self._changes, self._changed = self.book.changes, [self.book.changed(seq) for seq in wanted]
        return self

    def check_current(self, count: int | None = None) -> None:
        """ValueError when one of the sequences (of the first `count`) was freed or got other frames since `refresh`."""
        if self._changes == self.book.changes:
            return
        for seq, changed in zip(self.seqs[:count], self._changed):
            now = self.book.changed(seq)
            if now != changed:
                what = "was freed" if now is None else "has other frames"
                raise ValueError(f"the view is older than the cache: sequence {seq} {what} since; call view.refresh()")
        if count is None:
            self._changes = self.book.changes  # whatever has changed, it is none of these sequences

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
        pages, used = torch.cat([torch.zeros(2, 0, dtype=torch.int32, device="cpu"), *self._tables], 1)
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
    """The first sequences of a `CacheView`, in its buffers: refreshed with it, at no cost of its own."""

    def __init__(self, view: CacheView, count: int):
        self.book, self._view, self._count = view.book, view, count
        self.num_pages, self.page_table, self.page_rows = (
            x[:count] for x in (view.num_pages, view.page_table, view.page_rows)
        )

    @property
    def seqs(self) -> tuple[int | None, ...]:
        return self._view.seqs[: self._count]

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
