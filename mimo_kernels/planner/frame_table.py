"""The frame table of a FrameMask: for every group of rows that sees the same keys, its row range and its key intervals.

What csrc/frame_mask.cpp (masks of lists of frames) and csrc/frame_mask_given.cpp (masks that are given) make of the
same arguments. Every function returns (table bytes, cells of a group, pairs, rows per clip, keys per clip or None: as
the rows, all clips alike, frames per clip, token counts of both copies as int32 bytes, the future's or None).
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterable
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from mimo_kernels.planner.layout import GROUP_KEYS, INTERVALS
from mimo_kernels.planner.numbers import (
    MAX_TOKENS,
    Counts,
    read_cells,
    read_drops,
    read_ends,
    read_ranges,
    read_size,
)

Interval = tuple[int, int]  # start, end
Lens = list[list[int]]  # token counts, [clips][frames]


class Table:
    """Grows clip by clip and group by group, with cells for `intervals` in every group."""

    def __init__(self, intervals: int = INTERVALS):
        self.columns = GROUP_KEYS + 2 * max(intervals, INTERVALS)
        self.groups: list[list[int]] = []
        self.first_rows: list[int] = []  # of every clip; and its first key and group
        self.first_keys: list[int] = []
        self.first_groups: list[int] = []
        self.rows = self.keys = self.pairs = 0

    def begin_clip(self, keys: int) -> None:
        """A clip of so many keys, whose groups follow."""
        self.first_rows.append(self.rows)
        self.first_keys.append(self.keys)
        self.first_groups.append(len(self.groups))
        self.keys += keys

    def add(self, rows: int, keys: Iterable[Interval]) -> None:
        """The next rows, and what they see, ascending. Empty intervals vanish and touching ones become one."""
        if rows == 0:
            return
        group = [self.rows, self.rows + rows]
        for start, end in keys:
            if start == end:
                continue
            self.pairs += rows * (end - start)
            if len(group) > GROUP_KEYS and group[-1] == start:
                group[-1] = end
            else:
                group += start, end
        self.groups.append(group + [0] * (self.columns - len(group)))
        self.rows += rows

    def result(self, history: Lens, future: Lens | None = None) -> tuple:
        rows = [end - start for start, end in pairwise([*self.first_rows, self.rows])]
        keys = [end - start for start, end in pairwise([*self.first_keys, self.keys])]
        cells = np.array(self.groups, np.int32).reshape(-1, self.columns)
        frames = [len(clip) for clip in history]
        counts = [None if copy is None else _int32(chain.from_iterable(copy)) for copy in (history, future)]
        facts = self.columns, self.pairs, rows, None if keys == rows else keys, self._alike(cells, keys), frames
        return bytearray(cells.tobytes()), *facts, *counts

    def _alike(self, cells: np.ndarray, keys: list[int]) -> bool:
        """Whether all clips have as many keys and the same table, counted from their own first row and key."""
        groups = [end - start for start, end in pairwise([*self.first_groups, len(self.groups)])]
        if len(set(groups)) != 1 or len(set(keys)) != 1:
            return False
        clips = cells.astype(np.int64).reshape(len(groups), groups[0], self.columns)
        used = (clips[0, :, ::2] != clips[0, :, 1::2]).repeat(2, axis=1)  # empty intervals are 0, 0 in every clip
        moved = np.empty((len(groups), 1, self.columns), np.int64)
        moved[:, 0, :GROUP_KEYS] = np.array(self.first_rows)[:, None]
        moved[:, 0, GROUP_KEYS:] = np.array(self.first_keys)[:, None]
        return bool((clips == clips[0] + used * moved).all())


def _int32(numbers: Iterable[int]) -> bytearray:
    return bytearray(array("i", numbers))


class Reach(NamedTuple):
    """How far back a frame sees: so many frames, itself included, so many tokens, its own included; and the first
    frames of the clip."""

    frames: int
    tokens: int
    sink: int


def _reach(window: int, sink: int, window_tokens: int) -> Reach:
    """Of the options of a mask; 0 for no window."""
    if sink < 0:
        raise ValueError(f"sink is {sink}; expected a number of frames >= 0")
    return Reach(window if window > 0 else MAX_TOKENS, window_tokens if window_tokens > 0 else MAX_TOKENS, sink)


def _past(starts: list[int], visible: int, frames: int, tokens: int, sink: int) -> list[Interval]:
    """Of the first `visible` frames of a clip its sinks, and the last `frames` of them as far as `tokens` tokens go."""
    first = max(starts[max(0, visible - frames)], starts[visible] - tokens)
    return [(starts[0], min(first, starts[min(sink, visible)])), (first, starts[visible])]


def _past_with(starts: list[int], t: int, reach: Reach) -> list[Interval]:
    """A frame of one copy, which is among those it sees, whole."""
    return _past(starts, t + 1, reach.frames, max(reach.tokens, starts[t + 1] - starts[t]), reach.sink)


def _past_before(starts: list[int], t: int, own: int, reach: Reach) -> list[Interval]:
    """A future frame of `own` tokens: it counts as one of those it sees, and stands elsewhere."""
    return _past(starts, t, reach.frames - 1, max(0, reach.tokens - own), reach.sink)


def teacher_forcing(
    history: Any, future: Any, drop: Any, window: int, sink: int, window_tokens: int, future_first: bool
) -> tuple:
    """Clean history beside noisy future. future_first: in every clip the future frames come first."""
    counts = Counts()
    history = counts.lens(history, "history_lens")
    future = counts.lens(future, "future_lens")
    if len(history) != len(future):
        raise ValueError(
            f"history_lens has {len(history)} clips and future_lens has {len(future)}; expected the same number"
        )
    dropped = None if drop is None else read_drops(drop, "drop_history")
    if dropped is not None and len(dropped) != len(future):
        raise ValueError(
            f"drop_history has {len(dropped)} clips and future_lens has {len(future)}; expected bool [clips, frames]"
        )
    reach = _reach(window, sink, window_tokens)
    table = Table()
    for c, (history_lens, future_lens) in enumerate(zip(history, future)):
        frames = len(history_lens)
        for name, lens in (("future_lens", future), ("drop_history", dropped)):
            if lens is not None and len(lens[c]) != frames:
                raise ValueError(
                    f"history_lens[{c}] has {frames} frames and {name}[{c}] has {len(lens[c])};"
                    " expected the same number"
                )
        tokens = sum(history_lens), sum(future_lens)
        history_starts = list(accumulate(history_lens, initial=table.keys + (tokens[1] if future_first else 0)))
        future_starts = list(accumulate(future_lens, initial=table.keys + (0 if future_first else tokens[0])))
        table.begin_clip(sum(tokens))
        history_rows = [(history_lens[t], _past_with(history_starts, t, reach)) for t in range(frames)]
        future_rows = []
        for t, own in enumerate(pairwise(future_starts)):
            past = _past_before(history_starts, t, future_lens[t], reach)
            if dropped is not None and dropped[c][t]:
                past = []
            future_rows.append((future_lens[t], [own, *past] if future_first else [*past, own]))
        for rows, keys in future_rows + history_rows if future_first else history_rows + future_rows:
            table.add(rows, keys)
    return table.result(history, future)


def block_causal(frame_lens: Any, window: int, sink: int, window_tokens: int, queries: Any) -> tuple:
    """Every frame sees itself and earlier frames of its clip. queries: None, or the slice of every clip's frames that
    ask."""
    lens = Counts().lens(frame_lens, "frame_lens")
    reach = _reach(window, sink, window_tokens)
    asking = slice(None) if queries is None else queries
    if not isinstance(asking, slice):
        raise ValueError(f"queries is {queries!r}; expected a slice of frames")
    try:
        step = asking.indices(0)[2]
    except Exception:  # of a stranger's __index__ too
        step = 0
    if step != 1:
        raise ValueError(f"queries is {queries!r}; expected a slice from int to int, without a step")
    table = Table()
    for clip in lens:
        starts = list(accumulate(clip, initial=table.keys))
        table.begin_clip(sum(clip))
        for t in range(*asking.indices(len(clip))):
            table.add(clip[t], _past_with(starts, t, reach))
    return table.result(lens)


def bidirectional(lens: Any) -> tuple:
    """Every frame sees its whole clip: then the clip is a single group of rows."""
    clips = Counts().lens(lens, "lens")
    table = Table()
    for clip in clips:
        first, tokens = table.keys, sum(clip)
        table.begin_clip(tokens)
        table.add(tokens, [(first, first + tokens)])
    return table.result(clips)


def from_cells(groups: Any, clip_lens: Any, key_lens: Any) -> tuple:
    """Any table, checked. clip_lens: rows per clip; None: one clip. key_lens: keys per clip; None: as many as rows."""
    groups = read_cells(groups, "frames")
    columns = len(groups[0]) if groups else GROUP_KEYS
    for g, group in enumerate(groups):
        if len(group) != columns or columns < GROUP_KEYS or columns % 2:
            raise ValueError(
                f"frames[{g}] has {len(group)} cells; expected two and two for each interval, as many in all groups"
            )
    tokens = groups[-1][1] if groups else 0
    if tokens > MAX_TOKENS:
        raise ValueError(f"frames has {tokens} rows; expected at most {MAX_TOKENS}")
    ends = [0, tokens] if clip_lens is None else read_ends(clip_lens, "clip_lens")
    if ends[-1] != tokens:
        raise ValueError(f"clip_lens add up to {ends[-1]} and frames has {tokens} rows; expected the same number")
    key_ends = ends if key_lens is None else read_ends(key_lens, "key_lens")
    if len(key_ends) != len(ends):
        raise ValueError(
            f"key_lens has {len(key_ends) - 1} clips and clip_lens has {len(ends) - 1}; expected the same number"
        )
    last_cells = [max((i for i, cell in enumerate(group) if cell), default=0) for group in groups]
    table = Table(max((last // 2 for last in last_cells), default=0))
    frames: Lens = []
    row = 0

    def begin_clip() -> None:
        table.begin_clip(key_ends[len(frames) + 1] - key_ends[len(frames)])
        frames.append([])

    for g, (start, end, *cells) in enumerate(groups):
        if start != row or end <= row:
            raise ValueError(
                f"frames[{g}] has rows {start}..{end}; expected a range that starts at {row} and is not empty"
            )
        while len(frames) + 1 < len(ends) and ends[len(frames)] <= row:
            begin_clip()
        if end > ends[len(frames)]:
            raise ValueError(
                f"frames[{g}] has rows {start}..{end}; expected none beyond its clip, which ends at {ends[len(frames)]}"
            )
        inside = key_ends[len(frames) - 1], key_ends[len(frames)]
        table.add(end - start, _checked_keys(f"frames[{g}]", list(zip(cells[::2], cells[1::2])), *inside))
        frames[-1].append(end - start)
        row = end
    while len(frames) + 1 < len(ends):
        begin_clip()
    return table.result(frames)


def _checked_keys(name: str, cells: list[Interval], first: int, last: int) -> list[Interval]:
    """The intervals in the cells of a group, of keys in [first, last)."""
    keys = [key for key in cells if key != (0, 0)]
    edges = [first - 1, *chain.from_iterable(keys)]
    legal = cells[: len(keys)] == keys and all(a < b for a, b in pairwise(edges)) and edges[-1] <= last
    if not legal:
        listing = ", ".join(f"{start}..{end}" for start, end in cells)
        raise ValueError(
            f"{name} has key intervals {listing}; expected ascending ones with gaps between, then 0..0,"
            f" inside its clip {first}..{last}"
        )
    return keys


def from_slices(q_ranges: Any, k_ranges: Any, num_queries: Any, num_keys: Any) -> tuple:
    """Queries of slice i see keys of slice i; a query in several slices sees the keys of all of them. One clip, in
    which neighbouring rows that see the same are a group."""
    rows = read_size(num_queries, "num_queries")
    keys_name = "num_queries" if num_keys is None else "num_keys"
    num_keys = rows if num_keys is None else read_size(num_keys, keys_name)
    queries = read_ranges(q_ranges, "q_ranges", rows, "num_queries")
    seen = read_ranges(k_ranges, "k_ranges", num_keys, keys_name)
    if len(queries) != len(seen):
        raise ValueError(f"q_ranges has {len(queries)} ranges and k_ranges has {len(seen)}; expected the same number")
    slices = [(query, key) for query, key in zip(queries, seen) if query[0] < query[1] and key[0] < key[1]]
    slices.sort(key=lambda pair: pair[0][0])
    places = sorted({0, rows, *chain.from_iterable(query for query, _ in slices)})
    groups: list[tuple[int, list[Interval]]] = []  # rows, and what they see
    active: list[tuple[Interval, int]] = []  # of the slices at hand, keys ascending and the end of the queries
    next_slice = 0
    for row, end in pairwise(places):
        active = [(key, stop) for key, stop in active if stop > row]
        while next_slice < len(slices) and slices[next_slice][0][0] == row:
            (_, stop), key = slices[next_slice]
            insort(active, (key, stop))
            next_slice += 1
        intervals: list[Interval] = []
        for key, _ in active:
            if intervals and key[0] <= intervals[-1][1]:
                intervals[-1] = intervals[-1][0], max(intervals[-1][1], key[1])
            else:
                intervals.append(key)
        if groups and groups[-1][1] == intervals:
            groups[-1] = groups[-1][0] + end - row, intervals
        else:
            groups.append((end - row, intervals))
    table = Table(max((len(intervals) for _, intervals in groups), default=0))
    table.begin_clip(num_keys)
    for count, intervals in groups:
        table.add(count, intervals)
    return table.result([[count for count, _ in groups]])
