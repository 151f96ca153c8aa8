"""The request of `mimo sample`, checked against the network, the context, the actions and this machine."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimo.config import MiMoConfig, SampleConfig
from mimo.data.errors import UnreadableVideo
from mimo.data.fitting import clip_span
from mimo.data.local import local_file
from mimo.data.npz import load_actions
from mimo.data.text import read_text
from mimo.data.video import open_clip
from mimo.data.writing import check_fps
from mimo.errors import InputError, user_input
from mimo.folders import NotOurs
from mimo.runtime import autocast, memory_of
from mimo.sampling.loading import Loaded, round_weights
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving, delete_folder
from mimo.sampling.videos import Format, generate, require_replaceable, video_paths, write_videos
from mimo.tokenizers.protocols import Tokenizer

UNFINISHED = "unfinished"  # the folder in OUT where a run saves itself


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `mimo sample` is asked for, beside the checkpoint and how its network is sampled.

    Args:
        context: a clip to continue. context_frames, frames: of the clip and of the result, in video frames; None takes
            what the checkpoint's configuration says. start, interval: which frames of the clip, see `_interval`.
        label: the class. text: a file of features, see mimo.data.text. actions: an npz file; None takes those of the
            context, in it or in an npz beside it.
        count, seed: how many videos, of which noise.
        fps, format: of the files, see `write_videos`. overwrite: files that are there may be replaced.
        save_every: latent frames after which the unfinished run is saved. resume: continue that run.
    """

    context: Path | None = None
    context_frames: int | None = None
    start: int = 0
    interval: int | None = None
    label: int | None = None
    actions: Path | None = None
    text: Path | None = None
    frames: int | None = None
    count: int = 1
    seed: int = 0
    fps: float = 10.0
    format: Format = "mp4"
    overwrite: bool = False
    save_every: int | None = None
    resume: bool = False


class Lengths(NamedTuple):
    """Latent frames of the context and of the whole result, and the video frames that they decode to."""

    context: int
    total: int
    context_shown: int
    total_shown: int


def sample(loaded: Loaded, config: SampleConfig, out: Path, request: Request) -> list[Path]:
    """Draw the videos, write them and one contact sheet, print and return the paths."""
    c, tokenizer = loaded.model.config, loaded.tokenizer
    _check(c, config, request)
    unfinished = out / UNFINISHED
    _require(
        not request.resume or unfinished.exists(), f"--resume: {out} holds no run to continue (no {UNFINISHED} folder)"
    )
    lengths, interval = _lengths(config, request, tokenizer), _interval(loaded, request.interval)
    config = user_input(replace, config, context_frames=lengths.context, num_frames=lengths.total)
    sampler = user_input(Sampler, loaded.model, config)
    # bf16 saves time on a GPU; a CPU computes in fp32, whatever the training did.
    precision = loaded.train_config.precision if next(loaded.model.parameters()).device.type == "cuda" else "fp32"
    _require_memory(sampler, request, lengths, precision)
    _require_free(video_paths(out, request.count, request.format), request)
    clip = actions = None
    if request.context is not None:
        size = c.video_shape[1:]
        clip = read_context(request.context, lengths.context_shown, request.start, interval, size)
    if c.num_actions and (request.context or request.actions):
        asked = request.context, request.actions, lengths.total, request.start, interval, c.num_actions
        actions = read_actions(*asked)
    text = None if request.text is None else read_words(request.text, c)
    saving = None
    if request.resume or request.save_every is not None:
        saving = Saving(
            unfinished, request.save_every or Saving.every, _recorded(request, lengths, interval, clip, actions, text)
        )
    if precision != "fp32":
        round_weights(loaded.model)
    videos = generate(
        sampler,
        tokenizer=tokenizer,
        context=None if clip is None else clip.expand(request.count, -1, -1, -1, -1),
        labels=None if request.label is None else torch.full((request.count,), request.label),
        actions=None if actions is None else actions.expand(request.count, -1),
        intervals=torch.full((request.count,), interval) if c.max_interval else None,
        text=None if text is None else text.expand(request.count, -1, -1),
        count=request.count,
        seed=request.seed,
        precision=precision,
        progress=True,
        saving=saving,
        resume=request.resume,
    )
    paths = write_videos(
        out,
        videos.numpy(),
        [f"sample {number}, seed {request.seed}" for number in range(request.count)],
        kind=request.format,
        fps=request.fps,
        context=lengths.context_shown,
        actions=None if actions is None else actions.expand(request.count, -1).numpy(),
    )
    if saving is not None:
        try:
            delete_folder(saving.folder)
        except NotOurs as kept:  # the videos are written all the same
            print(kept)
    for path in paths:
        print(path)
    return paths


