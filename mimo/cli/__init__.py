"""The command line: `mimo COMMAND ...` or `python -m mimo COMMAND ...`.

Exit status 0 done, 2 bad input (one line on stderr, no traceback), 1 a fault of ours (traceback), 130 interrupted.
Everything heavy is imported by the command that needs it, so that --help answers at once.
"""

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mimo.config import PRESETS, Encoding, MiMoConfig, SampleConfig, TokenizerTraining, TrainConfig
from mimo.errors import InputError, tell_launcher, user_input

Device = Literal["auto", "cpu", "cuda"]


@dataclass(kw_only=True)
class Clips:
    """Which clips a command reads.

    Args:
        data: a folder of videos or npz trajectories, one such file, an annotation (.json), "shapes" for procedural clips,
            or (for `mimo train`) a folder that `mimo encode` wrote.
        layout: read the folder as a paper did: kinetics600, ucf101, minecraft, dmlab or bair; what is given besides holds
            against the layout.
        annotation: JSON list of {"video_path": ..., "label": ..., "action_path": ...}; paths are relative to --data.
        split: a subfolder of --data to use alone.
        folder_labels: classes are the names of the folders the videos lie in.
        random_crop: draw the place of the crop; otherwise it is the centre, if the layout does not say more.
    """

    data: str
    layout: str | None = None
    annotation: Path | None = None
    split: str | None = None
    folder_labels: bool = False
    random_crop: bool = False

    def open(self, *, encoded: bool = False, **options):
        """The dataset. `encoded`: latents may take the place of videos. `options`: of `open_dataset`; None says nothing."""
        from mimo.data import open_dataset
        from mimo.data.latents import is_latents

        names = ("layout", "annotation", "split", "folder_labels", "random_crop")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name)}
        latents = is_latents(Path(self.data))
        if latents and not encoded:
            raise InputError(f"--data {self.data}: holds latents, expected videos")
        if latents or self.data == "shapes":
            if chosen:
                option = next(iter(chosen)).replace("_", "-")
                why = "says how files are read, and these clips are " + ("encoded already" if latents else "made")
                raise InputError(f"--data {self.data}: --{option} {why}")
            names = ("num_frames", "height", "width", *(("num_classes", "num_actions") if latents else ()))
            options = {name: options[name] for name in names}
        options = {name: value for name, value in options.items() if value is not None}
        return user_input(open_dataset, self.data, **options, **chosen)


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
        require_folder(self.out)
        demo(self.data, self.out, steps=self.steps, interval=self.interval, seed=self.seed)


