"""Sampling, frame by frame (MiMo, Algorithms 2 and 4).

Every frame starts from noise and is denoised in `steps` steps that see the keys and values of all earlier frames; the
finished frame goes through the network once as history, which adds its own keys and values to the cache. The branches
of guidance are one batch: class branches share one history, and the branch without history has an empty page table.

On a GPU one denoising step is one CUDA graph, captured once and replayed for all steps and frames: the step's number,
the positions and the cache's lengths are tensors on the device. Nothing is read back inside a frame.

Letters: B clips, K trajectories per clip, S = B * K sequences, T frames, N tokens per frame, C latent channels,
G branches of guidance.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo.config import SampleConfig
from mimo.diffusion import FlowSchedule, VPredictionSchedule
from mimo.model import MiMo
from mimo_kernels import FrameCache, FrameMask, frame_attention, guided_step, paged_frame_attention
from mimo_kernels.cache import CacheView, FrameSlot

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


class Sampler:
    """Draws videos from a MiMo network.

    Args:
        model: the network; its dtype and device are those of the computation, under autocast the cache has its dtype.
        config: sampler, steps and guidance.
        policy: which earlier frames a frame sees; default all.
        use_cache: False computes the history anew in every step, with the full mask: for comparison.
        page_size: tokens per cache page; default the largest divisor of a frame's tokens in 16..64, else 64 or a
            frame, whichever is less.
        temperature: factor on the noise that a frame starts from, for the first and the last frame made, linear in
            between: lower late frames accumulate less error (VideoMAR, Sec. 3.3, uses 1 to 0.9).
        history_noise: standard deviation of the noise added to a finished frame before it becomes history, for the
            first and the last frame made, linear in between.

    A sampler keeps the cache and the graphs of its latest run for the next run of the same size.
    """

    def __init__(
        self,
        model: MiMo,
        config: SampleConfig,
        *,
        policy: CachePolicy | None = None,
        use_cache: bool = True,
        page_size: int | None = None,
        temperature: tuple[float, float] = (1.0, 1.0),
        history_noise: tuple[float, float] = (0.0, 0.0),
    ):
        expected = {"v": "ddim", "flow": "euler"}[model.config.parameterization]
        if config.sampler != expected:
            raise ValueError(
                f"sampler={config.sampler!r}: a {model.config.parameterization!r} network is sampled by {expected!r}"
            )
        self.model, self.config = model, config
        self.policy = policy or CachePolicy()
        if not use_cache and self.policy.coarse is not None:
            raise ValueError("a coarse policy needs the cache, got use_cache=False")
        self.run_type = CachedRun if use_cache else UncachedRun
        self.temperature, self.history_noise = temperature, history_noise
        tokens = model.config.tokens
        divisors = [size for size in range(16, 65) if tokens % size == 0]
        self.page_size = page_size or max(divisors, default=min(tokens, 64))
        self.latencies: list[Callable[[], float]] = []
        self._idle: dict[tuple, Run] = {}

    def sample(self, context: Tensor | Sequence[Tensor] | None, num_frames: int, **options) -> Tensor | list[Tensor]:
        """`stream`, collected behind the context: ``[S, T, N, C]``; a list of ``[T_s, N, C]`` if contexts differ."""
        made = torch.stack(list(self.stream(context, num_frames, **options)), 1)
        copies = options.get("trajectories", 1)
        if context is None:
            return made
        given = [clip.to(made) for clip in context for _ in range(copies)]
        whole = [torch.cat([clip, new]) for clip, new in zip(given, made, strict=True)]
        return torch.stack(whole) if len({len(clip) for clip in given}) == 1 else whole

    @torch.no_grad()
    def stream(
        self,
        context: Tensor | Sequence[Tensor] | None,
        num_frames: int,
        *,
        batch: int | None = None,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        generator: torch.Generator | None = None,
        trajectories: int = 1,
        ids: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Yields the frames that follow the context, one by one as they are done, each fp32 ``[S, N, C]``.

        Args:
            context: clean latents ``[B, Tc, N, C]``, or a list of ``[Tc_b, N, C]`` of different lengths, or None.
            num_frames: frames of the result, those of the longest context included.
            batch: B where there is no context; default 1, or as many as there are labels or actions.
            labels: int64 ``[B]``. actions: int64 ``[B, num_frames]``; an action belongs to the frame it leads to.
            generator: source of the run's seed: one number is drawn from it. Default: torch's global generator.
            trajectories: K; row b * K + k is the k-th continuation of clip b. Their context is in the cache once.
            ids: a number per sequence, default 0..S-1. The noise of a frame is a function of the seed, the id and the
                frame's position, so a sequence is the same alone and in any batch.
            progress: called as progress(frames done, frames to do) after every frame.

        `latencies` has, per frame, a function that gives its seconds (on a GPU it waits for that frame).
        Raises ValueError for arguments that do not fit together or the network.
        """
        clips, count = self._clips(context, batch, labels, actions)
        copies = count * trajectories
        longest = max(map(len, clips), default=0)
        positions = [len(clip) for clip in clips for _ in range(trajectories)]
        ids = list(range(copies)) if ids is None else list(ids)
        self._check(clips, num_frames, longest, labels, actions, count, trajectories, ids)
        device = self._device
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))
        if self.model.rope is not None:
            self.model.rope.tables_on(device, max(num_frames, self.model.config.height, self.model.config.width))
        labels, actions = (
            None if given is None else given.to(device).repeat_interleave(trajectories, 0)
            for given in (labels, actions)
        )
        told = labels is not None, actions is not None
        # Without a condition its null branch would be the same rows twice.
        branches = guidance_branches(self.config.history_guidance, self.config.class_guidance if any(told) else 1.0)
        key = RunKey(count, trajectories, longest, num_frames, *told, self._dtype, tuple(branches))
        run = self._idle.pop(key, None) or self.run_type(self, key)
        self._idle.clear()
        self.latencies = []
        try:
            run.begin(clips, trajectories, labels, actions, positions)
            for done in range(1, num_frames - longest + 1):
                share = (done - 1) / max(1, num_frames - longest - 1)
                clock = _Clock(device)
                run.denoise(self._noise(seed, ids, positions, "start", _between(self.temperature, share)))
                frame = run.x.clone()
                if done < num_frames - longest:
                    scale = _between(self.history_noise, share)
                    run.remember(self._noise(seed, ids, positions, "history", scale) if scale else None)
                    positions = [position + 1 for position in positions]
                self.latencies.append(clock.stop())
                if progress is not None:
                    progress(done, num_frames - longest)
                yield frame
        finally:
            run.end()
        self._idle[key] = run

    @property
    def _device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        kind = self._device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.embed.weight.dtype

    def _clips(self, context, batch, labels, actions) -> tuple[list[Tensor], int]:
        """The contexts, one tensor per clip, and B."""
        c = self.model.config
        if context is None:
            given = [len(x) for x in (labels, actions) if x is not None]
            count = batch or (given[0] if given else 1)
            return [torch.empty(0, c.tokens, c.channels)] * count, count
        clips = list(context)
        for clip in clips:
            if clip.ndim != 3 or clip.shape[1:] != (c.tokens, c.channels):
                raise ValueError(f"a context is {list(clip.shape)}: expected [frames, {c.tokens}, {c.channels}]")
        if batch not in (None, len(clips)):
            raise ValueError(f"batch={batch}: the context has {len(clips)} clips")
        return clips, len(clips)

    def _check(self, clips, num_frames, longest, labels, actions, count, trajectories, ids) -> None:
        c = self.model.config
        if not clips or trajectories < 1:
            raise ValueError(f"expected a clip and a trajectory, got {len(clips)} clips, trajectories={trajectories}")
        if num_frames <= longest:
            raise ValueError(f"num_frames={num_frames}: the context has {longest} frames already")
        if self.model.positions is not None and num_frames > c.frames:
            raise ValueError(f"num_frames={num_frames}: learned positions end at {c.frames}")
        if len(ids) != count * trajectories:
            raise ValueError(f"{len(ids)} ids for {count * trajectories} sequences")
        if labels is not None and (not c.num_classes or labels.shape != (count,)):
            raise ValueError(f"labels are {list(labels.shape)} for {count} clips and {c.num_classes} classes")
        if actions is not None and (not c.num_actions or actions.shape != (count, num_frames)):
            raise ValueError(
                f"actions are {list(actions.shape)}: expected [{count}, {num_frames}] and a network with actions, "
                f"this one has {c.num_actions}"
            )

    def _noise(self, seed: int, ids: list[int], positions: list[int], use: str, scale: float) -> Tensor:
        """scale * noise on the host, ``[S, N, C]``; drawn there, so that every device makes the same video."""
        c = self.model.config
        noise = torch.empty(len(ids), c.tokens, c.channels, pin_memory=self._device.type == "cuda")
        for row, *names in zip(noise, ids, positions, strict=True):
            digest = hashlib.blake2b(repr((seed, *names, use)).encode(), digest_size=8).digest()
            row.normal_(generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))
        return noise.mul_(scale)


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
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(self.size, dtype=torch.int64, device=device)
        self.labels = torch.zeros_like(self.position) if key.labels else None
        self.actions = self.position.new_zeros(self.size, key.num_frames) if key.actions else None

    def begin(self, clips, trajectories, labels, actions, positions) -> None:
        """Take the conditions and the context."""
        for static, given in ((self.labels, labels), (self.actions, actions)):
            if static is not None:
                static.copy_(given)
        self.position.copy_(torch.tensor(positions))
        self.take_context(clips, trajectories)

    def denoise(self, noise: Tensor) -> None:
        self.x.copy_(noise, non_blocking=True)
        self.index.zero_()
        for _ in range(self.steps):
            self.step()

    def step(self) -> None:
        """One denoising step of one frame, all branches of guidance in one batch."""
        c, size, branches = self.model.config, self.size, len(self.branches)
        v = self.model.future_frame(
            self.x.to(self.model.embed.weight.dtype).repeat(branches, 1, 1),
            self.embeddings[self.index].expand(branches * size),
            self.position.repeat(branches),
            self.attend,
            labels=self._per_branch(self.labels, c.num_classes),
            actions=self._per_branch(self.action(), c.num_actions),
        )
        v = v.unflatten(0, (branches, size))
        guided_step(self.x, v, self.weights, self.coefficients, self.index, backend=self.model.backend)
        self.index.add_(1)

    def action(self) -> Tensor | None:
        """The actions that lead to the current frames, ``[S]``."""
        return None if self.actions is None else self.actions.gather(1, self.position[:, None])[:, 0]

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
        self.clean = torch.zeros_like(self.x)
        self.seqs: list[int] = []
        nothing = [None] * self.size
        self.seen = self.cache.view(nothing * len(self.branches), max_pages=whole)  # by the branches
        self.past = self.cache.view(nothing, max_pages=whole)  # by a frame that becomes history
        self.slot: FrameSlot | None = None  # of the frame that becomes history now
        self.kept: FrameSlot | None = None  # the one that the captured graph writes to
        self.step = _Replayed(super().step, self.device)
        self.record = _Replayed(self._record, self.device)

    def take_context(self, clips: list[Tensor], trajectories: int) -> None:
        firsts = [self.cache.new_sequence() for _ in clips]
        self.seqs = list(firsts)
        for moment in range(max(map(len, clips))):
            here = [b for b, clip in enumerate(clips) if len(clip) > moment]
            seqs = [firsts[b] for b in here]
            x = torch.stack([clips[b][moment] for b in here]).to(self.x)
            actions = None if self.actions is None else self.actions[::trajectories, moment][here]
            self.slot = self.cache.begin_frame(seqs, self.tokens)
            self._as_history(x, moment, actions, self.cache.view(seqs))
            self._commit()
        self.seqs = []
        for first in firsts:
            self.seqs += [first, *(self.cache.fork(first) for _ in range(trajectories - 1))]
        self._refresh()

    def remember(self, noise: Tensor | None) -> None:
        """The finished frame, plus noise, joins the history."""
        self.clean.copy_(self.x)
        if noise is not None:
            self.clean.add_(noise.to(self.device, non_blocking=True))
        self.slot = self.kept = self.cache.begin_frame(self.seqs, self.tokens, reuse=self.kept)
        self.record()
        self._commit()
        self.position.add_(1)
        self._refresh()

    def end(self) -> None:
        if self.slot is not None and self.slot.open:
            self.cache.cancel(self.slot)
        for seq in self.seqs:
            self.cache.free(seq)
        self.seqs = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(self.seen, layer, *self._frames(q, k, v))

    def _record(self) -> None:
        self._as_history(self.clean, self.position, self.action(), self.past)

    def _as_history(self, x: Tensor, position: int | Tensor, actions: Tensor | None, past: CacheView) -> None:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = self._frames(q, k, v)
            self.cache.write(self.slot, layer, k, v)
            return self._attend(past, layer, q, k, v)

        self.model.history_frame(x.to(self.model.embed.weight.dtype), position, attend, actions=actions)

    def _attend(self, view: CacheView, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = paged_frame_attention(q, k, v, self.cache, layer=layer, view=view, backend=self.model.backend)
        return out.flatten(0, 1)

    def _commit(self) -> None:
        self.cache.commit(self.slot)
        self.policy.apply(self.cache, self.slot.seqs)

    def _refresh(self) -> None:
        self.past.refresh(self.seqs)
        self.seen.refresh([seq if branch.history else None for branch in self.branches for seq in self.seqs])

    def _frames(self, *packed: Tensor) -> list[Tensor]:
        return [x.unflatten(0, (-1, self.tokens)) for x in packed]


class UncachedRun(Run):
    """History as latents, computed anew in every step under the full mask."""

    def take_context(self, clips: list[Tensor], trajectories: int) -> None:
        self.frames = [list(clip.to(self.x)) for clip in clips for _ in range(trajectories)]

    def remember(self, noise: Tensor | None) -> None:
        for frames, x in zip(self.frames, self.x if noise is None else self.x + noise.to(self.x), strict=True):
            frames.append(x.clone())
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
        self.model.history_frame(x, moments, attend, actions=actions)
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
    """A function of static buffers. On a GPU its second call is captured as a CUDA graph and replayed from then on."""

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.function, self.device = function, device
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.device.type != "cuda" or not self.warm:
            self.warm = True
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            kind = self.device.type
            # Weights that autocast has cast live as long as its context, the graph lives longer: cast them inside it.
            autocast = torch.autocast(
                kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
            )
            with autocast, torch.cuda.graph(self.graph):
                self.function()
        self.graph.replay()


class _Clock:
    """Seconds from its making to `stop`; on a GPU of the work queued in between."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.start = self._now()

    def stop(self) -> Callable[[], float]:
        end = self._now()
        if not self.cuda:
            return lambda: end - self.start

        def seconds() -> float:
            end.synchronize()
            return self.start.elapsed_time(end) / 1000

        return seconds

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share
