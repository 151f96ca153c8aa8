"""What a frame sees of the frames before it: keys and values in a paged cache, or computed anew from the latents.

A history is asked by the loop (mimo.sampling.sampler) in this order:

    begin(clips)                    the context
    per frame
        per step
            prepare()
            attend(layer, q, k, v)  per layer: rows of all branches, each sees its own history
        reserve()                   host: room for the frame
        record(x)                   device: the finished frame
        commit()                    host: it is seen from now on
    end()

`prepare`, `attend` and `record` are device work on static buffers; where `captures` is true they can be replayed as a
CUDA graph.

Where attention is factorized, the network attends within a frame by itself and a token sees its own place in the frames
before: then every place of a sequence is a track, with a history of one token per frame.

Letters: B clips, K trajectories per clip, S = B * K sequences, N tokens per frame, C latent channels, G branches,
H histories, P tracks of a sequence (1, or N where attention is factorized).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo.errors import InputError
from mimo.network.blocks import attend_tracks
from mimo.network.frames import Frame, FrameList
from mimo.network.network import MiMo
from mimo.sampling.guidance import Conditions, RunKey
from mimo_kernels import FrameCache, frame_attention, paged_frame_attention
from mimo_kernels.attention.paged import serving as paged_serving
from mimo_kernels.cache.pages import CacheView, FrameSlot, ViewHead


@dataclass(frozen=True)
class CachePolicy:
    """Which earlier frames a frame sees.

    Args:
        window: the latest frames, the one being made included, as in FrameMask; None: all of them.
        sink: the first frames of the video, which stay visible.
        coarse_tokens: a frame that leaves the window stays as so many tokens, see mimo.sampling.multi_level; 0: it is
            dropped.
    """

    window: int | None = None
    sink: int = 0
    coarse_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: expected 1 or more frames, or None")
        if self.sink < 0:
            raise ValueError(f"sink={self.sink}: expected 0 or more frames")
        if self.coarse_tokens and (self.window is None or self.sink):
            raise ValueError(
                f"coarse_tokens={self.coarse_tokens}: expected a window that frames leave and no sink, "
                f"got window={self.window}, sink={self.sink}"
            )

    def pages(self, frames: int, tokens: int, page_size: int) -> int:
        """Pages of a sequence of up to `frames` frames at most, the frame being added included."""
        whole = frames if self.window is None else min(frames, self.window + self.sink)
        coarse = frames - whole if self.coarse_tokens else 0
        return sum(
            FrameCache.pages_for(count, size, page_size=page_size)
            for count, size in ((whole, tokens), (coarse, self.coarse_tokens))
        )

    def pages_of_run(self, key: RunKey, tokens: int, page_size: int) -> int:
        """Pages of all sequences of a run in all of its histories, at most."""
        whole, shared, own = (
            self.pages(frames, tokens, page_size)
            for frames in (key.num_frames, key.context_frames, key.num_frames - key.context_frames)
        )
        if self.coarse_tokens:  # the window is encoded again for every trajectory, behind shared coarse frames
            made = key.num_frames - key.context_frames
            own = self.pages(min(self.window or 0, key.num_frames), tokens, page_size)
            own += FrameCache.pages_for(made, self.coarse_tokens, page_size=page_size)
        # Trajectories share the context's pages, so K of them need less than K times one.
        return key.histories * min(key.sequences * whole, key.clips * shared + key.sequences * own)

    def apply(self, cache: FrameCache, seqs: Sequence[int]) -> None:
        """Leave in the cache what the next frame sees."""
        if self.window is None:
            return
        for seq in seqs:
            cache.evict(seq, window=self.window - 1, sink=self.sink)


class History(ABC):
    """The frames before the one being made, of all sequences of a run. See the top of this file."""

    captures = False  # device work can be captured as a CUDA graph
    captures_record = True  # that of `record` too

    def __init__(self, model: MiMo, policy: CachePolicy, key: RunKey, conditions: Conditions, page_size: int):
        self.model, self.policy, self.key, self.conditions = model, policy, key, conditions
        self.page_size = page_size
        self.size, self.tokens, self.branches = key.sequences, model.config.tokens, key.branches
        self.tracks = model.config.tracks
        self.device, self.dtype = model.embed.weight.device, model.embed.weight.dtype

    @abstractmethod
    def begin(self, clips: list[Tensor]) -> None:
        """Take the contexts, one ``[Tc_b, N, C]`` per clip, for all of its trajectories."""

    def prepare(self) -> None:
        """Before a denoising step."""
        return

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the rows of a step, each ``[G * S * N, h, d]``."""

    def reserve(self) -> None:
        """Room for the frame being made. A frame that is not committed gives it back in `end`."""
        return

    @abstractmethod
    def record(self, x: Tensor) -> None:
        """The finished frame ``[S, N, C]`` becomes history."""

    def commit(self) -> None:
        """The recorded frame is seen from now on."""
        return

    @abstractmethod
    def end(self) -> None:
        """Forget everything; the next run `begin`s."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the frames to come depend on, as tensors on the host; of histories that can be saved."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Instead of `begin`: go on where `state_dict` was called."""
        raise NotImplementedError


