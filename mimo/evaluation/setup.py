"""From checkpoints, folders and a dataset to the sets of videos that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mimo.config import MiMoConfig, SampleConfig
from mimo.data.datasets import find_files
from mimo.data.errors import DataError, UnreadableVideo
from mimo.data.protocols import VideoDataset
from mimo.data.video import VIDEO_SUFFIXES, open_clip
from mimo.errors import InputError, user_input
from mimo.evaluation.protocols import Protocol
from mimo.evaluation.subjects import Copied, Folder, Made, Reals, Reconstructed, Subject
from mimo.sampling.loading import Loaded, round_weights
from mimo.sampling.request import latents_covering
from mimo.tokenizers.weights import checksum


@dataclass(frozen=True)
class Shape:
    """Of the videos that are compared: frames that are given and that there are in all, rows, columns, and the distance
    of frames in the source."""

    context: int
    frames: int
    height: int
    width: int
    interval: int

    def __str__(self) -> str:
        given = f"{self.context} of {self.frames} frames given" if self.context else f"{self.frames} frames"
        return f"{given}, {self.height} x {self.width}, interval {self.interval}"


@dataclass
class Setup:
    reals: Reals
    subjects: list[Subject]
    shape: Shape


def set_up(
    checkpoints: Sequence[tuple[Path, Loaded]],
    folders: Sequence[Path],
    protocol: Protocol,
    open_clips: Callable[..., VideoDataset],
    *,
    sampling: Callable[[SampleConfig], SampleConfig],
    interval: int | None,
    seed: int,
    device: torch.device,
) -> Setup:
    """The real clips and all sets beside them.

    Args:
        checkpoints: networks, and what they are called.
        open_clips: opens the dataset, with the options of `open_dataset` that shapes and conditions ask for.
        sampling: of a checkpoint's configuration, what is asked for.
        interval: None takes that of training.

    Raises: InputError for checkpoints that do not make videos of one shape, conditions that the dataset has not, and
        fewer clips than are asked for.
    """
    labels = [str(path) for path in (*(path for path, _ in checkpoints), *folders)]
    if again := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"{again[0]} is named twice, expected each once")
    asked = [(path, loaded, _lengths(loaded, sampling(loaded.sample_config), protocol)) for path, loaded in checkpoints]
    shapes = [(str(path), _shape(loaded, config, interval)) for path, loaded, config in asked]
    if not shapes:
        shapes = [(str(folders[0]), _folder_shape(folders[0], protocol, interval or 1))]
    for label, shape in shapes[1:]:
        if shape != shapes[0][1]:
            raise InputError(
                f"{label} ({shape}) makes other videos than {shapes[0][0]} ({shapes[0][1]}), expected one shape: name "
                "--frames, --context-frames and --interval, or measure them apart"
            )
    shape = shapes[0][1]
    if shape.context >= shape.frames:
        raise InputError(f"--context-frames {shape.context}: expected fewer than the {shape.frames} frames of a video")
    configs = [(str(path), loaded.model.config) for path, loaded in checkpoints]
    dataset = open_clips(
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        interval=shape.interval,
        flip=False,
        **_conditions(configs),
    )
    for label, c in configs:
        for name, needed, there in (
            ("classes", c.num_classes, dataset.has_labels),
            ("actions", c.num_actions, dataset.has_actions),
        ):
            if needed and not there:
                raise InputError(f"{label} is told {name}, and the clips of --data have none")
    wanted = protocol.clips or len(dataset)
    if wanted > len(dataset):
        raise InputError(f"--clips {wanted}: --data holds {len(dataset)} clips")
    reals = Reals(dataset, wanted, seed)
    subjects: list[Subject] = []
    for path, loaded, config in asked:
        subjects.append(
            user_input(Made, str(path), loaded, config, reals, protocol.trajectories, seed, interval=shape.interval)
        )
        if subjects[-1].precision != "fp32":  # type: ignore[attr-defined]
            round_weights(loaded.model)
    subjects += [Folder(path, reals) for path in folders]
    tokenizers = {checksum(loaded.tokenizer): loaded for _, loaded in checkpoints}
    for number, loaded in enumerate(tokenizers.values(), 1):
        name = f"{loaded.model.config.tokenizer} reconstruction"
        label = name if len(tokenizers) == 1 else f"{name} {number}"
        subjects.append(Reconstructed(label, loaded.tokenizer, device, reals))
    if shape.context:
        subjects.append(Copied(shape.context, reals))
    return Setup(reals, subjects, shape)


def _lengths(loaded: Loaded, config: SampleConfig, protocol: Protocol) -> SampleConfig:
    """The configuration with the protocol's lengths, in latent frames."""
    context, total, c = protocol.context_frames, protocol.frames, loaded.model.config
    latents, frames = config.context_frames, config.num_frames
    if context is not None:
        latents = latents_covering("--context-frames", context, loaded.tokenizer) if context else 0
    if total is not None:
        frames = latents_covering("--frames", total, loaded.tokenizer)
    if latents >= frames:
        shown = [loaded.tokenizer.num_frames(count) for count in (latents, frames)]
        raise InputError(f"--context-frames {shown[0]}: expected fewer than the {shown[1]} frames of a video")
    config = user_input(replace, config, context_frames=latents, num_frames=frames)
    if config.context_frames and c.recipe == "video_dit":
        given = loaded.tokenizer.num_frames(config.context_frames)
        raise InputError(f"--context-frames {given}: expected 0, as {c.recipe!r} makes clips at once")
    if c.positions == "learned" and config.num_frames > c.frames:
        raise InputError(f"--frames: {config.num_frames} latent frames, but learned positions end at {c.frames}")
    return config


def _shape(loaded: Loaded, config: SampleConfig, interval: int | None) -> Shape:
    tokenizer, trained = loaded.tokenizer, loaded.train_config.interval
    low = trained if isinstance(trained, int) else trained[0]
    context = tokenizer.num_frames(config.context_frames) if config.context_frames else 0
    _, height, width = loaded.model.config.video_shape
    return Shape(context, tokenizer.num_frames(config.num_frames), height, width, interval or low)


def _folder_shape(folder: Path, protocol: Protocol, interval: int) -> Shape:
    """That of the first video."""
    try:
        files = find_files(folder, (*VIDEO_SUFFIXES, ".npz"))
        if not files:
            raise InputError(f"--videos {folder}: holds no video and no npz file")
        with open_clip(files[0]) as reader:
            frames, height, width = reader.num_frames, reader.height, reader.width
    except (DataError, UnreadableVideo) as error:
        raise InputError(f"--videos {error}") from None
    return Shape(protocol.context_frames or 0, protocol.frames or frames, height, width, interval)


def _conditions(configs: Sequence[tuple[str, MiMoConfig]]) -> dict:
    """What the networks are told, as options of `open_dataset`: those that are told something are told the same."""
    options: dict[str, int | tuple[int, int] | None] = {"num_classes": None, "num_actions": None, "text": None}
    said_by: dict[str, str] = {}
    for label, c in configs:
        told = {"num_classes": c.num_classes, "num_actions": c.num_actions}
        for name, value in {**told, "text": (c.text_tokens, c.text_dim) if c.text_dim else None}.items():
            if not value:
                continue
            if options[name] not in (None, value):
                raise InputError(f"{label} has {name} {value}, {said_by[name]} {options[name]}: measure them apart")
            options[name], said_by[name] = value, label
    return options
