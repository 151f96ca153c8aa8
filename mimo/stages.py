"""A curriculum: the first steps of training on shorter or smaller clips than the network is made for.

TrainConfig.stages has a word per stage, "UNTIL:FRAMESxHEIGHTxWIDTH": until that step clips have this shape in pixels.
Behind the last one they have the network's own. Steps count through, and so do the learning rate and the walk through
the data: a run resumed inside any stage goes on as if it had never stopped. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """until: the step that is not part of it. frames, height, width: of its clips, in pixels. text: as it was told."""

    until: int
    frames: int
    height: int
    width: int
    text: str


def parse_stages(texts: Sequence[str]) -> list[Stage]:
    """The stages of TrainConfig.stages; ValueError for what is none, and for stages that do not end one after the
    other. One may end behind the last step of training."""
    stages: list[Stage] = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d{0,17}):([1-9]\d{0,8})x([1-9]\d{0,8})x([1-9]\d{0,8})", text)
        if match is None:
            raise ValueError(f"stages={text!r}: expected UNTIL:FRAMESxHEIGHTxWIDTH, as 20000:5x256x256")
        until, frames, height, width = map(int, match.groups())
        stage = Stage(until, frames, height, width, text)
        if stages and stage.until <= stages[-1].until:
            raise ValueError(f"stages={text!r}: expected to end behind the stage before, {stages[-1].text!r}")
        stages.append(stage)
    return stages


def stage_at(config, step: int) -> Stage | None:
    """The stage of a step of training by a TrainConfig; None: clips have the network's own shape."""
    return next((stage for stage in parse_stages(config.stages) if step < stage.until), None)


def stage_config(config, stage: Stage | None, tokenizer: Any):
    """The MiMoConfig of a network in a stage: the same weights for clips of another shape. tokenizer: of the network.

    ValueError for a shape that the tokenizer or the network cannot have.
    """
    if stage is None:
        return config
    try:
        frames, height, width, _ = tokenizer.latent_shape(stage.frames, stage.height, stage.width)
        return replace(config, frames=frames, height=height, width=width, video_frames=stage.frames)
    except ValueError as error:
        raise ValueError(f"stages={stage.text!r}: {error}") from None