def read_context(path: Path, num_frames: int, start: int, interval: int, size: tuple[int, int]) -> Tensor:
    """The frames a video is continued from, start, start + interval, ..., as uint8 [1, F, H, W, 3].

    Raises InputError when the clip cannot be read or is shorter than asked.
    """
    _require_file("--context", path, "a video or an npz trajectory")
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
    if file is not None:
        _require_file("--actions", file, "an npz with 'actions'")
    else:
        assert context is not None, "one of both is given"
        with open_clip(context) as reader:
            known = reader.actions
        file = context.with_suffix(".npz")
        _require(
            known is not None or file.is_file(),
            f"{where}: this model needs actions, and {file} does not exist: name their npz with --actions",
        )
    if known is None:
        known = load_actions(file)
    wanted = known[start : start + clip_span(num_frames, interval) : interval]
    _require(
        len(wanted) == num_frames,
        f"{where}: {num_frames} actions from frame {start} on, {interval} apart, are asked for, {file.name} holds "
        f"{len(known)}",
    )
    low, high = wanted.min(), wanted.max()
    _require(
        0 <= low and high < num_actions, f"{where}: actions reach from {low} to {high}, expected 0..{num_actions - 1}"
    )
    return torch.from_numpy(wanted.astype(np.int64))[None]


def read_words(path: Path, c: MiMoConfig) -> Tensor:
    """The features of a text, fp32 [1, L, text_dim], as training reads them; InputError when they cannot be read."""
    try:
        return torch.from_numpy(read_text(path, tokens=c.text_tokens, width=c.text_dim))[None]
    except UnreadableVideo as error:
        raise InputError(f"--text {error}") from None


def _check(c: MiMoConfig, config: SampleConfig, request: Request) -> None:
    """What can be wrong with the words alone."""
    r = request
    _require(r.count >= 1, f"--count {r.count}: expected at least 1")
    _require(r.label is None or c.num_classes, f"--class {r.label}: this model has no classes")
    _require(r.label is None or 0 <= r.label < c.num_classes, f"--class {r.label}: expected 0..{c.num_classes - 1}")
    _require(r.text is None or c.text_dim, f"--text {r.text}: this model is told no texts")
    _require(
        r.context is not None or r.context_frames is None, f"--context-frames {r.context_frames}: expected a --context"
    )
    _require(0 <= r.seed < 2**63, f"--seed {r.seed}: expected 0 to 2**63 - 1")
    _require(r.start >= 0, f"--start {r.start}: expected 0 or more")
    _require(r.actions is None or c.num_actions, f"--actions {r.actions}: this model has no actions")
    _require(r.save_every is None or r.save_every >= 1, f"--save-every {r.save_every}: expected at least 1")
    _require(
        config.history_guidance == 1 or c.history_dropout > 0,
        f"--history-guidance {config.history_guidance:g}: this model was trained with --model.history-dropout 0 and "
        "has not learned to do without history",
    )
    _require(not config.sink or config.window, f"--sink {config.sink}: expected a --window beside it")
    user_input(check_fps, r.fps)


def _lengths(config: SampleConfig, request: Request, tokenizer: Tokenizer) -> Lengths:
    total = config.num_frames if request.frames is None else latents_covering("--frames", request.frames, tokenizer)
    total_shown, given, shown = tokenizer.num_frames(total), 0, 0
    if request.context is not None:
        given, asked = config.context_frames, request.context_frames
        if asked is not None:
            given = latents_covering("--context-frames", asked, tokenizer)
        _require(
            given > 0, "--context: this model is sampled from nothing by default: say how many --context-frames to use"
        )
        shown = tokenizer.num_frames(given)
        _require(given < total, f"--frames {total_shown}: the context is part of them, expected more than its {shown}")
    return Lengths(given, total, shown, total_shown)


def _interval(loaded: Loaded, asked: int | None) -> int:
    """The distance of the frames in a video: one of those that the model was trained on, or 1, which training falls
    back to for short videos. None: the smallest of training."""
    trained = loaded.train_config.interval
    low, high = (trained, trained) if isinstance(trained, int) else trained
    if asked is None:
        return low
    expected = f"{low}..{high}" if low < high else f"{low}"
    _require(asked == 1 or low <= asked <= high, f"--interval {asked}: expected {expected}, as the model was trained")
    return asked


