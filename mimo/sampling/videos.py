"""From tokens to videos: the frames that a sampler makes, decoded, and the files they are written to."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mimo import folders
from mimo.data import contact_sheet, to_float, to_uint8, write_gif, write_video
from mimo.errors import InputError
from mimo.folders import atomic_path
from mimo.network.frames import to_latents, to_tokens
from mimo.runtime import autocast, config_tokenizer
from mimo.sampling.sampler import Sampler, Stream
from mimo.sampling.saving import Saving
from mimo.tokenizers.protocols import Tokenizer

MIN_SIDE = 128  # small videos are written magnified until their shorter side has this many pixels
Format = Literal["mp4", "png", "npz"]
_PICTURES = ("frame_*.png",)  # all that lies in a folder of frames; see mimo.folders
_SECONDS = 10.0  # between two lines about the progress, where there is no terminal


@torch.no_grad()
def generate(
    sampler: Sampler,
    *,
    tokenizer: Tokenizer | None = None,
    context: Tensor | None = None,
    labels: Tensor | None = None,
    actions: Tensor | None = None,
    intervals: Tensor | None = None,
    text: Tensor | None = None,
    count: int = 1,
    trajectories: int = 1,
    ids: Sequence[int] | None = None,
    seed: int = 0,
    precision: Literal["bf16", "fp32", "fp8"] = "fp32",
    progress: bool = False,
    saving: Saving | None = None,
    resume: bool = False,
) -> Tensor:
    """Videos of the sampler's config.num_frames latent frames, uint8 [B K, F, H, W, 3] on the CPU.

    Args:
        tokenizer: of the network; None makes the one that config_tokenizer gives without weights.
        context: uint8 [B, F, H, W, 3]; its first config.context_frames latent frames are continued, and kept as they
            are. Or latents fp32 [B, T, H, W, C], which come back decoded. None generates from nothing.
        labels: int64 [B].
        actions: int64 [B, config.num_frames].
        intervals: int64 [B], for a network that is told them.
        text: [B, L, text_dim], the features of texts followed by zeros.
        count: B where there is no context.
        trajectories: K; row b K + k is the k-th continuation of clip b.
        ids: of the noise, a number per row; see `Sampler.stream`.
        seed: of the noise: the same seed, on the same device, gives the same videos.
        precision: see `autocast`; a network trained in fp8 is sampled in bf16.
        progress: say on stderr how far it is and how long the rest will take.
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
        latents, count = to_tokens(latents, model.config.patch), len(context)
    generator = torch.Generator(device).manual_seed(seed)
    told = {"labels": labels, "actions": actions, "intervals": intervals, "text": text}
    conditions = {name: None if value is None else value.to(device) for name, value in told.items()}
    with autocast(device, precision):
        if resume:
            assert saving is not None, "it says where the run lies"
            frames = sampler.resume(saving)
        else:
            batch = None if latents is not None else count
            options: dict[str, Any] = {"batch": batch, "generator": generator, "saving": saving} | conditions
            options |= {"trajectories": trajectories, "ids": ids}
            frames = sampler.stream(latents, config.num_frames, **options)
        made = list(_shown(frames) if progress else frames)
    if resume:
        made = [frame.to(device) for frame in frames.saved()]
    given = [] if latents is None else [latents.repeat_interleave(trajectories, 0)]
    latents = torch.cat([*given, torch.stack(made, dim=1)], dim=1)
    latents = to_latents(latents.float(), model.config.grid, model.config.patch)
    video = to_uint8(tokenizer.decode(latents)).cpu()
    if context is not None and not context.is_floating_point():
        video[:, : context.shape[1]] = context.repeat_interleave(trajectories, 0)  # not what the tokenizer made of it
    return video


