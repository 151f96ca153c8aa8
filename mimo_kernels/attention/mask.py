"""FrameMask: which key rows each query row sees, told as a list of frames."""

import functools
import operator
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from mimo_kernels.core import torch_private
from mimo_kernels.core.backends import extension, extension_reason

INTERVALS = 3  # key intervals a row can have: sinks, the latest frames, its own future frame
COLUMNS = 2 + 2 * INTERVALS
DRAWN_FRAMES = 10  # a drawing shows at most so many frames of each copy
DRAWN_CLIPS = 2
MARKS = {"■": "#", "▒": "+", "·": ".", "…": "~"}  # of a drawing, and what stands for them in ASCII

Lens = Sequence[Sequence[int]] | torch.Tensor


class FrameMask:
    """The attention mask of a batch of clips, packed one after another without padding.

    A clip is a list of frames, a frame is a number of tokens, and every row of a frame sees the same keys: at most
    three contiguous intervals of rows. The mask holds those, never a matrix, so it costs O(frames) to make and to keep.
    Build one per batch and pass it to every layer; the kernels' schedules are made once per device and stay with it.
    Masks compare by identity.

    Make one with `teacher_forcing`, `block_causal`, `bidirectional` or, for anything else that is intervals,
    `from_table`.

    Attributes:
        num_tokens: rows of the packed sequence, all clips together.
        num_pairs: allowed (query, key) pairs.
        num_clips, clip_lens: the clips, and the rows of each.
        history_lens, future_lens: token counts [clips][frames]. A mask with one copy of the frames has empty future
        clips.
        frames: int32 host tensor [groups, 8]: row_start, row_end and three times key_start, key_end; ascending,
            disjoint, adjacent ones merged, unused ones (0, 0). Only frames with tokens, in row order; together they
            cover every row. A bidirectional clip is one group. Not to be written to: attention refuses a mask whose
            table was.
        uniform: (clips, rows per clip) when all clips have the same table, counted from their own first row, else None.
        pattern, repeats: the same mask with alike clips told once: a table as `frames`, and how many such clips follow
        one another.
    """

    @torch.inference_mode(False)  # a table made in it could not serve training later
    def __init__(self, kind: str, table: tuple, window: int | None = None, sink: int = 0):
        cells, self.num_pairs, self.clip_lens, alike, *self._lens = table
        self.kind, self.window, self.sink = kind, window, sink
        self.num_tokens = sum(self.clip_lens)
        self.num_clips = len(self.clip_lens)
        self.uniform = (self.num_clips, self.clip_lens[0]) if alike else None
        self.repeats = self.num_clips if alike else 1
        with (
            torch_private.without_dispatch_modes(),
            torch.device("cpu"),
        ):  # numbers, also where a mode makes all tensors fake ones
            frames = torch.frombuffer(cells, dtype=torch.int32) if cells else torch.empty(0, dtype=torch.int32)
            self.frames = frames.view(-1, COLUMNS)
            self.pattern = self.frames if self.repeats == 1 else self.frames[: len(self.frames) // self.repeats]

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
        sink: int = 0,
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
            sink: the first `sink` frames stay visible to the frames after them.
        """
        return _make(cls, "teacher_forcing", history_lens, future_lens, drop_history, window=window, sink=sink)

    @classmethod
    def block_causal(cls, frame_lens: Lens, *, window: int | None = None, sink: int = 0) -> "FrameMask":
        """One copy of the frames; frame t sees frames <= t of its clip: FAR, DFoT, VideoMAR, autoregressive inference.

            keys  0  1  2
                0 ■  ·  ·
                1 ■  ■  ·
                2 ■  ■  ■

        Args:
            frame_lens: token counts, a list (clips) of lists (frames) or an int tensor [clips, frames]; 0 is legal.
            window, sink: as in `teacher_forcing`: frame t sees frames t-window+1 .. t and the first `sink` ones.
        """
        return _make(cls, "block_causal", frame_lens, window=window, sink=sink)

    @classmethod
    def bidirectional(cls, lens: Lens) -> "FrameMask":
        """Every token of a clip sees the whole clip. `lens`: token counts [clips][frames], or an int tensor [clips,
        frames]."""
        return _make(cls, "bidirectional", lens)

    @classmethod
    def from_table(cls, frames: torch.Tensor, *, clip_lens: Sequence[int] | None = None) -> "FrameMask":
        """A mask from its interval table: int [groups, 8] in the form of the attribute `frames`. A group may see no
        keys at all.

        clip_lens: rows per clip; keys lie inside their clip. None: everything is one clip.
        """
        if frames.dim() != 2 or frames.shape[1] != COLUMNS or frames.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"frames is {frames.dtype} of shape {list(frames.shape)}; expected int32 or int64 [groups, {COLUMNS}]"
            )
        return _make(cls, "from_table", frames, clip_lens)

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
        """bool [num_tokens, num_tokens], True where the row may see the column. For tests and small sizes: O(tokens^2)
        memory."""
        dense = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool)
        for row_start, row_end, *keys in self.frames.tolist():
            for start, end in zip(keys[::2], keys[1::2]):
                dense[row_start:row_end, start:end] = True
        return dense

    def to_mask_mod(self, device: torch.device | str = "cpu") -> Callable:
        """The same rule as a `mask_mod(b, h, q_idx, kv_idx)` of torch.nn.attention.flex_attention, for its create_mask
        and create_block_mask.

        It reads int32 tensors [num_tokens] on `device`, two per key interval in use.
        """
        used = max(1, int((self.frames[:, 3::2] > 0).any(0).sum()))
        group = torch.repeat_interleave(self.frames[:, 1] - self.frames[:, 0])
        bounds = [column.contiguous() for column in self.frames[group, 2 : 2 + 2 * used].to(device).unbind(1)]

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
        share = f" ({self.num_pairs / self.num_tokens**2:.1%} of all)" if self.num_tokens else ""
        options = (f", window={self.window}" if self.window else "") + (f", sink={self.sink}" if self.sink else "")
        clips = f"{self.num_clips} clip{'s' * (self.num_clips != 1)}"
        size = f"{self.num_tokens:,} tokens, {self.num_pairs:,} pairs"
        lines = [f"FrameMask.{self.kind}: {clips}, {size}{share}{options}"]
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
        row = sum(self.clip_lens[:clip])
        blocks: list[tuple[str, int, int] | None] = []  # (name, first row, end row), None: frames that are not shown
        for letter, lens in zip(
            "hf" if self.future_lens[clip] else " ", (self.history_lens[clip], self.future_lens[clip])
        ):
            copy = []
            for frame, count in enumerate(lens):
                if count:
                    copy.append((f"{letter}{frame}".strip(), row, row + count))
                row += count
            hidden = len(copy) - DRAWN_FRAMES
            shown = DRAWN_FRAMES // 2
            blocks += copy if hidden <= 0 else [*copy[:shown], None, *copy[-shown:]]

        starts = [group[0] for group in table]
        width = max((len(block[0]) for block in blocks if block), default=0)
        rows = max((len(f"{block[2] - block[1]:,}") for block in blocks if block), default=0)
        cells = [block[0] if block else "…" for block in blocks]
        lines = [" " * (width + rows + 5) + " ".join(f"{cell:<{width}}" for cell in cells)]
        for block in blocks:
            if block is None:
                lines.append(f"  {'…':>{width}}")
                continue
            name, first, end = block
            keys = table[bisect_right(starts, first) - 1][2:]
            marks = ["…" if other is None else _mark(other, keys) for other in blocks]
            lines.append(f"  {name:>{width}}  {end - first:>{rows},} " + " ".join(f"{mark:<{width}}" for mark in marks))
        return [line.rstrip() for line in lines]


def _mark(block: tuple[str, int, int], keys: list[int]) -> str:
    _, first, end = block
    seen = sum(max(0, min(stop, end) - max(start, first)) for start, stop in zip(keys[::2], keys[1::2]))
    return "■" if seen == end - first else "▒" if seen else "·"


def _by_clip(counts: bytearray, frames: list[int]) -> list[list[int]]:
    numbers = memoryview(counts).cast("i").tolist()
    return [numbers[end - count : end] for count, end in zip(frames, accumulate(frames))]


def _check_window(window: int | None, sink: int) -> tuple[int | None, int]:
    if window is not None and (not _is_int(window) or window < 1):
        raise ValueError(f"window is {window!r}; expected a number of frames >= 1, or None for all")
    if not _is_int(sink) or sink < 0:
        raise ValueError(f"sink is {sink!r}; expected a number of frames >= 0")
    return None if window is None else operator.index(window), operator.index(sink)


def _is_int(value: object) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")


@torch.compiler.disable(reason="a FrameMask is built on the host from numbers")
def _make(cls: type[FrameMask], kind: str, *numbers, window: int | None = None, sink: int = 0) -> FrameMask:
    """What csrc/frame_mask.cpp makes of the numbers in lists, arrays and tensors."""
    module = extension()
    if module is None:
        raise ImportError(f"FrameMask needs the compiled module mimo_kernels._C: {extension_reason()}")
    window, sink = _check_window(window, sink)
    if kind in ("teacher_forcing", "block_causal"):
        numbers = (*numbers, window or 0, sink)
    try:
        table = getattr(module, f"frame_table_{kind}")(*numbers)
    except RuntimeError as error:  # of torch: tensors that stand for others
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"a FrameMask is built from numbers, and a tensor here has none to read ({type(error).__name__}: {reason})"
            "; build it outside of FakeTensorMode and of torch.func's transforms"
        ) from None
    return cls(kind, table, window, sink)
