"""How the tokens of a batch lie behind one another, and which of them see which.

Training feeds every clip twice: clean *history*, a part of its tokens dropped, and noisy *future*. The rows of all clips
lie packed, without padding, in the order of FrameMask:

    clip 0: history frame 0, 1, ..., T-1, future frame 0, 1, ..., T-1;  clip 1: ...

Letters: B clips, T frames, N tokens per frame, k kept history tokens per frame, D width, R packed rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels import FrameRows
from mimo_kernels.attention import FrameMask


class Layout(NamedTuple):
    """The packed rows of B clips, each with T history frames and T future frames of equal length; either may be empty."""

    clips: int
    frames: int
    history_len: int  # history rows per clip
    rows: FrameRows
    future_rows: FrameRows | None

    def history(self, x: Tensor) -> Tensor:
        """[R, D] -> a view of the history rows, [B, T * k, D]."""
        return x.unflatten(0, (self.clips, -1))[:, : self.history_len]

    def future(self, x: Tensor) -> Tensor:
        """[R, D] -> the future rows, packed."""
        return x.unflatten(0, (self.clips, -1))[:, self.history_len :].flatten(0, 1)


class Plan(NamedTuple):
    """All that the host decides about a batch; made by MiMo.plan, read by every layer.

    mask: of all blocks that compute history. last_mask: of a last block whose history rows nobody reads; they see nothing.
    decoder: per offset the mask and the rows of the decoder.
    """

    layout: Layout
    mask: FrameMask
    last_mask: FrameMask
    decoder: dict[int, tuple[FrameMask, FrameRows]]


@lru_cache(maxsize=256)
def make_layout(clips: int, frames: int, kept: int, tokens: int, separate_ln: bool) -> Layout:
    """`kept` tokens per history frame, `tokens` per future frame; 0 for none."""
    future_frames = clips * frames if tokens else 0
    history_group = -1 if separate_ln else future_frames  # AdaLN at tau = 0 is the row after those of the future frames
    lens, groups = [], []
    for clip in range(clips):
        if kept:
            lens += [kept] * frames
            groups += [history_group] * frames
        if tokens:
            lens += [tokens] * frames
            groups += range(clip * frames, (clip + 1) * frames)
    future_rows = FrameRows([tokens] * future_frames, range(future_frames)) if tokens else None
    return Layout(clips, frames, frames * kept, FrameRows(lens, groups), future_rows)


def make_masks(
    clips: int, frames: int, kept: int, tokens: int, drop: Tensor | None = None
) -> tuple[FrameMask, FrameMask]:
    """Plan.mask and Plan.last_mask."""
    lens = [[kept] * frames] * clips, [[tokens] * frames] * clips
    mask = FrameMask.teacher_forcing(*lens, drop_history=drop)
    if not tokens:
        return mask, mask
    table = mask.frames.clone()
    table.view(clips, 2, frames, -1)[:, 0, :, 2:] = 0  # no key intervals for history rows
    return mask, FrameMask.from_table(table, clip_lens=mask.clip_lens)


@lru_cache(maxsize=256)
def make_plan(clips: int, frames: int, kept: int, noised: int, tokens: int, separate_ln: bool, offsets: tuple) -> Plan:
    """The plan of a batch in which no future frame is cut off from history. Few distinct ones occur, so they are kept."""
    decoder = {}
    for offset in offsets:
        if offset < frames:  # the last frames have no frame `offset` later
            mask = FrameMask.block_causal([[tokens] * (frames - offset)] * clips)
            decoder[offset] = mask, make_layout(clips, frames - offset, tokens, 0, True).rows
    return Plan(
        make_layout(clips, frames, kept, noised, separate_ln), *make_masks(clips, frames, kept, noised), decoder
    )


def coordinates(place: Tensor, height: int, width: int) -> Tensor:
    """(t, y, x) of tokens numbered in the order frame, row, column: [...] -> int32 [..., 3]."""
    return torch.stack([place // (height * width), place // width % height, place % width], dim=-1).int()
