"""A frame list (mimo.network.frames) on a device: which rows are whose, and how the network takes them.

Letters: B clips, T frames per clip, F frames in all clips, N tokens per frame, k kept tokens per clean frame, R packed
rows, G rows of modulation, C channels of a token, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels import FrameRows, gather_tokens
from mimo_kernels.attention import FrameMask


class Part(NamedTuple):
    """Rows that lie in a longer sequence, those of the frames of a kind.

    alike: (B, T, rows per frame), when all clips are alike; the part then begins at row `start` of each clip. Else
        None, and `index` has the rows and `frame` the number in the part of every row's frame, int64 [n].
    frame_rows: of the part by itself, where something is done with it by itself: of the frames that are predicted.
    clip, time: int64 [frames of the part].
    """

    alike: tuple[int, int, int] | None
    start: int
    frame_rows: FrameRows | None
    clip: Tensor
    time: Tensor
    index: Tensor | None
    frame: Tensor | None

    def select(self, x: Tensor) -> Tensor:
        """[R, D] -> the rows of the part, [B, T * k, D] (a view) if alike, else [n, D]."""
        if self.alike is None:
            return x[self.index]
        clips, frames, tokens = self.alike
        return x.unflatten(0, (clips, -1))[:, self.start : self.start + frames * tokens]

    def rows(self, x: Tensor) -> Tensor:
        """[R, D] -> [n, D]."""
        return self.select(x).flatten(0, -2)

    def split(self, rows: Tensor) -> Tensor:
        """What `rows` gives -> what `select` gives."""
        return rows if self.alike is None else rows.unflatten(0, (self.alike[0], -1))

    def add(self, x: Tensor, values: Tensor) -> Tensor:
        """x [R, D] with the values of the part's frames, [frames, D], added to their rows; in place where clips are
        alike."""
        if self.alike is None:
            return x.index_add(0, self.index, values[self.frame])
        self.by_frame(self.select(x)).add_(self.per_frame(values))
        return x

    def add_rows(self, x: Tensor, values: Tensor) -> Tensor:
        """x [R, D] with the values of the part's rows, [n, D], added to them; in place where clips are alike."""
        if self.alike is None:
            return x.index_add(0, self.index, values)
        self.select(x).add_(self.split(values))
        return x

    def per_frame(self, values: Tensor) -> Tensor:
        """Values of the part's frames, [frames, D] -> what broadcasts over `by_frame`."""
        if self.alike is None:
            return values[self.frame]
        clips, frames, _ = self.alike
        return values.view(clips, frames, 1, -1)

    def by_frame(self, selected: Tensor) -> Tensor:
        """What `select` gives -> [B, T, k, D] if alike."""
        return selected if self.alike is None else selected.unflatten(1, (self.alike[1], -1))


class Tracks(NamedTuple):
    """How attention that is spatial and temporal in turn goes from frames to tracks (see `FrameList.tracks`).

    to_tracks, to_frames: int64 [R]: the row of the frames that is each row of the tracks, and the other way round.
    last_to_tracks, last_to_frames: int64 [n]: of the rows of frames that are predicted, the row of the frames that is
        each of theirs in the tracks, and where each of them, in the order of the frames, is among those.
    frames: the mask of the spatial layers.
    """

    to_tracks: Tensor
    to_frames: Tensor
    last_to_tracks: Tensor
    last_to_frames: Tensor
    frames: FrameMask


