"""Random FrameMasks beside dense ones made from the rules alone, pair by pair."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from mimo_kernels.attention import FrameMask


@dataclass
class Case:
    mask: FrameMask
    dense: torch.Tensor  # bool [queries, keys]
    clip_lens: list[int]
    key_lens: list[int]
    alone: list[FrameMask]  # a mask of every clip by itself


@dataclass
class Reach:
    """The options of a mask that say how far back a frame sees."""

    window: int | None = None
    window_tokens: int | None = None
    sink: int = 0

    def within(self, frames: int, tokens: int, key_frame: int) -> bool:
        """Of a key so many frames before the query's, and whose token is the `tokens`-th one, counted back from the end
        of what the query's frame sees (its own tokens among them)."""
        near = self.window is None or frames < self.window
        return (near and (self.window_tokens is None or tokens <= self.window_tokens)) or key_frame < self.sink


def _left(lens: list[int], t: int, frame: int, token: int) -> int:
    """The number of a token of a frame, counted back from the end of frame t."""
    return sum(lens[frame : t + 1]) - token


def teacher_forcing_sees(query, key, history, future, drop, reach: Reach) -> bool:
    """query and key are (clip, "h" or "f", frame, token in it)."""
    (clip, copy, t, _), (key_clip, key_copy, key_t, token) = query, key
    if clip != key_clip:
        return False
    if copy == "h":
        seen = key_t == t or reach.within(t - key_t, _left(history[clip], t, key_t, token), key_t)
        return key_copy == "h" and key_t <= t and seen
    if key_copy == "f":
        return key_t == t
    left = future[clip][t] + _left(history[clip], t - 1, key_t, token)
    return key_t < t and reach.within(t - key_t, left, key_t) and not (drop and drop[clip][t])


def teacher_forcing(history, future, drop=None, window=None, sink=0, window_tokens=None, future_first=False) -> Case:
    reach, tokens = Reach(window, window_tokens, sink), []
    for clip, copies in enumerate(zip(history, future)):
        both = list(zip("hf", copies))
        for copy, lens in both[::-1] if future_first else both:
            tokens += [(clip, copy, frame, i) for frame, count in enumerate(lens) for i in range(count)]
    dense = [[teacher_forcing_sees(query, key, history, future, drop, reach) for key in tokens] for query in tokens]

    def mask(history, future, drop):
        options = vars(reach) | {"drop_history": drop, "future_first": future_first}
        return FrameMask.teacher_forcing(history, future, **options)

    alone = [mask([h], [f], drop and [drop[clip]]) for clip, (h, f) in enumerate(zip(history, future))]
    lens = [sum(h) + sum(f) for h, f in zip(history, future)]
    return Case(mask(history, future, drop), _matrix(dense, len(tokens)), lens, lens, alone)


def one_copy(lens, causal, window=None, sink=0, window_tokens=None, queries=None) -> Case:
    """queries: of every clip the frames that ask."""
    reach = Reach(window, window_tokens, sink)
    tokens = [(clip, t, i) for clip, counts in enumerate(lens) for t, count in enumerate(counts) for i in range(count)]
    asking = [(clip, t, i) for clip, t, i in tokens if queries is None or t in range(len(lens[clip]))[queries]]

    def sees(query, key) -> bool:
        (clip, t, _), (key_clip, key_t, token) = query, key
        past = key_t == t or (key_t < t and reach.within(t - key_t, _left(lens[clip], t, key_t, token), key_t))
        return clip == key_clip and (not causal or past)

    def mask(clips):
        options = vars(reach) | {"queries": queries}
        return FrameMask.block_causal(clips, **options) if causal else FrameMask.bidirectional(clips)

    dense = [[sees(query, key) for key in tokens] for query in asking]
    rows = [sum(query[0] == clip for query in asking) for clip in range(len(lens))]
    alone = [mask([counts]) for counts in lens]
    return Case(mask(lens), _matrix(dense, len(tokens)), rows, [sum(counts) for counts in lens], alone)


def _matrix(rows: list[list[bool]], keys: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool).view(len(rows), keys)


COUNTS = st.sampled_from([0, 1, 1, 2, 3, 5, 8])


@st.composite
def cases(draw, max_clips: int = 3) -> Case:
    """Teacher forcing, block causal or bidirectional: ragged or repeated clips, empty frames, single tokens, drops,
    windows in frames or tokens, sinks, either order of the copies, frames that do not ask."""
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
    reach = {"sink": draw(st.integers(0, 3))}
    limit = draw(st.sampled_from([None, "window", "window_tokens"]))
    if limit:
        reach[limit] = draw(st.integers(1, 5 if limit == "window" else 20))
    if kind == "teacher_forcing":
        drop = lens(st.booleans()) if draw(st.booleans()) else None
        return teacher_forcing(lens(COUNTS), lens(COUNTS), drop, **reach, future_first=draw(st.booleans()))
    if kind == "block_causal":
        return one_copy(lens(COUNTS), True, **reach, queries=draw(st.none() | SLICES))
    return one_copy(lens(COUNTS), False)


SLICES = st.builds(slice, *[st.none() | st.integers(-5, 5)] * 2)


@st.composite
def slices(draw) -> Case:
    """Any ranges of queries beside any ranges of keys: empty ones, ones that overlap or are there twice, rows with many
    intervals or none, no rows or keys at all."""
    queries, keys = draw(st.integers(0, 24)), draw(st.integers(0, 24))

    def ranges(size, longest):
        start = draw(st.integers(0, size))
        return start, min(size, start + draw(st.integers(0, longest)))

    longest = draw(st.sampled_from([1, 2, 24]))
    count = draw(st.integers(0, 12))
    q_ranges = [(0, queries) if draw(st.booleans()) else ranges(queries, 24) for _ in range(count)]
    k_ranges = [ranges(keys, longest) for _ in range(count)]
    dense = torch.zeros(queries, keys, dtype=torch.bool)
    for (q_start, q_end), (k_start, k_end) in zip(q_ranges, k_ranges):
        dense[q_start:q_end, k_start:k_end] = True
    mask = FrameMask.from_slices(q_ranges, k_ranges, num_queries=queries, num_keys=keys)
    return Case(mask, dense, [queries], [keys], [mask])


@st.composite
def tables(draw) -> torch.Tensor:
    """Any interval table of one clip, with groups that see nothing."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    tokens, row, groups = sum(counts), 0, []
    drawn = [sorted(draw(st.sets(st.integers(0, tokens), max_size=12))) for _ in counts]
    room = max(6, *(len(cuts) // 2 * 2 for cuts in drawn))
    for count, cuts in zip(counts, drawn):
        cuts = cuts[: len(cuts) // 2 * 2]
        groups.append([row, row + count, *cuts, *[0] * (room - len(cuts))])
        row += count
    return torch.tensor(groups, dtype=torch.int32)


def dense_of_table(table: torch.Tensor) -> torch.Tensor:
    tokens = int(table[-1, 1])
    dense = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, *keys in table.tolist():
        for row in range(start, end):
            for column in range(tokens):
                dense[row, column] = any(a <= column < b for a, b in zip(keys[::2], keys[1::2]))
    return dense
