"""What the systems share whose network predicts masked tokens through a token head, as MAR does for images.

    L = mean over masked tokens and over K draws of (t, eps) of |eps - eps_theta(x_t | t, z)|^2

Source: Li et al. 2024, arXiv 2406.11838 (MAR), Eq. 1 and Sec. 4; MAGI and VideoMAR follow it.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.cross import Text
from mimo.network.frames import Asked
from mimo.recipes.base import Draws, Recipe

DEVIATION = 0.25  # of the mask ratio, before it is cut off


def masked_count(tokens: int, bounds: tuple[float, float], uniform: float) -> int:
    """How many of a frame's tokens are masked: ceil(tokens * ratio), ratio ~ N(high, 0.25^2) cut off at (low, high).

    uniform: in [0, 1), from which the ratio is drawn.
    """
    low, high = bounds
    normal = NormalDist(high, DEVIATION)
    below = normal.cdf(low)
    ratio = normal.inv_cdf(below + uniform * (0.5 - below))
    return min(tokens, max(1, math.ceil(tokens * ratio)))


class MaskedTokens(Recipe):
    """The mask ratio is one number per step, as in MAR; which tokens of a frame are masked is drawn per frame."""

    def __init__(self, config: MiMoConfig, *, unmasked_from: int | None = None, **options: Any) -> None:
        super().__init__(config, unmasked_from=unmasked_from, **options)
        if unmasked_from is not None:
            raise ValueError(f"unmasked_steps: expected 0, as the recipe {config.recipe!r} predicts what is masked")

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        if not config.token_depth:
            raise ValueError(f"token_depth=0: expected a token head with recipe={config.recipe!r}")
        cls.require(config, interleaved=False, mask_weight=0.0, clean_context=0.0, history_dropout=0.0, coarse_stride=0)

    def told(self, conditions: dict[str, Any], draws: Draws) -> tuple[Tensor | None, Text | None]:
        """Classes and texts of the clips, some of them replaced by the null one."""
        config, text = self.config, conditions.get("text")
        labels = draws.nulled(conditions["labels"], config.num_classes, config.label_dropout)
        if text is not None:
            told = (draws.on_host() >= config.label_dropout).tolist()
            lengths = tuple(n if is_told else 0 for n, is_told in zip(text.lengths, told, strict=True))
            text = text._replace(lengths=lengths)
        return labels, text

    def masked_places(self, draws: Draws, tokens: int, *frames: int) -> Tensor:
        """int64 [B, *frames, m]: the masked tokens of every frame, m the same for all."""
        count = masked_count(tokens, self.config.mask_ratio, torch.rand((), generator=draws.host).item())
        return draws.uniform(*frames, tokens).argsort(dim=-1, stable=True)[..., :count]

    def asked(self, tokens: Tensor, rows: Tensor, draws: Draws) -> tuple[Asked, Tensor, Tensor]:
        """What the token head is asked of masked tokens, its target [K, n, C] and the weight of the errors [K, n].

        tokens: [B, ..., m, C], clean. rows: int64 [B, ..., m], of those of the frames that are not clean.
        """
        repeats = self.config.token_draws
        x = tokens.unsqueeze(1).expand(-1, repeats, *[-1] * (tokens.dim() - 1))  # [B, K, ..., m, C]
        t = self.schedule.sample_timesteps((draws.total, *x.shape[1:-1]), draws.generator, x.device)[draws.ours]
        eps = draws.normal_like(x)
        noisy = self.schedule.add_noise(x, eps, t)
        noisy, eps = (value.transpose(0, 1).flatten(1, -2) for value in (noisy, eps))
        t = t.transpose(0, 1).flatten(1)
        weight = torch.full(t.shape, 1 / eps.numel(), device=x.device)
        return Asked(rows.flatten(), noisy, self.schedule.embedding(t)), self.schedule.target(noisy, eps, t), weight
