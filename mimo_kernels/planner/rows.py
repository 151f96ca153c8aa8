"""Schedules of tiles of query rows, for the forward and dQ: what csrc/plan_rows.cpp writes (docs/schedule.md)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import Any

from mimo_kernels.planner.tiles import (
    Group,
    Intervals,
    Schedule,
    Tile,
    blocks_of,
    check_sizes,
    end_of,
    read_table,
    row_axis,
    seen_in,
    split_blocks,
)

# With more (frames of a few tokens, or many intervals of keys) no tile of rows ends early: the choice is not worth its
# time.
ROW_GROUPS_PER_TILE, INTERVALS_PER_GROUP = 32, 8


def _unite(a: Intervals, b: Intervals) -> Intervals:
    """Touching intervals become one."""
    union: Intervals = []
    for start, end in sorted(a + b):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _intersect(a: Intervals, b: Intervals) -> Intervals:
    both = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            both.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


class RowSchedule(Schedule):
    """seen, common: the keys that some row, and that every row, of the open tile sees."""

    def __init__(self, groups: list[Group], num_keys: int, tile: int, block: int, band_rows: int):
        super().__init__(row_axis(groups, num_keys), tile, block, band_rows)
        self.groups = groups
        self.seen: Intervals = []
        self.common: Intervals = []
        self._unions: dict[int, Intervals] = {}  # first group -> what it and some groups after it see
        self._blocks: dict[int, list[int]] = {}  # first group -> blocks of a tile with 1, 2, .. groups
        intervals = sum(len(group.keys) for group in groups)
        if self.holds_at_most(ROW_GROUPS_PER_TILE) and intervals <= INTERVALS_PER_GROUP * len(groups):
            self.choose_cuts()
        self.walk()

    def tile_blocks(self, first: int, last: int) -> int:
        known = self._blocks.setdefault(first, [])
        while len(known) <= last - first:
            union = _unite(self._unions.get(first, []), self.groups[first + len(known)].keys)
            self._unions[first] = union
            known.append(sum(blocks_of(end - start, self.block) for start, end in union))
        return known[last - first]

    def begin(self, start: int, span: int) -> None:
        self.seen = self.common = self.groups[span].keys

    def joins(self, span: int) -> bool:
        if span in self.ends_early:
            return False
        keys = self.groups[span].keys
        self.seen, self.common = _unite(self.seen, keys), _intersect(self.common, keys)
        return True

    def emit(self, tile: Tile) -> None:
        groups = self.groups[tile.first_span : tile.end_span]
        if len(groups) == 1:
            return self._emit_group(tile, groups[0])
        gaps = self._cuts_in_gaps(groups)
        for start, end in self.seen:
            inside = gaps[bisect_right(gaps, start) : bisect_left(gaps, end)]
            for edges in pairwise([start, *inside, end]):
                for first, last, bare in split_blocks(*edges, self.common, self.block):
                    if bare:
                        self.add_bare(tile, first, last)
                    else:
                        self._add_masked(tile, groups, first, last)

    def _emit_group(self, tile: Tile, group: Group) -> None:
        """Rows that all see the same: only what is left over behind the blocks of an interval is masked."""
        for start, end in group.keys:
            rest = start + (end - start) // self.block * self.block
            if rest > start:
                self.add_bare(tile, start, rest)
            if rest < end:
                self._add_masked(tile, [group], rest, end)

    def _add_masked(self, tile: Tile, groups: list[Group], start: int, end: int) -> None:
        """A masked segment, and what its rows see of it: runs of groups that see the same."""
        bounds: list[tuple[int, int, int]] = []
        for group in groups:
            seen = seen_in(group.keys, start, end)
            if not bounds or bounds[-1][1:] != seen:
                bounds.append((group.start, *seen))
        tile.masked += start, end, len(bounds)
        for run in bounds:
            tile.masked += run
        tile.masked_steps += 1
        tile.blocks += blocks_of(end - start, self.block)

    @staticmethod
    def _cuts_in_gaps(groups: list[Group]) -> list[int]:
        """Fewest positions so that every gap between two intervals of one group holds one: cut there, and no masked
        segment holds two intervals of a row."""
        gaps = [(before[1], after[0]) for group in groups for before, after in pairwise(group.keys)]
        cuts: list[int] = []
        for start, end in sorted(gaps, key=end_of):
            if not cuts or cuts[-1] < start:
                cuts.append(end)
        return cuts


def plan_rows(frames: Any, tile: int, block: int, band_rows: int, num_keys: int = -1) -> tuple:
    """Schedule.result of the frame table [groups, cells], a buffer of int32. num_keys < 0: as many as rows."""
    check_sizes(tile, block, band_rows)
    return RowSchedule(*read_table(frames, num_keys), tile, block, band_rows).result()
