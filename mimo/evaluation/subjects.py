"""What is compared: the real clips, and sets of videos beside them.

    Reals            the clips of a dataset, in its class-balanced order
    Made             what a checkpoint makes of them: each video a function of seed, clip and trajectory
    Reconstructed    what a tokenizer makes of the clips: no network behind it can be nearer to them
    Copied           the last given frame, held: what a network has to beat
    Folder           videos that were made elsewhere

Each is a set of videos whose numbers are those of the clips; `videos(numbers)` gives those that can be had.

Letters: b clips of a part, K trajectories, F frames.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mimo.config import SampleConfig
from mimo.data import to_float, to_uint8
from mimo.data.datasets import find_files
from mimo.data.errors import DataError, OutOfRange, UnreadableVideo
from mimo.data.loader import report
from mimo.data.protocols import VideoDataset
from mimo.data.video import VIDEO_SUFFIXES, open_clip
from mimo.errors import InputError
from mimo.sampling.loading import Loaded
from mimo.sampling.sampler import Sampler
from mimo.sampling.videos import generate
from mimo.tokenizers.protocols import Tokenizer
from mimo.tokenizers.weights import checksum

REAL = "real clips"


class Subject(Protocol):
    """A set of videos.

    Attributes:
        label: in tables. trajectories: K.
        kept: whether its videos are stored, as they took long to make.
        paired: whether video n is about clip n, so that they are compared with each other.
    """

    label: str
    trajectories: int
    kept: bool
    paired: bool

    def identity(self) -> dict[str, Any]:
        """All that decides the videos."""
        ...

    def videos(self, numbers: list[int]) -> tuple[list[int], Tensor]:
        """Those of `numbers` that can be had, and uint8 [b, K, F, H, W, 3]."""
        ...


class Reals:
    """The first clips of a dataset's class-balanced order, cut as sample(index, seed) cuts them. A clip that cannot be
    read is named and left out of every comparison."""

    label, trajectories, kept, paired = REAL, 1, False, False

    def __init__(self, dataset: VideoDataset, clips: int, seed: int):
        self.dataset, self.seed = dataset, seed
        self.order = dataset.evaluation_order()[:clips]
        self._reported: set[str] = set()
        self._last: tuple[list[int], tuple[list[int], dict[str, Tensor]]] | None = None

    def identity(self) -> dict[str, Any]:
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        d = self.dataset
        files = [(os.fspath(file), _size(file)) for file in d.sources()]
        root = os.path.commonpath([name for name, _ in files]) if files else ""
        listed = json.dumps([(os.path.relpath(name, root), size) for name, size in files])
        return {
            "kind": type(d).__name__,
            "settings": d.settings(),
            "shape": [d.num_frames, d.height, d.width],
            "files": hashlib.sha256(listed.encode()).hexdigest(),
            "clips": len(d),
            "seed": self.seed,
        }

    def batch(self, numbers: list[int]) -> tuple[list[int], dict[str, Tensor]]:
        """The clips that can be read, and their arrays, stacked; the latest are kept."""
        if self._last is not None and self._last[0] == numbers:
            return self._last[1]
        read, samples = [], []
        for number in numbers:
            try:
                sample = self.dataset.sample(self.order[number], self.seed)
            except OutOfRange as error:
                raise DataError(str(error)) from None
            except UnreadableVideo as error:
                report(self._reported, [(error.path, error.why)], {})
                continue
            read.append(number)
            samples.append(sample)
        batch = {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in (samples or [{}])[0]}
        self._last = numbers, (read, batch)
        return read, batch

    def videos(self, numbers: list[int]) -> tuple[list[int], Tensor]:
        read, batch = self.batch(numbers)
        return read, batch["video"][:, None] if read else torch.empty(0)

    def name(self, number: int) -> str:
        return self.dataset.name(self.order[number])


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:  # a clip that cannot be read, and is left out
        return None


@dataclass
class Made:
    """What a checkpoint makes of the clips: their continuations, or videos of their classes.

    The noise is a function of (seed, clip, trajectory), so a video does not depend on how many there are.

    Args:
        config: as the network is sampled, with context and length in latent frames.
        interval: that networks with max_interval are told.
    """

    label: str
    loaded: Loaded
    config: SampleConfig
    reals: Reals
    trajectories: int
    seed: int
    interval: int
    kept, paired = True, True

    def __post_init__(self) -> None:
        model = self.loaded.model
        gpu = next(model.parameters()).device.type == "cuda"
        self.precision = self.loaded.train_config.precision if gpu else "fp32"
        # Before weights are rounded for sampling.
        self._weights, self._tokenizer = checksum(model), checksum(self.loaded.tokenizer)
        self.sampler = Sampler(model, self.config)
        self.paired = self.config.context_frames > 0

    def identity(self) -> dict[str, Any]:
        return {
            "weights": self._weights,
            "tokenizer": self._tokenizer,
            "model": self.loaded.model.config.to_dict(),
            "sample": self.config.to_dict(),
            "precision": self.precision,
            "seed": self.seed,
            "trajectories": self.trajectories,
            "interval": self.interval,
            "clips": self.reals.identity(),
        }

    def videos(self, numbers: list[int]) -> tuple[list[int], Tensor]:
        read, batch = self.reals.batch(numbers)
        if not read:
            return read, torch.empty(0)
        c = self.loaded.model.config
        made = generate(
            self.sampler,
            tokenizer=self.loaded.tokenizer,
            context=batch["video"] if self.config.context_frames else None,
            labels=batch["label"] if c.num_classes else None,
            actions=batch["actions"] if c.num_actions else None,
            intervals=torch.full((len(read),), self.interval) if c.max_interval else None,
            text=batch["text"] if c.text_dim else None,
            count=len(read),
            trajectories=self.trajectories,
            ids=[number * self.trajectories + k for number in read for k in range(self.trajectories)],
            seed=self.seed,
            precision=self.precision,
        )
        return read, made.unflatten(0, (len(read), self.trajectories))


@dataclass
class Reconstructed:
    """The clips, encoded and decoded by a tokenizer."""

    label: str
    tokenizer: Tokenizer
    device: torch.device
    reals: Reals
    trajectories = 1
    kept, paired = False, True

    def identity(self) -> dict[str, Any]:
        return {"reconstructed by": checksum(self.tokenizer), "clips": self.reals.identity()}

    @torch.no_grad()
    def videos(self, numbers: list[int]) -> tuple[list[int], Tensor]:
        read, batch = self.reals.batch(numbers)
        if not read:
            return read, torch.empty(0)
        latents = self.tokenizer.encode(to_float(batch["video"].to(self.device)))
        return read, to_uint8(self.tokenizer.decode(latents)).cpu()[:, None]


@dataclass
class Copied:
    """The clips up to the last frame of the context, and that frame from there on."""

    context: int
    reals: Reals
    label = "last given frame"
    trajectories = 1
    kept, paired = False, True

    def identity(self) -> dict[str, Any]:
        return {"copied from frame": self.context - 1, "clips": self.reals.identity()}

    def videos(self, numbers: list[int]) -> tuple[list[int], Tensor]:
        read, videos = self.reals.videos(numbers)
        if read:
            videos = videos.clone()
            videos[:, :, self.context :] = videos[:, :, self.context - 1 : self.context]
        return read, videos


class Folder:
    """Videos that were made elsewhere, in the order of their names. If they are called like the dataset's clips, each
    is compared with its clip.

    Raises: InputError when there are none, and for one of another size or with fewer frames than are scored.
    """

    trajectories, kept = 1, False

    def __init__(self, path: Path, reals: Reals):
        self.label, self.reals, d = str(path), reals, reals.dataset
        self.frames, self.size = d.num_frames, (d.height, d.width)
        try:
            self.files = find_files(path, (*VIDEO_SUFFIXES, ".npz"))
        except DataError as error:
            raise InputError(f"--videos {error}") from None
        if not self.files:
            raise InputError(f"--videos {path}: holds no video and no npz file")
        for file in self.files:
            self._check(file)
        numbers = {Path(reals.name(number)).stem: number for number in range(len(reals.order))}
        named = {numbers[file.stem]: file for file in self.files if file.stem in numbers}
        self.paired = len(named) == len(numbers)
        self.by_number = named if self.paired else dict(enumerate(self.files[: len(numbers)]))

    def _check(self, file: Path) -> None:
        try:
            with open_clip(file) as reader:
                found = reader.height, reader.width
                if found != self.size:
                    height, width = self.size
                    raise InputError(
                        f"--videos {file}: is {found[0]} x {found[1]}, expected {height} x {width}, as the others"
                    )
                if reader.num_frames < self.frames:
                    raise InputError(
                        f"--videos {file}: has {reader.num_frames} frames, expected at least {self.frames}"
                    )
        except UnreadableVideo as error:
            raise InputError(f"--videos {error}") from None

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for number, file in sorted(self.by_number.items()):
            digest.update(f"{number} {file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
        return {"files": digest.hexdigest(), "frames": self.frames, "size": self.size}

    def videos(self, numbers: list[int]) -> tuple[list[int], Tensor]:
        there = self.reals.batch(numbers)[0] if self.paired else numbers  # a clip that cannot be read has no pair
        here, made = [number for number in there if number in self.by_number], []
        for number in here:
            try:
                with open_clip(self.by_number[number]) as reader:
                    made.append(torch.from_numpy(reader.read(self.frames)))
            except UnreadableVideo as error:  # damaged behind its beginning
                raise InputError(f"--videos {error}") from None
        return here, torch.stack(made)[:, None] if made else torch.empty(0)
