"""The frame list: what a training sequence is made of, and all that follows from it.

Every scheme of training in this field is a list of frames per clip. A frame says where it stands in time, what kind it
is and how many tokens of it there are:

    clean     as in the data. Norms of its own, or with config.separate_ln off AdaLN at tau = 0, one row for all
    noisy     at a timestep, modulated by AdaLN: what the network predicts
    masked    as in the data, but for a learned token at the masked places, which a token head predicts. Nothing
              modulates it: it goes through the norms of clean frames
    coarse    as in the data, `stride` x `stride` tokens in one, far back in time: modulated by AdaLN, not predicted

and the list says which of them see which: `sees` is the name of the FrameMask. From that follow the packed rows, the
modulation rows, the mask and the coordinates, once per list, on the host, in O(frames); lists of a shape that comes
again are kept. What changes with every batch are tensors, in FrameBatch: latents, timesteps, kept tokens, conditions.

    two copies, "teacher_forcing":  clip 0: clean 0, 1, ..., T-1, noisy 0, 1, ..., T-1;  clip 1: ...      MiMo, ACDiT
    one copy, "block_causal":       clip 0: noisy 0, 1, ..., T-1;  clip 1: ...                            DFoT, FAR
    one copy, "bidirectional":      the same                                                              video DiT
    one copy, "block_causal":       clip 0: clean 0, 1, ..., t-1, masked t;  clip 1: ...                  VideoMAR
    two copies, "teacher_forcing":  clip 0: clean 0, 1, ..., T-1, masked 0, 1, ..., T-1;  clip 1: ...     MAGI, CTF
    one copy, "block_causal":       clip 0: masked 0, 1, ..., T-1;  clip 1: ...                           MAGI, MTF
    two sizes, "block_causal":      clip 0: coarse 0, ..., L-1, noisy L, ..., T-1;  clip 1: ...           FAR-Long

Letters: B clips, T frames per clip, F frames in all clips, N tokens per frame, k kept tokens per clean frame, R packed
rows, G rows of modulation, C channels of a token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mimo.network.cross import Text
from mimo.network.packed import Decoding, Packed, Part, Sizes, Tracks
from mimo_kernels import FrameRows
from mimo_kernels.attention import FrameMask
from mimo_kernels.core.device_copies import DeviceCopies

Kind = Literal["clean", "noisy", "masked", "coarse"]


class Frame(NamedTuple):
    """A frame of a clip: its time, its kind, how many of its tokens there are, and what a step in its grid is in y and
    x."""

    time: int
    kind: Kind
    tokens: int
    stride: int = 1


@dataclass(frozen=True, eq=False)
class FrameList:
    """The frames of a batch, and who sees whom. Lists compare by identity, and are kept by those who make them.

    Args:
        clips: the frames of every clip, in packed order. With "teacher_forcing" all clean ones come first, in the order
            of time, then as many others of the same times, of which each sees the clean ones before it and itself.
        sees: the constructor of FrameMask.
        alone: bool on the host, [frames that are not clean]: it sees itself alone (history guidance); None: none does.
        window, sink: as in FrameMask.
    """

    clips: tuple[tuple[Frame, ...], ...]
    sees: Literal["teacher_forcing", "block_causal", "bidirectional"]
    alone: Tensor | None = None
    window: int | None = None
    sink: int = 0
    _kept: dict = field(default_factory=dict, repr=False)  # what `alone` has no part in; shared with `isolating`

    def isolating(self, alone: Tensor | None) -> FrameList:
        """The same list, in which the frames of `alone` see themselves alone; bool, one per frame that is not clean."""
        if alone is None or not alone.any():
            return self
        return replace(self, alone=alone.flatten())

    @property
    def frames(self) -> list[Frame]:
        return self._once("frames", lambda: [frame for clip in self.clips for frame in clip])

    @cached_property
    def mask(self) -> FrameMask:
        lens = self._once("lens", lambda: [[frame.tokens for frame in clip] for clip in self.clips])
        if self.sees == "bidirectional":
            if self.alone is not None or self.window is not None:
                raise ValueError("sees='bidirectional': expected no window and no frame alone, as all see all")
            return FrameMask.bidirectional(lens)
        bounds = {"window": self.window, "sink": self.sink}
        if self.sees == "block_causal":
            mask = FrameMask.block_causal(lens, **bounds)
            return mask if self.alone is None else _isolating(mask, self._mentioned(self.alone))
        clean, others = self._once("copies", self._copies)
        drop = self.alone
        if drop is not None:
            counts = [len(clip) for clip in others]
            drop = drop.view(len(counts), -1) if len(set(counts)) == 1 else [d.tolist() for d in drop.split(counts)]
        return FrameMask.teacher_forcing(clean, others, drop_history=drop, **bounds)

    @cached_property
    def last_mask(self) -> FrameMask:
        """`mask`, but only frames that are predicted ask: of a last block, behind which nobody needs the others. Its
        keys are all rows."""
        asks = self._once("asks", lambda: torch.tensor([is_predicted(frame) for frame in self.frames]))
        if asks.all() or not asks.any():
            return self.mask
        return _asked_by(self.mask, asks[self._once("with rows", self._with_rows)])

    @cached_property
    def tracks(self) -> FrameList:
        """The same list seen from one place: a track is a clip that has one token of every frame. All tracks of clip 0
        come first, in the order of its places, then those of clip 1.

        ValueError where frames are not of one size each: then places have no tracks.
        """
        listed: FrameList = self._once("tracks", self._tracks)
        if self.alone is None:
            return listed
        counts = [sum(frame.kind != "clean" for frame in clip) for clip in self.clips]
        each = zip(self.alone.split(counts), self.clips, strict=True)
        return listed.isolating(torch.cat([alone.repeat(_places(clip)) for alone, clip in each]))

    def packed(self, *, separate_ln: bool, device: torch.device, factorized: bool = False) -> Packed:
        """What the network needs of the list, on a device. separate_ln: clean frames have norms of their own;
        factorized: attention is spatial and temporal in turn."""
        packed = self._once(f"packed {separate_ln}", lambda: _Copied(_pack(self, separate_ln))).on(device)
        if not factorized:
            return packed._replace(mask=self.mask, last_mask=self.last_mask)
        seen = self.tracks
        return packed._replace(mask=seen.mask, last_mask=seen.last_mask, tracks=self.by_tracks(device))

    def by_tracks(self, device: torch.device) -> Tracks:
        """How rows go from frames to `tracks` and back."""
        tracks = self._once("track rows", lambda: _Copied(_track_rows(self))).on(device)
        return tracks._replace(frames=self._once("within", self._within))

    def decoding(self, offset: int, tokens: int, device: torch.device) -> Decoding | None:
        """How clean frames are decoded into those `offset` later, of `tokens` tokens; None if no clip has any."""
        return self._once(f"decoding {offset} {tokens}", lambda: _Copied(_decoding(self, offset, tokens))).on(device)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `alone` has no part in is made once for the list and those that isolate frames of it."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _within(self) -> FrameMask:
        """Every frame sees itself alone."""
        return FrameMask.bidirectional([[frame.tokens] for frame in self.frames if frame.tokens])

    def _tracks(self) -> FrameList:
        clips: list[tuple[Frame, ...]] = []
        for clip in self.clips:
            clips += [tuple(frame._replace(tokens=1) for frame in clip)] * _places(clip)
        return FrameList(tuple(clips), self.sees, None, self.window, self.sink)

    def _copies(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token counts of the clean frames and of the others, per clip, as FrameMask.teacher_forcing takes them."""
        lens: tuple[list[list[int]], list[list[int]]] = [], []
        for clip in self.clips:
            clean = [frame for frame in clip if frame.kind == "clean"]
            others = [frame for frame in clip if frame.kind != "clean"]
            fits = not others or [f.time for f in clean] == [f.time for f in others]
            if list(clip) != clean + others or not fits:
                raise ValueError("sees='teacher_forcing': expected clean frames, then others of the same times")
            lens[0].append([frame.tokens for frame in clean])
            lens[1].append([frame.tokens for frame in others] or [0] * len(clean))
        return lens

    def _mentioned(self, alone: Tensor) -> Tensor:
        """From frames that are not clean to frames that have rows."""
        every = torch.zeros(len(self.frames), dtype=torch.bool)
        every[[i for i, frame in enumerate(self.frames) if frame.kind != "clean"]] = alone
        return every[self._once("with rows", self._with_rows)]

    def _with_rows(self) -> Tensor:
        return torch.tensor([i for i, frame in enumerate(self.frames) if frame.tokens])


