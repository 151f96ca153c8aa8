"""FrameMask: which key rows each query row sees, told as a list of frames."""

import functools
import operator
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from mimo_kernels.core import host, torch_private

INTERVALS = 3  # key intervals that frames need: sinks, the latest ones, their own; others may need more
KEYS = 2  # cells of a group before those of its intervals: row_start, row_end
COLUMNS = KEYS + 2 * INTERVALS
DRAWN_FRAMES = 10  # a drawing shows at most so many frames of each copy
DRAWN_CLIPS = 2
MARKS = {"■": "#", "▒": "+", "·": ".", "…": "~"}  # of a drawing, and what stands for them in ASCII

Lens = Sequence[Sequence[int]] | torch.Tensor
Block = tuple[str, int, int]  # of a drawing: name, first row or key, end
Drawn = list[Block | None]  # None: some that are not shown


class FrameMask:
    """The attention mask of a batch of clips, packed one after another without padding.

    A clip is a list of frames, a frame is a number of tokens, and every row of a frame sees the same keys: a few
    contiguous intervals of them. The mask holds those, never a matrix, so it costs O(frames) to make and to keep.
    Build one per batch and pass it to every layer; the kernels' schedules are made once per device and stay with it.
    Masks compare by identity.

    Make one with `teacher_forcing`, `block_causal`, `bidirectional` or, for anything else, `from_slices` and
    `from_table`.

    Attributes:
        num_queries: rows, all clips together.
        num_keys: keys, all clips together.
        num_tokens: both, where they are the same, else ValueError.
        num_pairs: allowed (query, key) pairs.
        num_clips: the clips.
        clip_lens: rows of each clip.
        key_lens: keys of each clip.
        history_lens: token counts `[clips][frames]` of the history.
        future_lens: of the future; a mask with one copy of the frames has empty future clips.
        frames: int32 host tensor [groups, 8]: row_start, row_end and three times key_start, key_end; ascending,
            disjoint, adjacent ones merged, unused ones (0, 0). Where a group sees more than three intervals, all groups
            have cells for as many. Only frames with tokens, in row order; together they cover every row. A
            bidirectional clip is one group. Not to be written to: attention refuses a mask whose table was.
        uniform: (clips, rows per clip) when all clips have as many keys and the same table, counted from their own
            first row and key, else None.
        pattern: the same mask with alike clips told once: a table as `frames`.
        repeats: how many such clips follow one another.
    """

    def __init__(self, kind: str, table: tuple, options: dict | None = None):
        cells, columns, self.num_pairs, self.clip_lens, key_lens, alike, *self._lens = table
        self.kind, self._options = kind, options or {}
        self.key_lens = self.clip_lens if key_lens is None else key_lens
        self.num_queries, self.num_keys = sum(self.clip_lens), sum(self.key_lens)
        self.num_clips = len(self.clip_lens)
        self.uniform = (self.num_clips, self.clip_lens[0]) if alike else None
        self.repeats = self.num_clips if alike else 1
        # Through numpy, as torch.set_default_device means every tensor that torch makes.
        numbers = np.ndarray((len(cells) // (4 * columns), columns), np.int32, cells)
        with torch_private.plain_tensors():
            self.frames = torch.from_numpy(numbers)
            self.pattern = self.frames if self.repeats == 1 else self.frames[: len(self.frames) // self.repeats]

    @property
    def num_tokens(self) -> int:
        if self.num_queries != self.num_keys:
            raise ValueError(
                f"num_tokens: this mask has {self.num_queries} queries and {self.num_keys} keys; expected as many of"
                " both (num_queries and num_keys tell them apart)"
            )
        return self.num_queries

    @functools.cached_property
    def history_lens(self) -> list[list[int]]:
        frames, history, _ = self._lens
        return _by_clip(history, frames)

    @functools.cached_property
    def future_lens(self) -> list[list[int]]:
        frames, _, future = self._lens
        return [[] for _ in frames] if future is None else _by_clip(future, frames)

    @classmethod
    def teacher_forcing(
        cls,
        history_lens: Lens,
        future_lens: Lens,
        *,
        drop_history: Sequence | torch.Tensor | None = None,
        window: int | None = None,
        window_tokens: int | None = None,
        sink: int = 0,
        future_first: bool = False,
    ) -> "FrameMask":
        """Clean history beside noisy future: MiMo, ACDiT, Self-Forcing's teacher forcing (MiMo, Sec. 3.3); MAGI in
        its temporal layers only.

        Token order: clip after clip; in a clip all history frames in time order, then all future frames in time order.
        History frame t sees history frames <= t. Future frame t sees history frames < t (strictly: its own would be the
        answer) and itself.

                  keys  h0 h1 h2 f0 f1 f2
            queries h0  ■  ·  ·  ·  ·  ·
                    h1  ■  ■  ·  ·  ·  ·
                    h2  ■  ■  ■  ·  ·  ·
                    f0  ·  ·  ·  ■  ·  ·
                    f1  ■  ·  ·  ·  ■  ·
                    f2  ■  ■  ·  ·  ·  ■

        Args:
            history_lens, future_lens: token counts, a list (clips) of lists (frames) or an int tensor [clips, frames].
                Both have the same clips and frames; token counts may differ in every frame and may be 0.
            drop_history: bool [clips, frames], the same frames again: that future frame sees itself alone (history
                guidance).
            window: how many of the latest frames a frame sees, itself included; None: all. Future frame t sees itself
                and history t-window+1 .. t-1.
            window_tokens: instead of `window`, for frames that differ: how many of the latest tokens a frame sees, its
                own included; it sees itself whole, and may see the last tokens alone of a frame before.
            sink: the first `sink` frames stay visible to the frames after them.
            future_first: another token order: in a clip all future frames, then all history frames.
        """
        reach = {"window": window, "sink": sink, "window_tokens": window_tokens}
        if not isinstance(future_first, bool):
            raise ValueError(f"future_first is {future_first!r}; expected a bool")
        options = {"future_first": future_first}
        return _make(cls, "teacher_forcing", history_lens, future_lens, drop_history, reach=reach, options=options)

    @classmethod
    def block_causal(
        cls,
        frame_lens: Lens,
        *,
        window: int | None = None,
        window_tokens: int | None = None,
        sink: int = 0,
        queries: slice | None = None,
    ) -> "FrameMask":
        """One copy of the frames; frame t sees frames <= t of its clip: FAR, DFoT, VideoMAR, autoregressive inference.

            keys  0  1  2
                0 ■  ·  ·
                1 ■  ■  ·
                2 ■  ■  ■

        Args:
            frame_lens: token counts, a list (clips) of lists (frames) or an int tensor [clips, frames]; 0 is legal.
            window, window_tokens, sink: as in `teacher_forcing`: frame t sees frames t-window+1 .. t, or the
                `window_tokens` tokens up to its last one, and the first `sink` frames.
            queries: the frames of every clip that ask, slice(-3, None) for the last three; None: all. The keys stay
                those of all frames.
        """
        reach = {"window": window, "sink": sink, "window_tokens": window_tokens}
        return _make(cls, "block_causal", frame_lens, reach=reach, options={"queries": queries})

    @classmethod
    def bidirectional(cls, lens: Lens) -> "FrameMask":
        """Every token of a clip sees the whole clip. `lens`: token counts `[clips][frames]`, or an int tensor [clips,
        frames]."""
        return _make(cls, "bidirectional", lens)

    @classmethod
    def from_slices(
        cls,
        q_ranges: Sequence[Sequence[int]] | torch.Tensor,
        k_ranges: Sequence[Sequence[int]] | torch.Tensor,
        *,
        num_queries: int,
        num_keys: int | None = None,
    ) -> "FrameMask":
        """Any mask that is rectangles: the queries of q_ranges[i] see the keys of k_ranges[i].

        The mask is the union of the slices: a query in several of them sees the keys of all, a pair in several counts
        once. So key ranges may touch, overlap or repeat, a row has any number of intervals, and a row in no slice sees
        nothing. Sequences of different samples are one clip here.

        Args:
            q_ranges, k_ranges: as many (start, end) of both, lists or int tensors [slices, 2]; end is not included, and
                start == end is an empty range.
            num_queries, num_keys: rows and keys there are; num_keys=None: as many keys as rows.
        """
        return _make(cls, "from_slices", q_ranges, k_ranges, num_queries, num_keys)

    @classmethod
    def from_table(
        cls,
        frames: torch.Tensor,
        *,
        clip_lens: Sequence[int] | None = None,
        key_lens: Sequence[int] | None = None,
    ) -> "FrameMask":
        """A mask from its interval table: int [groups, 8], or more columns for more intervals, in the form of the
        attribute `frames`. A group may see no keys at all.

        clip_lens: rows per clip; keys lie inside their clip. None: everything is one clip.
        key_lens: keys per clip; None: as many as rows.
        """
        columns = frames.shape[1] if frames.dim() == 2 else 0
        if columns < COLUMNS or columns % 2 or frames.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"frames is {frames.dtype} of shape {list(frames.shape)}; expected int32 or int64 [groups, {COLUMNS}],"
                " or with two columns more for every further interval"
            )
        return _make(cls, "from_table", frames, clip_lens, key_lens)

    def pattern_for(self, x: torch.Tensor) -> torch.Tensor:
        """`pattern` for an operator on x: where x has no numbers, a table without numbers."""
        if not torch.compiler.is_compiling() and torch_private.is_fake(x):
            return x.new_empty(self.pattern.shape, dtype=torch.int32, device="cpu")
        return self.pattern

    def check_unchanged(self) -> None:
        """ValueError when the table was written to: plans were made from it, and `num_pairs` and the rest tell of
        it."""
        if self.frames._version or self.pattern._version:
            raise ValueError("the mask's table `frames` was written to; expected a mask as it was made: make a new one")

    def to_dense(self) -> torch.Tensor:
        """bool [num_queries, num_keys], True where the row may see the column. For tests and small sizes: O(tokens^2)
        memory."""
        dense = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool)
        for row_start, row_end, *keys in self.frames.tolist():
            for start, end in zip(keys[::2], keys[1::2]):
                dense[row_start:row_end, start:end] = True
        return dense

    def to_mask_mod(self, device: torch.device | str = "cpu") -> Callable:
        """The same rule as a `mask_mod(b, h, q_idx, kv_idx)` of torch.nn.attention.flex_attention, for its create_mask
        and create_block_mask.

        It reads int32 tensors [num_queries] on `device`, two per key interval in use.
        """
        used = max(1, int((self.frames[:, KEYS + 1 :: 2] > 0).any(0).sum()))
        group = torch.repeat_interleave(self.frames[:, 1] - self.frames[:, 0])
        bounds = [column.contiguous() for column in self.frames[group, KEYS : KEYS + 2 * used].to(device).unbind(1)]

        def mask_mod(b, h, q_idx, kv_idx):
            seen = (kv_idx >= bounds[0][q_idx]) & (kv_idx < bounds[1][q_idx])
            for interval in range(1, used):
                seen = seen | ((kv_idx >= bounds[2 * interval][q_idx]) & (kv_idx < bounds[2 * interval + 1][q_idx]))
            return seen

        return mask_mod

    def __str__(self) -> str:
        """The drawing, in the characters that the standard output can show."""
        drawing = repr(self)
        try:
            "".join(MARKS).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            drawing = drawing.translate({ord(mark): plain for mark, plain in MARKS.items()})
        return drawing

    def __repr__(self) -> str:
        possible = self.num_queries * self.num_keys
        share = f" ({self.num_pairs / possible:.1%} of all)" if possible else ""
        options = "".join(f", {name}={value}" for name, value in self._options.items() if value)
        clips = f"{self.num_clips} clip{'s' * (self.num_clips != 1)}"
        tokens = f"{self.num_queries:,} tokens"
        if self.num_queries != self.num_keys:
            tokens = f"{self.num_queries:,} queries, {self.num_keys:,} keys"
        lines = [f"FrameMask.{self.kind}: {clips}, {tokens}, {self.num_pairs:,} pairs{share}{options}"]
        table = self.frames.tolist()
        shown = min(1 if self.uniform else DRAWN_CLIPS, self.num_clips)
        for clip in range(shown):
            alike = f", and the other {self.num_clips - 1} alike" if self.uniform and self.num_clips > 1 else ""
            lines += [f"clip {clip}{alike}: rows see columns", *self._draw(clip, table)]
        if not self.uniform and self.num_clips > shown:
            lines.append(f"... {self.num_clips - shown} more, with other lengths")
        return "\n".join(lines)

    def _draw(self, clip: int, table: list[list[int]]) -> list[str]:
        """Frames as blocks: ■ all keys of the frame are seen, ▒ some, · none. Frames without tokens are left out."""
        rows, columns = self._blocks(clip, table)
        starts = [group[0] for group in table]
        width = max((len(block[0]) for block in rows + columns if block), default=0)
        counts = max((len(f"{block[2] - block[1]:,}") for block in rows if block), default=0)
        cells = [block[0] if block else "…" for block in columns]
        lines = [" " * (width + counts + 5) + " ".join(f"{cell:<{width}}" for cell in cells)]
        for block in rows:
            if block is None:
                lines.append(f"  {'…':>{width}}")
                continue
            name, first, end = block
            keys = table[bisect_right(starts, first) - 1][KEYS:]
            marks = ["…" if other is None else _mark(other, keys) for other in columns]
            seen = " ".join(f"{mark:<{width}}" for mark in marks)
            lines.append(f"  {name:>{width}}  {end - first:>{counts},} {seen}")
        return [line.rstrip() for line in lines]

    def _blocks(self, clip: int, table: list[list[int]]) -> tuple[Drawn, Drawn]:
        """The rows and the columns of a drawing."""
        row, key = sum(self.clip_lens[:clip]), sum(self.key_lens[:clip])
        history, future = self.history_lens[clip], self.future_lens[clip]
        if self.kind in ("from_slices", "from_table"):
            rows = _named("", history, row)
            if self.kind == "from_table" and row == key and self.clip_lens[clip] == self.key_lens[clip]:
                return _abbreviated(rows), _abbreviated(rows)
            # No frames are known of the keys: what is seen alike is a block.
            stop = key + self.key_lens[clip]
            places = {place for group in table for place in group[KEYS:] if key < place < stop} | {key, stop}
            keys = [(f"k{i}", first, end) for i, (first, end) in enumerate(pairwise(sorted(places)))]
            return _abbreviated([(f"q{name}", first, end) for name, first, end in rows]), _abbreviated(keys)
        copies = [("h", history), ("f", future)] if future else [("", history)]
        if self._options.get("future_first"):
            copies.reverse()
        columns: Drawn = []
        asking: Drawn = []
        for letter, lens in copies:
            frames = _named(letter, lens, key)
            columns += _abbreviated(frames)
            key += sum(lens)
            if not self._options.get("queries"):
                asking = columns
                continue
            chosen = range(*self._options["queries"].indices(len(lens)))
            mine = [(f"{letter}{t}", lens[t]) for t in chosen if lens[t]]
            ends = list(accumulate((count for _, count in mine), initial=row))
            asking = _abbreviated([(name, ends[i], ends[i + 1]) for i, (name, _) in enumerate(mine)])
        return asking, columns


def _named(letter: str, lens: list[int], first: int) -> list[Block]:
    """The frames that have tokens, which begin at a row or key."""
    ends = list(accumulate(lens, initial=first))
    return [(f"{letter}{frame}", ends[frame], ends[frame + 1]) for frame, count in enumerate(lens) if count]


def _abbreviated(blocks: list[Block]) -> Drawn:
    shown = DRAWN_FRAMES // 2
    return [*blocks] if len(blocks) <= DRAWN_FRAMES else [*blocks[:shown], None, *blocks[-shown:]]


def _mark(block: tuple[str, int, int], keys: list[int]) -> str:
    _, first, end = block
    seen = sum(max(0, min(stop, end) - max(start, first)) for start, stop in zip(keys[::2], keys[1::2]))
    return "■" if seen == end - first else "▒" if seen else "·"


def _by_clip(counts: bytearray, frames: list[int]) -> list[list[int]]:
    numbers = memoryview(counts).cast("i").tolist()
    return [numbers[end - count : end] for count, end in zip(frames, accumulate(frames))]


def _check_reach(window: int | None, sink: int, window_tokens: int | None) -> dict[str, int | None]:
    for name, value, unit in (("window", window, "frames"), ("window_tokens", window_tokens, "tokens")):
        if value is not None and (not _is_int(value) or value < 1):
            raise ValueError(f"{name} is {value!r}; expected a number of {unit} >= 1, or None for all")
    if window is not None and window_tokens is not None:
        raise ValueError(f"window is {window} and window_tokens is {window_tokens}; expected one of them")
    if not _is_int(sink) or sink < 0:
        raise ValueError(f"sink is {sink!r}; expected a number of frames >= 0")
    reach = {"window": window, "sink": sink, "window_tokens": window_tokens}
    return {name: None if value is None else operator.index(value) for name, value in reach.items()}


def _is_int(value: object) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")


@torch.compiler.disable(reason="a FrameMask is built on the host from numbers")
def _make(
    cls: type[FrameMask], kind: str, *numbers, reach: dict | None = None, options: dict | None = None
) -> FrameMask:
    """What the planner makes of the numbers in lists, arrays and tensors."""
    options = options or {}
    if reach is not None:
        reach = _check_reach(**reach)
        numbers = (*numbers, *(min(value or 0, sys.maxsize) for value in reach.values()), *options.values())
        options = reach | options
    try:
        table = getattr(host.planner(), f"frame_table_{kind}")(*numbers)
    except RuntimeError as error:  # of torch: tensors that stand for others
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"a FrameMask is built from numbers, and a tensor here has none to read ({type(error).__name__}: {reason})"
            "; build it outside of FakeTensorMode and of torch.func's transforms"
        ) from None
    return cls(kind, table, options)
