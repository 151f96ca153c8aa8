"""`mimo train`: the options; mimo.training does the work."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mimo.cli.options import Clips, Device, Preset, changed, clip_options, find_device
from mimo.cli.parser import find_preset, given
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError, user_input


@dataclass(kw_only=True)
class Train(Clips):
    """Train a model; RUN holds checkpoints, log.jsonl, TensorBoard files and previews.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m mimo train ... (see --train.strategy). The batch is that of
    all of them, and how many there are changes neither the data nor the noise: a run may be resumed on another number.

    SIGTERM and Ctrl-C end it with a checkpoint, and exit status 0 and 130: --resume continues from there.

    Every field of the preset can be overridden: --model.* is the network and its objective, --train.* the optimisation,
    --sample.* how previews (and later samples) are drawn.

    Args:
        preset: which values to start from; without it --help shows those of mimo-tiny.
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

    preset: Preset
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

    @classmethod
    def defaults(cls, arguments: list[str]) -> "Train":
        preset = find_preset("train", arguments)
        return cls(
            preset=preset if given("preset", arguments) else tyro.MISSING,
            data=tyro.MISSING,
            out=tyro.MISSING,
            model=MiMoConfig.from_preset(preset),
            train=TrainConfig.from_preset(preset),
            sample=SampleConfig.from_preset(preset),
        )

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
        train_config = self.train if self.steps is None else changed(self.train, steps=self.steps)
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
