"""Random FrameMasks beside dense ones made from the rules alone, pair by pair."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from mimo_kernels.attention import FrameMask


@dataclass
class Case:
    mask: FrameMask
    dense: torch.Tensor  # bool [tokens, tokens]
    clip_lens: list[int]
    alone: list[FrameMask]  # a mask of every clip by itself


def _within(query_frame: int, key_frame: int, window: int | None, sink: int) -> bool:
    return window is None or query_frame - key_frame < window or key_frame < sink


def teacher_forcing_sees(query, key, drop, window, sink) -> bool:
    """query and key are (clip, "h" or "f", frame)."""
    (clip, copy, t), (key_clip, key_copy, key_t) = query, key
    if clip != key_clip:
        return False
    if copy == "h":
        return key_copy == "h" and key_t <= t and _within(t, key_t, window, sink)
    if key_copy == "f":
        return key_t == t
    return key_t < t and _within(t, key_t, window, sink) and not (drop and drop[clip][t])


def teacher_forcing(history, future, drop=None, window=None, sink=0) -> Case:
    tokens = []
    for clip, (history_clip, future_clip) in enumerate(zip(history, future)):
        for copy, lens in (("h", history_clip), ("f", future_clip)):
            tokens += [(clip, copy, frame) for frame, count in enumerate(lens) for _ in range(count)]
    dense = [[teacher_forcing_sees(query, key, drop, window, sink) for key in tokens] for query in tokens]
    mask = FrameMask.teacher_forcing(history, future, drop_history=drop, window=window, sink=sink)
    alone = [
        FrameMask.teacher_forcing([h], [f], drop_history=drop and [drop[clip]], window=window, sink=sink)
        for clip, (h, f) in enumerate(zip(history, future))
    ]
    return Case(mask, _matrix(dense), [sum(h) + sum(f) for h, f in zip(history, future)], alone)


def one_copy(lens, causal, window=None, sink=0) -> Case:
    tokens = [
        (clip, frame) for clip, counts in enumerate(lens) for frame, count in enumerate(counts) for _ in range(count)
    ]
    dense = [
        [c == kc and (not causal or (kt <= t and _within(t, kt, window, sink))) for kc, kt in tokens] for c, t in tokens
    ]

    def mask(clips):
        return FrameMask.block_causal(clips, window=window, sink=sink) if causal else FrameMask.bidirectional(clips)

    return Case(mask(lens), _matrix(dense), [sum(counts) for counts in lens], [mask([counts]) for counts in lens])


def _matrix(rows: list[list[bool]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool).view(len(rows), len(rows))


COUNTS = st.sampled_from([0, 1, 1, 2, 3, 5, 8])


@st.composite
def cases(draw, max_clips: int = 3) -> Case:
    """Teacher forcing, block causal or bidirectional: ragged or repeated clips, empty frames, single tokens, drops,
    windows, sinks."""
    clips = draw(st.integers(1, max_clips))
    if draw(st.booleans()):
        frames = [draw(st.integers(0, 4))] * clips
    else:
        frames = [draw(st.integers(0, 4)) for _ in range(clips)]
    alike = draw(st.booleans()) and len(set(frames)) == 1

    def lens(values):
        drawn = [draw(st.lists(values, min_size=count, max_size=count)) for count in frames]
        return [list(drawn[0]) for _ in drawn] if alike else drawn

    kind = draw(st.sampled_from(["teacher_forcing", "block_causal", "bidirectional"]))
    window, sink = draw(st.none() | st.integers(1, 5)), draw(st.integers(0, 3))
    if kind == "teacher_forcing":
        drop = lens(st.booleans()) if draw(st.booleans()) else None
        return teacher_forcing(lens(COUNTS), lens(COUNTS), drop, window, sink)
    if kind == "block_causal":
        return one_copy(lens(COUNTS), True, window, sink)
    return one_copy(lens(COUNTS), False)


@st.composite
def tables(draw) -> torch.Tensor:
    """Any interval table of one clip, with groups that see nothing."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    tokens, row, groups = sum(counts), 0, []
    for count in counts:
        cuts = sorted(draw(st.sets(st.integers(0, tokens), max_size=6)))
        cuts = cuts[: len(cuts) // 2 * 2]
        groups.append([row, row + count, *cuts, *[0] * (6 - len(cuts))])
        row += count
    return torch.tensor(groups, dtype=torch.int32)


def dense_of_table(table: torch.Tensor) -> torch.Tensor:
    tokens = int(table[-1, 1])
    dense = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, *keys in table.tolist():
        for row in range(start, end):
            for column in range(tokens):
                dense[row, column] = any(keys[i] <= column < keys[i + 1] for i in (0, 2, 4))
    return dense
