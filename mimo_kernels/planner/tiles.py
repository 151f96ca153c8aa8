"""What tile schedules have in common: the head of csrc/plan.h says how one is made, and docs/schedule.md draws it.

Three steps make a schedule. `choose_cuts` decides where tiles end before they are full, `walk` goes through the tiles
and writes the segments of each, `result` sorts the tiles: longest first inside bands of clips.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from mimo_kernels.planner.layout import GROUP_CELLS, MAX_ROWS, MAX_TILE, ROW_SEGMENT_CELLS, TILE_CELLS

Interval = tuple[int, int]  # start, end
Intervals = list[Interval]  # ascending, with gaps between them

LOOK_AHEAD = 64  # spans from one early end of a tile to the next


class Group(NamedTuple):
    """Rows that see the same keys."""

    start: int
    end: int
    keys: Intervals

    @property
    def rows(self) -> int:
        return self.end - self.start


def end_of(interval: Interval) -> int:
    return interval[1]


def blocks_of(length: int, block: int) -> int:
    return -(-length // block)


def seen_in(keys: Intervals, start: int, end: int) -> Interval:
    """What the first of these intervals that ends behind `start` has of [start, end); of none (0, 0)."""
    at = bisect_right(keys, start, key=end_of)
    if at == len(keys) or keys[at][0] >= end:
        return 0, 0
    return max(keys[at][0], start), min(keys[at][1], end)


def read_table(frames: Any, num_keys: int) -> tuple[list[Group], int]:
    """The groups of a contiguous int32 [groups, cells], looked at cell by cell, and how many keys there are;
    num_keys < 0: as many as rows."""
    memory = memoryview(frames)
    table = np.asarray(memory)
    legal = table.ndim == 2 and table.dtype == np.int32 and table.flags.c_contiguous and table.flags.aligned
    if not legal or table.shape[1] < GROUP_CELLS or table.shape[1] % 2:
        raise ValueError(
            f"the frame table is not a contiguous int32 [groups, {GROUP_CELLS}], or with two cells more for every"
            " further interval"
        )
    rows = int(table[-1, 1]) if len(table) else 0
    for what, count in (("rows", rows), ("keys", num_keys)):
        if count > MAX_ROWS:
            raise ValueError(f"a mask of {count} {what}; the kernels number at most {MAX_ROWS}")
    num_keys = rows if num_keys < 0 else num_keys
    groups, row = [], 0
    for g, (start, end, *cells) in enumerate(table.tolist()):
        intervals = list(zip(cells[::2], cells[1::2]))
        used = next((i for i, key in enumerate(intervals) if key == (0, 0)), len(intervals))
        edges = [-1, *chain.from_iterable(intervals[:used])]
        ascend = all(a < b for a, b in pairwise(edges)) and edges[-1] <= num_keys
        if not (start == row < end <= rows and ascend and not any(cells[2 * used :])):
            raise ValueError(f"frames[{g}] is not what a FrameMask holds: its table was written to")
        groups.append(Group(start, end, intervals[:used]))
        row = end
    return groups, num_keys


@dataclass
class Axis:
    """What tiles are cut from: spans one after another, of rows or of keys, and where a part of the mask begins that
    sees nothing of what was before. Tiles do not reach over it."""

    spans: Intervals
    starts_part: list[bool]


def _key_limits(groups: list[Group], num_keys: int) -> list[Interval]:
    """Where the keys that the groups before each group see end, and where those begin that it and all after it see."""
    ends = accumulate((group.keys[-1][1] if group.keys else 0 for group in groups), max, initial=0)
    firsts = [group.keys[0][0] if group.keys else num_keys for group in groups]
    starts = list(accumulate(reversed(firsts), min, initial=num_keys))[:0:-1]
    return list(zip(ends, starts))


def row_axis(groups: list[Group], num_keys: int) -> Axis:
    """A part of rows begins where the keys of all groups before it end in front of the keys of all others."""
    starts_part = [before <= after for before, after in _key_limits(groups, num_keys)]
    return Axis([(group.start, group.end) for group in groups], starts_part)


def key_axis(groups: list[Group], num_keys: int) -> Axis:
    """Where rows and keys are the same tokens, the spans of keys are those of the rows: as far as the parts tell, rows
    and keys of each have the same numbers. Else they are keys that the same rows see, and keys between two parts that
    nobody sees are a part of their own: nothing tells which clip they are of."""
    limits = _key_limits(groups, num_keys)
    parts = [(group.start, before, after) for group, (before, after) in zip(groups, limits) if before <= after]
    num_rows = groups[-1].end if groups else 0
    if num_keys == num_rows and all(before <= row <= after for row, before, after in parts):
        return row_axis(groups, num_keys)
    begins = set(chain.from_iterable(part[1:] for part in parts))
    begins.add(max((group.keys[-1][1] for group in groups if group.keys), default=0))
    places = {0, num_keys, *chain.from_iterable(chain.from_iterable(group.keys for group in groups))}
    spans = list(pairwise(sorted(places)))
    return Axis(spans, [start in begins for start, _ in spans])


def split_blocks(start: int, end: int, common: Intervals, block: int) -> Iterator[tuple[int, int, bool]]:
    """Cuts [start, end) into runs of whole blocks inside one interval of `common`, which are bare, and the rest:
    (start, end, bare)."""
    place = start
    for i in range(bisect_right(common, start, key=end_of), len(common)):
        if common[i][0] >= end:
            break
        first = start + blocks_of(max(0, common[i][0] - start), block) * block
        last = start + (min(common[i][1], end) - start) // block * block
        if first >= last:
            continue
        if place < first:
            yield place, first, False
        yield first, last, True
        place = last
    if place < end:
        yield place, end, False


@dataclass
class Tile:
    start: int
    end: int
    first_span: int
    end_span: int
    band: int
    place: int  # of its segments, from the first one of all
    bare_blocks: int = 0
    masked_steps: int = 0
    blocks: int = 0
    masked: list[int] = field(default_factory=list)  # cells of the masked segments


class Schedule(ABC):
    """Of tiles of `tile` rows or keys and steps of `block` keys or rows."""

    def __init__(self, axis: Axis, tile: int, block: int, band_rows: int):
        self.spans, self.starts_part = axis.spans, axis.starts_part
        self.size = axis.spans[-1][1] if axis.spans else 0  # rows, or keys
        self.tile, self.block = tile, block
        self.tiles: list[Tile] = []
        self.segments: list[int] = []
        self.ends_early: set[int] = set()  # spans: the tile before is not filled with their rows
        self.bands = self._find_bands(band_rows)

    @abstractmethod
    def begin(self, start: int, span: int) -> None:
        """A tile begins at a row of a span."""

    @abstractmethod
    def joins(self, span: int) -> bool:
        """Whether the tile reaches into this span too."""

    @abstractmethod
    def emit(self, tile: Tile) -> None:
        """The segments of the tile."""

    @abstractmethod
    def tile_blocks(self, first: int, last: int) -> int:
        """The blocks that a tile with these spans visits."""

    def _find_bands(self, band_rows: int) -> list[int]:
        """Of every span: whole parts form a band."""
        bands, band, band_start = [], 0, 0
        for (start, _), starts_part in zip(self.spans, self.starts_part):
            if start - band_start >= band_rows and starts_part:
                band, band_start = band + 1, start
            bands.append(band)
        return bands

    def holds_at_most(self, spans: int) -> bool:
        """Whether tiles hold at most so many spans, on average."""
        return len(self.spans) * self.tile <= self.size * spans

    def choose_cuts(self) -> None:
        """Decides at which spans tiles end early: the fewest blocks over all choices, a shortest path over the spans
        from the last to the first."""
        count = len(self.spans)
        best, next_cut = [0.0] * (count + 1), [count] * (count + 1)  # blocks of all from a span on; the next early end
        for first in reversed(range(count)):
            best[first], next_cut[first] = self._next_cut(first, best)
        span = 0
        while span < count:
            self.ends_early.add(span)
            span = next_cut[span]

    def _next_cut(self, first: int, best: list[float]) -> tuple[float, int]:
        """Where tiles that begin with the span `first`, and are filled one after another, should end early next: the
        fewest blocks from `first` on, and that span."""
        spans, tile, count = self.spans, self.tile, len(self.spans)
        row, span, blocks = spans[first][0], first, 0
        least, cut = math.inf, count

        def consider(span: int, until_there: int) -> None:
            nonlocal least, cut
            if until_there + best[span] < least:
                least, cut = until_there + best[span], span

        def more() -> bool:
            return span + 1 < count and not self.starts_part[span + 1]

        while row < self.size and (span - first < LOOK_AHEAD or cut == count):
            start = span
            if spans[span][1] - row >= tile:  # tiles in this span alone
                inside = (spans[span][1] - row) // tile
                blocks += inside * self.tile_blocks(span, span)
                row += inside * tile
                if row == spans[span][1]:
                    consider(span + 1, blocks)
                    break  # what follows does not depend on where this began
            while more() and spans[span + 1][0] - row < tile:
                consider(span + 1, blocks + self.tile_blocks(start, span))
                span += 1
            blocks += self.tile_blocks(start, span)
            row += min((self.size if more() else spans[span][1]) - row, tile)
            if row == spans[span][1]:
                consider(span + 1, blocks)
                break
            if blocks + best[span + 1] >= least:
                break  # the rows left over need at least as much as those of the spans to come
        return least, cut

    def walk(self) -> None:
        """Cuts the spans into tiles. A tile ends at the first further span that starts a part or does not join it, or
        when it is full."""
        start = span = 0
        while start < self.size:
            end, stop = min(self.size, start + self.tile), span + 1
            self.begin(start, span)
            while stop < len(self.spans) and self.spans[stop][0] < end and not self.starts_part[stop]:
                if not self.joins(stop):
                    break
                stop += 1
            if stop < len(self.spans):
                end = min(end, self.spans[stop][0])
            tile = Tile(start, end, span, stop, self.bands[span], len(self.segments))
            self.tiles.append(tile)
            self.emit(tile)
            self._close(tile)
            start, span = end, stop - 1 if self.spans[stop - 1][1] > end else stop

    def add_bare(self, tile: Tile, start: int, end: int) -> None:
        self.segments += start, end
        tile.bare_blocks += (end - start) // self.block
        tile.blocks += (end - start) // self.block

    def _close(self, tile: Tile) -> None:
        if max(tile.bare_blocks, tile.masked_steps) > MAX_ROWS:
            raise ValueError(f"a tile of {tile.blocks} blocks; kernels count them in int32")
        self.segments += [tile.masked_steps, *tile.masked, tile.start, tile.end]
        tile.masked.clear()

    def result(self) -> tuple[bytearray, int, int, int]:
        """(bytes of tiles and segments; number of tiles; executed pairs; rows, or keys, that the tiles cover)."""
        first_segment = len(self.tiles) * TILE_CELLS
        cells: list[int] = []
        for tile in sorted(self.tiles, key=lambda tile: (tile.band, -tile.blocks)):
            cells += tile.start, tile.end, first_segment + tile.place, tile.bare_blocks
        cells += self.segments
        cells += [0] * ROW_SEGMENT_CELLS  # kernels look one segment ahead
        if len(cells) > MAX_ROWS:
            raise ValueError(f"a schedule of {len(cells)} numbers for {self.size} rows; expected at most {MAX_ROWS}")
        executed = sum(tile.blocks for tile in self.tiles) * self.tile * self.block
        return bytearray(array("i", cells)), len(self.tiles), executed, self.size


def check_sizes(tile: int, block: int, band_rows: int) -> None:
    if not (0 < tile <= MAX_TILE and 0 < block <= MAX_TILE and block & (block - 1) == 0 and band_rows > 0):
        raise ValueError(
            f"a schedule with tiles of {tile}, blocks of {block} and bands of {band_rows} rows; expected 1 to"
            f" {MAX_TILE}, a power of two for the blocks, and a positive number"
        )