def latents_covering(option: str, frames: int, tokenizer: Tokenizer) -> int:
    """Latent frames that cover so many video frames exactly."""
    _require(1 <= frames < 2**63, f"{option} {frames}: expected at least 1, and less than 2**63")
    # Latent frames come in chunks, of one where each stands for itself, and every chunk but the first covers as many
    # frames.
    chunk = next(n for n in range(1, 1025) if _covered(n, tokenizer))
    first, second = (_covered(n * chunk, tokenizer) for n in (1, 2))
    before = max(0, frames - first) // (second - first)
    low, high = (_covered((before + n) * chunk, tokenizer) for n in (1, 2))
    if frames != low:
        nearest = f"{low} or {high}" if frames > low else f"{low}"
        raise InputError(f"{option} {frames}: this model's latents cover {nearest} frames")
    return (before + 1) * chunk


def _covered(latents: int, tokenizer: Tokenizer) -> int:
    """Video frames that so many latent frames decode to, 0 if they do not."""
    try:
        return tokenizer.num_frames(latents)
    except ValueError:
        return 0


def _require_memory(sampler: Sampler, request: Request, lengths: Lengths, precision: str) -> None:
    """Refuse what this machine cannot hold, before anything is made: the cache, and the video as it comes out of the
    tokenizer. That is what is needed at least."""
    c, device = sampler.model.config, next(sampler.model.parameters()).device
    told: dict[str, Any] = {"labels": request.label is not None}
    told |= {"text": c.text_tokens if request.text is not None else 0}
    told |= {"actions": bool(c.num_actions and (request.context or request.actions))}
    with autocast(device, precision):
        cache = sampler.cache_bytes(request.count, lengths.context, lengths.total, **told)
    pixels = request.count * lengths.total_shown * c.video_shape[1] * c.video_shape[2] * 3
    latents = request.count * lengths.total * c.tokens * c.token_channels
    needed = {
        "the cache": cache,
        "latents": 8 * latents,
        "the video": 4 * pixels,
        "the steps": 24 * sampler.config.steps,
    }
    if c.token_depth:  # see MaskedRun.noise
        needed["the noise of a frame"] = 4 * request.count * c.tokens * c.token_channels * sampler.config.steps
    if device.type == "cpu":
        needed["the video"] += pixels
    elif (there := memory_of(torch.device("cpu"))) < pixels:
        raise InputError(
            f"{_asked(request, lengths, sampler)} needs {_size(pixels)} for the video, the host has {_size(there)}"
        )
    total, there = sum(needed.values()), memory_of(device)
    if total > there:
        largest = max(needed, key=needed.__getitem__)
        where = "this machine" if device.type == "cpu" else f"{device}"
        raise InputError(
            f"{_asked(request, lengths, sampler)} needs at least {_size(total)} of memory, {_size(needed[largest])} of "
            f"it for {largest}; {where} has {_size(there)}"
        )


def _asked(request: Request, lengths: Lengths, sampler: Sampler) -> str:
    return f"--frames {lengths.total_shown} --count {request.count} --steps {sampler.config.steps}"


def _size(count: int) -> str:
    """Bytes in words."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:,.4g} {units[0]}" if size < 1e6 else f"{size:.1e} {units[0]}"


def _require_free(paths: list[Path], request: Request) -> None:
    there = [path for path in paths if os.path.lexists(path)]
    if there and not request.overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise InputError(f"{there[0]}{more}: exists already: expected another --out, or --overwrite")
    for path in there:
        require_replaceable(path)


def _recorded(
    request: Request,
    lengths: Lengths,
    interval: int,
    clip: Tensor | None,
    actions: Tensor | None,
    text: Tensor | None,
) -> dict[str, str | int | None]:
    """What a continued run has to be asked for alike, and what it has to find in the files it was given."""
    paths = {"context": request.context, "actions": request.actions}
    read = {"context": clip, "actions": actions}
    told = {} if text is None else {"text": str(request.text), "text_sha256": _sha256(text)}
    return {
        **told,
        **{name: None if path is None else str(path) for name, path in paths.items()},
        **{f"{name}_sha256": None if x is None else _sha256(x) for name, x in read.items()},
        "start": request.start,
        "interval": interval,
        "class": request.label,
        "context_frames": lengths.context,
        "frames": lengths.total,
        "count": request.count,
        "seed": request.seed,
    }


def _sha256(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def _require_file(option: str, path: Path, expected: str) -> None:
    try:
        local_file(path)
    except UnreadableVideo as error:
        why = error.why[:1].lower() + error.why[1:]
        raise InputError(f"{option} {path}: {why}, expected {expected}") from None


def _require(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)