def _places(clip: tuple[Frame, ...]) -> int:
    """Tokens of each of the frames of a clip."""
    sizes = {frame.tokens for frame in clip}
    if len(sizes) > 1:
        raise ValueError(f"frames of {sorted(sizes)} tokens in a clip: expected one size, so that places have tracks")
    return sizes.pop() if sizes else 0


def is_predicted(frame: Frame) -> bool:
    return frame.kind in ("noisy", "masked")


def _isolating(mask: FrameMask, chosen: Tensor) -> FrameMask:
    """The mask, but the chosen ones of its groups see themselves alone."""
    table = mask.frames.clone()
    table[chosen, 2:] = 0
    table[chosen, 2:4] = table[chosen, :2]
    return FrameMask.from_table(table, clip_lens=mask.clip_lens)


def _asked_by(mask: FrameMask, chosen: Tensor) -> FrameMask:
    """The mask of the chosen ones of its groups: their rows, numbered anew, and all keys."""
    table = mask.frames[chosen]
    counts = table[:, 1] - table[:, 0]
    clip_ends = torch.tensor(mask.clip_lens, device="cpu").cumsum(0)
    clips = torch.bucketize(table[:, 0].contiguous(), clip_ends, right=True)
    clip_lens = torch.zeros_like(clip_ends).index_add(0, clips, counts.long())
    table[:, 1] = counts.cumsum(0)
    table[:, 0] = table[:, 1] - counts
    return FrameMask.from_table(table, clip_lens=clip_lens.tolist(), key_lens=mask.key_lens)


