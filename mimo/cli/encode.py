"""`mimo encode`: the options; mimo.data.encode does the work."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mimo.cli.options import Clips, Device, Preset, clip_options, require_folder, work_device
from mimo.cli.parser import find_preset, given
from mimo.config import Encoding, MiMoConfig, TrainConfig
from mimo.errors import user_input


@dataclass(kw_only=True)
class Encode(Clips):
    """Put a dataset through a tokenizer once, into latent shards that `mimo train --data OUT` reads.

    With --model.repa-weight, the features of the encoder that REPA aligns with are stored beside the latents: training
    then needs no encoder. (Those of VideoMAE-L take 3 MB a clip.)

    Several processes (torchrun, or RANK and WORLD_SIZE) share the work. Run it again to continue one that was stopped,
    or to check one that is finished.

    Args:
        preset: which values --model.* and --interval start from; without it --help shows those of mimo-tiny.
        out: folder for the shards.
        model: the network that will be trained: what it says of the tokenizer and the clips is used.
        encoding: how the dataset is encoded.
        interval: take every n-th frame of a video, or every frame if it is too short for that; a pair LOW HIGH draws n
            per clip.
        flip: mirror half of the clips.
        tokenizer_weights: what the tokenizer reads: a folder or file, for dcae also a hub id; "dct" and "lapped"
            have none.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code.
        encoder_weights: the folder that REPA's encoder reads; "hog" has none.
        device: where to encode; "auto" takes a GPU if there is one.
    """

    preset: Preset
    out: Path
    model: MiMoConfig
    interval: int | tuple[int, int]
    flip: bool
    encoding: Annotated[Encoding, tyro.conf.arg(name="")] = field(default_factory=Encoding)
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    encoder_weights: Path | None = None
    device: Device = "auto"

    @classmethod
    def defaults(cls, arguments: list[str]) -> "Encode":
        preset = find_preset("encode", arguments)
        train = TrainConfig.from_preset(preset)
        return cls(
            preset=preset if given("preset", arguments) else tyro.MISSING,
            data=tyro.MISSING,
            out=tyro.MISSING,
            model=MiMoConfig.from_preset(preset),
            interval=train.interval,
            flip=train.flip,
        )

    def run(self) -> None:
        from mimo.data.encode import write_shards
        from mimo.runtime import config_encoder, config_tokenizer

        require_folder(self.out)
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        tokenizer = user_input(config_tokenizer, self.model, self.tokenizer_weights, trust_pickle=self.trust_pickle)
        encoder = user_input(config_encoder, self.model, self.encoder_weights)
        dataset = self.open(interval=self.interval, flip=self.flip, **clip_options(self.model))
        write_shards(
            dataset,
            tokenizer,
            self.out,
            self.encoding,
            tokenizer_name=self.model.tokenizer,
            encoder=encoder,
            encoder_name=self.model.repa_encoder,
            rank=rank,
            world_size=size,
            device=work_device(self.device),
        )
