"""`mimo data check`: the options; mimo.data.check does the work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mimo.errors import InputError


@dataclass
class DataCheck:
    """Count what a folder holds and name what cannot be read.

    Args:
        path: a folder of videos, npz trajectories, tar shards or latent shards, one file, or an annotation (.json).
        layout: look as training does with this layout: at its split, for its frames, classes and actions.
        annotation: JSON list of {"video_path": ..., "label": ..., "action_path": ...}; paths are relative to PATH.
        allow_outside: take files that an annotation or an index names in other folders than its own and PATH.
        split: a subfolder to look at alone.
        num_frames: count the clips with fewer frames.
        decode_all: decode every frame, not only the first and the last; of latent shards, look for values that are not
            finite.
        strict: exit with status 2 when a clip is unreadable, damaged or too short.
        workers: processes that read; 0 reads in this one. Without it one per core, or fewer for few clips.
    """

    prints_its_result = True

    path: Annotated[Path, tyro.conf.Positional]
    layout: str | None = None
    annotation: Path | None = None
    allow_outside: bool = False
    split: str | None = None
    num_frames: int = 0
    decode_all: bool = False
    strict: bool = False
    workers: int | None = None

    def run(self) -> None:
        from mimo.data.check import run

        for name in ("num_frames", "workers"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected 0 or more")
        names = ("layout", "annotation", "allow_outside", "split", "num_frames", "decode_all", "strict", "workers")
        run(self.path, **{name: getattr(self, name) for name in names})
