"""What a noisy frame is told of the frames right before it, beside what its tokens collect by attention.

Letters: F frames, N tokens per frame, C channels of a token, D width, n frames that are told.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig


class Recent(nn.Module):
    """The latest frames as a part of the embedding: a convolution, whose window is a token and its eight neighbours.

    Motion over less than a token is a function of such windows. A small network learns it there in minutes, where
    attention would first have to find the neighbours.
    """

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.proj = nn.Linear(9 * config.recent_frames * config.token_channels, config.dim)

    def forward(self, recent: Tensor) -> Tensor:
        """[F, N, n C], zeros where there is no frame, -> [F, N, D]."""
        rows, columns = self.grid
        padded = F.pad(recent.unflatten(1, self.grid), (0, 0, 1, 1, 1, 1))
        windows = [padded[:, y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
        return self.proj(torch.cat(windows, dim=-1).flatten(1, 2))


def recent_frames(history: Tensor, count: int) -> Tensor:
    """The `count` frames before each of [B, T, N, C], the latest first, zeros where there is none,
    [B, T, N, count C]."""
    before = [F.pad(history[:, : -i or None], (0, 0, 0, 0, i, 0))[:, : history.shape[1]] for i in range(1, count + 1)]
    return torch.cat(before, dim=-1)
