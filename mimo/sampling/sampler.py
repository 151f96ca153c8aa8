"""Sampling, frame by frame (MiMo, Algorithms 2 and 4): the loop.

Every frame starts from noise and is denoised in `steps` steps that see the keys and values of all earlier frames; the
finished frame goes through the network once as history, which adds its own keys and values. One frame, in this file:

    Stream._make      noise for the frame; then hands it out, saves it
      Run.denoise     noise -> frame: `steps` times Run._step, one batch of all branches of guidance
      Run.remember    frame -> history

What a frame sees is mimo.sampling.history, the branches are mimo.sampling.guidance. On a GPU one denoising step, or one
whole frame, is one CUDA graph, captured once and replayed for all steps and frames (mimo.sampling.graphs): everything
that changes from step to step and from frame to frame (the step's number, positions, actions, page tables, the rows a
frame is written to) stands in device memory at addresses that never change, and nothing is read back inside a frame.
Runs that take long save themselves and are continued after an interruption (mimo.sampling.saving).

Letters: B clips, K trajectories per clip, S = B * K sequences, T frames, N tokens per frame, C latent channels,
G branches of guidance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mimo.config import SampleConfig
from mimo.diffusion import build_schedule
from mimo.network.network import MiMo
from mimo.recipes import recipe_type
from mimo.sampling.at_once import AtOnceRun
from mimo.sampling.frame_run import FrameRun, frame_generator
from mimo.sampling.graphs import Replayed
from mimo.sampling.guidance import Conditions, RunKey, guidance_branches
from mimo.sampling.history import CachedHistory, CachePolicy, History, RecomputedHistory
from mimo.sampling.masked import MaskedRun
from mimo.sampling.multi_level import MultiLevelHistory, RecomputedMultiLevelHistory
from mimo.sampling.saving import Progress, Saver, Saving, begin_folder, load_frames, load_run
from mimo.tokenizers.weights import checksum
from mimo_kernels import FrameCache, guided_step

MODULATION_BYTES = 2**28  # memory for what the norms are told in all steps of a frame
AnyRun = FrameRun | AtOnceRun


class Run(FrameRun):
    """A run whose frames are denoised whole: static buffers, and one frame from noise to history."""

    def __init__(
        self, model: MiMo, config: SampleConfig, key: RunKey, history: History, conditions: Conditions, graph: str
    ):
        super().__init__(model, config, key, history, conditions)
        c, device = model.config, self.x.device
        self.steps = config.steps
        schedule = build_schedule(c.parameterization, c.prediction)
        self.embeddings = schedule.embedding(schedule.sampling_timesteps(self.steps, device))  # [steps]
        self.coefficients = schedule.coefficients(self.steps, device)  # [steps, 2]
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        # A few sequences wait for weights, many for arithmetic: then every step makes its own.
        self.modulations: Tensor | None = None  # of every step, [steps, M, G * S, D]
        rows = self.steps * len(self.branches) * self.size
        self.modulates_once = rows * (6 * c.depth + 2) * c.dim * 4 <= MODULATION_BYTES
        # What a graph holds: a step and the pass as history, or a frame, which is both.
        self.step = Replayed(self._step, history.captures)
        self.record = Replayed(self._record, history.captures and history.captures_record)
        self.frame = Replayed(self._frame, history.captures) if graph == "frame" else None

    def denoise(self, noise: Tensor, extra: Tensor | None = None) -> None:
        """Makes the next frame, in `x`, from noise; `extra` is added to it when it becomes history."""
        self.x.copy_(noise, non_blocking=True)
        self._add_later(extra)
        if self.frame is not None:
            self.history.reserve()  # for the last frame too: the graph writes its history, nobody commits it
            self.frame()
            return
        self._start()
        for _ in range(self.steps):
            self.step()
        self._finish()

    def remember(self) -> None:
        """The finished frame, plus what is added to it, joins the history."""
        if self.frame is None:
            self.history.reserve()
            self.record()
        self._commit()

    def _frame(self) -> None:
        """A whole frame: all of its steps and its pass as history."""
        self._start()
        for _ in range(self.steps):
            self._step()
        self._finish()
        self._record()

    def _start(self) -> None:
        self.index.zero_()
        if self.conditions.actions is not None:
            self._modulate()

    def _step(self) -> None:
        """One denoising step of one frame, all branches of guidance in one batch."""
        branches, conditions = len(self.branches), self.conditions
        self.history.prepare()
        if self.modulates_once and self.modulations is not None:
            told: dict[str, Any] = {"timestep": None, "modulations": self.modulations[self.index][0]}
        else:
            told = {"timestep": self.embeddings[self.index].expand(branches * self.size), **conditions.of_branches()}
        v = self.model.future_frame(
            self.x.to(self.model.embed.weight.dtype).repeat(branches, 1, 1),
            position=conditions.time(conditions.position).repeat(branches),
            attend=self.history.attend,
            intervals=None if conditions.intervals is None else conditions.intervals.repeat(branches),
            recent=self._told_recent(),
            **told,
        )
        v = v.unflatten(0, (branches, self.size))
        guided_step(self.x, v, self.weights, self.coefficients, self.index, backend=self.model.backend)
        self.index.add_(1)

    def _told_recent(self) -> Tensor | None:
        """The latest frames for the rows of all branches, [G * S, N, n C]; those without history are told of none."""
        if self.recent is None or not self.model.config.recent_frames:
            return None
        recent = self.recent.to(self.model.embed.weight.dtype)
        nothing = torch.zeros_like(recent)
        return torch.cat([nothing if branch.history is None else recent for branch in self.branches])

    def _tell(self, given: dict[str, Tensor], positions: list[int]) -> None:
        super()._tell(given, positions)
        if self.conditions.actions is None:
            self._modulate()

    def _modulate(self) -> None:
        """What the norms are told in every step. Only actions change it from frame to frame."""
        if not self.modulates_once:
            return
        rows = len(self.branches) * self.size
        told = {name: x.repeat(self.steps) for name, x in self.conditions.of_branches().items()}
        made = self.model.modulations(self.embeddings.repeat_interleave(rows), **told)
        made = made.unflatten(1, (self.steps, rows)).transpose(0, 1)
        if self.modulations is None:
            self.modulations = made.contiguous()
        else:
            self.modulations.copy_(made)


class Stream(Iterator[Tensor]):
    """The frames of a run, one by one as they are done, each fp32 ``[S, N, C]``; made by `Sampler.stream` and `resume`.

    `progress.done` counts the frames, those before an interruption included. `latencies` has, per frame, a function
    that gives its seconds (on a GPU it waits for that frame).
    """

    def __init__(
        self,
        sampler: Sampler,
        run: AnyRun,
        progress: Progress,
        begin: Callable[[], None],
        saving: Saving | None = None,
        report: Callable[[int, int], None] | None = None,
    ):
        self.sampler, self.run, self.progress = sampler, run, progress
        self.latencies: list[Callable[[], float]] = []
        self.saver = None
        if saving is not None:
            identity = partial(sampler.identity, saving.request)
            self.saver = Saver(saving, identity, run.key.asked, run.state_dict)
        self._frames: Generator[Tensor, None, None] = self._make(begin, report)

    def __next__(self) -> Tensor:
        # The caller may be on another device: kernels, events and graphs belong to this one.
        with torch.no_grad(), torch.cuda.device_of(self.run.x):
            return next(self._frames)

    def close(self) -> None:
        """Give the run up; what was saved stays."""
        self._frames.close()

    def saved(self) -> Iterator[Tensor]:
        """The frames in the folder, each ``[S, N, C]`` on the host, those made before an interruption first."""
        assert self.saver is not None, "saved() is of a run with `saving`"
        return load_frames(self.saver.saving.folder, self.progress)

    def _make(
        self, begin: Callable[[], None], report: Callable[[int, int], None] | None
    ) -> Generator[Tensor, None, None]:
        sampler, run, now = self.sampler, self.run, self.progress
        try:
            begin()
            while now.done < now.total:
                clock = _Clock(run.x.device)
                share = now.done / max(1, now.total - 1)
                last = now.done + 1 == now.total
                start = _between(sampler.config.temperature, share)
                extra = 0.0 if last else _between(sampler.config.history_noise, share)
                if isinstance(run, MaskedRun):
                    run.draw(now.seed, now.ids, now.positions)
                if extra and isinstance(run, FrameRun):
                    run.conditions.tell_noise(extra)
                run.denoise(
                    sampler._noise(now.seed, now.ids, now.positions, "start", start),
                    sampler._noise(now.seed, now.ids, now.positions, "history", extra) if extra else None,
                )
                frame = run.x.clone()
                now.done += 1
                if not last:
                    run.remember()
                    now.positions = [position + 1 for position in now.positions]
                self.latencies.append(clock.stop())
                if self.saver is not None:
                    self.saver.add(frame, now)
                if report is not None:
                    report(now.done, now.total)
                yield frame
        finally:
            run.end()
        sampler._idle[run.key] = run


class Sampler:
    """Draws videos from a MiMo network.

    Args:
        model: the network; its dtype and device are those of the computation, under autocast the cache has its dtype.
        config: sampler, steps, guidance, window, temperature.
        policy: which earlier frames a frame sees, where the config's window and sink do not say all.
        use_cache: False computes the history anew in every step, with the full mask: for comparison.
        page_size: tokens per cache page; default the largest divisor of a frame's tokens in 16..64, else 64 or a
            frame, whichever is less. (Of a track's one token where attention is factorized.)
        graph: what one CUDA graph holds on a GPU: a denoising "step", replayed for every step, or a whole "frame" with
            its pass as history, which is launched once, but takes longer to capture.

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
        graph: Literal["step", "frame"] = "step",
    ):
        recipe = recipe_type(model.config)
        recipe.check(model.config)
        recipe.check_history(model.config)
        expected = {"v": "ddim", "flow": "euler", "epsilon": "ddpm"}[model.config.parameterization]
        if config.sampler != expected:
            raise ValueError(
                f"sampler={config.sampler!r}: a {model.config.parameterization!r} network is sampled by {expected!r}"
            )
        most = getattr(build_schedule(model.config.parameterization), "num_timesteps", config.steps)
        if config.steps > most:
            raise ValueError(f"steps={config.steps}: expected 1..{most}")
        self.model, self.config = model, config
        self.history = recipe.history_policy(model.config)
        if policy is not None and config.window is not None:
            raise ValueError(f"window={config.window} and a policy: expected one of them")
        self.policy = policy or CachePolicy(window=config.window, sink=config.sink)
        if graph not in ("step", "frame"):
            raise ValueError(f"graph={graph!r}: expected 'step' or 'frame'")
        self.graph = graph
        self.history_type: type[History] = CachedHistory if use_cache else RecomputedHistory
        if model.config.coarse_stride or self.policy.coarse_tokens:
            self._use_coarse_frames(use_cache)
        # The shortest frames fill whole pages.
        tokens = self.policy.coarse_tokens or model.config.tokens // model.config.tracks
        divisors = [size for size in range(min(16, tokens), 65) if tokens % size == 0]
        self.page_size = page_size or max(divisors, default=min(tokens, 64))
        self.latencies: list[Callable[[], float]] = []
        self._idle: dict[tuple, AnyRun] = {}
        if config.interpolate and model.config.positions != "sincos":
            raise ValueError(
                f"interpolate=True: expected False, or a network with positions='sincos', not "
                f"{model.config.positions!r}"
            )
        most = model.config.max_noise
        if model.config.noise_levels and max(config.history_noise) > most:
            expected = f"expected at most max_noise={most}, as in training"
            raise ValueError(f"history_noise={config.history_noise}: {expected}")
        if self.history.at_once:
            self._check_at_once()
        has = model.config.token_depth > 0
        unused = "temperature" if has else "token_temperature"
        if (found := getattr(config, unused)) != (1.0, 1.0):
            raise ValueError(
                f"{unused}={found}: expected (1.0, 1.0), as the network has {'a' if has else 'no'} token head"
            )

    def sample(self, context: Tensor | Sequence[Tensor] | None, num_frames: int, **options) -> Tensor | list[Tensor]:
        """`stream`, collected behind the context: ``[S, T, N, C]``; a list of ``[T_s, N, C]`` if contexts differ."""
        made = torch.stack(list(self.stream(context, num_frames, **options)), 1)
        copies = options.get("trajectories", 1)
        if context is None:
            return made
        given = [clip.to(made) for clip in context for _ in range(copies)]
        whole = [torch.cat([clip, new]) for clip, new in zip(given, made, strict=True)]
        return torch.stack(whole) if len({len(clip) for clip in given}) == 1 else whole

    def stream(
        self,
        context: Tensor | Sequence[Tensor] | None,
        num_frames: int,
        *,
        batch: int | None = None,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        text: Tensor | None = None,
        generator: torch.Generator | None = None,
        trajectories: int = 1,
        ids: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        saving: Saving | None = None,
    ) -> Stream:
        """The frames that follow the context, one by one as they are done, each fp32 ``[S, N, C]``.

        Args:
            context: clean latents ``[B, Tc, N, C]``, or a list of ``[Tc_b, N, C]`` of different lengths, or None.
            num_frames: frames of the result, those of the longest context included.
            batch: B where there is no context; default 1, or as many as there are labels, actions or intervals.
            labels: int64 ``[B]``. actions: int64 ``[B, num_frames]``; an action belongs to the frame it leads to.
            intervals: int64 ``[B]`` in 1..max_interval, for a network that is told them; it needs them.
            text: ``[B, L, text_dim]``, the features of texts followed by zeros, for a network with text_dim.
            generator: source of the run's seed: one number is drawn from it. Default: torch's global generator.
            trajectories: K; row b * K + k is the k-th continuation of clip b. Their context is in the cache once.
            ids: a number per sequence, default 0..S-1. The noise of a frame is a function of the seed, the id and the
                frame's position, so a sequence is the same alone and in any batch.
            progress: called as progress(frames done, frames to do) after every frame.
            saving: where the run saves itself, so that `resume` can continue it.

        `latencies` has, per frame of the latest stream, a function that gives its seconds (on a GPU it waits for that
        frame). Raises ValueError for arguments that do not fit together or the network, InputError for a folder that
        holds a saved run already.
        """
        clips, count = self._clips(context, batch, labels, actions, intervals, text)
        copies = count * trajectories
        longest = max(map(len, clips), default=0)
        positions = [len(clip) for clip in clips for _ in range(trajectories)]
        ids = list(range(copies)) if ids is None else list(ids)
        self._check(clips, num_frames, longest, labels, actions, intervals, count, trajectories, ids)
        device = self._device
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))
        if text is not None and (text.dim() != 3 or len(text) != count or text.shape[2] != self.model.config.text_dim):
            expected = f"[{count}, tokens, text_dim={self.model.config.text_dim}]"
            raise ValueError(f"text is {list(text.shape)}: expected {expected}")
        given = {"labels": labels, "actions": actions, "intervals": intervals, "text": text}
        conditions = {
            name: x.to(device).repeat_interleave(trajectories, 0) for name, x in given.items() if x is not None
        }
        if saving is not None:
            self._check_saves()
            begin_folder(saving.folder)
        tokens = 0 if text is None else text.shape[1]
        run = self._run(count, trajectories, longest, num_frames, labels is not None, actions is not None, tokens)
        now = Progress(num_frames - longest, seed, ids, positions)
        if isinstance(run, AtOnceRun):
            return self._start(run, now, lambda: run.begin(conditions, self._noise_of_clips(now)), saving, progress)
        return self._start(run, now, lambda: run.begin(clips, conditions, positions), saving, progress)

    def resume(self, saving: Saving, *, progress: Callable[[int, int], None] | None = None) -> Stream:
        """The frames that a saved run, interrupted at any moment, has yet to make: bit for bit those that it would have
        made on the same device and software. `Stream.saved` has the frames made before.

        A damaged state is passed over for the one before it, and the log says so.

        Raises InputError when there is no saved run, when no state of it is whole, and when it was made by other
        weights, another configuration or for another request; the message says what there is and what is expected.
        """
        self._check_saves()
        saved = load_run(saving.folder, self.identity(saving.request))
        run, now = self._run(*saved.key), saved.progress
        return self._start(run, now, lambda: run.load_state_dict(saved.tensors, now.positions), saving, progress)

    def identity(self, request: dict) -> dict:
        """What has to be the same for a continued run to make the same frames."""
        config, policy = self.config, self.policy
        lengths = ("context_frames", "num_frames")  # of a preset; a run has its own
        sampling = {name: value for name, value in config.to_dict().items() if name not in lengths}
        sampling |= {name: getattr(policy, name) for name in ("window", "sink", "coarse_tokens")}
        sampling |= {"page_size": self.page_size, "dtype": str(self._dtype)}
        network = self.model.config.to_dict()
        return {"network": network, "weights": checksum(self.model), "sampling": sampling, "request": request}

    def cache_bytes(
        self, count: int, context_frames: int, num_frames: int, *, labels: bool, actions: bool, text: int = 0
    ) -> int:
        """What the cache of `stream` takes for so many clips: all of it before the run, however far the run comes."""
        if self.history.at_once:
            return 0
        c, key = self.model.config, self._key(count, 1, context_frames, num_frames, labels, actions, text)
        pages = c.tracks * self.policy.pages_of_run(key, c.tokens // c.tracks, self.page_size)
        return FrameCache.bytes(
            c.cached_depth, c.heads, c.head_dim, num_pages=pages, page_size=self.page_size, dtype=key.dtype
        )

    def _key(
        self, clips, trajectories, context_frames, num_frames, labels: bool, actions: bool, text: int = 0
    ) -> RunKey:
        given = {name for name, there in (("labels", labels), ("actions", actions), ("text", text)) if there}
        # Without a condition its null branch would be the same rows twice.
        class_guidance = self.config.class_guidance if given else 1.0
        own_history = not given.isdisjoint(self.history.conditions)
        branches = guidance_branches(self.config.history_guidance, class_guidance, own_history=own_history)
        asked = clips, trajectories, context_frames, num_frames, labels, actions
        return RunKey(*asked, self._dtype, tuple(branches), self._pace(num_frames), text)

    def _pace(self, num_frames: int) -> float | None:
        """Times of training per frame, where positions are interpolated: the last frame stands where a training clip
        ends."""
        frames = self.model.config.frames
        return (frames - 1) / (num_frames - 1) if self.config.interpolate and num_frames > frames else None

    def _run(self, *asked: Any) -> AnyRun:
        """The latest run, if it was of the same size, or a new one. asked: as `RunKey.asked`."""
        c, key = self.model.config, self._key(*asked)
        if self.model.rope is not None:
            self.model.rope.tables_on(self._device, max(key.num_frames, *c.grid))
        run = self._idle.pop(key, None)
        self._idle.clear()  # before memory is taken for another one
        return run or self._new_run(key)

    def _new_run(self, key: RunKey) -> AnyRun:
        if self.history.at_once:
            return AtOnceRun(self.model, self.config, key)
        conditions = Conditions(self.model.config, key, self.history, self._device)
        history = self.history_type(self.model, self.policy, key, conditions, self.page_size)
        if self.model.config.token_depth:
            return MaskedRun(self.model, self.config, key, history, conditions)
        return Run(self.model, self.config, key, history, conditions, self.graph)

    def _start(self, run: AnyRun, now: Progress, begin: Callable[[], None], saving, progress) -> Stream:
        stream = Stream(self, run, now, begin, saving, progress)
        self.latencies = stream.latencies
        return stream

    def _check_saves(self) -> None:
        if not issubclass(self.history_type, CachedHistory):
            raise ValueError("a run saves its cache, got use_cache=False")

    @property
    def _device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        kind = self._device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.embed.weight.dtype

    def _clips(self, context, batch, *conditions) -> tuple[list[Tensor], int]:
        """The contexts, one tensor per clip, and B."""
        c = self.model.config
        if context is None:
            given = [len(x) for x in conditions if x is not None]
            count = batch or (given[0] if given else 1)
            return [torch.empty(0, c.tokens, c.token_channels)] * count, count
        clips = list(context)
        for clip in clips:
            if clip.ndim != 3 or clip.shape[1:] != (c.tokens, c.token_channels):
                raise ValueError(f"a context is {list(clip.shape)}: expected [frames, {c.tokens}, {c.token_channels}]")
        if batch not in (None, len(clips)):
            raise ValueError(f"batch={batch}: the context has {len(clips)} clips")
        return clips, len(clips)

    def _check(self, clips, num_frames, longest, labels, actions, intervals, count, trajectories, ids) -> None:
        c = self.model.config
        if not clips or trajectories < 1:
            raise ValueError(f"expected a clip and a trajectory, got {len(clips)} clips, trajectories={trajectories}")
        if longest and self.history.at_once:
            raise ValueError(f"the context has {longest} frames: expected none, as {c.recipe!r} makes clips at once")
        if num_frames <= longest:
            raise ValueError(f"num_frames={num_frames}: the context has {longest} frames already")
        if c.positions == "learned" and num_frames > c.frames:
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
        given = None if intervals is None else intervals.tolist()
        if not c.max_interval and given is not None:
            raise ValueError(f"intervals={given}: expected None, as the network knows no intervals (max_interval=0)")
        within = given is not None and len(given) == count and all(1 <= n <= c.max_interval for n in given)
        if c.max_interval and not within:
            raise ValueError(f"intervals={given}: expected {count} numbers in 1..{c.max_interval}")

    def _use_coarse_frames(self, use_cache: bool) -> None:
        """The network says which frames are fine; there is no other policy."""
        c, policy = self.model.config, self.policy
        if not c.coarse_stride:
            raise ValueError(f"coarse_tokens={policy.coarse_tokens}: expected 0, as {c.recipe!r} has no coarse frames")
        expected = CachePolicy(c.fine_frames, coarse_tokens=c.coarse_tokens)
        if policy not in (CachePolicy(), expected):
            raise ValueError(
                f"window={policy.window}, sink={policy.sink}: expected none, as {c.recipe!r} keeps the latest "
                f"{c.fine_frames} frames whole and those before them coarse"
            )
        if self.config.interpolate:
            raise ValueError(f"interpolate=True: expected False, as {c.recipe!r} has frames at whole times alone")
        if self.graph == "frame":
            raise ValueError("graph='frame': expected 'step', as frames that become coarse are encoded outside of it")
        self.policy = expected
        self.history_type = MultiLevelHistory if use_cache else RecomputedMultiLevelHistory

    def _check_at_once(self) -> None:
        """A network that makes clips at once has no use for what concerns history."""
        config, policy = self.config, self.policy
        expected = {
            "history_guidance": (config.history_guidance, 1.0),
            "history_noise": (config.history_noise, (0.0, 0.0)),
            "window": (policy.window, None),
            "interpolate": (config.interpolate, False),
        }
        for name, (found, wanted) in expected.items():
            if found != wanted:
                recipe = self.model.config.recipe
                raise ValueError(f"{name}={found!r}: expected {wanted!r}, as {recipe!r} makes clips at once")

    def _noise_of_clips(self, now: Progress) -> Tensor:
        """The noise of every frame of a run without history, ``[T, S, N, C]`` on the host."""
        noise = []
        for t in range(now.total):
            scale = _between(self.config.temperature, t / max(1, now.total - 1))
            noise.append(self._noise(now.seed, now.ids, [t] * len(now.ids), "start", scale))
        return torch.stack(noise)

    def _noise(self, seed: int, ids: list[int], positions: list[int], use: str, scale: float) -> Tensor:
        """scale * noise on the host, ``[S, N, C]``; drawn there, so that every device makes the same video."""
        c = self.model.config
        noise = torch.empty(len(ids), c.tokens, c.token_channels, pin_memory=self._device.type == "cuda")
        for row, number, position in zip(noise, ids, positions, strict=True):
            row.normal_(generator=frame_generator(seed, number, position, use))
        return noise.mul_(scale)


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
