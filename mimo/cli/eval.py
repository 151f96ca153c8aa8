"""`mimo eval`: the options; mimo.evaluation does the work."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mimo.cli.options import Clips, Device, changed, find_device, require_folder
from mimo.errors import InputError, user_input
from mimo.evaluation.protocols import PROTOCOLS, Protocol

ProtocolName = Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PROTOCOLS) + "}")]


@dataclass(kw_only=True)
class Eval(Clips):
    """Measure checkpoints, or folders of videos, against a dataset: a table of scores with intervals.

    Writes a table and curves over the frames (JSON, CSV, Markdown, PNG) and a sheet of samples. Videos and features are
    kept in OUT/cache: run it again to continue, or with more checkpoints, scores or clips. Several processes (torchrun)
    share the work, and make the same table.

    Args:
        out: folder for the results.
        checkpoints: run folders (their newest checkpoints), checkpoints/step_* folders or exported networks.
        videos: folders of videos that were made elsewhere; if they are named like the clips of --data, each is compared
            with its clip.
        protocol: what is measured, and how; the options below change parts of it. "relative" needs no weights.
        scores: psnr ssim lpips fvd fid vmmd cmmd, or fd-dct fd-random, which need no weights and no published figure is
            comparable with.
        clips: of the dataset, classes in turn.
        context_frames: video frames that are given. frames: of the whole video.
        size: score videos at so many pixels a side.
        trajectories: videos per clip; the best counts for psnr, ssim and lpips, the mean for distances of sets.
        seed: of the clips and of the noise.
        interval: take every n-th frame of a video.
        batch_size: clips that are made at once.
        steps: denoising steps per frame.
        history_guidance: 1 is none.
        class_guidance: of class or actions; 1 is none.
        weights: the averaged weights, or those of the last step.
        tokenizer_weights: where the tokenizer's weights lie, if not where they lay when the models were trained.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code.
        i3d: for fvd: i3d_torchscript.pt.
        inception: for fid: inception-2015-12-05.pt, TorchScript.
        alexnet: for lpips: torchvision's alexnet-owt-7be5be79.pth.
        vjepa2: for vmmd: a folder of V-JEPA 2, as transformers saves it.
        clip: for cmmd: a folder of CLIP, as transformers saves it.
        device: where to compute; "auto" takes a GPU if there is one.
    """

    out: Path
    checkpoints: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    protocol: ProtocolName = "relative"
    scores: tuple[str, ...] | None = None
    clips: int | None = None
    context_frames: int | None = None
    frames: int | None = None
    size: int | None = None
    trajectories: int | None = None
    seed: int = 0
    interval: int | None = None
    batch_size: int = 8
    steps: int | None = None
    history_guidance: float | None = None
    class_guidance: float | None = None
    weights: Literal["ema", "model"] = "ema"
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    i3d: Path | None = None
    inception: Path | None = None
    alexnet: Path | None = None
    vjepa2: Path | None = None
    clip: Path | None = None
    device: Device = "auto"

    def run(self) -> None:
        import torch

        from mimo.training.distributed import process_group

        if self.protocol not in PROTOCOLS:
            raise InputError(f"unknown protocol {self.protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        if not self.checkpoints and not self.videos:
            raise InputError("mimo eval: nothing to measure: expected --checkpoints or --videos")
        for name, low in (("batch_size", 1), ("seed", 0), ("interval", 1)):
            if (value := getattr(self, name)) is not None and not low <= value < 2**63:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {low}, and less than 2**63")
        require_folder(self.out)
        with process_group(gpu=self.device != "cpu" and torch.cuda.is_available()) as world:
            self.run_in(world)

    def run_in(self, world) -> None:
        """`run`, as one of the processes of a mimo.training.distributed.World."""
        from mimo.evaluation.report import report

        with world.together():
            evaluation, about = self.prepare()
        with world.together():
            evaluation.measure(world)
        with world.together():
            if world.leads:
                for path in report(evaluation, about):
                    print(path)

    def prepare(self) -> tuple[Any, dict[str, Any]]:
        """The evaluation, and what it is of; everything that can be wrong with the words is refused here."""
        from mimo.evaluation.evaluate import Evaluation, applicable
        from mimo.evaluation.judges import open_judges
        from mimo.evaluation.setup import set_up
        from mimo.runtime import best_device
        from mimo.sampling.loading import load

        protocol = self.asked()
        device = find_device(self.device) or best_device()
        paths = {name: getattr(self, name) for name in ("i3d", "inception", "alexnet", "vjepa2", "clip")}
        judges = open_judges(protocol.scores, paths, device)
        options: dict[str, Any] = {
            "weights": self.weights,
            "tokenizer_weights": self.tokenizer_weights,
            "device": device,
        }
        setup = set_up(
            [(path, load(path, trust_pickle=self.trust_pickle, **options)) for path in self.checkpoints],
            self.videos,
            protocol,
            self.clips_of(protocol).open,
            sampling=self.sampling,
            interval=self.interval,
            seed=self.seed,
            device=device,
        )
        context, frames = setup.shape.context, min(setup.shape.frames, protocol.scored or setup.shape.frames)
        if frames <= context:
            raise InputError(f"--context-frames {context}: expected fewer than the {frames} that are scored")
        scores = applicable(protocol, self.scores, setup.subjects)
        evaluation = Evaluation(
            protocol, setup.reals, setup.subjects, scores, judges, context, frames, self.out, self.batch_size
        )
        about = {"protocol": self.protocol, "source": protocol.source, "data": str(self.data), "seed": self.seed}
        return evaluation, about | {"clips": len(setup.reals.order), "shape": str(setup.shape)}

    def asked(self) -> Protocol:
        """The protocol, with what the options say."""
        names = ("clips", "context_frames", "frames", "size", "trajectories", "scores")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        protocol = PROTOCOLS[self.protocol]
        if "frames" in given and protocol.scored is not None:
            given["scored"] = None
        try:
            return replace(protocol, **given)
        except ValueError as error:
            name, _, rest = str(error).partition("=")
            raise InputError(f"--{name.replace('_', '-')} {rest}") from None

    def sampling(self, config):
        """How a checkpoint is sampled: as it says, but for the options that are given."""
        names = ("steps", "history_guidance", "class_guidance")
        return changed(config, **{name: getattr(self, name) for name in names if getattr(self, name) is not None})

    def clips_of(self, protocol: Protocol) -> "Eval":
        """These options, with the layout of the protocol where nothing else is said."""
        from mimo.data.datasets import made

        if made(self.data) or self.layout or self.protocol == "relative":
            return self
        return user_input(replace, self, layout=protocol.layout, split=self.split or protocol.split)