class CachedHistory(History):
    """Keys and values in a FrameCache: H * S * P sequences, those of history 0 first, tracks of a sequence together."""

    def __init__(self, model: MiMo, policy: CachePolicy, key: RunKey, conditions: Conditions, page_size: int):
        super().__init__(model, policy, key, conditions, page_size)
        c = model.config
        self.rows = self.tokens // self.tracks  # of a track in a frame
        num_pages = self.tracks * policy.pages_of_run(key, self.rows, page_size)
        sizes = {"num_pages": num_pages, "page_size": page_size}
        self.cache = FrameCache(c.cached_depth, c.heads, c.head_dim, **sizes, dtype=key.dtype, device=self.device)
        self.seqs: list[int] = []
        most = policy.pages(key.num_frames, self.rows, page_size)
        rows = self.size * self.tracks
        self.seen = self.cache.view([None] * (rows * len(self.branches)), max_pages=most)  # by the branches
        self.past = self.seen.first(key.histories * rows)  # by a frame that becomes history
        self.slot: FrameSlot | None = None  # of the frame that becomes history now
        self.kept: FrameSlot | None = None  # the one that the captured graph writes to
        # The reference attention takes lengths from the host, which a graph would freeze.
        refusals = paged_serving(self.device, key.dtype, c.head_dim)["triton"]
        self.captures = self.device.type == "cuda" and model.backend == "auto" and not refusals
        # Graphs point to the tables of these, which others may push out of what is kept.
        self.frame_rows = (
            model.rows_of_frames(self.size * len(self.branches)),
            model.rows_of_frames(self.size * key.histories, clean=conditions.history.timestep is None),
        )

    def begin(self, clips: list[Tensor]) -> None:
        histories, trajectories, tracks = self.key.histories, self.key.trajectories, range(self.tracks)
        # All of them, should this fail.
        self.seqs = [self.cache.new_sequence() for _ in range(histories * len(clips) * self.tracks)]
        firsts = [self.seqs[i : i + self.tracks] for i in range(0, len(self.seqs), self.tracks)]
        for moment in range(max(map(len, clips))):
            here = [b for b, clip in enumerate(clips) if len(clip) > moment]
            seqs = [firsts[h * len(clips) + b][p] for h in range(histories) for b in here for p in tracks]
            x = torch.stack([clips[b][moment] for b in here]).to(self.device, torch.float32)
            rows = torch.tensor([b * trajectories for b in here], device=self.device)
            told = self.conditions.of_histories(rows, torch.full_like(rows, moment))
            self.slot = self.cache.begin_frame(seqs, self.rows)
            time = self.conditions.time(moment)
            self._as_history(x, time, told, self.cache.view(seqs, max_pages=self.seen.max_pages))
            self._show()
        self.seqs = []
        for first in firsts:
            self.seqs += first
            self.seqs += [self.cache.fork(track) for _ in range(trajectories - 1) for track in first]
        self._refresh()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(self.seen, layer, q, k, v)

    def reserve(self) -> None:
        self.slot = self.kept = self.cache.begin_frame(self.seqs, self.rows, reuse=self.kept)

    def record(self, x: Tensor) -> None:
        time = self.conditions.time(self.conditions.position).expand(self.key.histories, -1).flatten()
        self._as_history(x, time, self.conditions.of_histories(), self.past)

    def commit(self) -> None:
        self._show()
        self._refresh()

    def end(self) -> None:
        self._cancel()
        for seq in self.seqs:
            self.cache.free(seq)
        self.seqs = []

    def state_dict(self) -> dict[str, Tensor]:
        """What the frames to come depend on, as tensors on the host."""
        self._cancel()
        return self.cache.state_dict() | {"seqs": torch.tensor(self.seqs)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Instead of `begin`: go on where `state_dict` was called. InputError for a state of other histories."""
        seqs, rows = state["seqs"].tolist(), self.size * self.tracks
        expected = self.key.histories * rows
        if len(seqs) != expected:
            raise InputError(
                f"the saved run has {len(seqs)} sequences in its cache, expected {expected}: {rows} in each of "
                f"{self.key.histories} histories"
            )
        self.cache.load_state_dict(state)
        self.seqs = seqs
        self._refresh()

    def _as_history(self, x: Tensor, time: float | Tensor, told: dict, past: CacheView | ViewHead) -> None:
        """Keys and values of clean frames in all histories, made straight into the pages of `slot`."""
        self.model.history_frame(
            x.to(self.dtype).expand(self.key.histories, *x.shape).flatten(0, 1),
            time,
            lambda layer, q, k, v: self._attend(past, layer, q, k, v),
            **told,
            place=lambda layer: self.cache.place(self.slot, layer),
        )

    def _attend(self, view: CacheView | ViewHead, layer: int, *packed: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, self.rows)) for x in packed)
        out = paged_frame_attention(q, k, v, self.cache, layer=layer, view=view, backend=self.model.backend)
        return out.flatten(0, 1)

    def _cancel(self) -> None:
        if self.slot is not None and self.slot.open:
            self.cache.cancel(self.slot)

    def _show(self) -> None:
        assert self.slot is not None  # `remember` has begun a frame
        self.cache.commit(self.slot)
        self.policy.apply(self.cache, self.slot.seqs)

    def _refresh(self) -> None:
        """What every row of a step sees: the sequence of its history, or nothing."""
        seqs: list[int | None] = []
        for branch in self.branches:
            rows = self.size * self.tracks
            first = None if branch.history is None else branch.history * rows
            seqs += [None] * rows if first is None else self.seqs[first : first + rows]
        self.seen.refresh(seqs)


class RecomputedHistory(History):
    """Latents, put through the network anew in every step under the full mask: for comparison."""

    def begin(self, clips: list[Tensor]) -> None:
        latents = [clip.to(self.device, torch.float32) for clip in clips]
        self.frames = [list(clip) for clip in latents for _ in range(self.key.trajectories)]

    def prepare(self) -> None:
        self.layers = self._run()

    def record(self, x: Tensor) -> None:
        for frames, latent in zip(self.frames, x, strict=True):
            frames.append(latent)

    def end(self) -> None:
        self.frames = []

    def _run(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Keys and values of every frame, per layer and sequence of all histories: ``[frames, N, h, d]``."""
        counts, histories = [len(frames) for frames in self.frames], self.key.histories
        packed = [x for frames in self.frames for x in frames]
        if not packed:
            return [[]] * self.model.config.cached_depth
        clips = tuple(tuple(Frame(t, "clean", self.tokens) for t in range(count)) for count in counts * histories)
        listed = FrameList(clips, "block_causal", window=self.policy.window, sink=self.policy.sink)
        mask = listed.mask if self.tracks == 1 else listed.tracks.mask
        layers, backend = [], self.model.backend

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            split = [x.unflatten(0, (-1, self.tokens)).split(counts * histories) for x in (k, v)]
            layers.append(list(zip(*split, strict=True)))
            if self.tracks == 1:
                return frame_attention(q, k, v, mask, backend=backend)
            return attend_tracks(q, k, v, mask, listed.by_tracks(self.device), backend)

        rows = torch.arange(self.size).repeat_interleave(torch.tensor(counts)).to(self.device)
        moments = torch.cat([torch.arange(count) for count in counts]).to(self.device)
        x = torch.stack(packed).to(self.dtype).repeat(histories, 1, 1)
        told = self.conditions.of_histories(rows, moments)
        self.model.history_frame(x, self.conditions.time(moments).repeat(histories), attend, **told)
        return layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.unflatten(0, (len(self.branches), self.size, self.tokens)) for x in (q, k, v)]
        out = torch.empty_like(rows[0])
        for g, branch in enumerate(self.branches):
            for s in range(self.size):
                # [frames, N, h, d] -> [P, h, frames * N / P, d]
                each = [x[g, s][None] for x in rows]
                if branch.history is not None and self.layers[layer]:
                    each[1:] = self._behind(self.layers[layer][branch.history * self.size + s], each[1:], s)
                each = [x.unflatten(1, (self.tracks, -1)).transpose(0, 1).flatten(1, 2) for x in each]
                q_s, k_s, v_s = (x.transpose(1, 2).squeeze(0) for x in each)
                out[g, s] = F.scaled_dot_product_attention(q_s, k_s, v_s).transpose(-3, -2).reshape(out.shape[2:])
        return out.flatten(0, 2)

    def _behind(self, past: Sequence[Tensor], own: Sequence[Tensor], s: int) -> list[Tensor]:
        """Keys and values of a sequence's frame behind those of the frames that it sees."""
        count, window = len(self.frames[s]), self.policy.window
        first = 0 if window is None else max(0, count - (window - 1))
        seen = [t for t in range(count) if t >= first or t < self.policy.sink]
        return [torch.cat([x[seen], new]) for x, new in zip(past, own, strict=True)]