@dataclass(kw_only=True)
class Train(Clips):
    """Train a model; RUN holds checkpoints, log.jsonl, TensorBoard files and previews.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m mimo train ... (see --train.strategy). The batch is that of
    all of them, and how many there are changes neither the data nor the noise: a run may be resumed on another number.

    SIGTERM and Ctrl-C end it with a checkpoint, and exit status 0 and 130: --resume continues from there.

    Every field of the preset can be overridden: --model.* is the network and its objective, --train.* the optimisation,
    --sample.* how previews (and later samples) are drawn.

    Args:
        preset: which values to start from.
        out: the run folder.
        steps: the same as --train.steps.
        resume: continue from the newest checkpoint in the run folder.
        tokenizer_weights: what the tokenizer reads: a folder or file, for dcae also a hub id; "dct" has none.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code.
        keep_every: checkpoints whose step is a multiple of this are never deleted.
        compile: run the network through torch.compile.
        device: where to train; "auto" takes a GPU if there is one.
        model: the network and its objective.
        train: the optimisation.
        sample: how videos are drawn.
    """

    preset: str
    out: Path
    model: MiMoConfig
    train: TrainConfig
    sample: SampleConfig
    steps: int | None = None
    resume: bool = False
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    keep_every: int | None = None
    compile: bool = False
    device: Device = "auto"

    def run(self) -> None:
        import torch

        from mimo.training.distributed import process_group

        if self.keep_every is not None and self.keep_every < 1:
            raise InputError(f"--keep-every {self.keep_every}: expected at least 1")
        with process_group(gpu=self.device != "cpu" and torch.cuda.is_available()) as world:
            self.run_in(world)

    def run_in(self, world) -> None:
        """`run`, as one of the processes of a mimo.training.distributed.World."""
        from mimo.training.preview import Preview
        from mimo.training.trainer import Trainer, train

        config = self.model
        train_config = self.train if self.steps is None else user_input(replace, self.train, steps=self.steps)
        options = clip_options(config) | {"interval": train_config.interval, "flip": train_config.flip}
        with world.together():
            device, dataset = find_device(self.device), self.open(encoded=True, **options)
        trainer = user_input(
            Trainer,
            config,
            train_config,
            self.sample,
            dataset,
            tokenizer_weights=self.tokenizer_weights,
            trust_pickle=self.trust_pickle,
            device=device,
            compile=self.compile,
        )
        with world.together():
            preview = user_input(Preview, trainer, self.out / "previews") if train_config.preview_every else None
        where = f"{world.size} x {trainer.device.type}" if world.size > 1 else trainer.device
        train(
            trainer,
            self.out,
            resume=self.resume,
            keep_every=self.keep_every,
            preview=preview,
            heading=f"{self.preset} on {where}, parameters:\n{trainer.model.parameter_report()}",
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
        interval: take every n-th frame of --context, and tell n to a model that was trained with --model.max-interval; it
            must have occurred in training. The default is the smallest of training.
        actions: npz file with the actions of the video; without it those of the context, in it or in an npz beside it.
        label: class of the video, 0 .. number of classes - 1.
        frames: frames of the result, context included.
        count: number of videos.
        seed: of the noise; the same seed gives the same video.
        sampler: "ddim" for v-prediction, "euler" for flow.
        steps: denoising steps per frame.
        history_guidance: 1 is none.
        class_guidance: 1 is none.
        window: latent frames that a frame sees, the latest, itself included: long videos in constant memory.
        sink: the first frames, which stay visible beside the window.
        temperature: factor on the noise that the first and the last frame start from, linear in between.
        history_noise: standard deviation of the noise on the first and the last frame as the history of later ones.
        weights: the averaged weights, or those of the last step.
        tokenizer_weights: where the tokenizer's weights lie, if not where they lay when the model was trained.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code.
        fps: frame rate of the results.
        save_every: latent frames after which the unfinished run is saved in OUT/unfinished.
        resume: continue the run in OUT/unfinished that was interrupted; the other options are to be the same.
        device: where to sample; "auto" takes a GPU if there is one.
    """

    checkpoint: Path
    out: Path
    context: Path | None = None
    context_frames: int | None = None
    start: int = 0
    interval: int | None = None
    actions: Path | None = None
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    frames: int | None = None
    count: int = 1
    seed: int = 0
    sampler: Literal["ddim", "euler"] | None = None
    steps: int | None = None
    history_guidance: float | None = None
    class_guidance: float | None = None
    window: int | None = None
    sink: int | None = None
    temperature: tuple[float, float] | None = None
    history_noise: tuple[float, float] | None = None
    weights: Literal["ema", "model"] = "ema"
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    fps: float = 10.0
    save_every: int | None = None
    resume: bool = False
    device: Device = "auto"

    def run(self) -> None:
        from mimo.sampling.videos import load, sample

        require_folder(self.out)
        loaded = load(
            self.checkpoint,
            weights=self.weights,
            tokenizer_weights=self.tokenizer_weights,
            trust_pickle=self.trust_pickle,
            device=find_device(self.device),
        )
        options = (
            "sampler",
            "steps",
            "history_guidance",
            "class_guidance",
            "window",
            "sink",
            "temperature",
            "history_noise",
        )
        chosen = {name: getattr(self, name) for name in options if getattr(self, name) is not None}
        if chosen.get("class_guidance", 1) != 1 and self.label is None and not loaded.model.config.num_actions:
            raise InputError(f"--class-guidance {self.class_guidance:g}: expected a --class to guide to")
        config = user_input(replace, loaded.sample_config, **chosen)
        names = ("context", "context_frames", "start", "interval", "actions", "label", "frames", "count", "seed", "fps")
        names += ("save_every", "resume")
        try:
            sample(loaded, config, self.out, **{name: getattr(self, name) for name in names})
        except KeyboardInterrupt:
            if (self.save_every or self.resume) and (saved := self.out / "unfinished").exists():
                raise KeyboardInterrupt(f": --resume continues the run in {saved}") from None
            raise


@dataclass(kw_only=True)
class Encode(Clips):
    """Put a dataset through a tokenizer once, into latent shards that `mimo train --data OUT` reads.

    Several processes (torchrun, or RANK and WORLD_SIZE) share the work. Run it again to continue one that was stopped, or
    to check one that is finished.

    Args:
        preset: which values --model.* and --interval start from.
        out: folder for the shards.
        model: the network that will be trained: what it says of the tokenizer and the clips is used.
        encoding: how the dataset is encoded.
        interval: take every n-th frame of a video, or every frame if it is too short for that; a pair LOW HIGH draws n per
            clip.
        flip: mirror half of the clips.
        tokenizer_weights: what the tokenizer reads: a folder or file, for dcae also a hub id; "dct" has none.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code.
        device: where to encode; "auto" takes a GPU if there is one.
    """

    preset: str
    out: Path
    model: MiMoConfig
    interval: int | tuple[int, int]
    flip: bool
    encoding: Annotated[Encoding, tyro.conf.arg(name="")] = field(default_factory=Encoding)
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    device: Device = "auto"

    def run(self) -> None:
        from mimo.data.encode import write_shards
        from mimo.runtime import config_tokenizer

        require_folder(self.out)
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        tokenizer = user_input(config_tokenizer, self.model, self.tokenizer_weights, trust_pickle=self.trust_pickle)
        dataset = self.open(interval=self.interval, flip=self.flip, **clip_options(self.model))
        write_shards(
            dataset,
            tokenizer,
            self.out,
            self.encoding,
            tokenizer_name=self.model.tokenizer,
            rank=rank,
            world_size=size,
            device=work_device(self.device),
        )


@dataclass
class DataCheck:
    """Count what a folder holds and name what cannot be read.

    Args:
        path: a folder of videos, npz trajectories or latent shards, one file, or an annotation (.json).
        layout: look as training does with this layout: at its split, for its frames, classes and actions.
        annotation: JSON list of {"video_path": ..., "label": ..., "action_path": ...}; paths are relative to PATH.
        split: a subfolder to look at alone.
        num_frames: count the clips with fewer frames.
        decode_all: decode every frame, not only the first and the last; of latent shards, compare the checksums.
        workers: processes that read; 0 reads in this one. Without it one per core, or fewer for few clips.
    """

    path: Annotated[Path, tyro.conf.Positional]
    layout: str | None = None
    annotation: Path | None = None
    split: str | None = None
    num_frames: int = 0
    decode_all: bool = False
    workers: int | None = None

    def run(self) -> None:
        from mimo.data.check import run

        for name in ("num_frames", "workers"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected 0 or more")
        names = ("layout", "annotation", "split", "num_frames", "decode_all", "workers")
        run(self.path, **{name: getattr(self, name) for name in names})


@dataclass(kw_only=True)
class TrainTokenizer(Clips):
    """Train a DC-AE on a dataset; OUT/tokenizer is what --tokenizer-weights reads.

    Args:
        out: the run folder.
        size: height and width of a frame in pixels; needed without --layout.
        training: how it is trained.
        interval: take every n-th frame of a video.
        flip: mirror half of the clips.
        resume: continue from the newest checkpoint in the run folder.
        device: where to train; "auto" takes a GPU if there is one.
    """

    out: Path
    size: tuple[int, int] | None = None
    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")] = field(default_factory=TokenizerTraining)
    interval: int = 2
    flip: bool = False
    resume: bool = False
    device: Device = "auto"

    def run(self) -> None:
        from mimo.tokenizers.train import train_tokenizer

        if self.layout is None and self.size is None:
            raise InputError("mimo train-tokenizer: --size is missing: expected it, or a --layout that says it")
        require_folder(self.out)
        height, width = self.size or (None, None)
        shape = {"num_frames": self.training.frames, "height": height, "width": width}
        # An autoencoder sees neither classes nor actions.
        dataset = self.open(interval=self.interval, flip=self.flip or None, use_actions=False, **shape)
        device = work_device(self.device)
        train_tokenizer(dataset, self.out, self.training, resume=self.resume, device=device)


COMMANDS = {
    "demo": Demo,
    "train": Train,
    "sample": Sample,
    "encode": Encode,
    "data check": DataCheck,
    "train-tokenizer": TrainTokenizer,
}


def clip_options(config: MiMoConfig) -> dict:
    """What a network asks of its clips, as options of `open_dataset`."""
    frames, height, width = config.video_shape
    counts = {"num_classes": config.num_classes or None, "num_actions": config.num_actions or None}
    return {"num_frames": frames, "height": height, "width": width} | counts


def find_device(name: Device):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that torch can use")
    return None if name == "auto" else torch.device(name)


def require_folder(out: Path) -> None:
    """Refuse an --out that cannot be made, before hours of work."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--out {out}: {there} is no folder that can be written to")


