"""Videos from a checkpoint: predicted from context frames, for a class, or from nothing."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import contact_sheet, to_float, to_uint8, write_gif, write_video
from mimo.data.fitting import clip_span
from mimo.data.npz import load_actions
from mimo.data.video import open_clip
from mimo.data.writing import check_fps
from mimo.errors import InputError, user_input
from mimo.network.network import MiMo
from mimo.runtime import autocast, best_device, config_tokenizer, recorded_tokenizer
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving
from mimo.tokenizers.weights import checksum

MIN_SIDE = 128  # small videos are written magnified until their shorter side has this many pixels


@dataclass
class Loaded:
    """A network for sampling, as a checkpoint describes it."""

    model: MiMo
    tokenizer: nn.Module
    train_config: TrainConfig
    sample_config: SampleConfig
    folder: Path


def load(
    path: Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    tokenizer_weights: str | Path | None = None,
    trust_pickle: bool = False,
    device: torch.device | None = None,
) -> Loaded:
    """The network in a run folder (its newest whole checkpoint) or in one step folder, and its tokenizer.

    Args:
        weights: the averaged ones, or those of the last step.
        tokenizer_weights: where the tokenizer's weights lie now; None takes the path that the checkpoint remembers. Weights
            with another checksum than those of training are refused.
        trust_pickle: see `build_tokenizer`.
    """
    folder, passed_over = checkpoint.find(path, parts=[weights])
    for reason in passed_over:
        print(f"passed over: {reason}")
    state = checkpoint.read_state(folder)
    try:
        configs = state["configs"]
        model_config = MiMoConfig.from_dict(configs["model"])
        train_config, sample_config = TrainConfig.from_dict(configs["train"]), SampleConfig.from_dict(configs["sample"])
        model = MiMo(model_config)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {folder}: its configuration does not fit this version: {error}") from None
    checkpoint.load_module(model, checkpoint.read_tensors(folder, weights, state), folder)
    device = device or best_device()
    recorded = recorded_tokenizer(configs)
    tokenizer = _load_tokenizer(folder, model_config, recorded, tokenizer_weights, trust_pickle)
    return Loaded(model.to(device).eval(), tokenizer.to(device), train_config, sample_config, folder)


def round_weights(model: MiMo) -> None:
    """Keep in bf16 what autocast rounds to it before every product: a captured graph would do so in every step."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()


def _load_tokenizer(
    folder: Path, config: MiMoConfig, recorded: dict, given: str | Path | None, trust_pickle: bool
) -> nn.Module:
    try:
        tokenizer = config_tokenizer(config, given or recorded["weights"], trust_pickle=trust_pickle)
    except InputError as error:
        where = "--tokenizer-weights" if given else "its tokenizer, which --tokenizer-weights can name anew"
        raise InputError(f"checkpoint {folder}: {where}: {error}") from None
    if (found := checksum(tokenizer)) != recorded["sha256"]:
        what = given or recorded["weights"] or f"this version's {config.tokenizer!r}"
        raise InputError(
            f"checkpoint {folder}: {what} is not the tokenizer it was trained with: its checksum is {found}, expected "
            f"{recorded['sha256']}"
        )
    return tokenizer


@torch.no_grad()
def generate(
    sampler: Sampler,
    *,
    tokenizer: nn.Module | None = None,
    context: Tensor | None = None,
    labels: Tensor | None = None,
    actions: Tensor | None = None,
    intervals: Tensor | None = None,
    count: int = 1,
    seed: int = 0,
    precision: Literal["bf16", "fp32", "fp8"] = "fp32",
    progress: bool = False,
    saving: Saving | None = None,
    resume: bool = False,
) -> Tensor:
    """Videos of the sampler's config.num_frames latent frames, uint8 [B, F, H, W, 3] on the CPU.

    Args:
        tokenizer: of the network; None makes the one that config_tokenizer gives without weights.
        context: uint8 [B, F, H, W, 3]; its first config.context_frames latent frames are continued, and kept as they
            are. Or latents fp32 [B, T, H, W, C], which come back decoded. None generates from nothing.
        labels: int64 [B].
        actions: int64 [B, config.num_frames].
        intervals: int64 [B], for a network that is told them.
        count: B where there is no context.
        seed: of the noise: the same seed, on the same device, gives the same videos.
        precision: see `autocast`; a network trained in fp8 is sampled in bf16.
        saving: where the run saves itself; with `resume`, where the run lies that is continued.
    """
    model, config = sampler.model, sampler.config
    device = next(model.parameters()).device
    tokenizer = (tokenizer or config_tokenizer(model.config)).to(device)
    latents = None
    if context is not None:
        if context.is_floating_point():
            latents = context[:, : config.context_frames].to(device)
        else:
            context = context[:, : tokenizer.num_frames(config.context_frames)]
            latents = tokenizer.encode(to_float(context.to(device)))
        latents, count = latents.flatten(2, 3), len(context)  # [B, T, N, C]
    generator = torch.Generator(device).manual_seed(seed)
    given = {"labels": labels, "actions": actions, "intervals": intervals}
    conditions = {name: None if value is None else value.to(device) for name, value in given.items()}
    with autocast(device, precision):
        if resume:
            frames = sampler.resume(saving)
        else:
            batch = None if latents is not None else count
            options = {"batch": batch, "generator": generator, "saving": saving}
            frames = sampler.stream(latents, config.num_frames, **options, **conditions)
        # The bar counts frames; tqdm's disable=None shows it on a terminal only.
        new = config.num_frames - (0 if latents is None else latents.shape[1])
        bar = {"total": new, "initial": frames.progress.done, "unit": "frame", "desc": "sampling", "leave": False}
        made = list(tqdm(frames, **bar, disable=None if progress else True))
    if resume:
        made = [frame.to(device) for frame in frames.saved()]
    latents = torch.cat([*([] if latents is None else [latents]), torch.stack(made, dim=1)], dim=1)
    c = model.config
    video = to_uint8(tokenizer.decode(latents.float().unflatten(2, (c.height, c.width)))).cpu()
    if context is not None and not context.is_floating_point():
        video[:, : context.shape[1]] = context  # not what the tokenizer made of it
    return video


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
        shutil.rmtree(saving.folder)
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
