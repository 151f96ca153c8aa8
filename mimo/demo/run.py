"""Train the small network of a system for a few minutes and predict clips it has not seen."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import Clips, ShapesDataset
from mimo.demo.clips import read_windows
from mimo.demo.page import plot_losses, write_page, write_pictures
from mimo.errors import InputError, user_input
from mimo.presets import TINY_SYSTEMS
from mimo.recipes import recipe_type
from mimo.sampling.sampler import Sampler
from mimo.sampling.videos import generate
from mimo.training.distributed import World
from mimo.training.local import run_together
from mimo.training.log import duration
from mimo.training.loop import train
from mimo.training.trainer import Trainer

TEST_CLIPS = 64  # predicted and scored
SHOWN_CLIPS = 4  # of these, in the pictures
# One or two quick discs of one colour: what minutes on a CPU can learn, and what copying a frame gets wrong.
SHAPES: dict[str, Any] = {
    "shapes": (1, 2),
    "speed": (0.05, 0.1),
    "textures": ("plain",),
    "sides": (1,),
    "color": (255, 232, 198),
}
# What is added to the tiny preset of a system of flow: of no paper, but of what minutes can teach. Frames are decoded
# without seams, and the network predicts clean latents. Where clean frames stand beside noisy ones, it predicts what
# changes, mostly at much noise, where that follows from the frames before, and is told the last two of them.
ADDED: dict[str, Any] = {"tokenizer": "lapped", "prediction": "clean", "timestep_mean": 1.4}
ADDED_HISTORY: dict[str, Any] = {"timestep_mean": 3.0, "residual": True, "recent_frames": 2}
# At pure noise such a network says the mean of what may come, and little remains to be drawn: one step is enough.
HISTORY_SAMPLING: dict[str, Any] = {"steps": 1}
OWN_HISTORY = 0.3  # of the steps, the last ones
OWN_COST = 0.3  # of a step, what such a one takes longer
# A GPU trains a network of ten times the size in the same time.
GPU = {"depth": 8, "dim": 256, "heads": 4, "decoder_layer": 6}
GPU_TRAINING = {"batch_size": 32, "steps": 3000, "lr": 2e-3, "warmup": 100}
LOSSES = {"diffusion": "diffusion loss", "mask": "masked history loss", "alignment": "alignment with the encoder"}


@dataclass
class Plan:
    """What is trained, on what, and how it is sampled. added: what of the network is not its preset's."""

    preset: str
    model: MiMoConfig
    train: TrainConfig
    sample: SampleConfig
    dataset: Clips
    added: dict[str, Any]