@lru_cache(maxsize=256)
def two_copies(clips: int, frames: int, kept: int, tokens: int) -> FrameList:
    """Clean frames of `kept` tokens beside noisy ones of `tokens`; 0 for none of either."""
    clean = [Frame(t, "clean", kept) for t in range(frames)] if kept else []
    noisy = [Frame(t, "noisy", tokens) for t in range(frames)] if tokens else []
    return FrameList(((*clean, *noisy),) * clips, "teacher_forcing")


@lru_cache(maxsize=256)
def one_copy(
    clips: int, frames: int, tokens: int, sees: Literal["block_causal", "bidirectional"] = "block_causal"
) -> FrameList:
    """Noisy frames alone."""
    return FrameList((tuple(Frame(t, "noisy", tokens) for t in range(frames)),) * clips, sees)


@lru_cache(maxsize=512)  # the number of coarse frames is drawn: FAR-Long meets 285 lists
def two_sizes(clips: int, distant: int, frames: int, tokens: int, stride: int) -> FrameList:
    """Coarse frames, `distant` of them, of tokens / stride^2 tokens each, and the `frames` noisy ones after them."""
    coarse = [Frame(t, "coarse", tokens // stride**2, stride) for t in range(distant)]
    noisy = [Frame(distant + t, "noisy", tokens) for t in range(frames)]
    return FrameList(((*coarse, *noisy),) * clips, "block_causal")


@torch.inference_mode(False)  # what is made in it could not serve training later
def _pack(given: FrameList, separate_ln: bool) -> Packed:
    frames = given.frames
    clean = [i for i, frame in enumerate(frames) if frame.kind == "clean"]
    others = [i for i, frame in enumerate(frames) if frame.kind != "clean"]
    modulated = [i for i in others if frames[i].kind != "masked"]
    predicted = [i for i, frame in enumerate(frames) if is_predicted(frame)]
    clips = [b for b, clip in enumerate(given.clips) for _ in clip]
    groups = [-1 if separate_ln else len(modulated)] * len(frames)
    for group, i in enumerate(modulated):
        groups[i] = group
    lens = [frame.tokens for frame in frames]
    per_clip = [sum(frame.tokens for frame in clip) for clip in given.clips]
    strides = [frame.stride for frame in frames]
    frame, token = _rows_of(lens)
    return Packed(
        clips=len(given.clips),
        clean=_part(given, clean, None),
        predicted=_part(given, predicted, groups),
        sizes=_sizes(given),
        rows=FrameRows(lens, groups),
        told_clip=torch.tensor([clips[i] for i in modulated], dtype=torch.int64),
        told_time=torch.tensor([frames[i].time for i in modulated], dtype=torch.int64),
        group=None if len(predicted) == len(others) else torch.tensor([groups[i] for i in predicted]),
        mask=None,
        last_mask=None,
        clip=None if len(set(per_clip)) == 1 else _rows_of(per_clip)[0],
        frame=frame.int(),
        token=token.int(),
        masked=torch.tensor([int(frame.kind == "masked") for frame in frames]),
        time=torch.tensor([frame.time for frame in frames]),
        stride=None if set(strides) == {1} else torch.tensor(strides),
    )


@torch.inference_mode(False)
def _track_rows(given: FrameList) -> Tracks:
    order, start = [], 0
    for clip in given.clips:
        places = _places(clip)
        rows = torch.arange(len(clip) * places)
        order.append(start + rows.view(len(clip), places).t().flatten())
        start += len(rows)
    to_tracks = torch.cat(order)
    asks = torch.tensor([is_predicted(frame) for frame in given.frames])
    last = to_tracks[asks[_rows_of([frame.tokens for frame in given.frames])[0]][to_tracks]]
    return Tracks(to_tracks, torch.argsort(to_tracks), last, torch.argsort(last), frames=None)


def _sizes(given: FrameList) -> Sizes | None:
    coarse = [i for i, frame in enumerate(given.frames) if frame.kind == "coarse"]
    fine = [i for i, frame in enumerate(given.frames) if frame.kind != "coarse"]
    if not coarse:
        return None
    parts = _part(given, coarse, None), _part(given, fine, None)
    order = None
    if parts[1] is not None and (parts[0].alike is None or parts[1].alike is None or parts[0].start):
        sized = torch.cat([_rows_in(given, coarse), _rows_in(given, fine)])
        order = torch.empty_like(sized)
        order[sized] = torch.arange(len(sized))
    return Sizes(*parts, frames=torch.tensor(coarse), order=order)


def _rows_in(given: FrameList, chosen: list[int]) -> Tensor:
    """int64 [n], the rows of the frames with the numbers `chosen`."""
    lens = [frame.tokens for frame in given.frames]
    first = torch.tensor(list(accumulate(lens, initial=0)))
    frame, token = _rows_of([lens[i] for i in chosen])
    return first[torch.tensor(chosen)][frame] + token


def _part(given: FrameList, chosen: list[int], groups: list[int] | None) -> Part | None:
    """The part of the frames with the numbers `chosen`. groups: rows of modulation of all frames."""
    if not chosen:
        return None
    lens = [frame.tokens for frame in given.frames]
    first = list(accumulate(lens, initial=0))
    counts = [lens[i] for i in chosen]
    clip = [b for b, clip in enumerate(given.clips) for _ in clip]
    alike, start, index, frame = None, 0, None, None
    here = [i for i in chosen if clip[i] == 0]
    if len(set(given.clips)) == 1 and here == list(range(here[0], here[-1] + 1)) and len(set(counts)) == 1:
        alike, start = (len(given.clips), len(here), counts[0]), first[here[0]]
    else:
        index, (frame, _) = _rows_in(given, chosen), _rows_of(counts)
    return Part(
        alike=alike,
        start=start,
        frame_rows=None if groups is None else FrameRows(counts, [groups[i] for i in chosen]),
        clip=torch.tensor([clip[i] for i in chosen]),
        time=torch.tensor([given.frames[i].time for i in chosen]),
        index=index,
        frame=frame,
    )


@torch.inference_mode(False)
def _decoding(given: FrameList, offset: int, tokens: int) -> Decoding | None:
    clean = tuple(tuple(frame for frame in clip if frame.kind == "clean") for clip in given.clips)
    counts = [max(0, len(clip) - offset) for clip in clean]
    if not any(counts):
        return None
    history = FrameList(clean, "block_causal")
    starts = accumulate(map(len, clean), initial=0)
    read = [start + t for start, count in zip(starts, counts, strict=False) for t in range(count)]
    kept = _part(history, read, None)
    frame, _ = _rows_of([history.frames[i].tokens for i in read])
    return Decoding(
        kept=kept,
        first=(frame * tokens).int(),
        mask=FrameMask.block_causal([[tokens] * count for count in counts]),
        frame_rows=FrameRows([tokens] * len(read), [-1] * len(read)),
        time=kept.time,
        shape=(len(read),) if kept.alike is None else kept.alike[:2],
    )


def _rows_of(lens: Iterable[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Of things with these lengths, one after the other: the thing of every row, and the row's number in it."""
    lens = torch.as_tensor(lens, dtype=torch.int64)
    thing = torch.repeat_interleave(lens)
    return thing, torch.arange(len(thing)) - (lens.cumsum(0) - lens)[thing]


class _Copied:
    """A Packed, a Tracks, a Decoding or None on the host, and the same with its tensors on a device."""

    def __init__(self, host: Packed | Tracks | Decoding | None) -> None:
        tensors: list[Tensor] = []
        _each_tensor(host, lambda tensor: tensors.append(tensor) or tensor)
        self.host, self.copies = host, DeviceCopies("FrameList: these frames", *tensors)

    def on(self, device: torch.device) -> Any:
        if self.host is None:
            return None
        copies = iter(self.copies.on(device))
        return _each_tensor(self.host, lambda _: next(copies))


def _each_tensor(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A NamedTuple, nested, with f of its tensors in their places."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each_tensor(part, f) for part in value))
    return value


@dataclass
class FrameBatch:
    """The tensors of a frame list.

    Args:
        frames: the list.
        latents: [F, N, C], every frame whole, in the order of the list.
        timestep: [G] in 0..1000, of the frames that are modulated, neither clean nor masked; None without any. What
            lies outside is a timestep of its own, as FAR's -1 of a clean frame and -2 of a coarse one.
        tokens: int64 [R], the token of every row in its frame; None where all frames are whole.
        labels: int64 [B]; None or num_classes is the null class.
        actions: int64 [B, T]; None or num_actions is the null action. An action belongs to the frame it leads to.
        intervals: int64 [B] in 1..max_interval, the distance of a clip's frames in its video; there is no null one.
        noise: int64 [F] in 0..noise_levels - 1, how noisy the latents of every frame are; None: none is.
        masked: bool [R], the rows that a learned token stands for; only in masked frames.
        asked: what the token head is to predict, and from what.
        text: what the clips are told, for a network with text_dim; None tells all of them nothing.
        recent: [frames that are noisy, N, n C], the n = recent_frames frames before each, for a network that is told.
    """

    frames: FrameList
    latents: Tensor
    timestep: Tensor | None = None
    tokens: Tensor | None = None
    labels: Tensor | None = None
    actions: Tensor | None = None
    intervals: Tensor | None = None
    noise: Tensor | None = None
    masked: Tensor | None = None
    asked: Asked | None = None
    text: Text | None = None
    recent: Tensor | None = None


class Asked(NamedTuple):
    """What the token head is asked in training.

    rows: int64 [n], of those of the frames that are not clean: the tokens.
    noisy: [K, n, C], K noisy versions of each. timestep: int64 [K, n], how noisy each is.
    """

    rows: Tensor
    noisy: Tensor
    timestep: Tensor


def clean_and_noisy(
    clean: Tensor,
    noisy: Tensor | None,
    timestep: Tensor | None,
    *,
    keep: Tensor | None = None,
    drop_history: Tensor | None = None,
    **conditions: Tensor | None,
) -> FrameBatch:
    """Clean frames [B, T, N, C] beside noisy ones of the same clips; of the clean ones the tokens `keep`.

    Args:
        noisy: [B, T, N, C]; None for clean frames alone.
        timestep: [B, T] in 0..1000; None with `noisy`.
        keep: int64 [B, k], sorted: the tokens that are not masked, the same in every frame of a clip; None keeps all.
        drop_history: bool [B, T] on the host: that noisy frame sees itself alone.
        conditions: labels, actions, intervals and recent of FrameBatch.
    """
    _check(clean, noisy, timestep, keep, drop_history)
    clips, frames, size, _ = clean.shape
    kept = size if keep is None else keep.shape[1]
    listed = two_copies(clips, frames, kept, 0 if noisy is None else size).isolating(drop_history)
    latents, tokens = (clean if noisy is None else torch.stack([clean, noisy], dim=1)).flatten(0, -3), None
    if keep is not None:
        tokens = keep[:, None].expand(-1, frames, -1).flatten(1)
        if noisy is not None:
            whole = torch.arange(size, device=keep.device).expand(clips, frames, -1).flatten(1)
            tokens = torch.cat([tokens, whole], dim=1)
        tokens = tokens.flatten()
    return FrameBatch(listed, latents, None if timestep is None else timestep.flatten(), tokens, **conditions)


def noisy_alone(
    noisy: Tensor,
    timestep: Tensor,
    *,
    sees: Literal["block_causal", "bidirectional"] = "block_causal",
    drop_history: Tensor | None = None,
    **conditions: Tensor | None,
) -> FrameBatch:
    """Noisy frames [B, T, N, C] at timesteps [B, T]; the other arguments as in `clean_and_noisy`."""
    _check(noisy, None, None, None, drop_history)
    if timestep.shape != noisy.shape[:2]:
        raise ValueError(f"timestep is {list(timestep.shape)}: expected {list(noisy.shape[:2])}, to match the frames")
    listed = one_copy(*noisy.shape[:3], sees).isolating(drop_history)
    return FrameBatch(listed, noisy.flatten(0, 1), timestep.flatten(), **conditions)


def coarse_and_noisy(
    coarse: Tensor,
    noisy: Tensor,
    timestep: Tensor,
    *,
    stride: int,
    drop_history: Tensor | None = None,
    **conditions: Tensor | None,
) -> FrameBatch:
    """Distant frames [B, L, N, C], whole as all latents are, of which the network makes coarse ones, and noisy frames
    [B, T, N, C] after them, block causal.

    Args:
        timestep: [B, L + T], those of the coarse frames first.
        stride: tokens of the latent per token of a coarse frame, in y and in x.
        drop_history: bool [B, T] on the host: that noisy frame sees itself alone.
        conditions: labels, actions [B, L + T] and intervals of FrameBatch.
    """
    _check(noisy, None, None, None, drop_history)
    whole = torch.cat([coarse, noisy], dim=1)
    if timestep.shape != whole.shape[:2]:
        raise ValueError(f"timestep is {list(timestep.shape)}: expected {list(whole.shape[:2])}, to match the frames")
    listed = two_sizes(len(noisy), coarse.shape[1], *noisy.shape[1:3], stride)
    if drop_history is not None:
        listed = listed.isolating(torch.cat([drop_history.new_zeros(coarse.shape[:2]), drop_history], dim=1))
    return FrameBatch(listed, whole.flatten(0, 1), timestep.flatten(), **conditions)


def _check(frames: Tensor, noisy, timestep, keep, drop_history) -> None:
    """Refuses shapes that do not fit, by name."""
    shape = frames.shape
    if frames.dim() != 4:
        raise ValueError(f"frames are {list(shape)}: expected [B, T, N, C]")
    if (noisy is None) != (timestep is None):
        raise ValueError("noisy and timestep: expected both or neither")
    expected = {"noisy": (noisy, shape), "timestep": (timestep, shape[:2]), "drop_history": (drop_history, shape[:2])}
    for name, (tensor, wanted) in expected.items():
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"{name} is {list(tensor.shape)}: expected {list(wanted)}, to match the clean frames")
    if keep is not None and (keep.dim() != 2 or len(keep) != shape[0] or not 1 <= keep.shape[1] <= shape[2]):
        raise ValueError(f"keep is {list(keep.shape)}: expected [{shape[0]}, k] with 1 <= k <= {shape[2]}")
    if drop_history is not None and drop_history.device.type != "cpu":
        raise ValueError(f"drop_history is on {drop_history.device}: expected cpu, where the mask is built")


def to_tokens(latents: Tensor, patch: int) -> Tensor:
    """Latents [B, T, H, W, channels] -> tokens [B, T, N, C]: `patch` x `patch` positions, row by row, are one."""
    return rearrange(latents, "b t (h p) (w q) c -> b t (h w) (p q c)", p=patch, q=patch)


def to_latents(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `to_tokens`; grid: rows and columns of a frame in tokens."""
    h, w = grid
    return rearrange(tokens, "b t (h w) (p q c) -> b t (h p) (w q) c", h=h, w=w, p=patch, q=patch)


@lru_cache(maxsize=256)
def frame_rows(sequences: int, tokens: int, *, modulated: bool | None = True) -> FrameRows:
    """Rows of one frame per sequence: each modulated by a row of its own; all by the same one (None); or by none
    (False)."""
    groups = {True: range(sequences), None: [0] * sequences, False: [-1] * sequences}[modulated]
    return FrameRows([tokens] * sequences, groups)
