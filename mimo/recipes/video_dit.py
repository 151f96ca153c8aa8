"""Video DiT, the baseline of FAR's Fig. 5: all frames of a clip at one timestep, all see all.

Source: Gu et al. 2025, arXiv 2503.19325, Sec. 4.1.
"""

from __future__ import annotations

from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.frames import noisy_alone
from mimo.recipes.base import NOTHING_MASKED, Draws, HistoryPolicy, Prepared, Recipe


class VideoDiT(Recipe):
    """One copy, bidirectional, one timestep per clip, the loss on every frame. Clips are made all at once: there is no
    history."""

    aligns = frozenset({"future"})

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        cls.require(config, **NOTHING_MASKED, separate_ln=False, clean_context=0.0, history_dropout=0.0)
        cls.require(config, min_snr_decay=None, coarse_stride=0)  # what there is between a frame and those before

    @classmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        return HistoryPolicy(at_once=True)

    def frames(self, x: Tensor, conditions: dict[str, Tensor | None], draws: Draws, step: int | None) -> Prepared:
        config, schedule = self.config, self.schedule
        told = {
            "labels": draws.nulled(conditions["labels"], config.num_classes, config.label_dropout),
            "actions": draws.nulled(conditions["actions"], config.num_actions, config.label_dropout),
            "intervals": conditions["intervals"],
        }
        t = schedule.sample_timesteps((draws.total, 1), draws.generator, x.device)[draws.ours].expand(-1, x.shape[1])
        eps = draws.normal_like(x)
        noisy = schedule.add_noise(x, eps, t)
        batch = noisy_alone(noisy, schedule.embedding(t), sees="bidirectional", **told)
        return Prepared(batch, schedule.target(x, eps, t), self.weight(x, t))
