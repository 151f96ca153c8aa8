"""`mimo demo`: train the smallest network of a system for a few minutes on a CPU and predict clips it has not seen."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import ShapesDataset, UnreadableVideo, contact_sheet, write_gif, write_video
from mimo.data.datasets import find_files
from mimo.data.errors import DamagedVideo
from mimo.data.npz import NpzReader
from mimo.data.video import VIDEO_SUFFIXES, VideoReader, open_clip
from mimo.data.writing import upscale
from mimo.errors import InputError, user_input
from mimo.folders import atomic_path
from mimo.presets import TINY_SYSTEMS
from mimo.sampling.sampler import Sampler
from mimo.sampling.videos import generate
from mimo.training.log import duration
from mimo.training.loop import train
from mimo.training.trainer import Trainer

TEST_CLIPS = 8  # predicted and scored
SHOWN_CLIPS = 4  # of these, in the pictures
HELD_OUT = 0.25  # of every real clip, its end
# One or two quick discs of one colour: what minutes on a CPU can learn, and what copying a frame gets wrong.
SHAPES: dict[str, Any] = {
    "shapes": (1, 2),
    "speed": (0.05, 0.1),
    "textures": ("plain",),
    "sides": (1,),
    "color": (255, 232, 198),
}
MAX_FRAMES = 1000  # read of every real clip
LOSSES = {"diffusion": "diffusion loss", "mask": "masked history loss", "alignment": "alignment with the encoder"}
ORANGE, GREY = (235, 120, 20), (200, 200, 200)


class Windows:
    """Windows of clips held in memory: `sample` as in mimo.data, and `test_windows` from the held-out ends.

    Args:
        clips: (name, video uint8 [F, H, W, 3], actions int64 [F] or None), each at least 2 num_frames long.
    """

    num_classes: int | None = None
    num_actions: int | None
    has_labels = False
    decodes = False

    def __init__(self, clips: list[tuple[str, np.ndarray, np.ndarray | None]], num_frames: int):
        self.clips, self.num_frames = clips, num_frames
        self.splits = [
            min(len(v) - num_frames, round(len(v) * (1 - HELD_OUT))) for _, v, _ in clips
        ]  # first test frame
        with_actions = [actions is not None for _, _, actions in clips]
        if any(with_actions) and not all(with_actions):
            raise InputError(f"{clips[with_actions.index(False)][0]} has no actions, though other clips have")
        self.num_actions = 1 + max(int(a.max()) for _, _, a in clips if a is not None) if all(with_actions) else 0
        self.has_actions = all(with_actions)

    def __len__(self) -> int:
        return len(self.clips)

    def __repr__(self) -> str:
        frames = sum(len(video) for _, video, _ in self.clips)
        return f"{len(self)} clip{'s' if len(self) > 1 else ''}, {frames} frames" + (
            f", {self.num_actions} actions" if self.num_actions else ""
        )

    def name(self, index: int) -> str:
        return self.clips[index][0]

    def sample(self, index: int, seed: int) -> dict[str, np.ndarray]:
        latest = self.splits[index] - self.num_frames
        return self._window(index, int(np.random.default_rng((seed, index)).integers(0, latest + 1)))

    def test_windows(self, count: int) -> list[dict[str, np.ndarray]]:
        """`count` held-out windows: one of each clip in turn, spread over its end."""
        windows = []
        for number in range(count):
            index, turn = number % len(self), number // len(self)
            turns = -(-(count - index) // len(self))
            first, latest = self.splits[index], len(self.clips[index][1]) - self.num_frames
            windows.append(self._window(index, first + (latest - first) * turn // max(1, turns - 1)))
        return windows

    def _window(self, index: int, start: int) -> dict[str, np.ndarray]:
        _, video, actions = self.clips[index]
        cut = slice(start, start + self.num_frames)
        return {"video": video[cut]} | ({} if actions is None else {"actions": actions[cut]})


def demo(
    data: Path | None,
    out: Path,
    *,
    recipe: str = "mimo",
    steps: int | None = None,
    interval: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a tiny preset with its full objective, predict unseen clips, write pictures; returns the measured numbers.

    A preset without context frames predicts nothing: clips are made from nothing, and there is no truth to compare
    them with.

    Args:
        data: a folder of videos or npz trajectories, or one such file; None makes clips of moving shapes.
        recipe: a system, one of mimo.presets.TINY_SYSTEMS.
        steps: training steps; None takes the preset's.
        interval: take every n-th frame of real clips.

    Raises: InputError for a system without a tiny preset, and for clips that cannot be used.
    """
    started = time.monotonic()
    preset = tiny_preset(recipe)
    trainer, tests = _begin(preset, data, steps, interval, seed)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{preset}, {parameters / 1e6:.2f} M parameters, on {trainer.device}: {trainer.config.steps} steps on "
        f"{trainer.dataset}"
    )
    records = train(trainer)
    first, last = records[0], records[-1]
    trained = losses(trainer.model_config)
    for name in trained:
        print(f"{name} loss: {first[name]:.4f} until step {first['step']}, {last[name]:.4f} at the end")
    unseen = "unseen clips" if data is None else "windows of the training clips' ends, which training did not see"
    context, truth = trainer.sample_config.context_frames, _truth(tests)
    made = _make(trainer, truth, tests, seed)
    scores = _compare(made, truth, context, unseen) if context else {}
    shown = truth[:SHOWN_CLIPS].numpy() if context else None
    paths = write_results(out, shown, made[:SHOWN_CLIPS].numpy(), context)
    paths.append(plot_losses(out / "loss.png", records, trained))
    trainer.save(out / "run")
    for path in paths:
        print(path)
    print(
        f"took {duration(time.monotonic() - started)}; for more: mimo sample --checkpoint {out / 'run'} --out samples"
    )
    return scores | {"first": first, "last": last}


