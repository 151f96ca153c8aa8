"""What a tokenizer has to offer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch

from mimo.errors import InputError


@runtime_checkable
class Tokenizer(Protocol):
    """Video to latents and back. Every tokenizer is also an nn.Module, frozen if it has weights.

    Attributes:
        compression: video frames, rows and columns per latent position.
        channels: latent channels C.
    """

    compression: tuple[int, int, int]
    channels: int

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """nn.Module's, and so are the next two."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]: ...

    def named_buffers(self) -> Iterable[tuple[str, torch.Tensor]]: ...

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> latents fp32 [B, T, H', W', C], of about unit scale."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, T, H', W', C] -> video fp32 [B, F, 3, H, W], about in [-1, 1], not clamped."""
        ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, H', W', C) of a clip's latents; ValueError when it cannot be encoded."""
        ...

    def num_frames(self, latent_frames: int) -> int:
        """Video frames that so many latent frames decode to; ValueError when none do."""
        ...


@runtime_checkable
class VariationalTokenizer(Tokenizer, Protocol):
    """A tokenizer whose encoder gives a distribution: `encode` its means, `draw` values drawn from it."""

    def draw(self, video: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """As `encode`; seeds int64 [B] are those of the clips' noise."""
        ...


def require_posterior(tokenizer: Tokenizer, name: str, posterior: str) -> None:
    """InputError when latents are to be drawn from a distribution that the tokenizer called `name` does not give."""
    if posterior == "sample" and not isinstance(tokenizer, VariationalTokenizer):
        raise InputError(f"posterior={posterior!r}: expected 'mean', as the tokenizer {name!r} gives no distribution")