def work_device(name: Device):
    """The device of this process; with several on a machine, each takes its own GPU."""
    from mimo.runtime import best_device

    device = find_device(name) or best_device()
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device.type == "cuda" else device


def overview() -> str:
    lines = [
        "usage: mimo COMMAND [options]",
        "",
        "Masked history modelling: video diffusion, frame after frame.",
        "",
        "commands:",
        *(f"  {name:16} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()),
        "",
        "examples:",
        "  mimo demo",
        "  mimo train --preset mimo-tiny --data shapes --out runs/shapes",
        "  mimo encode --preset mimo-tiny --data videos --out latents",
        "  mimo train --preset mimo-tiny --data latents --out runs/latents",
        "  mimo data check videos",
        "  mimo sample --checkpoint runs/shapes --context clip.mp4 --frames 16 --out samples",
        "",
        f"presets: {', '.join(PRESETS)}",
        "",
        "`mimo COMMAND --help` lists the options of a command; `mimo --version` prints the version.",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str]):
    """The command, one of COMMANDS, with its options."""
    words = 2 if argv[0] == "data" else 1
    name, rest = " ".join(argv[:words]), list(argv[words:])
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)} (see mimo --help)")
    default = None
    if name in ("train", "encode"):
        preset = find_preset(name, rest)
    if name == "train":
        default = Train(
            preset=preset,
            data=tyro.MISSING,
            out=tyro.MISSING,
            model=MiMoConfig.from_preset(preset),
            train=TrainConfig.from_preset(preset),
            sample=SampleConfig.from_preset(preset),
        )
    if name == "encode":
        train = TrainConfig.from_preset(preset)
        model = MiMoConfig.from_preset(preset)
        options = {"interval": train.interval, "flip": train.flip}
        default = Encode(preset=preset, data=tyro.MISSING, out=tyro.MISSING, model=model, **options)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(COMMANDS[name], prog=f"mimo {name}", args=rest, default=default)
    except SystemExit as stop:
        if stop.code == 2:
            raise InputError(f"mimo {name}: {one_line(complaint.getvalue())}") from None
        raise


