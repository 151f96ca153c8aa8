"""Heads that only training has: the decoder of masked history modelling, and the projection of REPA.

Letters: B clips, T frames, N tokens per frame, C channels of a token, D width, n clean rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.blocks import Block, Norm, added_positions
from mimo.network.packed import Decoding
from mimo_kernels import AxialRoPE, frame_attention, scatter_tokens


class Decoder(nn.Module):
    """Masked history modelling (Eq. 5): from the features of kept history tokens to the tokens of frame t + offset.

    Kept features go back to their places, a learned query fills the holes, an embedding tells the offset, and a
    frame-causal ViT does the rest: bidirectional attention would show it frame t + 1.
    """

    def __init__(self, config: MiMoConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.query = nn.Parameter(0.02 * torch.randn(config.dim))
        self.offset = nn.Parameter(0.02 * torch.randn(len(config.mask_offsets), config.dim))
        self.positions = added_positions(config)
        vit = {"modulated": False, "affine1": True, "affine2": True}
        self.blocks = nn.ModuleList(Block(config, backend, **vit) for _ in range(config.decoder_depth))
        self.norm = Norm(config.dim, backend, modulated=False, affine=True)
        self.head = nn.Linear(config.dim, config.token_channels)

    def forward(
        self, features: Tensor, tokens: Tensor, offset: int, decoding: Decoding, rope: AxialRoPE | None
    ) -> Tensor:
        """From clean frames 0..T-1-offset to frames offset..T-1, [B, T-offset, N, C], or [rows, C] where clips differ.

        Args:
            features: [n, D], of all clean rows.
            tokens: int64 [n, 1], the token of each in its frame.
            decoding: of the frame list, for this offset.
        """
        config, size, device = self.config, self.config.tokens, features.device
        num_rows = decoding.frame_rows.num_rows
        index = decoding.first + decoding.kept.rows(tokens).flatten()
        x = scatter_tokens(decoding.kept.rows(features), index, num_rows, self.query, backend=self.backend)
        x = x + self.offset[config.mask_offsets.index(offset)].to(x.dtype)
        row = torch.arange(num_rows, device=device)
        token = row % size
        width = config.grid[1]
        coords = torch.stack([decoding.time[row // size], token // width, token % width], dim=-1).int()
        if self.positions is not None:
            x = x + self.positions(coords).to(x.dtype)
        c, pending = x.new_empty(0, config.dim), None  # nothing is modulated

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return frame_attention(q, k, v, decoding.mask, backend=self.backend)

        for block in self.blocks:
            x, pending = block(x, pending, c, decoding.frame_rows, coords, rope, attend)
        _, y = self.norm(x, pending, self.norm.condition(c), decoding.frame_rows)
        return self.head(y).unflatten(0, (*decoding.shape, size)) if len(decoding.shape) > 1 else self.head(y)


class Projection(nn.Sequential):
    """From hidden states [..., D] to the channels of an encoder's features: the MLP of REPA (Yu et al. 2024, Sec. 3.2),
    two hidden layers with SiLU."""

    def __init__(self, config: MiMoConfig) -> None:
        hidden, channels = config.repa_hidden, config.repa_channels
        super().__init__(
            *(nn.Linear(config.dim, hidden), nn.SiLU()),
            *(nn.Linear(hidden, hidden), nn.SiLU()),
            nn.Linear(hidden, channels),
        )
