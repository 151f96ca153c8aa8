"""What a dataset has to offer: to training (`Clips`), to evaluation (`ClipDataset`) and to `mimo encode`
(`VideoDataset`)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Clips(Protocol):
    """Clips that are drawn by number. `sample` is a pure function of (index, seed) and gives

        video     uint8 [F, H, W, 3], or latents fp32 [T, H, W, C] where the clips are encoded already
        label     int64, if `has_labels`
        actions   int64 [F], if `has_actions`
        interval  int64, if the frame interval is drawn per clip
        text      fp32 [L, E], the features of a text followed by zeros, if clips were opened with texts

    It raises UnreadableVideo for a clip that cannot be used, DataError for what is wrong with all of them.

    Attributes:
        num_classes, num_actions: labels and actions lie below; None where nothing says so.
        has_labels, has_actions: whether samples hold them.
        decodes: whether samples are decoded from files, which takes a core's time.
    """

    num_classes: int | None
    num_actions: int | None
    decodes: bool

    @property
    def has_labels(self) -> bool: ...

    @property
    def has_actions(self) -> bool: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The clip, for reports."""
        ...

    def sample(self, index: int, seed: int) -> dict[str, np.ndarray]: ...


@runtime_checkable
class ClipDataset(Clips, Protocol):
    """Clips that were opened with a shape.

    Attributes:
        num_frames, height, width: of a sample's video.
    """

    num_frames: int
    height: int
    width: int

    def check_readable(self) -> None:
        """DataError unless clips can be read."""
        ...

    def evaluation_order(self) -> list[int]:
        """Indices so that every prefix is as class-balanced as possible."""
        ...


@runtime_checkable
class VideoDataset(ClipDataset, Protocol):
    """Clips of pixels, which can be encoded."""

    def sources(self) -> list[Path]:
        """Every file that is read."""
        ...

    def settings(self) -> dict:
        """What decides, besides the files, what a sample is; survives JSON."""
        ...
