"""Schedules of tiles of keys, for dK and dV: what csrc/plan_keys.cpp writes (docs/schedule.md)."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

from mimo_kernels.planner.layout import ROW_SEGMENT_BEGINS, ROW_SEGMENT_CELLS, ROW_SEGMENT_GROUPS, ROW_SEGMENT_KEYS
from mimo_kernels.planner.tiles import (
    Group,
    Interval,
    Intervals,
    Schedule,
    Tile,
    blocks_of,
    check_sizes,
    key_axis,
    read_table,
    seen_in,
    split_blocks,
)

# With more the rows that see a tile do not tell its blocks: where a tile of keys ends is decided on the spot.
KEY_SPANS_PER_TILE = 8


class Event(NamedTuple):
    """A group begins or ceases to see keys at a place."""

    place: float
    group: int
    begins: bool


class KeySchedule(Schedule):
    """Walks along the keys. `active` are the groups that see the current one, `viewers` their rows. Of the open tile:
    the groups that see some key of it, all of its keys, several intervals of it."""

    def __init__(self, groups: list[Group], num_keys: int, tile: int, block: int, band_rows: int):
        super().__init__(key_axis(groups, num_keys), tile, block, band_rows)
        self.groups = groups
        intervals = [(g, key) for g, group in enumerate(groups) for key in group.keys]
        events = [Event(key[not begins], g, begins) for g, key in intervals for begins in (True, False)]
        self.events = [*sorted(events, key=lambda event: event.place), Event(math.inf, 0, False)]
        self.next_event = 0
        self.active: set[int] = set()
        self.viewers = 0
        self.some: set[int] = set()
        self.whole: set[int] = set()
        self.several: set[int] = set()
        self.first_key = self.tile_viewers = 0  # of the open tile
        self.chooses = self.holds_at_most(KEY_SPANS_PER_TILE)
        if self.chooses:
            self._count_viewers()
            self.choose_cuts()
        self.walk()

    def _count_viewers(self) -> None:
        """For every span the rows that see its first key, and those that begin to see keys in it."""
        self.at_start, joining = [], []
        viewers, e = 0, 0
        for start, end in self.spans:
            at_start = joined = 0
            while self.events[e].place < end:
                event = self.events[e]
                rows = self.groups[event.group].rows
                viewers += rows if event.begins else -rows
                joined += rows if event.begins else 0
                if event.place <= start:
                    at_start = viewers
                e += 1
            self.at_start.append(at_start or viewers)
            joining.append(joined)
        self.joined = list(accumulate(joining))  # in this span and those before

    def tile_blocks(self, first: int, last: int) -> int:
        return blocks_of(self.at_start[first] + self.joined[last] - self.joined[first], self.block)

    def begin(self, start: int, span: int) -> None:
        while self.events[self.next_event].place <= start:
            self._apply(self.events[self.next_event])
        self.some, self.whole, self.several = set(self.active), set(self.active), set()
        self.first_key, self.tile_viewers = start, self.viewers

    def joins(self, span: int) -> bool:
        if self.chooses:
            return span not in self.ends_early
        self.tile_viewers += self._enter_until(self.spans[span][0] - 1)
        return not self._cut_here(*self.spans[span])

    def _apply(self, event: Event) -> None:
        self.next_event += 1
        self.active ^= {event.group}
        rows = self.groups[event.group].rows
        self.viewers += rows if event.begins else -rows

    def _enter_until(self, place: int) -> int:
        """Moves inside a tile up to and including `place`; returns the rows that begin to see keys on the way."""
        rows = 0
        while self.events[self.next_event].place <= place:
            event = self.events[self.next_event]
            self._apply(event)
            self.whole.discard(event.group)
            if event.begins:
                (self.several if event.group in self.some else self.some).add(event.group)
                rows += self.groups[event.group].rows
        return rows

    def _cut_here(self, start: int, end: int) -> bool:
        """Whether the open tile should end at the span [start, end) rather than reach over the boundary, which saves a
        part of a tile of that span."""
        joining = leaving = 0
        e = self.next_event
        while self.events[e].place == start:
            rows = self.groups[self.events[e].group].rows
            joining, leaving = (joining + rows, leaving) if self.events[e].begins else (joining, leaving + rows)
            e += 1
        after = blocks_of(self.viewers + joining - leaving, self.block)
        before, both = (blocks_of(self.tile_viewers + more, self.block) for more in (0, joining))
        return (both - before) * self.tile > min(self.tile - (start - self.first_key), end - start) * after

    def emit(self, tile: Tile) -> None:
        """Runs of neighbouring groups that see keys of the tile become segments. A group with several intervals in the
        tile is a run of its own per interval, each with its window of keys."""
        self._enter_until(tile.end - 1)
        seeing = sorted(self.some)
        at = 0
        while at < len(seeing):
            first = seeing[at]
            at += 1
            if first in self.several:
                for start, end in self.groups[first].keys:
                    if end > tile.start and start < tile.end:
                        self._add_run(tile, first, first + 1, (max(start, tile.start), min(end, tile.end)))
                continue
            end = first + 1
            while at < len(seeing) and seeing[at] == end and end not in self.several:
                at, end = at + 1, end + 1
            self._add_run(tile, first, end, (tile.start, tile.end))

    def _add_run(self, tile: Tile, first: int, end: int, window: Interval) -> None:
        """The groups first .. end, which see some of these keys."""
        common: Intervals = []
        for g in range(first, end):
            if g not in self.whole:
                continue
            group = self.groups[g]
            if common and common[-1][1] == group.start:
                common[-1] = common[-1][0], group.end
            else:
                common.append((group.start, group.end))
        rows = self.groups[first].start, self.groups[end - 1].end
        for start, stop, bare in split_blocks(*rows, common, self.block):
            if bare:
                self.add_bare(tile, start, stop)
            else:
                self._add_masked(tile, start, stop, window)

    def _add_masked(self, tile: Tile, start: int, end: int, window: Interval) -> None:
        while start < end:
            group = bisect_right(self.groups, start, key=lambda group: group.end)
            cells = [0] * ROW_SEGMENT_CELLS
            stop, used = start, 0
            while used < ROW_SEGMENT_GROUPS and stop < end and stop - start < self.block:
                seen = self.groups[group + used]
                stop = min(seen.end, end)
                if used:
                    cells[ROW_SEGMENT_BEGINS + used - 1] = seen.start
                keys = ROW_SEGMENT_KEYS + 2 * used
                cells[keys : keys + 2] = seen_in(seen.keys, *window)
                used += 1
            full = start + (stop - start) // self.block * self.block
            if used > 1 and full > start:
                stop = start + self.block
            elif full > start and stop < end:
                stop = full  # the rest shares a block with the next group
            for begins in range(ROW_SEGMENT_BEGINS + used - 1, ROW_SEGMENT_BEGINS + ROW_SEGMENT_GROUPS - 1):
                cells[begins] = stop
            cells[:2] = start, stop
            tile.masked += cells
            tile.masked_steps += blocks_of(stop - start, self.block)
            tile.blocks += blocks_of(stop - start, self.block)
            start = stop


def plan_keys(frames: Any, tile: int, block: int, band_rows: int, num_keys: int = -1) -> tuple:
    """Schedule.result of the frame table [groups, cells], a buffer of int32. num_keys < 0: as many as rows."""
    check_sizes(tile, block, band_rows)
    return KeySchedule(*read_table(frames, num_keys), tile, block, band_rows).result()
