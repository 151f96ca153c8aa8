"""`mimo eval`: sets of videos, their features and their distances; the parts that are missing, by as many processes as
there are, and then the table.

The clips are taken in parts of `batch_size`. Everything about a part of a set (its videos, what a judge says of them)
is one file, made by one process from that part alone: an evaluation that was interrupted goes on where it was, and any
number of processes makes the same files (mimo.evaluation.store). The first process reads them all and writes the table
(mimo.evaluation.report).

Letters: N clips, b clips of a part, K trajectories, F frames, D features.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mimo.errors import InputError
from mimo.evaluation.judges import SCORES, judge_checksum
from mimo.evaluation.metrics import psnr, ssim
from mimo.evaluation.protocols import Protocol
from mimo.evaluation.store import Store
from mimo.evaluation.subjects import Reals, Reconstructed, Subject
from mimo.training.distributed import World

LEAST = 8  # clips, for a distance of sets
PIXELS = {"psnr": psnr, "ssim": ssim}


@dataclass(frozen=True)
class Measured:
    """What was measured of one set: the clips' numbers and, by score, values fp64 [N, K, F'] of the frames that are
    compared with the truth, or features [N, K, D] or [N, K, F', D]."""

    subject: Subject
    numbers: list[int]
    frames: dict[str, Tensor]
    features: dict[str, Tensor]


@dataclass
class Evaluation:
    """Sets of videos, measured as a protocol says.

    Args:
        subjects: the sets, beside the real clips.
        scores: names in SCORES that are measured; see `applicable`.
        judges: by name, see `open_judges`.
        context: video frames that were given; frames: of all, that are scored.
        out: the folder of the results.
    """

    protocol: Protocol
    reals: Reals
    subjects: Sequence[Subject]
    scores: tuple[str, ...]
    judges: dict[str, Any]
    context: int
    frames: int
    out: Path
    batch_size: int = 8

    def __post_init__(self) -> None:
        self.chunks = [
            list(range(start, min(start + self.batch_size, len(self.reals.order))))
            for start in range(0, len(self.reals.order), self.batch_size)
        ]
        sets = [SCORES[name].title for name in self.scores if SCORES[name].distance is not None]
        if sets and (clips := len(self.reals.order)) < LEAST:  # before anything is made
            raise InputError(f"--clips {clips}: expected at least {LEAST}, for {sets[0]}, which compares sets")
        self.everything: list[Subject] = [self.reals, *self.subjects]
        cache = self.out / "cache"
        self.stores = [
            Store(cache, type(s).__name__.lower(), s.identity() | {"parts of": self.batch_size})
            for s in self.everything
        ]

    # ---- measuring

    def measure(self, world: World) -> None:
        """Make what is missing of this process's parts."""
        mine = range(world.rank, len(self.chunks), world.size)
        todo = [
            (number, chunk)
            for number, _ in enumerate(self.everything)
            for chunk in mine
            if self._missing(number, chunk)
        ]
        self._require_room(todo)
        if world.leads:
            for number in sorted({number for number, _ in todo}):
                self.stores[number].describe()
        with tqdm(total=len(todo), unit="part", desc="eval", disable=None if world.leads else True) as bar:
            for count, (number, chunk) in enumerate(todo, 1):
                self._measure(number, chunk)
                bar.update()
                if bar.disable and world.leads and count * 10 // len(todo) > (count - 1) * 10 // len(todo):
                    print(f"eval: {count} of {len(todo)} parts", file=sys.stderr)

    def _kinds(self, number: int) -> dict[str, str]:
        """What is stored of a set besides videos: score -> kind of file."""
        kinds = {}
        subject = self.everything[number]
        for name in self.scores:
            score = SCORES[name]
            judge = self.judges.get(score.judge or "")
            version = "" if judge is None else f"-{judge_checksum(judge)[:8]}"
            if score.distance is not None:
                kinds[name] = f"{score.judge}{version}-{self._window(self.judged)}"
            elif subject.paired:
                kinds[name] = f"{name}{version}-{self._window(self.predicted)}"
        return kinds

    def _window(self, frames: range) -> str:
        size = self.protocol.size
        return f"{frames.start}to{frames.stop}" + (f"at{size}" if size else "")

    @property
    def judged(self) -> range:
        """The frames that distances of sets see."""
        return self.predicted if self.protocol.judged == "predicted" else range(self.frames)

    @property
    def predicted(self) -> range:
        """The frames that are compared with the truth: those that were made."""
        return range(self.context, self.frames)

    def _missing(self, number: int, chunk: int) -> bool:
        store = self.stores[number]
        return any(
            store.read(kind, chunk, self.chunks[chunk], "values") is None for kind in set(self._kinds(number).values())
        )

    def _measure(self, number: int, chunk: int) -> None:
        subject, store = self.everything[number], self.stores[number]
        read, videos = self._videos(number, chunk)
        done = set()
        for name, kind in self._kinds(number).items():
            if kind in done or store.read(kind, chunk, self.chunks[chunk], "values") is not None:
                continue
            done.add(kind)
            values = self._values(name, subject, read, videos) if read else np.zeros((0, subject.trajectories, 1))
            store.write(kind, chunk, self.chunks[chunk], "values", read, values)

    def _videos(self, number: int, chunk: int) -> tuple[list[int], Tensor]:
        """[b, K, F, H, W, 3]; those that took long to make are stored."""
        subject, store, numbers = self.everything[number], self.stores[number], self.chunks[chunk]
        if not subject.kept:
            return subject.videos(numbers)
        stored = store.read("videos", chunk, numbers, "videos")
        if stored is not None:
            return stored[0], torch.from_numpy(stored[1])
        read, videos = subject.videos(numbers)
        store.write("videos", chunk, numbers, "videos", read, videos.numpy())
        return read, videos

    def _values(self, name: str, subject: Subject, read: list[int], videos: Tensor) -> np.ndarray:
        score, copies = SCORES[name], videos.shape[1]
        judge = self.judges.get(score.judge or "")
        if score.distance is not None:
            assert judge is not None
            shown = self._sized(videos[:, :, slice_of(self.judged)].flatten(0, 1))
            return judge(shown).unflatten(0, (len(read), copies)).numpy()
        clips, truth = self.reals.batch(self._part_of(read))
        rows = [clips.index(number) for number in read]
        frames = slice_of(self.predicted)
        true = self._sized(truth["video"][rows][:, frames]).repeat_interleave(copies, 0)
        made = self._sized(videos[:, :, frames].flatten(0, 1))
        measure: Any = PIXELS.get(name, judge)
        try:
            values = measure(made, true)
        except ValueError as error:  # frames too small for it
            raise InputError(str(error)) from None
        return values.unflatten(0, (len(read), copies)).numpy()

    def _part_of(self, read: list[int]) -> list[int]:
        """The whole part that these numbers are of: the latest that `Reals` holds."""
        return self.chunks[read[0] // self.batch_size]

    def _sized(self, videos: Tensor) -> Tensor:
        """uint8 [b, F, H, W, 3], brought to the protocol's size."""
        size = self.protocol.size
        if size is None or videos.shape[2:4] == (size, size):
            return videos
        x = videos.flatten(0, 1).movedim(-1, 1).float()
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return x.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).unflatten(0, videos.shape[:2]).contiguous()

    def _require_room(self, todo: list[tuple[int, int]]) -> None:
        """Refuse what the disk cannot hold, before anything is made. Videos are compressed, by how much nobody
        knows."""
        d, needed = self.reals.dataset, 0
        for number, chunk in todo:
            subject = self.everything[number]
            if subject.kept:
                needed += len(self.chunks[chunk]) * subject.trajectories * d.num_frames * d.height * d.width * 3
        there = next(path for path in (self.out, *self.out.parents) if path.exists())
        if needed > (free := shutil.disk_usage(there).free):
            raise InputError(
                f"--out {self.out}: up to {needed / 2**30:.1f} GiB of videos to store, {free / 2**30:.1f} GiB free"
            )

    # ---- reading

    def measured(self, number: int) -> Measured:
        """All parts of a set. number: 0 of the real clips, then of the subjects."""
        frames: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        numbers: list[int] = []
        for name, kind in self._kinds(number).items():
            parts = [self._read(number, kind, chunk) for chunk in range(len(self.chunks))]
            numbers = [n for part, _ in parts for n in part]
            whole = [torch.from_numpy(values) for part, values in parts if part]
            if whole:
                (features if SCORES[name].distance is not None else frames)[name] = torch.cat(whole)
        return Measured(self.everything[number], numbers, frames, features)

    def _read(self, number: int, kind: str, chunk: int) -> tuple[list[int], np.ndarray]:
        found = self.stores[number].read(kind, chunk, self.chunks[chunk], "values")
        if found is None:
            raise InputError(
                f"{self.stores[number].folder}: part {chunk} of {kind} is not there any more: run it again"
            )
        return found

    def shown(self, number: int, clips: int) -> tuple[list[int], Tensor]:
        """The first videos of a set, [b, F, H, W, 3], to look at."""
        read, videos = self._videos(number, 0)
        return read[:clips], videos[:clips, 0] if read else videos


def slice_of(frames: range) -> slice:
    return slice(frames.start, frames.stop)


def applicable(protocol: Protocol, asked: tuple[str, ...] | None, subjects: Sequence[Subject]) -> tuple[str, ...]:
    """The scores of a protocol that its videos have; those that were asked for have to be had.

    Raises: InputError for a distance from the truth that was asked for where no video that was made has a truth.
    """
    paired = any(subject.paired for subject in subjects if not isinstance(subject, Reconstructed))
    alone = [name for name in protocol.scores if SCORES[name].distance is None]
    if paired or not alone:
        return protocol.scores
    if asked is not None:
        raise InputError(
            f"the score {alone[0]} compares a video with its own clip: expected --context-frames, or --videos that are "
            "named like the clips"
        )
    return tuple(name for name in protocol.scores if name not in alone)
