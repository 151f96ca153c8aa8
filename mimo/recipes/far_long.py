"""FAR-Long: FAR whose distant frames are coarse, so that a long clip has few tokens.

    times        0    1   ...  L-1 | L  ...  L+n-1      n = config.fine_frames
    kind       coarse coarse coarse| noisy .. noisy     each sees those before it and itself
    timestep    -2   -2   ...  -2  | its own, or -1     -1: clean, as in FAR
    loss         -    -         -  | the mean over the frames that are not clean

Source: Gu et al. 2025, arXiv 2503.19325, Sec. 4.3 (long short-term context), Fig. 3, Tables 1 and 8; Sec. 4.4 and Fig.
8 (multi-level cache). What the paper leaves open is decided here as follows, after its published code where that says
it:

- A coarse frame is told timestep -2, and its action; it is always clean.
- A token of it stands at the first of the 4 x 4 places that it covers: coordinates are 4 times those of its own grid.
- Its embedding and, in every block, its query, key, value and output projections are its own; norms (those of queries
  and keys too), modulation and MLP are shared. The last block has no output projection for it, as nobody reads it.
- L is drawn once per step, uniformly from 0..m-n, both included, for all clips alike: all processes have as much to do.
  Where in the clip its L + n frames begin is drawn for every clip. Times count from the first of them.
- In sampling the n latest frames, the one being made included, are fine. So what a frame sees is what the last frame of
  a clip saw in training: the border between coarse and fine moves with every frame, the fine frames behind it are
  encoded again, and coarse ones, which never saw a fine one, stay as they are.
- Null branches of guidance are told nothing in any frame, coarse ones included, as in FAR.
- Beyond m frames the number of coarse frames goes on growing; nothing is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.frames import coarse_and_noisy
from mimo.recipes.base import NOTHING_MASKED, Draws, HistoryPolicy, Prepared, conditions_of
from mimo.recipes.far import CLEAN, FAR

COARSE = -2.0  # the timestep of a coarse frame


class FARLong(FAR):
    """FAR on the latest config.fine_frames frames of what is drawn from a clip; all before them are coarse."""

    aligns = frozenset()  # the frames that are fine are a part of the clip, and another one for every clip

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        cls.require(config, **NOTHING_MASKED, separate_ln=False)
        cls.require(config, attention="joint", cross_attention=False, token_depth=0)
        if not config.coarse_stride:
            raise ValueError(f"coarse_stride=0: expected 2 or more with recipe={config.recipe!r}")

    @classmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        return HistoryPolicy(CLEAN, conditions_of(config), coarse_timestep=COARSE)

    def frames(self, x: Tensor, conditions: dict[str, Tensor | None], draws: Draws, step: int | None) -> Prepared:
        config, schedule = self.config, self.schedule
        fine = min(config.fine_frames, x.shape[1])
        distant = int(torch.randint(x.shape[1] - fine + 1, (), generator=draws.host))
        x, actions = self._cut(x, conditions["actions"], distant + fine, draws)
        told: dict[str, Any] = {
            "labels": draws.nulled(conditions["labels"], config.num_classes, config.label_dropout),
            "actions": draws.nulled(actions, config.num_actions, config.label_dropout),
            "intervals": conditions["intervals"],
        }
        coarse, x = x[:, :distant], x[:, distant:]
        drop = self.dropped_history(draws, fine)
        t = schedule.sample_timesteps((draws.total, fine), draws.generator, x.device)[draws.ours]
        eps = draws.normal_like(x)
        noisy, timestep, weight = self.context(x, schedule.add_noise(x, eps, t), t, draws)
        timestep = torch.cat([timestep.new_full((len(x), distant), COARSE), timestep], dim=1)
        batch = coarse_and_noisy(coarse, noisy, timestep, stride=config.coarse_stride, drop_history=drop, **told)
        return Prepared(batch, schedule.target(x, eps, t), weight)

    @staticmethod
    def _cut(x: Tensor, actions: Tensor | None, length: int, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """`length` frames in a row of every clip [B, T, N, C], from a place drawn for each, and their actions."""
        first = (draws.uniform() * (x.shape[1] - length + 1)).long()  # [B]
        clip = torch.arange(len(x), device=x.device)[:, None]
        time = first[:, None] + torch.arange(length, device=x.device)
        return x[clip, time], None if actions is None else actions[clip, time]