class Sizes(NamedTuple):
    """Rows of two sizes of token, which have projections of their own.

    coarse, fine: the rows of coarse frames, and all the others; None: there are none.
    frames: int64, the numbers of the coarse frames in the list.
    order: int64 [R], the place of every row in the coarse rows with the fine ones behind them; None where clips are
        alike and their coarse frames come first.
    """

    coarse: Part
    fine: Part | None
    frames: Tensor
    order: Tensor | None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[R, D] -> coarse rows and fine rows."""
        return self.coarse.rows(x), None if self.fine is None else self.fine.rows(x)

    def join(self, coarse: Tensor, fine: Tensor | None, backend: str = "auto") -> Tensor:
        """What `split` gives -> [R, D]."""
        if fine is None or self.fine is None:
            return coarse
        if self.order is not None:
            return gather_tokens(torch.cat([coarse, fine]), self.order, backend=backend)
        return torch.cat([self.coarse.split(coarse), self.fine.split(fine)], dim=1).flatten(0, 1)


class Packed(NamedTuple):
    """A frame list on a device.

    clean, predicted: the clean frames, and those that are neither clean nor coarse; None where there are none.
    sizes: of the rows, where there are coarse frames; None: all are fine.
    rows: norms and modulation of every row. groups: rows of modulation, those of the frames that are not clean in their
        order and, with separate_ln off, a last one that the clean frames share.
    told_clip, told_time: int64 [G], clip and time of the frames that are modulated. group: int64, the rows of
        modulation of `predicted`; None: the first ones.
    clips: B. clip: int64 [R], the clip of every row, or None where all have as many.
    frame, token: int32 [R], the frame of every row and, if its frame is whole, the token in it.
    masked: int64 [F], 1 for masked frames, 0 for others. time: int64 [F]. stride: int64 [F], or None where it is 1
        everywhere.
    mask, last_mask: see FrameList.
    tracks: where attention is factorized; `mask` and `last_mask` are then those of the tracks.
    """

    clips: int
    clean: Part | None
    predicted: Part | None
    sizes: Sizes | None
    rows: FrameRows
    told_clip: Tensor
    told_time: Tensor
    group: Tensor | None
    mask: FrameMask
    last_mask: FrameMask
    clip: Tensor | None
    frame: Tensor
    token: Tensor
    masked: Tensor
    time: Tensor
    stride: Tensor | None
    tracks: Tracks | None = None

    def coordinates(self, tokens: Tensor | None, width: int) -> Tensor:
        """(t, y, x) of every row, int32 [R, 3]. tokens: int64 [R], where frames are not whole; width: of the latent."""
        token, time = self.token if tokens is None else tokens, self.time[self.frame]
        if self.stride is None:
            return torch.stack([time, token // width, token % width], dim=-1).int()
        stride = self.stride[self.frame]
        row = width // stride  # tokens in a row of the frame's grid
        return torch.stack([time, token // row * stride, token % row * stride], dim=-1).int()


class Decoding(NamedTuple):
    """How the decoder goes from clean frames 0 .. T-1-offset to frames offset .. T-1.

    kept: the rows that it reads, as a part of the clean rows.
    first: int64 [n], the row in the decoder's sequence at which the frame of each of them begins.
    mask, frame_rows: of the decoder's sequence, in which frames are whole.
    time: int64 [F], of the frames that are read. shape: [B, T - offset] if clips are alike.
    """

    kept: Part
    first: Tensor
    mask: FrameMask
    frame_rows: FrameRows
    time: Tensor
    shape: tuple[int, ...]


def patches(latents: Tensor, width: int, stride: int) -> Tensor:
    """Whole frames [F, N, C], of `width` columns, -> [F, N / stride^2, stride^2 C]: a token of a coarse frame has the
    channels of stride x stride neighbours, row after row."""
    grid = latents.unflatten(1, (-1, stride, width // stride, stride))  # [F, H / stride, stride, W / stride, stride, C]
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def frame_coordinates(time: Tensor, tokens: int, width: int) -> Tensor:
    """(t, y, x) of the tokens of one whole frame per sequence, at its time [S]: [S * N, 3], int32 for whole times."""
    token = torch.arange(tokens, device=time.device)
    place = torch.stack([torch.zeros_like(token), token // width, token % width], dim=-1)  # [N, 3]
    coords = place.repeat(len(time), 1, 1).to(time.dtype if time.is_floating_point() else torch.int32)
    coords[:, :, 0] = time[:, None]
    return coords.flatten(0, 1)
