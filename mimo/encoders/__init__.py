"""Frozen video encoders: from pixels to the features that hidden states are aligned with (mimo.recipes.repa).

Every one is an nn.Module with the methods of `Encoder`. `videomae` reads weights; `hog` is computed, for machines that
have none: it says what edges there are and nothing of what they are edges of, so it stands for no foundation model.
Checkpoints and latent shards remember the encoder's checksum (mimo.tokenizers.weights.checksum), as a tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from mimo.encoders.hog import HOG
from mimo.errors import InputError

ENCODERS = ("videomae", "hog")

__all__ = ["ENCODERS", "HOG", "Encoder", "build_encoder"]


@runtime_checkable
class Encoder(Protocol):
    """Video to features on a grid. Every encoder is also an nn.Module, and frozen.

    Attributes:
        channels: of the features, E.
    """

    channels: int

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """nn.Module's, and so are the next two."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]: ...

    def named_buffers(self) -> Iterable[tuple[str, torch.Tensor]]: ...

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the features of a clip; ValueError when it cannot be encoded."""
        ...

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> features fp32 [B, T', H', W', E], without a gradient."""
        ...


def build_encoder(name: str, *, channels: int | None = None, weights: str | Path | None = None) -> Encoder:
    """The encoder called `name`.

    Args:
        channels: that its features are expected to have; None takes what it has.
        weights: the folder that an encoder with weights reads; see its `from_pretrained`.

    Raises: InputError for an unknown name, weights that cannot be read, and features of other channels.
    """
    if name not in ENCODERS:
        raise InputError(f"unknown encoder {name!r}: known encoders are {', '.join(ENCODERS)}")
    if name == "hog":
        if weights is not None:
            raise InputError(f"the encoder 'hog' has no weights, but {weights} was given")
        encoder: Encoder = HOG()
    else:
        if weights is None:
            raise InputError(f"the encoder {name!r} needs weights (--encoder-weights): name a folder")
        from mimo.encoders.videomae import VideoMAE  # reads a big library

        encoder = VideoMAE.from_pretrained(weights)
    if channels is not None and encoder.channels != channels:
        source = weights or f"the encoder {name!r}"
        raise InputError(f"repa_channels={channels}: expected {encoder.channels}, the channels of {source}")
    return encoder
