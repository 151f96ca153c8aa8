"""`mimo train-tokenizer`: the options; mimo.tokenizers.train does the work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mimo.cli.options import Clips, Device, require_folder, work_device
from mimo.config import TokenizerTraining
from mimo.errors import InputError


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
        shape: dict[str, Any] = {"num_frames": self.training.frames, "height": height, "width": width}
        # An autoencoder sees neither classes nor actions.
        dataset = self.open(interval=self.interval, flip=self.flip or None, use_actions=False, **shape)
        device = work_device(self.device)
        train_tokenizer(dataset, self.out, self.training, resume=self.resume, device=device)