def find_preset(command: str, arguments: list[str]) -> str:
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
    raise InputError(f"mimo {command}: --preset is missing: expected one of {', '.join(PRESETS)}")


def one_line(box: str) -> str:
    """The parser's framed, several-line complaint as one line, without help texts."""
    sections = [[]]
    for line in (line.strip("│ ") for line in box.splitlines()):
        if line[:1] in ("╭", "╰", "─") or (line and not line.strip("-")):
            sections.append([])
        elif line:
            sections[-1].append(line)
    if "╭" not in box:  # a terminal without such characters: rules of dashes, and the title stands above the first
        del sections[0]
    wanted = [" ".join(lines) for lines in sections if lines and "helptext" not in lines[0]]
    # "Error parsing --steps: no type matching {None}|INT could be instantiated from ['abc']. Got errors: ..."
    refused = r"Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*?)\]\. .*"
    named = re.sub(r"Error parsing (model|train|sample): ", r"--\1.", "; ".join(wanted))
    return re.sub(refused, lambda m: f"{m[1]} {m[3]}: expected {metavar(m[2])}", named)


def metavar(kind: str) -> str:
    """The parser's name of a type in words: "{None}|INT|{INT INT}" -> "INT or INT INT"."""
    return re.sub(r"[{}]", "", kind.removeprefix("{None}|").replace("|", " or "))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Faults of ours are raised, and Python exits with 1."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Before torch loads its OpenMP: threads that spin for long while they wait make a CPU step several times slower as soon
    # as anything else wants a core; ones that never spin make it 40% slower when nothing does.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    command = None
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(overview(), file=sys.stdout if argv else sys.stderr, flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            from mimo_kernels import __version__

            print(__version__)
            return 0
        command = parse(argv)
        command.run()
        sys.stdout.flush()
    except InputError as error:
        words = " ".join(str(error).split())  # none if another process has them
        # What is wrong with the options, all that torchrun has started see alike: the first one says it.
        if words and (command or os.environ.get("RANK", "0") == "0"):
            print(f"error: {words}", file=sys.stderr, flush=True)
            if command is None:
                tell_launcher(error)
        return 2
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted{stop}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not (command is None or isinstance(command, DataCheck)):
            raise
        # `mimo data check | head` has seen enough; what Python still flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
