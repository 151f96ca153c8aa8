"""FAR: diffusion forcing in which some frames are clean already in training, and say so.

Source: Gu et al. 2025, arXiv 2503.19325, Sec. 4.2 (stochastic clean context) and 4.4 (the caching step).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.recipes.base import NOTHING_MASKED, Draws, HistoryPolicy, conditions_of
from mimo.recipes.dfot import DiffusionForcing

CLEAN = -1.0  # the timestep of a clean frame, beyond those of the schedule


class FAR(DiffusionForcing):
    """One copy, block causal, a timestep per frame; with probability `clean_context` a frame is clean, is told timestep
    -1 and has no loss. The loss of a clip is the mean over its other frames. A finished frame becomes history as such a
    clean one, with its class and action: the null branch of guidance is null in every frame, and sees a history of its
    own."""

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        cls.require(config, **NOTHING_MASKED, separate_ln=False, coarse_stride=0)

    @classmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        return HistoryPolicy(CLEAN, conditions_of(config))

    def context(self, x: Tensor, noisy: Tensor, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        frames = x.shape[1]
        clean = draws.uniform(frames) < self.config.clean_context
        snr = self.schedule.snr(t).masked_fill(clean, math.inf)  # what fused min-SNR makes of the frames behind it
        # A clip of clean frames alone has no loss, and no division by zero.
        share = frames / (frames - clean.sum(1, keepdim=True)).clamp(min=1)
        weight = torch.where(clean, 0.0, self.weight(x, t, snr) * share)
        timestep = self.schedule.embedding(t).masked_fill(clean, CLEAN)
        return torch.where(clean[..., None, None], x, noisy), timestep, weight
