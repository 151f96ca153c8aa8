"""REPA: hidden states are aligned with what a frozen video encoder makes of the same clip; any recipe can carry it.

    L = L_recipe + repa_weight (mean over the kinds of frames of L_align)
    L_align = mean over clips of sum_p w_p (1 - cos(z_p, y_p)) / sum_p w_p

y [T', H', W', E] are the encoder's features of a clip. z is what the projection makes of the hidden states behind layer
`repa_layer`, put at their places in the grid of tokens [T, H, W] and interpolated to the encoder's; p is a place there.

Sources: Yu et al. 2024 (REPA, arXiv 2410.06940, Sec. 3.2); MiMo's App. E, which aligns layer 4 with VideoMAE-L at
weight 0.5, on history, on future or on both, and interpolates as VideoREPA does (Zhang et al. 2025, arXiv 2505.23656).
What these leave open is decided so:

- The distance is 1 - cosine: REPA's, shifted so that it ends at zero.
- "both" is the mean of the two kinds: the weight stays the weight. They share one projection, as the copies share all
  other weights.
- Rows are projected, then interpolated: linearly along each axis, over the clip from its first edge to its last, as
  `torch.nn.functional.interpolate` does with align_corners=False. As products with small matrices its backward adds in
  one order on a GPU too.
- Of masked history only kept tokens have hidden states, and they alone are aligned: the decoder has its own loss. A
  place of the encoder's grid counts with the share w_p of its interpolation that falls on kept tokens, and z_p is
  their interpolation (the cosine does not see that the weights no longer add up to one). With nothing masked w_p = 1.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.frames import FrameList
from mimo_kernels import scatter_tokens

KINDS = {"history": "clean", "future": "noisy"}  # what the config calls them: kinds of a frame list


class Alignment:
    """REPA's part of a loss.

    Args:
        config: with repa_weight > 0.
        backend: "auto", or "reference" for plain PyTorch.
    """

    def __init__(self, config: MiMoConfig, backend: str = "auto") -> None:
        self.config, self.backend = config, backend
        wanted = KINDS if config.repa_frames == "both" else (config.repa_frames,)
        self.kinds = tuple(KINDS[name] for name in wanted)

    def taps(self, listed: FrameList) -> tuple[tuple[int, str], ...]:
        """What the network is asked for; of clips that are alike, and have not every kind in every step."""
        there = {frame.kind for frame in listed.clips[0]}
        return tuple((self.config.repa_layer, kind) for kind in self.kinds if kind in there)

    def loss(
        self,
        projection: nn.Module,
        hidden: dict[tuple[int, str], Tensor],
        keep: Tensor | None,
        features: Tensor | None,
        shape: tuple[int, int, int, int],
    ) -> Tensor:
        """The mean over the kinds of `hidden`, a scalar in fp32, or in fp64 of fp64 rows.

        Args:
            projection: [rows, D] -> [rows, E].
            hidden: of every tap the rows, [B * T * k, D], k of N tokens per frame.
            keep: int64 [B, k], the tokens of clean frames that are there; None: all.
            features: [B, T', H', W', E].
            shape: (B, T, H, W) of the tokens.

        Raises ValueError for features that are missing, of another batch or of other channels.
        """
        expected = [shape[0], "T'", "H'", "W'", self.config.repa_channels]
        if features is None:
            raise ValueError(f"features=None: expected {expected} with repa_weight={self.config.repa_weight}")
        if features.dim() != 5 or (features.shape[0], features.shape[4]) != (expected[0], expected[4]):
            raise ValueError(f"features are {list(features.shape)}: expected {expected}")
        grid = features.shape[1], features.shape[2], features.shape[3]
        losses = []
        for (_, kind), rows in hidden.items():
            kept = keep if kind == "clean" else None
            z = self._placed(projection(rows), kept, shape)
            with torch.autocast(z.device.type, enabled=False):  # a bf16 product would round what is compared
                z, weight = resized(z.to(torch.promote_types(z.dtype, torch.float32)), grid), None
                if kept is not None:
                    frame = z.new_zeros(shape[0], shape[2] * shape[3]).scatter(1, kept, 1.0)
                    weight = resized(frame.view(shape[0], 1, *shape[2:], 1), (1, *grid[1:])).squeeze(-1)
                losses.append(cosine_distance(z, features.to(z.dtype), weight))
        return torch.stack(losses).mean()

    def _placed(self, rows: Tensor, keep: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor:
        """Rows [B * T * k, E] at their places, [B, T, H, W, E]; zero where there is none."""
        clips, frames, height, width = shape
        if keep is not None:
            first = torch.arange(clips * frames, device=rows.device).view(clips, frames, 1) * (height * width)
            index = (first + keep[:, None]).flatten()
            rows = scatter_tokens(rows, index, clips * frames * height * width, backend=self.backend)
        return rows.view(*shape, -1)


def cosine_distance(z: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over clips of the weighted mean over places of 1 - cos(z, y).

    Args:
        z, y: [B, T', H', W', E].
        weight: [B, 1, H', W'], zero or more; None weighs all places alike. A clip of zeros alone has no loss.
    """
    distance = 1 - F.cosine_similarity(z, y, dim=-1)
    if weight is None:
        return distance.mean()
    weight = weight.expand_as(distance).flatten(1)
    return ((distance.flatten(1) * weight).sum(1) / weight.sum(1).clamp(min=1e-6)).mean()


def resized(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, T, H, W, E] -> [B, *grid, E], linearly along each axis."""
    for axis, size in enumerate(grid, start=1):
        if (found := x.shape[axis]) != size:
            matrix = interpolation(found, size, x.device).to(x.dtype)
            x = (matrix @ x.flatten(axis + 1).flatten(0, axis - 1)).view(*x.shape[:axis], size, *x.shape[axis + 1 :])
    return x


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def interpolation(source: int, target: int, device: torch.device) -> Tensor:
    """Linear interpolation of `source` values to `target` as a matrix, fp32 [target, source]. Place i of the target
    lies at (i + 1/2) source / target - 1/2, or at the first or last value where that is outside of them."""
    place = ((torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5).clamp(0, source - 1)
    distance = (place[:, None] - torch.arange(source)).abs()
    return (1 - distance).clamp(min=0).float().to(device)