def _shown(frames: Stream) -> Iterator[Tensor]:
    """The frames; how many are done and how long the rest will take is said on stderr: as a bar on a terminal,
    elsewhere in a line every few seconds."""
    now, begun, said = frames.progress, time.monotonic(), float("-inf")
    before = now.done  # an interruption
    with tqdm(total=now.total, initial=before, unit="frame", desc="sampling", leave=False, disable=None) as bar:
        for frame in frames:
            yield frame
            if frame.is_cuda and len(frames.latencies) > 1:
                frames.latencies[-2]()  # waits for the frame before: the host is never more than a frame ahead
            bar.update()
            passed, last = time.monotonic() - begun, now.done == now.total
            if bar.disable and (last or time.monotonic() - said >= _SECONDS):
                said = time.monotonic()
                left = tqdm.format_interval(passed / (now.done - before) * (now.total - now.done))
                spent = tqdm.format_interval(passed)
                rest = "" if last else f", about {left} left"
                print(f"sampling: frame {now.done} of {now.total}, {spent} spent{rest}", file=sys.stderr)


def video_paths(out: Path, count: int, kind: Format) -> list[Path]:
    """Every file and folder that `write_videos` makes."""
    return [*(path for stem in _stems(out, count) for path in _paths(stem, kind).values()), out / "contact_sheet.png"]


def require_replaceable(path: Path) -> None:
    """NotOurs for what is no file in the place of a file, and no folder of our pictures in the place of one."""
    if path.is_dir() or not path.suffix:
        if not folders.is_ours(path):
            raise folders.NotOurs(path, path, "was not written by mimo")
        for _ in folders.ours(path, _PICTURES):
            pass


def _stems(out: Path, count: int) -> list[Path]:
    return [out / "sample"] if count == 1 else [out / f"sample_{number}" for number in range(count)]


def _paths(stem: Path, kind: Format) -> dict[str, Path]:
    """What is written of one video."""
    looked_at = {"mp4": stem.with_suffix(".mp4"), "gif": stem.with_suffix(".gif")}
    return looked_at | {"mp4": {}, "png": {"png": stem}, "npz": {"npz": stem.with_suffix(".npz")}}[kind]


def write_videos(
    out: Path,
    videos: np.ndarray,
    labels: list[str],
    *,
    kind: Format,
    fps: float,
    context: int,
    actions: np.ndarray | None = None,
) -> list[Path]:
    """Write `video_paths`: of every video an mp4 and a GIF to look at, and what keeps every pixel, if asked for.

    Args:
        videos: uint8 [B, F, H, W, 3].
        labels: of the rows of the contact sheet.
        kind: "npz" writes `video` uint8 [F, H, W, 3], which every command of mimo reads as a clip, with `actions`;
            "png" a folder of frames at their own size; "mp4" neither.
        context: frames of each video that were given.
        actions: int64 [B, F].
    """
    for number, (stem, video) in enumerate(zip(_stems(out, len(videos)), videos, strict=True)):
        paths = _paths(stem, kind)
        write_video(paths["mp4"], video, fps, min_side=MIN_SIDE)
        write_gif(paths["gif"], video, fps, min_side=MIN_SIDE)
        if kind == "npz":
            _write_npz(paths["npz"], video, None if actions is None else actions[number])
        if kind == "png":
            _write_frames(paths["png"], video)
    contact_sheet(out / "contact_sheet.png", dict(zip(labels, videos, strict=True)), context)
    return video_paths(out, len(videos), kind)


def _write_npz(path: Path, video: np.ndarray, actions: np.ndarray | None) -> None:
    with atomic_path(path) as temporary:
        arrays: dict[str, Any] = {"video": video} if actions is None else {"video": video, "actions": actions}
        np.savez(temporary, **arrays)


def _write_frames(folder: Path, video: np.ndarray) -> None:
    """A folder of pictures, whole or not at all; takes the place of one that we wrote."""
    temporary = folder.with_name(f".{folder.name}.unfinished")
    folders.remove(temporary, _PICTURES)
    folders.claim(temporary)
    try:
        for number, frame in enumerate(video):
            Image.fromarray(frame).save(temporary / f"frame_{number:06d}.png", format="PNG")
        folders.remove(folder, _PICTURES)
        temporary.rename(folder)
    except OSError as error:
        folders.remove(temporary, _PICTURES)
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
