"""`mimo train`: the options; mimo.training does the work."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tyro

from mimo import records
from mimo.cli.options import Clips, Device, Preset, changed, clip_options, find_device
from mimo.cli.parser import HELP, find_preset, given
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError, user_input
from mimo.stages import parse_stages


@dataclass(kw_only=True)
class Train(Clips):
    """Train a model; RUN holds checkpoints, log.jsonl, TensorBoard files and previews.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m mimo train ... (see --train.strategy). The batch is that
    of all of them, and how many there are changes neither the data nor the noise: a run may be resumed on another
    number.

    SIGTERM and Ctrl-C end it with a checkpoint, and exit status 0 and 130: `mimo train --out RUN --resume` continues
    from there. The run remembers what it was told; what is told anew is changed, and what follows from it is said.

    Every field of the preset can be overridden: --model.* is the network and its objective, --train.* the optimisation,
    --sample.* how previews (and later samples) are drawn.

    Args:
        preset: which values to start from; without it --help shows those of mimo-tiny. Not needed with --resume.
        out: the run folder.
        steps: the same as --train.steps.
        resume: continue from the newest checkpoint in the run folder, or begin where there is none.
        tokenizer_weights: what the tokenizer reads: a folder or file, for dcae also a hub id; "dct" and "lapped"
            have none.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code. It is not remembered.
        encoder_weights: the folder that REPA's encoder reads (with --model.repa-weight); "hog" has none, and latents
            that were encoded with their features need none.
        init: a run folder, a checkpoint or an exported network whose averaged weights the run begins with: VideoMAR's
            second phase, whose clips and tokenizer are others. It is not remembered: checkpoints hold the weights.
        ignore_labels: train a network without classes on clips that have them.
        ignore_actions: train a network without actions on clips that have them.
        keep_every: checkpoints whose step is a multiple of this are never deleted.
        log: where the records of log.jsonl are shown: TensorBoard, or "wandb", Weights & Biases besides.
        compile: run the network through torch.compile.
        device: where to train; "auto" takes a GPU if there is one.
        model: the network and its objective.
        train: the optimisation.
        sample: how videos are drawn.
    """

    preset: Preset
    out: Path
    model: MiMoConfig
    train: TrainConfig
    sample: SampleConfig
    steps: int | None = None
    resume: bool = False
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    encoder_weights: Path | None = None
    init: Path | None = None
    ignore_labels: bool = False
    ignore_actions: bool = False
    keep_every: int | None = None
    log: Literal["tensorboard", "wandb"] = "tensorboard"
    compile: bool = False
    device: Device = "auto"

    @classmethod
    def defaults(cls, arguments: list[str]) -> "Train":
        """Those of the run that is resumed, or of the preset."""
        out = given("out", arguments)
        if "--resume" in arguments and out and not set(HELP) & set(arguments):
            configs = remembered(Path(out))
            if configs is not None:
                return cls._of_run(configs, Path(out), given("preset", arguments))
            if given("preset", arguments) is None:
                raise InputError(
                    f"--resume: {out} holds no checkpoint to continue: expected --preset and --data to begin"
                )
        preset = find_preset("train", arguments)
        return cls(
            preset=preset if given("preset", arguments) else tyro.MISSING,
            data=tyro.MISSING,
            out=tyro.MISSING,
            model=MiMoConfig.from_preset(preset),
            train=TrainConfig.from_preset(preset),
            sample=SampleConfig.from_preset(preset),
        )

    @classmethod
    def _of_run(cls, configs: dict[str, Any], out: Path, preset: str | None) -> "Train":
        """What the run in `out` was told, and `preset` again if at all."""
        told = dict(configs.get("told") or {})  # without, it is of before it was remembered
        known = {field.name: field for field in fields(cls) if field.name in cls.told_names()}
        paths = {name for name, field in known.items() if field.type in (Path, Path | None)}
        kinds = get_type_hints(cls) | dict.fromkeys(paths, str | None) | {"preset": str}
        for name in sorted(known.keys() & told.keys()):
            records.convert(told[name], kinds[name], f"{out}: the {name} that it was told")
        if preset is not None and preset != told.setdefault("preset", preset):
            raise InputError(f"--preset {preset}: {out} was begun with {told['preset']}, and a run keeps its network")
        told.setdefault("preset", "")
        told.setdefault("data", tyro.MISSING)
        options: dict[str, Any] = {
            name: Path(value) if name in paths and value is not None else value
            for name, value in told.items()
            if name in known
        }
        for name in ("tokenizer", "encoder"):
            recorded = configs.get(name) or {}
            if recorded.get("weights") is not None:
                options[f"{name}_weights"] = Path(recorded["weights"])
        return cls(
            out=out,
            model=MiMoConfig.from_dict(configs["model"]),
            train=TrainConfig.from_dict(configs["train"]),
            sample=SampleConfig.from_dict(configs["sample"]),
            **options,
        )

    @staticmethod
    def told_names() -> list[str]:
        """What checkpoints remember besides the configurations. Not --trust-pickle: a checkpoint is no permission."""
        clips = [field.name for field in fields(Clips)]
        return [*clips, "preset", "ignore_labels", "ignore_actions", "keep_every", "log", "compile", "device"]

    def told(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.told_names()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def run(self) -> None:
        import torch

        from mimo.data.datasets import made
        from mimo.training.boards import require_wandb
        from mimo.training.distributed import process_group

        if self.log == "wandb":
            require_wandb()
        if self.keep_every is not None and self.keep_every < 1:
            raise InputError(f"--keep-every {self.keep_every}: expected at least 1")
        if not made(self.data) and Path(self.data).exists():
            self.data = str(Path(self.data).resolve())  # as it is remembered: it holds in every folder
        if self.annotation is not None:
            self.annotation = self.annotation.resolve()
        with process_group(gpu=self.device != "cpu" and torch.cuda.is_available()) as world:
            self.run_in(world)

    def run_in(self, world) -> None:
        """`run`, as one of the processes of a mimo.training.distributed.World."""
        from mimo.network.report import parameter_report
        from mimo.training.loop import train
        from mimo.training.preview import Preview
        from mimo.training.trainer import Trainer

        config = self.model
        train_config = self.train if self.steps is None else changed(self.train, steps=self.steps)
        options = clip_options(config) | {"interval": train_config.interval, "flip": train_config.flip}
        with world.together():
            device, dataset = find_device(self.device), self.open(encoded=True, **options)
            listed = parse_stages(train_config.stages)
            shapes = ({"num_frames": s.frames, "height": s.height, "width": s.width} for s in listed)
            stages = [self.open(**options | shape) for shape in shapes]
        ignore = [name for name in ("labels", "actions") if getattr(self, f"ignore_{name}")]
        trainer = user_input(
            Trainer,
            config,
            train_config,
            self.sample,
            dataset,
            stages=stages,
            tokenizer_weights=self.tokenizer_weights,
            trust_pickle=self.trust_pickle,
            encoder_weights=self.encoder_weights,
            init=self.init,
            device=device,
            compile=self.compile,
            ignore=ignore,
            told=self.told(),
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
            wandb=self.log == "wandb",
            heading=f"{self.preset} on {where}, parameters:\n{parameter_report(trainer.model)}".lstrip(),
        )


def remembered(out: Path) -> dict[str, Any] | None:
    """The configurations in the newest checkpoint of a run whose state can be read; None where there is none."""
    from mimo import checkpoint
    from mimo.run_state import read_run_state

    newest, _ = checkpoint.latest(out, parts=())
    return None if newest is None else read_run_state(newest)["configs"]
