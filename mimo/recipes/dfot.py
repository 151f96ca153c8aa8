"""DFoT, causal: every frame is noisy at a timestep of its own and history to those after it.

Sources: Chen et al. 2024 (Diffusion Forcing), Song et al. 2025 (DFoT: history guidance, fused min-SNR), as MiMo's App.
E runs it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.frames import noisy_alone
from mimo.recipes.base import NOTHING_MASKED, Draws, HistoryPolicy, Prepared, Recipe, conditions_of


class DiffusionForcing(Recipe):
    """One copy, block causal, a timestep per frame, the loss on every frame.

    With history_dropout a frame sees itself alone; those after it see it still. A finished frame becomes history as a
    frame of timestep 0, with its class and action: guidance branches that are told another class see another history.
    """

    aligns = frozenset({"future"})

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        cls.require(config, **NOTHING_MASKED, separate_ln=False, clean_context=0.0, coarse_stride=0)

    @classmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        return HistoryPolicy(0.0, conditions_of(config))

    def frames(self, x: Tensor, conditions: dict[str, Tensor | None], draws: Draws, step: int | None) -> Prepared:
        config, schedule = self.config, self.schedule
        told: dict[str, Any] = {
            "labels": draws.nulled(conditions["labels"], config.num_classes, config.label_dropout),
            "actions": draws.nulled(conditions["actions"], config.num_actions, config.label_dropout),
            "intervals": conditions["intervals"],
        }
        drop = self.dropped_history(draws, x.shape[1])
        t = schedule.sample_timesteps((draws.total, x.shape[1]), draws.generator, x.device)[draws.ours]
        eps = draws.normal_like(x)
        noisy, timestep, weight = self.context(x, schedule.add_noise(x, eps, t), t, draws)
        batch = noisy_alone(noisy, timestep, drop_history=drop, **told)
        return Prepared(batch, schedule.target(x, eps, t), weight)

    def context(self, x: Tensor, noisy: Tensor, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """What the frames are in the end, of the clean ones, the noisy ones [B, T, N, C] and their schedule's timesteps
        [B, T]: their latents [B, T, N, C], the timesteps that the network is told, and their weights, [B, T] each."""
        return noisy, self.schedule.embedding(t), self.weight(x, t)
