"""The command line: `mimo COMMAND ...` or `python -m mimo COMMAND ...`.

Exit status 0 done, 2 bad input (one line on stderr, no traceback), 1 a fault of ours (traceback), 130 interrupted.
Everything heavy is imported by the command that needs it, so that --help answers at once.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mimo.config import PRESETS, MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError, user_input

Device = Literal["auto", "cpu", "cuda"]


@dataclass
class Demo:
    """Train mimo-tiny for a few minutes and predict clips it has not seen.

    Writes prediction.mp4, prediction.gif, contact_sheet.png (truth above prediction) and loss.png, and prints how the
    prediction compares with repeating the last context frame.

    Args:
        data: a folder of videos or npz trajectories, or one such file; without it, clips of moving shapes are made.
        out: folder for the results.
        steps: training steps, instead of the preset's.
        interval: take every n-th frame of real clips.
        seed: of everything random.
    """

    data: Path | None = None
    out: Path = Path("demo")
    steps: int | None = None
    interval: int = 1
    seed: int = 0

    def run(self) -> None:
        from mimo.demo import demo

        for name in ("steps", "interval"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} {value}: expected at least 1")
        demo(self.data, self.out, steps=self.steps, interval=self.interval, seed=self.seed)


@dataclass
class Train:
    """Train a model; RUN holds checkpoints, log.jsonl, TensorBoard files and previews.

    Every field of the preset can be overridden: --model.* is the network and its objective, --train.* the optimisation,
    --sample.* how previews (and later samples) are drawn.

    Args:
        preset: which values to start from.
        data: a folder of videos or npz trajectories, one such file, an annotation (.json), or
            "shapes" for procedural clips.
        out: the run folder.
        steps: the same as --train.steps.
        resume: continue from the newest checkpoint in the run folder.
        annotation: JSON list of {"video_path": ..., "label": ...}; paths are relative to --data.
        split: a subfolder of --data to use alone.
        folder_labels: classes are the names of the folders the videos lie in.
        random_crop: draw the place of the crop; otherwise it is the centre.
        keep_every: checkpoints whose step is a multiple of this are never deleted.
        compile: run the network through torch.compile.
        device: where to train; "auto" takes a GPU if there is one.
        model: the network and its objective.
        train: the optimisation.
        sample: how videos are drawn.
    """

    preset: str
    data: str
    out: Path
    model: MiMoConfig
    train: TrainConfig
    sample: SampleConfig
    steps: int | None = None
    resume: bool = False
    annotation: Path | None = None
    split: str | None = None
    folder_labels: bool = False
    random_crop: bool = False
    keep_every: int | None = None
    compile: bool = False
    device: Device = "auto"

    def run(self) -> None:
        from mimo.data import open_dataset
        from mimo.sample import Preview
        from mimo.train import Trainer, train

        config = self.model
        train_config = self.train if self.steps is None else user_input(replace, self.train, steps=self.steps)
        frames, height, width = config.video_shape
        options = {}
        if self.data != "shapes":
            options = {
                "interval": train_config.interval,
                "flip": train_config.flip,
                "annotation": self.annotation,
                "split": self.split,
                "folder_labels": self.folder_labels,
                "random_crop": self.random_crop,
                "num_classes": config.num_classes or None,
                "num_actions": config.num_actions or None,
            }
        dataset = user_input(open_dataset, self.data, num_frames=frames, height=height, width=width, **options)
        trainer = user_input(
            Trainer, config, train_config, self.sample, dataset, device=find_device(self.device), compile=self.compile
        )
        preview = user_input(Preview, trainer, self.out / "previews") if train_config.preview_every else None
        print(f"{self.preset} on {trainer.device}, parameters:\n{trainer.model.parameter_report()}")
        train(
            trainer,
            self.out,
            resume=self.resume,
            keep_every=self.keep_every,
            preview=preview,
        )


@dataclass
class Sample:
    """Draw videos from a checkpoint; writes mp4, GIF and a contact sheet.

    What is not given is taken from the configuration in the checkpoint.

    Args:
        checkpoint: a run folder (its newest checkpoint) or one of its checkpoints/step_* folders.
        out: folder for the results.
        context: a video or npz trajectory whose first frames are continued; without it the video starts from nothing.
        context_frames: how many frames of --context are given to the model.
        start: first frame of --context that is used.
        label: class of the video, 0 .. number of classes - 1.
        frames: frames of the result, context included.
        count: number of videos.
        seed: of the noise; the same seed gives the same video.
        sampler: "ddim" for v-prediction, "euler" for flow.
        steps: denoising steps per frame.
        history_guidance: 1 is none.
        class_guidance: 1 is none.
        weights: the averaged weights, or those of the last step.
        fps: frame rate of the results.
        device: where to sample; "auto" takes a GPU if there is one.
    """

    checkpoint: Path
    out: Path
    context: Path | None = None
    context_frames: int | None = None
    start: int = 0
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    frames: int | None = None
    count: int = 1
    seed: int = 0
    sampler: Literal["ddim", "euler"] | None = None
    steps: int | None = None
    history_guidance: float | None = None
    class_guidance: float | None = None
    weights: Literal["ema", "model"] = "ema"
    fps: float = 10.0
    device: Device = "auto"

    def run(self) -> None:
        from mimo.sample import load, sample

        loaded = load(self.checkpoint, weights=self.weights, device=find_device(self.device))
        chosen = {
            name: getattr(self, name)
            for name in ("sampler", "steps", "history_guidance", "class_guidance")
            if getattr(self, name) is not None
        }
        sample(
            loaded,
            user_input(replace, loaded.sample_config, **chosen),
            self.out,
            context=self.context,
            context_frames=self.context_frames,
            start=self.start,
            label=self.label,
            frames=self.frames,
            count=self.count,
            seed=self.seed,
            fps=self.fps,
        )


COMMANDS = {"demo": Demo, "train": Train, "sample": Sample}


def find_device(name: Device):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that torch can use")
    return None if name == "auto" else torch.device(name)


def overview() -> str:
    lines = [
        "usage: mimo COMMAND [options]",
        "",
        "Masked history modelling: video diffusion, frame after frame.",
        "",
        "commands:",
        *(f"  {name:8} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()),
        "",
        "examples:",
        "  mimo demo",
        "  mimo train --preset mimo-tiny --data shapes --out runs/shapes",
        "  mimo sample --checkpoint runs/shapes --context clip.mp4 --frames 16 --out samples",
        "",
        f"presets: {', '.join(PRESETS)}",
        "",
        "`mimo COMMAND --help` lists the options of a command; `mimo --version` prints the version.",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> Demo | Train | Sample:
    name, rest = argv[0], list(argv[1:])
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)} (see mimo --help)")
    default = None
    if name == "train":
        preset = find_preset(rest)
        default = Train(
            preset=preset,
            data=tyro.MISSING,
            out=tyro.MISSING,
            model=MiMoConfig.from_preset(preset),
            train=TrainConfig.from_preset(preset),
            sample=SampleConfig.from_preset(preset),
        )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(COMMANDS[name], prog=f"mimo {name}", args=rest, default=default)
    except SystemExit as stop:
        if stop.code == 2:
            raise InputError(f"mimo {name}: {one_line(complaint.getvalue())}") from None
        raise


def find_preset(arguments: list[str]) -> str:
    """The preset is needed before the other options are read, because it gives their defaults."""
    for number, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key == "--preset":
            name = value if equals else (arguments + [""])[number + 1]
            if name not in PRESETS:
                raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
            return name
    if {"-h", "--help"} & set(arguments):
        return "mimo-tiny"
    raise InputError(f"mimo train: --preset is missing: expected one of {', '.join(PRESETS)}")


def one_line(box: str) -> str:
    """The parser's framed, several-line complaint as one line, without help texts."""
    sections = [[]]
    for line in (line.strip("│ ") for line in box.splitlines()):
        if line[:1] in ("╭", "╰", "─"):
            sections.append([])
        elif line:
            sections[-1].append(line)
    wanted = [" ".join(lines) for lines in sections if lines and "helptext" not in lines[0]]
    return "; ".join(wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Faults of ours are raised, and Python exits with 1."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        from mimo_kernels import __version__

        print(__version__)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        parse(argv).run()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
