"""What several commands share: which clips they read, their device, their folder.

Everything heavy is imported where it is used, so that --help answers at once.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from mimo.config import PRESETS, MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError, user_input

Config = TypeVar("Config", SampleConfig, TrainConfig)
Device = Literal["auto", "cpu", "cuda"]
Preset = Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")]


@dataclass(kw_only=True)
class Clips:
    """Which clips a command reads.

    Args:
        data: a folder of videos, npz trajectories or tar shards with videos, one such file, an annotation (.json),
            "shapes" or "factors" for procedural clips ("factors:number=one,speed=fast" of one class of these), or (for
            `mimo train`) a folder that `mimo encode` wrote.
        layout: read the folder as a paper did: kinetics600, ucf101, minecraft, dmlab or bair; what is given besides
            holds against the layout.
        annotation: JSON list of {"video_path": ..., "label": ..., "action_path": ...}; paths are relative to --data.
        allow_outside: take files that an annotation or an index names in other folders than its own and --data.
        split: a subfolder of --data to use alone; of "factors" train or test.
        folder_labels: classes are the names of the folders the videos lie in.
        random_crop: draw the place of the crop; otherwise it is the centre, if the layout does not say more.
        frame_memory: MiB of decoded frames that each process of a run keeps to read again, its workers included.
    """

    data: str
    layout: str | None = None
    annotation: Path | None = None
    allow_outside: bool = False
    split: str | None = None
    folder_labels: bool = False
    random_crop: bool = False
    frame_memory: int = 512

    def open(self, *, encoded: bool = False, **options):
        """The dataset. encoded: latents may stand for videos. options: of `open_dataset`; None says nothing."""
        from mimo.data.datasets import made, open_dataset
        from mimo.data.latents import is_latents

        if self.frame_memory < 0:
            raise InputError(f"--frame-memory {self.frame_memory}: expected MiB, 0 or more")
        names = ("layout", "annotation", "split", "folder_labels", "random_crop")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name)}
        latents = is_latents(Path(self.data))
        if latents and not encoded:
            raise InputError(f"--data {self.data}: holds latents, expected videos")
        if latents or made(self.data):
            split = {"split": chosen.pop("split")} if made(self.data) == "factors" and self.split else {}
            if chosen:
                option = next(iter(chosen)).replace("_", "-")
                why = "says how files are read, and these clips are " + ("encoded already" if latents else "made")
                raise InputError(f"--data {self.data}: --{option} {why}")
            names = ("num_frames", "height", "width", *(("num_classes", "num_actions") if latents else ()))
            options = {name: options[name] for name in names}
            chosen = {"allow_outside": self.allow_outside} if latents else split
        else:
            chosen |= {"allow_outside": self.allow_outside, "frame_memory": self.frame_memory}
        options = {name: value for name, value in options.items() if value is not None}
        return user_input(open_dataset, self.data, **options, **chosen)


def clip_options(config: MiMoConfig) -> dict:
    """What a network asks of its clips, as options of `open_dataset`."""
    frames, height, width = config.video_shape
    counts = {"num_classes": config.num_classes or None, "num_actions": config.num_actions or None}
    text = (config.text_tokens, config.text_dim) if config.text_dim else None
    return {"num_frames": frames, "height": height, "width": width, "text": text} | counts


def changed(config: Config, **options) -> Config:
    """The config with other values of some fields, given as options: what is wrong with one is said of --option."""
    try:
        return replace(config, **options)
    except ValueError as error:
        name, equals, rest = str(error).partition("=")
        if not equals or name not in options:
            raise InputError(str(error)) from None
        raise InputError(f"--{name.replace('_', '-')} {rest}") from None


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
