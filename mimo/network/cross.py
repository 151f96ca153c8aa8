"""Cross-attention: rows attend to a sequence of embeddings that their clip is told, one token of its class or the
features of a text.

Letters: B clips, L tokens of a sequence at most, E their width, K rows of all sequences (B * L), R packed rows,
D width, h heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.fp8 import Projection
from mimo_kernels import FrameMask, frame_attention


class Text(NamedTuple):
    """Features of a text per clip, as a language model gives them.

    features: [B, L, E]; what lies behind a text's length is not looked at.
    lengths: of each text in tokens, on the host; 0 is no text: the clip is told the null token.
    """

    features: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def padded(cls, features: Tensor) -> Text:
        """Texts that are followed by rows of zeros, as mimo.data.text gives them. Waits for the device."""
        tokens = torch.arange(1, features.shape[1] + 1, device=features.device)
        return cls(features, tuple((features.ne(0).any(-1) * tokens).amax(1).tolist()))


def lengths_of(text: Text | None, clips: int) -> tuple[list[int], int]:
    """Of the sequences of clips, the null token included, and what they are padded to."""
    if text is None:
        return [1] * clips, 1
    return [max(1, length) for length in text.lengths], text.features.shape[1]


def text_on(text: Text | None, config: MiMoConfig, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Features, and which clips are told nothing, bool [B], on a device. ValueError for a text of other features than
    the network knows."""
    if text is None:
        return None
    if not config.text_dim or text.features.shape[2:] != (config.text_dim,):
        found = list(text.features.shape)
        raise ValueError(f"text features are {found}: expected [clips, tokens, text_dim={config.text_dim}]")
    return text.features.to(device), torch.tensor([n == 0 for n in text.lengths], device=device)


class Told(NamedTuple):
    """What a block's rows are told: `attend(q, k, v)` with q [R, h, d] and k, v [K, h, d] of the sequences; these as
    they are, [K, E], or as the keys and values that the block makes of them."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    sequences: Tensor | None = None
    keys_values: tuple[Tensor, Tensor] | None = None


class CrossAttention(nn.Module):
    """out(attention(q(y), k(s), v(s))) of rows y and the sequence s of their clip; queries and keys are RMS-normalised
    (unless config.qk_norm is False) and turned by no position."""

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = Projection(config.dim, config.dim)
        self.kv = Projection(config.text_dim or config.dim, 2 * config.dim)
        self.q_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.proj = Projection(config.dim, config.dim)

    def keys_values(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """[K, E] -> keys and values, [K, h, d] each."""
        k, v = self.kv(sequences).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return _normed(k, self.k_norm), v.contiguous()

    def forward(self, y: Tensor, told: Told) -> Tensor:
        """y [R, D] -> [R, D]."""
        q = _normed(self.q(y).unflatten(-1, (self.heads, -1)), self.q_norm)
        k, v = told.keys_values or self.keys_values(told.sequences)
        return self.proj(told.attend(q, k, v).flatten(-2))


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x.contiguous()
    precise = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(precise), x.shape[-1:], weight.to(precise), 1e-6).to(x.dtype)


def across_mask(rows: Sequence[int], lengths: Sequence[int], padded: int) -> FrameMask:
    """Who is told what: the rows of a clip see the sequence of their clip.

    rows, lengths: of every clip and of its sequence; sequences begin every `padded` rows.
    """
    ends = list(accumulate(rows, initial=0))
    keys = [(padded * clip, padded * clip + length) for clip, length in enumerate(lengths)]
    sizes = {"num_queries": ends[-1], "num_keys": padded * len(keys)}
    return FrameMask.from_slices(list(pairwise(ends)), keys, **sizes)


def attend_across(mask: FrameMask, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`Told.attend` under a mask."""
    return partial(frame_attention, mask=mask, backend=backend)
