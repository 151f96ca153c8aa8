"""The frames of a run as they are made, and runs that are continued after an interruption.

    FOLDER/
        checkpoints/step_00000020/   the newest state: the cache's pages and page tables, the conditions, the seed
        frames/checkpoints/step_*/   the frames made between two saves, each written once

Both are written as checkpoints are (mimo.checkpoint): they are whole or not there, and carry checksums. The noise of a
frame is a function of the seed and the frame's position, so a continued run makes the frames that it would have made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo import checkpoint

if TYPE_CHECKING:
    from mimo.sampling.denoiser import Run
    from mimo.sampling.sampler import Sampler


@dataclass(frozen=True)
class Saving:
    """Where a stream saves itself, and how often.

    Args:
        folder: holds the newest state and the frames made so far.
        every: frames between two saves.
        request: what the run was asked for, as JSON can hold it; a run is continued under an equal one only.
    """

    folder: Path
    every: int = 10
    request: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: expected 1 or more frames between two saves")


@dataclass
class Progress:
    """How far a run is.

    total: frames to make. seed, ids: of the noise. positions: of the frames to be made next, per sequence.
    chunks: `done` at every save, which names the folder of the frames made since the save before.
    """

    total: int
    seed: int
    ids: list[int]
    positions: list[int]
    done: int = 0
    chunks: list[int] = field(default_factory=list)


class Stream(Iterator[Tensor]):
    """The frames of a run, one by one as they are done, each fp32 ``[S, N, C]``; made by `Sampler.stream` and `resume`.

    `progress.done` counts the frames, those before an interruption included. `latencies` has, per frame, a function that
    gives its seconds (on a GPU it waits for that frame).
    """

    def __init__(
        self,
        sampler: Sampler,
        run: Run,
        progress: Progress,
        begin: Callable[[], None],
        saving: Saving | None = None,
        report: Callable[[int, int], None] | None = None,
    ):
        self.sampler, self.run, self.progress, self.saving = sampler, run, progress, saving
        self.latencies: list[Callable[[], float]] = []
        self._unsaved: list[Tensor] = []
        self._identity: dict | None = None
        self._frames = self._make(begin, report)

    def __next__(self) -> Tensor:
        # The caller may be on another device: kernels, events and graphs belong to this one.
        with torch.no_grad(), torch.cuda.device_of(self.run.x):
            return next(self._frames)

    def close(self) -> None:
        """Give the run up; what was saved stays."""
        self._frames.close()

    def saved(self) -> Iterator[Tensor]:
        """The frames in the folder, each ``[S, N, C]`` on the host, those made before an interruption first."""
        folder = self.saving.folder / "frames"
        for step in self.progress.chunks:
            chunk = checkpoint.step_folder(folder, step)
            yield from checkpoint.read_tensors(chunk, "frames", checkpoint.read_state(chunk))["frames"]

    def _make(self, begin: Callable[[], None], report: Callable[[int, int], None] | None) -> Iterator[Tensor]:
        sampler, run, now = self.sampler, self.run, self.progress
        try:
            begin()
            while now.done < now.total:
                clock = _Clock(run.device)
                share = now.done / max(1, now.total - 1)
                last = now.done + 1 == now.total
                scale = 0.0 if last else _between(sampler.config.history_noise, share)
                run.denoise(
                    sampler._noise(
                        now.seed, now.ids, now.positions, "start", _between(sampler.config.temperature, share)
                    ),
                    sampler._noise(now.seed, now.ids, now.positions, "history", scale) if scale else None,
                )
                frame = run.x.clone()
                now.done += 1
                if not last:
                    run.remember()
                    now.positions = [position + 1 for position in now.positions]
                self.latencies.append(clock.stop())
                if self.saving is not None:
                    self._unsaved.append(frame.clone())
                    if last or now.done % self.saving.every == 0:
                        self._save()
                if report is not None:
                    report(now.done, now.total)
                yield frame
        finally:
            run.end()
        sampler._idle[run.key] = run

    def _save(self) -> None:
        now, folder = self.progress, self.saving.folder
        self._identity = self._identity or identity(self.sampler, self.saving.request)
        frames = torch.stack(self._unsaved).cpu()
        checkpoint.save(folder / "frames", now.done, {"frames": {"frames": frames}}, {}, keep_every=1)
        now.chunks.append(now.done)
        self._unsaved = []
        key = self.run.key
        state = {
            "configs": self._identity,
            "run": [key.clips, key.trajectories, key.context_frames, key.num_frames, key.labels, key.actions],
            "progress": asdict(now),
        }
        checkpoint.save(folder, now.done, {"run": self.run.state_dict()}, state, keep_last=1)


def identity(sampler: Sampler, request: dict) -> dict:
    """What has to be the same for a continued run to make the same frames."""
    from mimo.tokenizers.weights import checksum

    config, policy = sampler.config, sampler.policy
    lengths = ("context_frames", "num_frames")  # of a preset; a run has its own
    sampling = {name: value for name, value in config.to_dict().items() if name not in lengths}
    sampling |= {name: getattr(policy, name) for name in ("window", "sink", "coarse_tokens")}
    sampling |= {"page_size": sampler.page_size, "dtype": str(sampler._dtype)}
    network = sampler.model.config.to_dict()
    return {"network": network, "weights": checksum(sampler.model), "sampling": sampling, "request": request}


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
