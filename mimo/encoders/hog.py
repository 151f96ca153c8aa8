"""Histograms of oriented gradients, features that need no weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CELL = 8  # pixels
BINS = 9  # of unsigned orientation
_REST = 0.1  # channel that keeps a cell without gradients from being zero, before it is normalised


class HOG(nn.Module):
    """Of every frame and every cell of 8 x 8 pixels, for each colour a histogram of the directions of its gradients,
    and a constant; normalised to length 1. Masked modelling of video learns well from such targets (Wei et al. 2022,
    MaskFeat, arXiv 2112.09133, Sec. 3.2).

    The gradient g is the central difference of the colour (in [-1, 1], borders repeated); its direction, taken modulo
    180 degrees, lies between the middles of two of 9 bins, and |g| / 64 is shared between them as it is near to them.
    """

    definition = f"hog: cells of {CELL} pixels, {BINS} bins, rest {_REST}"  # see mimo.tokenizers.weights.checksum
    channels = 3 * BINS + 1

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the features of a clip; ValueError when it cannot be encoded."""
        if frames < 1 or height < 1 or width < 1 or height % CELL or width % CELL:
            raise ValueError(f"hog: a clip of {frames} x {height} x {width}: expected sides that {CELL} divides")
        return frames, height // CELL, width // CELL

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> features fp32 [B, F, H/8, W/8, 28]."""
        clips, frames, colours, height, width = video.shape
        _, rows, columns = self.grid(frames, height, width)
        x = F.pad(video.float().flatten(0, 1), (1, 1, 1, 1), mode="replicate")  # [B F, 3, H + 2, W + 2]
        across, down = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2, (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2
        place = torch.atan2(down, across).remainder(math.pi) / math.pi * BINS - 0.5  # bin i has its middle at i
        middle = torch.arange(BINS, device=x.device).view(BINS, 1, 1)
        away = (place[:, :, None] - middle).abs()  # [B F, 3, bins, H, W]
        away = torch.minimum(away, BINS - away)  # directions are a circle
        share = (1 - away).clamp(min=0) * torch.hypot(across, down)[:, :, None]
        histograms = F.avg_pool2d(share.flatten(1, 2), CELL)  # [B F, 3 bins, H/8, W/8]
        rest = histograms.new_full((len(histograms), 1, rows, columns), _REST)
        features = F.normalize(torch.cat([histograms, rest], dim=1), dim=1)
        return rearrange(features, "(b f) c h w -> b f h w c", b=clips).contiguous()