def tiny_preset(recipe: str) -> str:
    """The preset that stands for a system; the name of a recipe will do, which has underscores."""
    name = recipe.replace("_", "-")
    if name not in TINY_SYSTEMS:
        raise InputError(f"unknown recipe {recipe!r}: expected one of {', '.join(TINY_SYSTEMS)}")
    return f"{name}-tiny"


def losses(config: MiMoConfig) -> dict[str, str]:
    """The losses that are trained, and what the plot calls them."""
    weights = {"mask": config.mask_weight, "alignment": config.repa_weight}
    return {name: label for name, label in LOSSES.items() if weights.get(name, 1.0) > 0}


def _begin(
    preset: str, data: Path | None, steps: int | None, interval: int, seed: int
) -> tuple[Trainer, list[dict[str, np.ndarray]]]:
    """The trainer, and the clips to predict."""
    model_config, sample_config = MiMoConfig.from_preset(preset), SampleConfig.from_preset(preset)
    train_config = user_input(replace, TrainConfig.from_preset(preset), seed=seed, preview_every=0)
    if steps is not None:
        train_config = replace(train_config, steps=steps, warmup=min(train_config.warmup, steps // 4))
    frames, height, width = model_config.video_shape
    if data is None:
        shapes = ShapesDataset(num_frames=frames, height=height, width=width, **SHAPES)
        # Training draws its clips from 64-bit seeds: these few are not among them.
        tests = [shapes.sample(index, seed=0) for index in range(TEST_CLIPS)]
        return Trainer(model_config, train_config, sample_config, shapes), tests
    windows = read_windows(data, frames, height, width, interval)
    model_config = replace(model_config, num_actions=windows.num_actions)
    return Trainer(model_config, train_config, sample_config, windows), windows.test_windows(TEST_CLIPS)


def _truth(tests: list[dict[str, np.ndarray]]) -> Tensor:
    """uint8 [B, F, H, W, 3]."""
    return torch.from_numpy(np.stack([test["video"] for test in tests]))


def _make(trainer: Trainer, truth: Tensor, tests: list[dict[str, np.ndarray]], seed: int) -> Tensor:
    """What the averaged weights make: uint8 [B, F, H, W, 3], with the context of the truth where the preset has any."""
    told, continues = trainer.model_config.num_actions, trainer.sample_config.context_frames > 0
    actions = torch.from_numpy(np.stack([test["actions"] for test in tests])) if told else None
    averaged = trainer.averaged()
    assert averaged is not None  # this process is alone
    sampler = Sampler(averaged, trainer.sample_config)
    context, count = truth if continues else None, len(truth)
    return generate(sampler, context=context, actions=actions, count=count, seed=seed, progress=True)


def _compare(predicted: Tensor, truth: Tensor, context: int, unseen: str) -> dict[str, float]:
    """The PSNR of predictions beside that of copying the last context frame; uint8 [B, F, H, W, 3] each."""
    frames = truth.shape[1]
    copied = truth[:, context - 1 : context].expand(-1, frames - context, -1, -1, -1)
    psnr_model, psnr_copy = psnr(predicted[:, context:], truth[:, context:]), psnr(copied, truth[:, context:])
    better = int((psnr_model > psnr_copy).sum())
    print(
        f"PSNR of {frames - context} predicted frames, mean of {TEST_CLIPS} {unseen}: {psnr_model.mean():.2f} dB, "
        f"{psnr_copy.mean():.2f} dB for copying the last context frame (better on {better} clips)"
    )
    return {"psnr": float(psnr_model.mean()), "psnr_copy": float(psnr_copy.mean())}


def read_windows(data: Path, num_frames: int, height: int, width: int, interval: int) -> Windows:
    """Read every clip under `data`, small; the unreadable and the short ones are named and left out."""
    files = find_files(data, (*VIDEO_SUFFIXES, ".npz"))
    clips = []
    for file in files:
        try:
            with open_clip(file) as reader:
                video = _read_from_start(reader, height, width, interval)
                actions = None if reader.actions is None else reader.actions[: len(video) * interval : interval]
                damage = reader.damage
        except UnreadableVideo as error:
            print(f"skipped {error}")
            continue
        if damage:
            print(f"{file}: {damage}")
        if len(video) < 2 * num_frames:
            print(f"skipped {file}: {len(video)} frames, expected at least {2 * num_frames}")
            continue
        clips.append((file.name, video, actions))
    if not clips:
        raise InputError(
            f"{data}: none of its {len(files)} videos and npz files can be used"
            if files
            else f"{data}: holds no video and no npz file"
        )
    return Windows(clips, num_frames)


def _read_from_start(reader: VideoReader | NpzReader, height: int, width: int, interval: int) -> np.ndarray:
    """Every interval-th frame, at most MAX_FRAMES, of a damaged video those before the damage: uint8 [F, H, W, 3]."""

    def read() -> np.ndarray:
        count = min(MAX_FRAMES, 1 + (reader.num_frames - 1) // interval)
        return reader.read(count, interval=interval, size=(height, width))

    try:
        return read()
    except DamagedVideo:
        reader.shorten()
        return read()


def psnr(video: Tensor, truth: Tensor) -> Tensor:
    """10 log10(255^2 / MSE) of every clip, uint8 [B, F, H, W, 3] -> fp64 [B]."""
    squared = (video.double() - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / squared.clamp(min=1e-10))


def write_results(out: Path, truth: np.ndarray | None, made: np.ndarray, context: int) -> list[Path]:
    """The video, the GIF and the contact sheet of some clips uint8 [B, F, H, W, 3]; truth=None: they predict nothing,
    and stand alone."""
    grid, rows = _row(made, context), {}
    if truth is not None:
        grid = np.concatenate([_row(truth, context), grid], axis=1)
    for number in range(len(made)):
        if truth is None:
            rows[f"sample {number + 1}"] = made[number]
        else:
            rows[f"clip {number + 1}: truth"] = truth[number]
            rows[f"clip {number + 1}: prediction"] = made[number]
    return [
        write_video(out / "prediction.mp4", grid, fps=5),
        write_gif(out / "prediction.gif", grid, fps=5),
        contact_sheet(out / "contact_sheet.png", rows, context),
    ]


def _row(clips: np.ndarray, context: int) -> np.ndarray:
    """Clips side by side with a border that is orange while context is shown: [B, F, H, W, 3] -> [F, H', W', 3]."""
    framed = []
    for clip in clips:
        big = upscale(clip, 128)
        border = np.empty((len(big), big.shape[1] + 8, big.shape[2] + 8, 3), np.uint8)
        border[:context], border[context:] = ORANGE, GREY
        border[:, 4:-4, 4:-4] = big
        framed.append(border)
    return np.concatenate(framed, axis=2)


def plot_losses(path: Path, records: list[dict[str, float]], names: dict[str, str]) -> Path:
    """names: of the losses, and what they are called."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in records]
    for name, label in names.items():
        axes.plot(steps, [record[name] for record in records], label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
