"""`mimo demo`: the options; mimo.demo does the work."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mimo.cli.options import require_folder
from mimo.errors import InputError
from mimo.presets import TINY_SYSTEMS


@dataclass
class Demo:
    """Train a tiny network for a few minutes and predict clips it has not seen.

    Writes result.html (all there is to see), prediction.mp4, prediction.gif, contact_sheet.png (truth above prediction)
    and loss.png, and prints how the prediction compares with repeating the last context frame. A system that continues
    no clip makes some from nothing.

    Args:
        data: a folder of videos or npz trajectories, or one such file; without it, clips of moving shapes are made.
        out: folder for the results.
        recipe: which system is trained, by its tiny preset.
        steps: training steps, instead of the preset's.
        minutes: train for about so long, instead of --steps: how many steps that is is measured and printed.
        interval: take every n-th frame of real clips.
        seed: of everything random.
        processes: that train together on a CPU, instead of one per core; as many give the same network again.
    """

    data: Path | None = None
    out: Path = Path("demo")
    recipe: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(TINY_SYSTEMS) + "}")] = "mimo"
    steps: int | None = None
    minutes: float | None = None
    interval: int = 1
    seed: int = 0
    processes: int | None = None

    def run(self) -> None:
        from mimo.demo.run import default_processes, demo

        for name in ("steps", "interval", "processes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} {value}: expected at least 1")
        if self.minutes is not None and not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise InputError(f"--minutes {self.minutes:g}: expected more than 0")
        if self.minutes is not None and self.steps is not None:
            raise InputError(f"--minutes {self.minutes:g} and --steps {self.steps}: expected one of them")
        require_folder(self.out)
        demo(
            self.data,
            self.out,
            recipe=self.recipe,
            steps=self.steps,
            minutes=self.minutes,
            interval=self.interval,
            seed=self.seed,
            processes=self.processes or default_processes(),
        )