def demo(
    data: Path | None,
    out: Path,
    *,
    recipe: str = "mimo",
    steps: int | None = None,
    minutes: float | None = None,
    interval: int = 1,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Train a tiny preset with its full objective, predict unseen clips, write pictures and a page; returns the
    measured numbers.

    A preset without context frames predicts nothing: clips are made from nothing, and there is no truth to compare
    them with.

    Args:
        data: a folder of videos or npz trajectories, or one such file; None makes clips of moving shapes.
        recipe: a system, one of mimo.presets.TINY_SYSTEMS.
        steps: training steps; None takes the preset's.
        minutes: as many steps as take about so long here, instead of `steps`; printed, so that the run can be repeated.
        interval: take every n-th frame of real clips.
        processes: that train together on the CPU; the same number gives the same network.

    Raises: InputError for a system without a tiny preset, and for clips that cannot be used.
    """
    started = time.monotonic()
    plan, tests = _plan(recipe, data, steps, interval, seed)
    while plan.train.batch_size % processes:
        processes -= 1
    trainer, records = run_together(processes, _fit, plan, minutes)
    trained = time.monotonic() - started
    trainer.world = World()  # what comes now this process does alone
    first, last = records[0], records[-1]
    names = losses(plan.model)
    for name in names:
        print(f"{name} loss: {first[name]:.4f} until step {first['step']}, {last[name]:.4f} at the end")
    unseen = "unseen clips" if data is None else "windows of the training clips' ends, which training did not see"
    context, truth = plan.sample.context_frames, _truth(tests)
    made = _make(trainer, truth, tests, seed)
    scores = compare(made, truth, context) if context else {}
    if context:
        print(_verdict(scores, unseen))
    shown = truth[:SHOWN_CLIPS].numpy() if context else None
    paths = write_pictures(out, shown, made[:SHOWN_CLIPS].numpy(), context)
    paths.append(plot_losses(out / "loss.png", records, names))
    trainer.save(out / "run")
    told = [f"{_described(plan, trainer)} {trainer.step} steps of {plan.train.batch_size} clips on {plan.dataset!r}."]
    told += [f"Trained in {duration(trained)} by {processes} process{'es' if processes > 1 else ''}, seed {seed}."]
    paths.append(_page(out, told, scores, unseen, context, paths))
    for path in paths:
        print(path)
    print(
        f"took {duration(time.monotonic() - started)}; for more: mimo sample --checkpoint {out / 'run'} --out samples"
    )
    return scores | {"first": first, "last": last}


def default_processes() -> int:
    """As many as train together on this machine: one per core, at most one per clip of a batch, or one with a GPU."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


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


def _plan(
    recipe: str, data: Path | None, steps: int | None, interval: int, seed: int
) -> tuple[Plan, list[dict[str, np.ndarray]]]:
    """What to train, and the clips to predict."""
    preset = tiny_preset(recipe)
    model, sample = MiMoConfig.from_preset(preset), SampleConfig.from_preset(preset)
    if on_gpu := torch.cuda.is_available():
        model = replace(model, **GPU)
    parts: dict[str, Any] = {}
    if model.parameterization == "flow":
        parts = ADDED | (ADDED_HISTORY if recipe_type(model).teacher_forcing else {})
    model = replace(model, **parts)
    if model.residual:
        sample = replace(sample, **HISTORY_SAMPLING)
    training = user_input(replace, TrainConfig.from_preset(preset), seed=seed, preview_every=0)
    if on_gpu:
        training = replace(training, **GPU_TRAINING)
    if steps is not None:
        training = replace(training, steps=steps, warmup=min(training.warmup, steps // 4))
    if model.residual:
        training = replace(training, own_history_steps=round(OWN_HISTORY * training.steps))
    frames, height, width = model.video_shape
    if data is None:
        shapes = ShapesDataset(num_frames=frames, height=height, width=width, **SHAPES)
        # Training draws its clips from 64-bit seeds: these few are not among them.
        tests = [shapes.sample(index, seed=0) for index in range(TEST_CLIPS)]
        return Plan(preset, model, training, sample, shapes, parts), tests
    windows = read_windows(data, frames, height, width, interval)
    model = replace(model, num_actions=windows.num_actions)
    return Plan(preset, model, training, sample, windows, parts), windows.test_windows(TEST_CLIPS)


def _fit(plan: Plan, minutes: float | None) -> tuple[Trainer, list[dict[str, float]]]:
    """The trainer after its last step, and the records of the log; every process of the group calls it."""
    trainer = Trainer(plan.model, plan.train, plan.sample, plan.dataset)
    if trainer.world.leads:
        length = f"{trainer.config.steps} steps" if minutes is None else f"{minutes:g} minutes"
        print(f"{_described(plan, trainer)} {length} on {plan.dataset!r}")
    records = []
    if minutes is not None:
        records = _until_rate_is_known(trainer, minutes)
    return trainer, records + train(trainer)


def _until_rate_is_known(trainer: Trainer, minutes: float) -> list[dict[str, float]]:
    """The steps of the warm-up, in which the learning rate does not depend on how many steps there will be. Their pace
    decides that; from then on the run is that of so many --steps."""
    warmup, world = trainer.config.warmup, trainer.world
    records = []
    for until in (warmup // 3, warmup):  # the first ones are slower
        began, before = time.monotonic(), trainer.step
        trainer.end_at(until, own_history_steps=0)
        records += train(trainer)
    own = OWN_HISTORY if trainer.model_config.residual else 0.0
    pace = (1 + OWN_COST * own) * (time.monotonic() - began) / (trainer.step - before)
    steps = world.agree(max(4 * warmup, round(60 * minutes / pace)) if world.leads else 0)
    trainer.end_at(steps, own_history_steps=round(own * steps))
    if world.leads:
        print(f"{minutes:g} minutes are {steps} steps here; the same again on any machine: --steps {steps}")
    return records


def _described(plan: Plan, trainer: Trainer) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    added = dict(plan.added)
    if plan.train.own_history_steps:
        added |= {"own_history_steps": f"{OWN_HISTORY:.0%}", "sampling steps": plan.sample.steps}
    words = ", ".join(f"{name}={value}" for name, value in added.items())
    beside = f", of the demo and no paper: {words}" if words else ""
    where = f"{trainer.world.size} x {trainer.device}" if trainer.world.size > 1 else f"{trainer.device}"
    return f"{plan.preset}{beside}; {parameters / 1e6:.2f} M parameters on {where};"


def _truth(tests: list[dict[str, np.ndarray]]) -> Tensor:
    """uint8 [B, F, H, W, 3]."""
    return torch.from_numpy(np.stack([test["video"] for test in tests]))


def _make(trainer: Trainer, truth: Tensor, tests: list[dict[str, np.ndarray]], seed: int) -> Tensor:
    """What the averaged weights make: uint8 [B, F, H, W, 3], with the context of the truth where the preset has any."""
    told, continues = trainer.model_config.num_actions, trainer.sample_config.context_frames > 0
    actions = torch.from_numpy(np.stack([test["actions"] for test in tests])) if told else None
    averaged = trainer.averaged()
    assert averaged is not None  # the first process has it
    sampler = Sampler(averaged, trainer.sample_config)
    context, count = truth if continues else None, len(truth) if continues else SHOWN_CLIPS
    return generate(sampler, context=context, actions=actions, count=count, seed=seed, progress=True)


def psnr(video: Tensor, truth: Tensor) -> Tensor:
    """10 log10(255^2 / MSE) of every clip, uint8 [B, F, H, W, 3] -> fp64 [B]."""
    return _decibels((video.double() - truth.double()).square().flatten(1).mean(1))


def frame_psnr(video: Tensor, truth: Tensor) -> Tensor:
    """The same of every frame, [B, F]."""
    return _decibels((video.double() - truth.double()).square().flatten(2).mean(2))


def _decibels(squared: Tensor) -> Tensor:
    return 10 * torch.log10(255**2 / squared.clamp(min=1e-10))


def compare(predicted: Tensor, truth: Tensor, context: int) -> dict[str, Any]:
    """The PSNR of predictions beside that of copying the last context frame; uint8 [B, F, H, W, 3] each. The mean over
    clips of that of all predicted frames, that of each frame, and on how many clips the prediction is better."""
    frames = truth.shape[1]
    copied = truth[:, context - 1 : context].expand(-1, frames - context, -1, -1, -1)
    predicted, truth = predicted[:, context:], truth[:, context:]
    psnr_model, psnr_copy = psnr(predicted, truth), psnr(copied, truth)
    return {
        "psnr": float(psnr_model.mean()),
        "psnr_copy": float(psnr_copy.mean()),
        "frames": frame_psnr(predicted, truth).mean(0).tolist(),
        "frames_copy": frame_psnr(copied, truth).mean(0).tolist(),
        "better": int((psnr_model > psnr_copy).sum()),
        "clips": len(truth),
    }


def _verdict(scores: Mapping[str, Any], unseen: str) -> str:
    each = ", ".join(f"{value:.1f}" for value in scores["frames"])
    return (
        f"PSNR of {len(scores['frames'])} predicted frames, mean of {scores['clips']} {unseen}: "
        f"{scores['psnr']:.2f} dB ({each}), {scores['psnr_copy']:.2f} dB for copying the last context frame "
        f"(better on {scores['better']} of {scores['clips']} clips)"
    )


def _page(
    out: Path, told: Sequence[str], scores: Mapping[str, Any], unseen: str, context: int, paths: Sequence[Path]
) -> Path:
    by_name = {path.name: path for path in paths}
    frames = {}
    if scores:
        told = [*told, _verdict(scores, unseen) + "."]
        frames = {"prediction": scores["frames"], "copying the last context frame": scores["frames_copy"]}
    pictures = {
        "Truth above prediction; an orange border is context" if scores else "Samples": by_name["prediction.gif"],
        "Frame by frame": by_name["contact_sheet.png"],
        "Losses": by_name["loss.png"],
    }
    commands = [
        f"mimo sample --checkpoint {out / 'run'} --out samples    # other clips from this network",
        "mimo demo --minutes 10                                 # the same with more steps",
        "mimo demo --data FOLDER                                # on your own videos",
        "mimo demo --recipe acdit                               # another system of the papers",
        "mimo train --preset mimo-b-k600 --data FOLDER --out RUN    # a network of the papers, on a GPU",
    ]
    return write_page(
        out / "result.html",
        title="mimo demo",
        told=told,
        frames=frames,
        first_frame=context,
        pictures=pictures,
        commands=commands,
    )
