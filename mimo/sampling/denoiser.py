"""One run of the sampler: static buffers, the history of every sequence, the branches of guidance, and CUDA graphs.

Everything that changes from step to step and from frame to frame (the step's number, positions, actions, page tables,
the rows a frame is written to) stands in device memory at addresses that never change, so that a graph captured once
serves all of them. Nothing is read back inside a frame.

Letters: B clips, K trajectories per clip, S = B * K sequences, T frames, N tokens per frame, C latent channels,
G branches of guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo.diffusion import FlowSchedule, VPredictionSchedule
from mimo.network.frames import make_layout
from mimo_kernels import FrameCache, FrameMask, frame_attention, guided_step, paged_frame_attention
from mimo_kernels.attention.paged import serving as paged_serving
from mimo_kernels.cache.pages import CacheView, FrameSlot, ViewHead

if TYPE_CHECKING:
    from mimo.sampling.sampler import Sampler

MODULATION_BYTES = 2**28  # memory for what the norms are told in all steps of a frame
SCHEDULES = {"ddim": VPredictionSchedule, "euler": FlowSchedule}


@dataclass(frozen=True)
class CachePolicy:
    """Which earlier frames a frame sees.

    Args:
        window: the latest frames, the one being made included, as in FrameMask; None: all of them.
        sink: the first frames of the video, which stay visible.
        coarse: called with the cache, a sequence and the time of a frame that leaves the window; returns the keys and
            values, each ``[layers, M, heads, head_dim]``, that stand for it from then on (FAR's multi-level cache,
            Sec. 4.4). None: it is dropped.
        coarse_tokens: M, so that the memory is known before the run.
    """

    window: int | None = None
    sink: int = 0
    coarse: Callable[[FrameCache, int, int], tuple[Tensor, Tensor]] | None = None
    coarse_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: expected 1 or more frames, or None")
        if self.sink < 0:
            raise ValueError(f"sink={self.sink}: expected 0 or more frames")
        if self.coarse is not None and (self.window is None or self.coarse_tokens < 1):
            raise ValueError(
                f"coarse needs a window that frames leave and the tokens that stay, "
                f"got window={self.window}, coarse_tokens={self.coarse_tokens}"
            )

    def pages(self, frames: int, tokens: int, page_size: int) -> int:
        """Pages of a sequence of up to `frames` frames at most, the frame being added included."""
        whole = frames if self.window is None else min(frames, self.window + self.sink)
        coarse = frames - whole if self.coarse is not None else 0
        return sum(
            FrameCache.pages_for(count, size, page_size=page_size)
            for count, size in ((whole, tokens), (coarse, self.coarse_tokens))
        )

    def apply(self, cache: FrameCache, seqs: Sequence[int]) -> None:
        """Leave in the cache what the next frame sees."""
        if self.window is None:
            return
        if self.coarse is not None:
            cache.compress(
                seqs, lambda seq, index: self.coarse(cache, seq, index), window=self.window - 1, sink=self.sink
            )
            return
        for seq in seqs:
            cache.evict(seq, window=self.window - 1, sink=self.sink)


@dataclass(frozen=True)
class Branch:
    """A summand of the guided velocity: its weight, and what its rows are told."""

    weight: float
    history: bool = True
    condition: bool = True


def guidance_branches(history_guidance: float, class_guidance: float) -> list[Branch]:
    """v = v(h, c) + (w_h - 1) (v(h, c) - v(-, c)) + (w_c - 1) (v(h, c) - v(h, -)); summands of weight 0 are left out.

    With one kind of guidance this is ``(1 - w) v(null) + w v`` (MiMo, Eq. 27).
    """
    others = [Branch(1 - history_guidance, history=False), Branch(1 - class_guidance, condition=False)]
    others = [branch for branch in others if branch.weight]
    return [Branch(1 - sum(branch.weight for branch in others)), *others]


class RunKey(NamedTuple):
    """What the buffers of a run depend on."""

    clips: int
    trajectories: int
    context_frames: int
    num_frames: int
    labels: bool
    actions: bool
    dtype: torch.dtype
    branches: tuple[Branch, ...]


class Run:
    """The state of one run: static buffers, and the denoising of one frame. Subclasses hold the history."""

    def __init__(self, sampler: Sampler, key: RunKey):
        self.key, self.model, self.policy, c = key, sampler.model, sampler.policy, sampler.model.config
        self.size, self.tokens, self.branches = key.clips * key.trajectories, c.tokens, key.branches
        device = self.device = sampler._device
        schedule, self.steps = SCHEDULES[sampler.config.sampler](), sampler.config.steps
        self.embeddings = schedule.embedding(schedule.sampling_timesteps(self.steps, device))  # [steps]
        # A step is linear in x and v: its coefficients, [steps, 2].
        every = torch.arange(self.steps, device=device)
        zero, one = torch.zeros(self.steps, device=device), torch.ones(self.steps, device=device)
        self.coefficients = torch.stack([schedule.step(zero, one, every), schedule.step(one, zero, every)], 1)
        self.weights = torch.tensor([branch.weight for branch in key.branches], dtype=torch.float32, device=device)
        self.conditioned = torch.tensor([branch.condition for branch in key.branches], device=device)[:, None]  # [G, 1]
        self.x = torch.zeros(self.size, c.tokens, c.channels, device=device)
        self.extra = torch.zeros_like(self.x)  # what is added to the finished frame before it becomes history
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(self.size, dtype=torch.int64, device=device)
        self.labels = torch.zeros_like(self.position) if key.labels else None
        self.actions = self.position.new_zeros(self.size, key.num_frames) if key.actions else None
        self.intervals = torch.ones_like(self.position) if c.max_interval else None
        # A few sequences wait for weights, many for arithmetic: then every step makes its own.
        self.modulations: Tensor | None = None  # of every step, [steps, M, G * S, D]
        rows = self.steps * len(self.branches) * self.size
        self.modulates_once = rows * (6 * c.depth + 2) * c.dim * 4 <= MODULATION_BYTES

    @property
    def conditions(self) -> dict[str, Tensor]:
        """The static buffers of what the network is told, by name."""
        given = {"labels": self.labels, "actions": self.actions, "intervals": self.intervals}
        return {name: static for name, static in given.items() if static is not None}

    def begin(self, clips: list[Tensor], conditions: dict[str, Tensor], positions: list[int]) -> None:
        """Take the conditions, one row per sequence, and the context."""
        self._tell(conditions, positions)
        self.take_context(clips, self.key.trajectories)

    def _tell(self, conditions: dict[str, Tensor], positions: list[int]) -> None:
        for name, static in self.conditions.items():
            static.copy_(conditions[name])
        self.position.copy_(torch.tensor(positions))
        if self.actions is None:
            self._modulate()

    def _modulate(self) -> None:
        """What the norms are told in every step. Only actions change it from frame to frame."""
        if not self.modulates_once:
            return
        rows = len(self.branches) * self.size
        labels, actions = self._conditions()
        made = self.model.modulations(
            self.embeddings.repeat_interleave(rows),
            labels=None if labels is None else labels.repeat(self.steps),
            actions=None if actions is None else actions.repeat(self.steps),
        )
        made = made.unflatten(1, (self.steps, rows)).transpose(0, 1)
        if self.modulations is None:
            self.modulations = made.contiguous()
        else:
            self.modulations.copy_(made)

    def denoise(self, noise: Tensor, extra: Tensor | None = None) -> None:
        """Makes the next frame, in `x`, from noise; `extra` is added to it when it becomes history."""
        self._take(noise, extra)
        self._start_frame()
        for _ in range(self.steps):
            self.step()

    def _start_frame(self) -> None:
        self.index.zero_()
        if self.actions is not None:
            self._modulate()

    def _take(self, noise: Tensor, extra: Tensor | None) -> None:
        self.x.copy_(noise, non_blocking=True)
        if extra is None:
            self.extra.zero_()
        else:
            self.extra.copy_(extra, non_blocking=True)

    def step(self) -> None:
        """One denoising step of one frame, all branches of guidance in one batch."""
        size, branches = self.size, len(self.branches)
        if self.modulates_once:
            told = {"timestep": None, "modulations": self.modulations[self.index][0]}
        else:
            labels, actions = self._conditions()
            timestep = self.embeddings[self.index].expand(branches * size)
            told = {"timestep": timestep, "labels": labels, "actions": actions}
        v = self.model.future_frame(
            self.x.to(self.model.embed.weight.dtype).repeat(branches, 1, 1),
            position=self.position.repeat(branches),
            attend=self.attend,
            intervals=None if self.intervals is None else self.intervals.repeat(branches),
            **told,
        )
        v = v.unflatten(0, (branches, size))
        guided_step(self.x, v, self.weights, self.coefficients, self.index, backend=self.model.backend)
        self.index.add_(1)

    def action(self) -> Tensor | None:
        """The actions that lead to the current frames, ``[S]``."""
        return None if self.actions is None else self.actions.gather(1, self.position[:, None])[:, 0]

    def _conditions(self) -> tuple[Tensor | None, Tensor | None]:
        """Labels and actions of the rows of a step, [G * S] each."""
        c = self.model.config
        return self._per_branch(self.labels, c.num_classes), self._per_branch(self.action(), c.num_actions)

    def _per_branch(self, given: Tensor | None, null: int) -> Tensor | None:
        return None if given is None else torch.where(self.conditioned, given, null).flatten()  # [G * S]


class CachedRun(Run):
    """History as keys and values in a FrameCache."""

    def __init__(self, sampler: Sampler, key: RunKey):
        super().__init__(sampler, key)
        c, page_size = self.model.config, sampler.page_size
        whole, shared, own = (
            self.policy.pages(frames, c.tokens, page_size)
            for frames in (key.num_frames, key.context_frames, key.num_frames - key.context_frames)
        )
        # Trajectories share the context's pages, so K of them need less than K times one.
        num_pages = min(self.size * whole, key.clips * shared + self.size * own)
        self.cache = FrameCache(
            c.depth, c.heads, c.head_dim, num_pages=num_pages, page_size=page_size, dtype=key.dtype, device=self.device
        )
        self.seqs: list[int] = []
        nothing = [None] * self.size
        self.seen = self.cache.view(nothing * len(self.branches), max_pages=whole)  # by the branches
        self.past = self.seen.first(self.size)  # by a frame that becomes history: what the first branch sees
        self.slot: FrameSlot | None = None  # of the frame that becomes history now
        self.kept: FrameSlot | None = None  # the one that the captured graph writes to
        # The reference attention takes lengths from the host, which a graph would freeze.
        refusals = paged_serving(self.device, key.dtype, c.head_dim)["triton"]
        captures = self.device.type == "cuda" and self.model.backend == "auto" and not refusals
        # Graphs point to the tables of these, which others may push out of the memory of layouts.
        self.layouts = (
            make_layout(self.size * len(self.branches), 1, 0, self.tokens, c.separate_ln),
            make_layout(self.size, 1, self.tokens, 0, c.separate_ln),
        )
        self.step = _Replayed(super().step, captures)
        self.record = _Replayed(self._record, captures)
        self.frame = _Replayed(self._frame, captures) if sampler.graph == "frame" else None

    def take_context(self, clips: list[Tensor], trajectories: int) -> None:
        firsts = [self.cache.new_sequence() for _ in clips]
        self.seqs = list(firsts)
        for moment in range(max(map(len, clips))):
            here = [b for b, clip in enumerate(clips) if len(clip) > moment]
            seqs = [firsts[b] for b in here]
            x = torch.stack([clips[b][moment] for b in here]).to(self.x)
            actions = None if self.actions is None else self.actions[::trajectories, moment][here]
            intervals = None if self.intervals is None else self.intervals[::trajectories][here]
            self.slot = self.cache.begin_frame(seqs, self.tokens)
            self._as_history(x, moment, actions, intervals, self.cache.view(seqs, max_pages=self.seen.max_pages))
            self._commit()
        self.seqs = []
        for first in firsts:
            self.seqs += [first, *(self.cache.fork(first) for _ in range(trajectories - 1))]
        self._refresh()

    def denoise(self, noise: Tensor, extra: Tensor | None = None) -> None:
        if self.frame is None:
            super().denoise(noise, extra)
            return
        self._take(noise, extra)
        self._reserve()  # for the last frame too: the graph writes its history, nobody commits it
        self.frame()

    def remember(self) -> None:
        """The finished frame, plus what is added to it, joins the history."""
        if self.frame is None:
            self._reserve()
            self.record()
        self._commit()
        self.position.add_(1)
        self._refresh()

    def end(self) -> None:
        self._cancel()
        for seq in self.seqs:
            self.cache.free(seq)
        self.seqs = []

    def state_dict(self) -> dict[str, Tensor]:
        """What the frames to come depend on, as tensors on the host."""
        self._cancel()
        conditions = {name: static.cpu() for name, static in self.conditions.items()}
        return self.cache.state_dict() | conditions | {"seqs": torch.tensor(self.seqs)}

    def load_state_dict(self, state: dict[str, Tensor], positions: list[int]) -> None:
        """Instead of `begin`: go on where `state_dict` was called."""
        self.cache.load_state_dict(state)
        self.seqs = state["seqs"].tolist()
        self._tell(state, positions)
        self._refresh()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(self.seen, layer, *self._frames(q, k, v))

    def _frame(self) -> None:
        """A whole frame: all of its steps and its pass as history."""
        self._start_frame()
        for _ in range(self.steps):
            super().step()
        self._record()

    def _record(self) -> None:
        self._as_history(self.x + self.extra, self.position, self.action(), self.intervals, self.past)

    def _as_history(self, x: Tensor, position: int | Tensor, actions, intervals, past: CacheView | ViewHead) -> None:
        """The pass that makes the keys and values of a clean frame, straight into the pages of `slot`."""
        self.model.history_frame(
            x.to(self.model.embed.weight.dtype),
            position,
            lambda layer, q, k, v: self._attend(past, layer, *self._frames(q, k, v)),
            actions=actions,
            intervals=intervals,
            place=lambda layer: self.cache.place(self.slot, layer),
        )

    def _attend(self, view: CacheView | ViewHead, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = paged_frame_attention(q, k, v, self.cache, layer=layer, view=view, backend=self.model.backend)
        return out.flatten(0, 1)

    def _reserve(self) -> None:
        self.slot = self.kept = self.cache.begin_frame(self.seqs, self.tokens, reuse=self.kept)

    def _cancel(self) -> None:
        if self.slot is not None and self.slot.open:
            self.cache.cancel(self.slot)

    def _commit(self) -> None:
        self.cache.commit(self.slot)
        self.policy.apply(self.cache, self.slot.seqs)

    def _refresh(self) -> None:
        self.seen.refresh([seq if branch.history else None for branch in self.branches for seq in self.seqs])

    def _frames(self, *packed: Tensor) -> list[Tensor]:
        return [x.unflatten(0, (-1, self.tokens)) for x in packed]


class UncachedRun(Run):
    """History as latents, computed anew in every step under the full mask."""

    def take_context(self, clips: list[Tensor], trajectories: int) -> None:
        self.frames = [list(clip.to(self.x)) for clip in clips for _ in range(trajectories)]

    def remember(self) -> None:
        for frames, x in zip(self.frames, self.x + self.extra, strict=True):
            frames.append(x)
        self.position.add_(1)

    def end(self) -> None:
        self.frames = []

    def step(self) -> None:
        self._history = self._run_history()
        super().step()

    def _run_history(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Keys and values of every frame, per layer and sequence: ``[frames, N, h, d]``."""
        counts = [len(frames) for frames in self.frames]
        packed = [x for frames in self.frames for x in frames]
        if not packed:
            return [[]] * self.model.config.depth
        mask = FrameMask.block_causal(
            [[self.tokens] * count for count in counts], window=self.policy.window, sink=self.policy.sink
        )
        layers = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            split = [x.unflatten(0, (-1, self.tokens)).split(counts) for x in (k, v)]
            layers.append(list(zip(*split, strict=True)))
            return frame_attention(q, k, v, mask, backend=self.model.backend)

        moments = torch.cat([torch.arange(count) for count in counts]).to(self.device)
        actions = None
        if self.actions is not None:
            actions = torch.cat([row[:count] for row, count in zip(self.actions, counts, strict=True)])
        x = torch.stack(packed).to(self.model.embed.weight.dtype)
        intervals = None
        if self.intervals is not None:
            intervals = self.intervals.repeat_interleave(torch.tensor(counts, device=self.device))
        self.model.history_frame(x, moments, attend, actions=actions, intervals=intervals)
        return layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.unflatten(0, (len(self.branches), self.size, self.tokens)) for x in (q, k, v)]
        out = torch.empty_like(rows[0])
        for g, branch in enumerate(self.branches):
            for s in range(self.size):
                q_s, k_s, v_s = (x[g, s] for x in rows)
                if branch.history and self._history[layer]:
                    seen = self._seen(s)
                    k_s, v_s = (
                        torch.cat([past[seen].flatten(0, 1), own])
                        for past, own in zip(self._history[layer][s], (k_s, v_s), strict=True)
                    )
                q_s, k_s, v_s = (x.transpose(0, 1) for x in (q_s, k_s, v_s))
                out[g, s] = F.scaled_dot_product_attention(q_s, k_s, v_s).transpose(0, 1)
        return out.flatten(0, 2)

    def _seen(self, s: int) -> list[int]:
        count, window = len(self.frames[s]), self.policy.window
        first = 0 if window is None else max(0, count - (window - 1))
        return [t for t in range(count) if t >= first or t < self.policy.sink]


class _Replayed:
    """A function of static buffers. If `captures`, its second call is captured as a CUDA graph and replayed from then on."""

    def __init__(self, function: Callable[[], None], captures: bool):
        self.function, self.captures = function, captures
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.captures or not self.warm:
            self.warm = True
            self.function()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # Weights that autocast has cast live as long as its context, the graph lives longer: cast them inside it.
            autocast = torch.autocast(
                "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
            )
            # Threads that load data or watch collectives go on with their own calls meanwhile.
            with autocast, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.function()
            self.graph = graph
        self.graph.replay()
