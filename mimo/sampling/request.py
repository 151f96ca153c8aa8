"""The request of `mimo sample`: what is asked, checked against the network, its context, its actions and this machine."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mimo.config import SampleConfig
from mimo.data import contact_sheet, write_gif, write_video
from mimo.data.fitting import clip_span
from mimo.data.npz import load_actions
from mimo.data.video import open_clip
from mimo.data.writing import check_fps
from mimo.errors import InputError, user_input
from mimo.folders import NotOurs
from mimo.sampling.loading import Loaded, round_weights
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving, delete_folder
from mimo.sampling.videos import MIN_SIDE, generate


def sample(
    loaded: Loaded,
    config: SampleConfig,
    out: Path,
    *,
    context: Path | None = None,
    context_frames: int | None = None,
    start: int = 0,
    interval: int | None = None,
    label: int | None = None,
    actions: Path | None = None,
    frames: int | None = None,
    count: int = 1,
    seed: int = 0,
    fps: float = 10.0,
    save_every: int | None = None,
    resume: bool = False,
) -> list[Path]:
    """`mimo sample`: draw `count` videos, write mp4, GIF and one contact sheet, print and return their paths.

    context_frames and frames count video frames; None takes what the checkpoint's configuration says. interval: see
    `_interval`. actions: an npz file; None takes those of the context, in it or in an npz of the same name beside it.
    save_every: latent frames after which the unfinished run is saved in OUT/unfinished; resume: continue that run.
    """
    c = loaded.model.config
    _require(count >= 1, f"--count {count}: expected at least 1")
    _require(label is None or c.num_classes, f"--class {label}: this model has no classes")
    _require(label is None or 0 <= label < c.num_classes, f"--class {label}: expected 0..{c.num_classes - 1}")
    _require(context is not None or context_frames is None, f"--context-frames {context_frames}: expected a --context")
    _require(0 <= seed < 2**63, f"--seed {seed}: expected 0 to 2**63 - 1")
    _require(start >= 0, f"--start {start}: expected 0 or more")
    _require(actions is None or c.num_actions, f"--actions {actions}: this model has no actions")
    _require(save_every is None or save_every >= 1, f"--save-every {save_every}: expected at least 1")
    _require(
        config.history_guidance == 1 or c.history_dropout > 0,
        f"--history-guidance {config.history_guidance:g}: this model was trained with --model.history-dropout 0 and has not "
        "learned to do without history",
    )
    _require(not config.sink or config.window, f"--sink {config.sink}: expected a --window beside it")
    unfinished = out / "unfinished"
    _require(
        not resume or unfinished.exists(), f"--resume: {out} holds no run to continue (no {unfinished.name} folder)"
    )
    user_input(check_fps, fps)
    interval = _interval(loaded, interval)
    tokenizer = loaded.tokenizer
    height, width = c.video_shape[1:]
    total = config.num_frames if frames is None else _latents("--frames", frames, tokenizer)
    clip, given, shown = None, 0, 0
    if context is not None:
        given = (
            config.context_frames if context_frames is None else _latents("--context-frames", context_frames, tokenizer)
        )
        _require(
            given > 0, "--context: this model is sampled from nothing by default: say how many --context-frames to use"
        )
        length, shown = tokenizer.num_frames(total), tokenizer.num_frames(given)
        _require(given < total, f"--frames {length}: the context is part of them, expected more than its {shown}")
        clip = read_context(context, shown, start, interval, (height, width))
        clip = clip.expand(count, -1, -1, -1, -1)
    told = None  # the actions
    if c.num_actions and (context or actions):
        told = read_actions(context, actions, total, start, interval, c.num_actions).expand(count, -1)
    config = user_input(replace, config, context_frames=given, num_frames=total)
    labels = None if label is None else torch.full((count,), label)
    saving = None
    if resume or save_every is not None:
        request = {"context": context, "actions": actions, "start": start, "interval": interval, "class": label}
        request |= {"context_frames": given, "frames": total, "count": count, "seed": seed}
        request = {name: str(value) if isinstance(value, Path) else value for name, value in request.items()}
        saving = Saving(unfinished, save_every or Saving.every, request)
    # bf16 saves time on a GPU; a CPU computes in fp32, whatever the training did.
    precision = loaded.train_config.precision if next(loaded.model.parameters()).device.type == "cuda" else "fp32"
    if precision != "fp32":
        round_weights(loaded.model)
    videos = generate(
        user_input(Sampler, loaded.model, config),
        tokenizer=tokenizer,
        context=clip,
        labels=labels,
        actions=told,
        intervals=torch.full((count,), interval) if c.max_interval else None,
        count=count,
        seed=seed,
        precision=precision,
        progress=True,
        saving=saving,
        resume=resume,
    ).numpy()
    paths = []
    for number, video in enumerate(videos):
        stem = out / ("sample" if count == 1 else f"sample_{number}")
        paths += [
            write_video(stem.with_suffix(".mp4"), video, fps, min_side=MIN_SIDE),
            write_gif(stem.with_suffix(".gif"), video, fps, min_side=MIN_SIDE),
        ]
    rows = {f"sample {number}, seed {seed}": video for number, video in enumerate(videos)}
    paths.append(contact_sheet(out / "contact_sheet.png", rows, shown))
    if saving is not None:
        try:
            delete_folder(saving.folder)
        except NotOurs as stranger:  # the videos are there all the same
            print(stranger)
    for path in paths:
        print(path)
    return paths


def read_context(path: Path, num_frames: int, start: int, interval: int, size: tuple[int, int]) -> Tensor:
    """The frames a video is continued from, start, start + interval, ..., as uint8 [1, F, H, W, 3].

    Raises InputError when the clip cannot be read or is shorter than asked.
    """
    _require(path.exists(), f"--context {path}: no such file")
    _require(path.is_file(), f"--context {path}: is a folder, expected a video or an npz trajectory")
    with open_clip(path) as reader:
        span = clip_span(num_frames, interval)
        there = max(0, reader.num_frames - start)
        apart = f" {interval} frames apart, so {span} in all," if interval > 1 else ""
        _require(
            there >= span,
            f"--context {path}: {num_frames} context frames{apart} are asked for, it holds {there}"
            + (f" from frame {start} on" if start else ""),
        )
        return torch.from_numpy(reader.read(num_frames, start=start, interval=interval, size=size))[None]


def read_actions(
    context: Path | None, file: Path | None, num_frames: int, start: int, interval: int, num_actions: int
) -> Tensor:
    """The actions that lead to the frames of a video, those of its context first, int64 [1, num_frames].

    They lie where training finds them: in `file`, in the context if that is an npz, or in an npz of its name beside it.
    Raises InputError when there are none, too few, or others than 0..num_actions - 1.
    """
    known, where = None, f"--actions {file}" if file is not None else f"--context {context}"
    if file is None:
        with open_clip(context) as reader:
            known = reader.actions
        file = context.with_suffix(".npz")
    if known is None:
        _require(
            file.is_file(),
            f"{where}: this model needs actions, and {file} does not exist: name their npz with --actions",
        )
        known = load_actions(file)
    wanted = known[start : start + clip_span(num_frames, interval) : interval]
    _require(
        len(wanted) == num_frames,
        f"{where}: {num_frames} actions from frame {start} on, {interval} apart, are asked for, {file.name} holds {len(known)}",
    )
    low, high = wanted.min(), wanted.max()
    _require(
        0 <= low and high < num_actions, f"{where}: actions reach from {low} to {high}, expected 0..{num_actions - 1}"
    )
    return torch.from_numpy(wanted.astype(np.int64))[None]


def _interval(loaded: Loaded, asked: int | None) -> int:
    """The distance of the frames in a video: one of those that the model was trained on, or 1, which training falls back
    to for short videos. None: the smallest of training."""
    trained = loaded.train_config.interval
    low, high = (trained, trained) if isinstance(trained, int) else trained
    if asked is None:
        return low
    expected = f"{low}..{high}" if low < high else f"{low}"
    _require(asked == 1 or low <= asked <= high, f"--interval {asked}: expected {expected}, as the model was trained")
    return asked


def _latents(option: str, frames: int, tokenizer) -> int:
    """Latent frames that cover so many video frames exactly."""
    _require(frames >= 1, f"{option} {frames}: expected at least 1")
    latents = 1
    while tokenizer.num_frames(latents) < frames:
        latents += 1
    covered = tokenizer.num_frames(latents)
    nearest = f"{tokenizer.num_frames(latents - 1)} or {covered}" if latents > 1 else str(covered)
    _require(covered == frames, f"{option} {frames}: this model's latents cover {nearest} frames")
    return latents


def _require(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)
