"""MAGI: tokens of every frame masked, predicted from complete frames before it by a diffusion model per token.

    CTF, complete teacher forcing (Eq. 4):  p(masked tokens of x_t | rest of x_t, x_1, ..., x_{t-1})
    MTF, masked teacher forcing (Eq. 3):    p(masked tokens of x_t | rest of x_t, rests of x_1, ..., x_{t-1})

With CTF the complete frames stand beside the masked ones, as in MiMo; with MTF the masked ones are alone, each history
to those after it. Spatial blocks see one frame, temporal blocks one place in the frames that a frame sees
(config.attention = "factorized").

Source: Zhou et al. 2025, "Taming Teacher Forcing for Masked Autoregressive Video Generation", Sec. 3, 4 and App. A;
"other hyperparameters follow MAR", Li et al. 2024, arXiv 2406.11838.

What the paper leaves open, and how it is decided here:

- *Blocks*: a spatial and a temporal layer are a pre-norm transformer block each, attention and an MLP of 4 D: 40 blocks
  of 1280 and a head of 3 x 1024 are 0.81 B parameters, "approximately 850 million" in App. A.1; temporal layers without
  an MLP would make them 0.54 B. No QK-norm, as in MAR. Observed and masked frames share all weights and norms.
- *Temporal attention*: an observed frame sees itself beside those before it, as Fig. 3's "each frame only attends to
  itself and its preceding observation frames" has it; otherwise the first one would see nothing.
- *Mask ratio*: MAR's, a normal distribution around 1 cut off at 0.7, one number per step; which tokens, per frame.
  Masked places hold one learned token and go through all blocks (a decoder alone, where MAR has an encoder without
  them).
- *Learned positions* are a table of the frame's places for observed frames, one for masked frames, and one that is
  added to what the diffusion head is told (MAR). With MTF every frame is a masked one, finished ones in the cache
  included.
- *Noise injection*: the range is missing from the text; GameNGen, which it follows, has 0 .. 0.7 in 10 levels. Level l
  of L adds max_noise l / (L - 1) N(0, 1) to the latents, so that level 0 is clean; levels are uniform, one per clip.
  "Concatenated with hidden states": the projection of a concatenation is the sum of two projections, and that of one of
  L embeddings is one of L vectors: it is added. With CTF the complete frames are noisy; with MTF the tokens that are
  not masked. What is predicted is clean. A frame being made is told level 0, a finished one the level of the noise that
  SampleConfig.history_noise adds to it, 0 by default.
- *Intervals* are uniform in 1..25 (App. A.2), one embedding each, added to all tokens of a clip.
- *Sampling*: within a frame MAR's loop: a random order, a cosine schedule over 64 steps, 100 steps of token diffusion
  each, temperature 1.
- *Positions in long videos*: linear interpolation, end to end: frame t of T' > T stands at t (T - 1) / (T' - 1),
  between the embeddings of its two neighbours (SampleConfig.interpolate).
- *Classes and texts* are not in the paper; with config.cross_attention they are told as in VideoMAR.
- *Numbers missing from the text*: the learning rates (here MAR's rule, 1e-4 x batch / 256) and the resolution (here
  256 x 256, that of the systems it compares with on UCF-101). Epochs are turned into steps in mimo.presets.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.frames import Frame, FrameBatch, FrameList, Kind
from mimo.recipes.base import Draws, HistoryPolicy, Prepared, conditions_of
from mimo.recipes.masked_tokens import MaskedTokens


@lru_cache(maxsize=256)
def masked_frames(clips: int, frames: int, tokens: int, *, complete: bool) -> FrameList:
    """Masked frames of `tokens` tokens, alone or beside complete ones."""
    masked = tuple(Frame(t, "masked", tokens) for t in range(frames))
    if not complete:
        return FrameList((masked,) * clips, "block_causal")
    clean = tuple(Frame(t, "clean", tokens) for t in range(frames))
    return FrameList(((*clean, *masked),) * clips, "teacher_forcing")


class MAGI(MaskedTokens):
    """All frames of a clip are masked and have a loss; they see complete frames (CTF) or each other (MTF)."""

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        super().check(config)
        cls.require(config, num_actions=0)

    @classmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        kind: Kind = "clean" if config.teacher_forcing == "complete" else "masked"
        return HistoryPolicy(None, conditions_of(config), kind=kind)

    def frames(self, x: Tensor, conditions: dict[str, Any], draws: Draws, step: int | None) -> Prepared:
        complete = self.config.teacher_forcing == "complete"
        clips, frames, tokens = x.shape[:3]
        labels, text = self.told(conditions, draws)
        places = self.masked_places(draws, tokens, frames)  # [B, T, m]
        masked = torch.zeros(clips, frames, tokens, dtype=torch.bool, device=x.device).scatter_(2, places, True)
        seen, noise = self.injected(x, draws)
        frame = torch.arange(clips * frames, device=x.device).view(clips, frames, 1)
        given = x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[-1]))  # [B, T, m, C]
        asked, target, weight = self.asked(given, frame * tokens + places, draws)
        if complete:
            seen = torch.stack([seen, x], 1)
            masked = torch.stack([torch.zeros_like(masked), masked], 1)
            noise = None if noise is None else torch.stack([noise, torch.zeros_like(noise)], 1)
        batch = FrameBatch(
            masked_frames(clips, frames, tokens, complete=complete),
            seen.flatten(0, -3),
            labels=labels,
            intervals=conditions["intervals"],
            text=text,
            noise=None if noise is None else noise.flatten(),
            masked=masked.flatten(),
            asked=asked,
        )
        return Prepared(batch, target, weight)

    def injected(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """x [B, T, N, C] with noise of a level per clip, and the levels, int64 [B, T]; None without levels."""
        levels = self.config.noise_levels
        if levels == 0:
            return x, None
        level = (draws.uniform() * levels).long()  # [B]
        deviation = self.config.max_noise * level / max(1, levels - 1)
        noisy = x + deviation.to(x.dtype)[:, None, None, None] * draws.normal_like(x)
        return noisy, level[:, None].expand(-1, x.shape[1])
