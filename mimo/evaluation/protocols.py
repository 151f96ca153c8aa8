"""What is measured, and how: the protocols of the papers, and one that needs no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Frames are video frames; None takes what the checkpoint's own configuration samples.

    Args:
        source: who measures so.
        scores: names in mimo.evaluation.judges.SCORES.
        clips: of the dataset, in its class-balanced order; None: all.
        context_frames: of each clip, given to the network. frames: of the whole video.
        scored: only the first so many frames are scored; None: all.
        judged: whether distances of sets see whole videos, or predicted frames alone.
        size: real and made videos are brought to size x size before they are scored; None: as the network makes them.
        trajectories: K videos per clip, of different noise. Of a video's distance from its truth the best of K counts,
            for each score by itself; of the distance of sets the mean over K.
        layout, split: how the dataset is read, where nothing else is said.
    """

    source: str
    scores: tuple[str, ...]
    clips: int | None = None
    context_frames: int | None = None
    frames: int | None = None
    scored: int | None = None
    judged: Literal["all", "predicted"] = "all"
    size: int | None = None
    trajectories: int = 1
    layout: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        least = {"clips": 1, "context_frames": 0, "frames": 1, "scored": 1, "size": 1, "trajectories": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}={value}: expected at least {low}")
        if not self.scores:
            raise ValueError("scores=(): expected at least one")


_MIMO = "MiMo, Sec. 4.1"
_PREDICTION = ("fvd", "psnr", "ssim", "lpips")
_LONG = Protocol(
    source="FAR, Sec. 5.2.3, and MiMo, App. H.2 (FVD): 144 frames are given, 156 predicted and scored",
    scores=_PREDICTION,
    clips=256,
    context_frames=144,
    frames=300,
    judged="predicted",
    size=128,
    trajectories=4,
    layout="minecraft",
)
_SHORT = Protocol(
    source="FAR, Table 4 (MCVD's setting): 2 frames are given, 28 predicted",
    scores=_PREDICTION,
    clips=256,
    context_frames=2,
    frames=30,
    size=64,
    trajectories=100,
    layout="bair",
)
_UCF = Protocol(
    source=f"{_MIMO}: whole videos, classes in balanced order",
    scores=("fvd",),
    clips=2048,
    context_frames=0,
    frames=16,
    size=256,
    layout="ucf101",
)


PROTOCOLS = {
    "relative": Protocol(
        source="needs no weights: for results beside each other, not beside published ones",
        scores=("psnr", "ssim", "fd-dct", "fd-random"),
        clips=64,
    ),
    "kinetics600": Protocol(
        source=f"{_MIMO}: 5 frames are given, 11 predicted, all 16 scored at 64 x 64",
        scores=("fvd",),
        clips=50_000,
        context_frames=5,
        frames=17,
        scored=16,
        size=64,
        layout="kinetics600",
        split="test",
    ),
    "ucf101": _UCF,
    "ucf101-far": replace(_UCF, source="FAR, Table 8: as ucf101, the mean of four draws", trajectories=4),
    "ucf101-prediction": replace(
        _SHORT,
        source="FAR, Table 4 (MCVD's setting): 4 frames are given, 12 predicted",
        context_frames=4,
        frames=16,
        layout="ucf101",
    ),
    "bair": _SHORT,
    "bair-14": replace(_SHORT, source="FAR, Table 4: 2 frames are given, 14 predicted", frames=16),
    "minecraft": _LONG,
    "minecraft-36": replace(
        _LONG,
        source="FAR, Sec. 5.2.3: 36 frames are given, FVD of 264 predicted ones",
        scores=("fvd",),
        context_frames=36,
    ),
    "dmlab": replace(
        _LONG, source="FAR, Sec. 5.2.3: 144 frames are given, 156 predicted and scored", size=64, layout="dmlab"
    ),
    "dmlab-36": replace(
        _LONG,
        source="FAR, Sec. 5.2.3: 36 frames are given, FVD of 264 predicted ones",
        scores=("fvd",),
        context_frames=36,
        size=64,
        layout="dmlab",
    ),
}
