"""Videos from a checkpoint: predicted from context frames, for a class, or from nothing."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import batches, contact_sheet, to_float, to_uint8, write_gif, write_video
from mimo.data.video import NpzReader, open_clip
from mimo.errors import InputError, user_input
from mimo.model import MiMo
from mimo.sampler import Sampler
from mimo.tokenizers.weights import checksum
from mimo.train import Trainer, autocast, best_device, config_tokenizer, recorded_tokenizer

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
    folder, passed_over = checkpoint.find(path)
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


def _load_tokenizer(
    folder: Path, config: MiMoConfig, recorded: dict, given: str | Path | None, trust_pickle: bool
) -> nn.Module:
    try:
        tokenizer = config_tokenizer(config, given or recorded["weights"], trust_pickle=trust_pickle)
    except InputError as error:
        where = "--tokenizer-weights" if given else "its tokenizer, which --tokenizer-weights can name anew"
        raise InputError(f"checkpoint {folder}: {where}: {error}") from None
    if (found := checksum(tokenizer)) != recorded["sha256"]:
        raise InputError(
            f"checkpoint {folder}: {given or recorded['weights']} is not the tokenizer it was trained with: its checksum is "
            f"{found}, expected {recorded['sha256']}"
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
    count: int = 1,
    seed: int = 0,
    precision: Literal["bf16", "fp32"] = "fp32",
    progress: bool = False,
) -> Tensor:
    """Videos of the sampler's config.num_frames latent frames, uint8 [B, F, H, W, 3] on the CPU.

    Args:
        tokenizer: of the network; None makes the one that config_tokenizer gives without weights.
        context: uint8 [B, F, H, W, 3]; its first config.context_frames latent frames are continued, and kept as they
            are. Or latents fp32 [B, T, H, W, C], which come back decoded. None generates from nothing.
        labels: int64 [B].
        actions: int64 [B, config.num_frames].
        count: B where there is no context.
        seed: of the noise: the same seed, on the same device, gives the same videos.
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
    conditions = {
        name: None if value is None else value.to(device) for name, value in (("labels", labels), ("actions", actions))
    }
    with autocast(device, precision):
        frames = sampler.stream(
            latents, config.num_frames, batch=None if latents is not None else count, generator=generator, **conditions
        )
        # The bar counts frames; tqdm's disable=None shows it on a terminal only.
        new = config.num_frames - (0 if latents is None else latents.shape[1])
        made = list(
            tqdm(frames, total=new, unit="frame", desc="sampling", leave=False, disable=None if progress else True)
        )
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
    label: int | None = None,
    frames: int | None = None,
    count: int = 1,
    seed: int = 0,
    fps: float = 10.0,
) -> list[Path]:
    """`mimo sample`: draw `count` videos, write mp4, GIF and one contact sheet, print and return their paths.

    context_frames and frames count video frames; None takes what the checkpoint's configuration says.
    """
    c = loaded.model.config
    _require(count >= 1, f"--count {count}: expected at least 1")
    _require(label is None or c.num_classes, f"--class {label}: this model has no classes")
    _require(label is None or 0 <= label < c.num_classes, f"--class {label}: expected 0..{c.num_classes - 1}")
    _require(context is not None or context_frames is None, f"--context-frames {context_frames}: expected a --context")
    _require(seed >= 0, f"--seed {seed}: expected 0 or more")
    tokenizer = loaded.tokenizer
    height, width = c.video_shape[1:]
    total = config.num_frames if frames is None else _latents("--frames", frames, tokenizer)
    clip = actions = None
    given = 0
    if context is not None:
        given = (
            config.context_frames if context_frames is None else _latents("--context-frames", context_frames, tokenizer)
        )
        _require(
            given > 0, "--context: this model is sampled from nothing by default: say how many --context-frames to use"
        )
        _require(given < total, f"--frames: {total} latent frames with the context, expected more than its {given}")
        clip, actions = read_context(
            context, tokenizer.num_frames(given), start, (height, width), actions=total if c.num_actions else 0
        )
        clip = clip.expand(count, -1, -1, -1, -1)
        actions = None if actions is None else actions.expand(count, -1)
    config = user_input(replace, config, context_frames=given, num_frames=total)
    labels = None if label is None else torch.full((count,), label)
    # bf16 saves time on a GPU; a CPU computes in fp32, whatever the training did.
    precision = loaded.train_config.precision if next(loaded.model.parameters()).device.type == "cuda" else "fp32"
    videos = generate(
        user_input(Sampler, loaded.model, config),
        tokenizer=tokenizer,
        context=clip,
        labels=labels,
        actions=actions,
        count=count,
        seed=seed,
        precision=precision,
        progress=True,
    ).numpy()
    shown = 0 if clip is None else clip.shape[1]
    paths = []
    for number, video in enumerate(videos):
        stem = out / ("sample" if count == 1 else f"sample_{number}")
        paths += [
            write_video(stem.with_suffix(".mp4"), video, fps, min_side=MIN_SIDE),
            write_gif(stem.with_suffix(".gif"), video, fps, min_side=MIN_SIDE),
        ]
    rows = {f"sample {number}, seed {seed}": video for number, video in enumerate(videos)}
    paths.append(contact_sheet(out / "contact_sheet.png", rows, shown))
    for path in paths:
        print(path)
    return paths


