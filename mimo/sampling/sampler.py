"""Sampling, frame by frame (MiMo, Algorithms 2 and 4).

Every frame starts from noise and is denoised in `steps` steps that see the keys and values of all earlier frames; the
finished frame goes through the network once as history, which adds its own keys and values to the cache. The branches
of guidance are one batch: class branches share one history, and the branch without history has an empty page table.

On a GPU one denoising step, or one whole frame, is one CUDA graph, captured once and replayed for all steps and frames
(mimo.sampling.denoiser). Runs that take long save themselves and are continued after an interruption (mimo.sampling.saving).

Letters: B clips, K trajectories per clip, S = B * K sequences, T frames, N tokens per frame, C latent channels,
G branches of guidance.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mimo import checkpoint
from mimo.config import SampleConfig
from mimo.errors import InputError
from mimo.network.network import MiMo
from mimo.sampling.denoiser import CachedRun, CachePolicy, Run, RunKey, UncachedRun, guidance_branches
from mimo.sampling.saving import Progress, Saving, Stream, identity

__all__ = ["CachePolicy", "Sampler", "Saving"]


class Sampler:
    """Draws videos from a MiMo network.

    Args:
        model: the network; its dtype and device are those of the computation, under autocast the cache has its dtype.
        config: sampler, steps, guidance, window, temperature.
        policy: which earlier frames a frame sees, where the config's window and sink do not say all.
        use_cache: False computes the history anew in every step, with the full mask: for comparison.
        page_size: tokens per cache page; default the largest divisor of a frame's tokens in 16..64, else 64 or a
            frame, whichever is less.
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
        expected = {"v": "ddim", "flow": "euler"}[model.config.parameterization]
        if config.sampler != expected:
            raise ValueError(
                f"sampler={config.sampler!r}: a {model.config.parameterization!r} network is sampled by {expected!r}"
            )
        self.model, self.config = model, config
        if policy is not None and config.window is not None:
            raise ValueError(f"window={config.window} and a policy: expected one of them")
        self.policy = policy or CachePolicy(window=config.window, sink=config.sink)
        if not use_cache and self.policy.coarse is not None:
            raise ValueError("a coarse policy needs the cache, got use_cache=False")
        if graph not in ("step", "frame"):
            raise ValueError(f"graph={graph!r}: expected 'step' or 'frame'")
        self.graph = graph
        self.run_type: type[Run] = CachedRun if use_cache else UncachedRun
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

    def stream(
        self,
        context: Tensor | Sequence[Tensor] | None,
        num_frames: int,
        *,
        batch: int | None = None,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
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
        clips, count = self._clips(context, batch, labels, actions, intervals)
        copies = count * trajectories
        longest = max(map(len, clips), default=0)
        positions = [len(clip) for clip in clips for _ in range(trajectories)]
        ids = list(range(copies)) if ids is None else list(ids)
        self._check(clips, num_frames, longest, labels, actions, intervals, count, trajectories, ids)
        device = self._device
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))
        given = {"labels": labels, "actions": actions, "intervals": intervals}
        conditions = {
            name: x.to(device).repeat_interleave(trajectories, 0) for name, x in given.items() if x is not None
        }
        if saving is not None:
            self._check_saves()
            if checkpoint.step_folders(saving.folder):
                raise InputError(f"{saving.folder} holds a saved run: resume it, or save into another folder")
        run = self._run(count, trajectories, longest, num_frames, labels is not None, actions is not None)
        now = Progress(num_frames - longest, seed, ids, positions)
        return self._start(run, now, lambda: run.begin(clips, conditions, positions), saving, progress)

    def resume(self, saving: Saving, *, progress: Callable[[int, int], None] | None = None) -> Stream:
        """The frames that a saved run, interrupted at any moment, has yet to make: bit for bit those that it would have
        made on the same device and software. `Stream.saved` has the frames made before.

        Raises InputError when there is no saved run, when it is damaged, and when it was made by other weights, another
        configuration or for another request; the message says what there is and what is expected.
        """
        self._check_saves()
        folder, damaged = checkpoint.find(saving.folder)
        if damaged:
            raise InputError(damaged[0])
        state = checkpoint.read_state(folder)
        checkpoint.require_same_config(state["configs"], identity(self, saving.request), folder)
        for leftovers in (saving.folder, saving.folder / "frames"):
            checkpoint.delete_unfinished(leftovers)
        now = Progress(**state["progress"])
        run = self._run(*state["run"])
        tensors = checkpoint.read_tensors(folder, "run", state)
        return self._start(run, now, lambda: run.load_state_dict(tensors, now.positions), saving, progress)

    def _run(self, clips, trajectories, context_frames, num_frames, labels: bool, actions: bool) -> Run:
        """The latest run, if it was of the same size, or a new one."""
        c = self.model.config
        if self.model.rope is not None:
            self.model.rope.tables_on(self._device, max(num_frames, c.height, c.width))
        # Without a condition its null branch would be the same rows twice.
        class_guidance = self.config.class_guidance if labels or actions else 1.0
        branches = guidance_branches(self.config.history_guidance, class_guidance)
        key = RunKey(clips, trajectories, context_frames, num_frames, labels, actions, self._dtype, tuple(branches))
        run = self._idle.pop(key, None)
        self._idle.clear()  # before memory is taken for another one
        return run or self.run_type(self, key)

    def _start(self, run: Run, now: Progress, begin: Callable[[], None], saving, progress) -> Stream:
        stream = Stream(self, run, now, begin, saving, progress)
        self.latencies = stream.latencies
        return stream

    def _check_saves(self) -> None:
        if not issubclass(self.run_type, CachedRun):
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
            return [torch.empty(0, c.tokens, c.channels)] * count, count
        clips = list(context)
        for clip in clips:
            if clip.ndim != 3 or clip.shape[1:] != (c.tokens, c.channels):
                raise ValueError(f"a context is {list(clip.shape)}: expected [frames, {c.tokens}, {c.channels}]")
        if batch not in (None, len(clips)):
            raise ValueError(f"batch={batch}: the context has {len(clips)} clips")
        return clips, len(clips)

    def _check(self, clips, num_frames, longest, labels, actions, intervals, count, trajectories, ids) -> None:
        c = self.model.config
        if not clips or trajectories < 1:
            raise ValueError(f"expected a clip and a trajectory, got {len(clips)} clips, trajectories={trajectories}")
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

    def _noise(self, seed: int, ids: list[int], positions: list[int], use: str, scale: float) -> Tensor:
        """scale * noise on the host, ``[S, N, C]``; drawn there, so that every device makes the same video."""
        c = self.model.config
        noise = torch.empty(len(ids), c.tokens, c.channels, pin_memory=self._device.type == "cuda")
        for row, *names in zip(noise, ids, positions, strict=True):
            digest = hashlib.blake2b(repr((seed, *names, use)).encode(), digest_size=8).digest()
            row.normal_(generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))
        return noise.mul_(scale)
