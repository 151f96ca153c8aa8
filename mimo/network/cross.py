"""Cross-attention: rows attend to a sequence of embeddings that their clip is told, one token of its class or the
features of a text.

Letters: B clips, L tokens of a sequence at most, E their width, K rows of all sequences (B * L), R packed rows,
D width, h heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.fp8 import Projection
from mimo_kernels import FrameMask, frame_attention
from mimo_kernels.attention.mask import COLUMNS


class Text(NamedTuple):
    """Features of a text per clip, as a language model gives them.

    features: [B, L, E]; what lies behind a text's length is not looked at.
    lengths: of each text in tokens, on the host; 0 is no text: the clip is told the null token.
    """

    features: Tensor
    lengths: tuple[int, ...]


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


class Across(NamedTuple):
    """Who is told what: rows 0 .. R-1 see the rows of their clip's sequence. Rows and sequences stand in one mask, the
    sequences behind, which ask nothing."""

    mask: FrameMask

    @classmethod
    def of(cls, rows: Sequence[int], lengths: Sequence[int], padded: int) -> Across:
        """rows, lengths: of every clip and of its sequence, which begins every `padded` rows."""
        ends, total = list(accumulate(rows)), sum(rows)
        table = torch.zeros(len(rows) + 1, COLUMNS, dtype=torch.int64)
        table[:-1, 0] = torch.tensor([0, *ends[:-1]])
        table[:-1, 1] = torch.tensor(ends)
        table[:-1, 2] = total + padded * torch.arange(len(rows))
        table[:-1, 3] = table[:-1, 2] + torch.tensor(lengths)
        table[-1, :2] = torch.tensor([total, total + padded * len(rows)])
        return cls(FrameMask.from_table(table[table[:, 1] > table[:, 0]]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        """q [R, h, d], k and v [K, h, d] -> [R, h, d]."""
        rows, keys = len(q), len(k)
        q, k, v = torch.cat([q, q.new_zeros(keys, *q.shape[1:])]), _behind(k, rows), _behind(v, rows)
        return frame_attention(q, k, v.to(q.dtype), self.mask, backend=backend)[:rows]


def _behind(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x.new_zeros(rows, *x.shape[1:]), x])