def read_context(
    path: Path, num_frames: int, start: int, size: tuple[int, int], *, actions: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The frames a video is continued from, uint8 [1, F, H, W, 3], and as many `actions` from `start` on, [1, actions].

    Raises InputError when the clip cannot be read or is shorter than asked.
    """
    _require(path.is_file(), f"--context {path}: no such file")
    _require(start >= 0, f"--start {start}: expected 0 or more")
    with open_clip(path) as reader:
        there = reader.num_frames - start
        _require(
            there >= num_frames,
            f"--context {path}: {num_frames} context frames are asked for, it holds {max(0, there)}"
            + (f" from frame {start} on" if start else ""),
        )
        video = torch.from_numpy(reader.read(num_frames, start=start, size=size))[None]
        if not actions:
            return video, None
        known = reader.actions if isinstance(reader, NpzReader) else None
    _require(known is not None, f"--context {path}: this model needs actions, expected an npz file with 'actions'")
    wanted = np.asarray(known[start : start + actions])
    _require(len(wanted) == actions, f"--context {path}: {actions} actions are asked for, it holds {len(wanted)}")
    return video, torch.from_numpy(wanted.astype(np.int64))[None]


class Preview:
    """Predicts (or, without context frames, generates) a few clips with the averaged weights, truth on the left.

    Raises ValueError at once, not in the middle of a run, for a sample_config that does not fit the network.
    """

    def __init__(self, trainer: Trainer, out: Path, clips: int = 2):
        self.out = out
        self.config = replace(trainer.sample_config, num_frames=trainer.model_config.frames)
        Sampler(trainer.ema.module, self.config)
        self.batch_size = clips

    def __call__(self, trainer: Trainer) -> list[Path]:
        # Another seed, so that the clips are cut differently than in training.
        batch = next(batches(trainer.dataset, self.batch_size, seed=trainer.config.seed + 1))
        clips = batch["latents"] if "latents" in batch else batch["video"]
        videos = generate(
            Sampler(trainer.ema.module, self.config),
            tokenizer=trainer.tokenizer,
            context=clips if self.config.context_frames else None,
            labels=batch["label"] if trainer.model_config.num_classes else None,
            actions=batch["actions"] if trainer.model_config.num_actions else None,
            count=len(clips),
            seed=trainer.config.seed,
            precision=trainer.config.precision,
        )
        truth = to_uint8(trainer.tokenizer.decode(clips.to(trainer.device))).cpu() if "latents" in batch else clips
        pairs = torch.cat([truth, videos], dim=3)  # side by side: [B, F, H, 2 W, 3]
        stacked = torch.cat(list(pairs), dim=1).numpy()
        return [write_video(self.out / f"step_{trainer.step:08d}.mp4", stacked, min_side=MIN_SIDE)]


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
