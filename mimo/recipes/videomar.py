"""VideoMAR: earlier frames whole, the tokens of one frame masked, predicted by a diffusion model per token.

A clip ends with a frame drawn from all of its frames; of that one a share of the tokens is masked, and the loss is on
them alone (the next-frame diffusion loss). Frames after it would see a frame that is not whole, so they are left out:
under the block-causal mask nobody would see them.

Source: Yu et al. 2025, "VideoMAR: Autoregressive Video Generation with Continuous Tokens", Sec. 4 and 5.1; where it
follows MAR, Li et al. 2024, arXiv 2406.11838.

What the paper leaves open, and how it is decided here:

- *Blocks*: pre-norm blocks with affine LayerNorm and nothing modulated, MLP of 4 D, 16 heads of 96, QK-norm as in every
  network here. 36 blocks of 1536 with cross-attention and a head of 3 x 1280 are 1.4 B parameters, as its Table 3 says;
  AdaLN would make them 1.9 B.
- *Clean and masked frames* share all weights and norms, and a frame that is finished goes into the cache as a clean
  one. A masked place has one learned token. Of a frame partly masked the rest of the tokens are as in the data.
- *The drawn frame* is uniform over all frames of the clip, the first one included ("spanning all the frames"), one per
  clip; the mask ratio is one per step, MAR's normal distribution around 1 cut off at 0.7.
- *The head* predicts eps; its loss has no term for the variance (optional in MAR), a step's variance is that of
  q(x' | x, x_0). Four draws of timestep and noise per token (MAR). Which timesteps 100 steps visit is decided in
  mimo.diffusion.EpsilonSchedule: not the very last one.
- *The condition* is a sequence of embeddings that every block attends to between its own attention and its MLP: one
  learned token per class, or the features of a text (Qwen2 1.5B there, 1536 wide; here with a LayerNorm in front, and
  128 tokens at most). Its tokens have no positions. 0.1 of the clips are told the null token instead (MAR). It reaches
  the keys and values of history: the null branch of guidance has a history of its own.
- *Guidance* of 3.0 is constant over the mask steps, in the eps of every step of the token diffusion.
- *Positions*: axial 3D RoPE, a third of a head's channels each, base 10,000.
- *Temperature* is the factor on the noise of every step of the token diffusion (MAR), 0.9 + 10^-(t+1) at latent frame
  t, counted from the given image as frame 0. The noise that a token starts from is not scaled.
- *Curriculum*: how long each stage takes is not said; see TrainConfig.stages. The second phase has another tokenizer,
  so it is a run of its own that begins with the first one's averaged weights (`mimo train --init`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.frames import Frame, FrameBatch, FrameList
from mimo.recipes.base import Draws, HistoryPolicy, Prepared, conditions_of
from mimo.recipes.masked_tokens import MaskedTokens


@lru_cache(maxsize=256)
def next_frames(counts: tuple[int, ...], tokens: int) -> FrameList:
    """A clip for each of `counts`: so many clean frames, then a masked one, of `tokens` each."""
    clips = (tuple(Frame(t, "clean", tokens) for t in range(n)) + (Frame(n, "masked", tokens),) for n in counts)
    return FrameList(tuple(clips), "block_causal")


class VideoMAR(MaskedTokens):
    """One ragged copy, block causal: clean frames, then one that is partly masked and alone has a loss."""

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        super().check(config)
        cls.require(config, num_actions=0, attention="joint", repa_weight=0.0)

    @classmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        return HistoryPolicy(None, conditions_of(config))

    def frames(self, x: Tensor, conditions: dict[str, Tensor | None], draws: Draws, step: int | None) -> Prepared:
        device = x.device
        clips, frames, tokens = x.shape[:3]
        counts = (draws.on_host() * frames).long()  # [B], clean frames of each clip
        labels, text = self.told(conditions, draws)
        places = self.masked_places(draws, tokens)  # [B, m]
        listed = next_frames(tuple(counts.tolist()), tokens)
        # The frames of the list, in its order, among all of the batch; and where in it the masked ones are.
        chosen = (torch.arange(frames) <= counts[:, None]).flatten().nonzero()[:, 0].to(device)
        last = counts.to(device)
        first = ((last + 1).cumsum(0) - 1) * tokens  # [B], the first row of the masked frame
        masked = torch.zeros(len(chosen) * tokens, dtype=torch.bool, device=device)
        masked[(first[:, None] + places).flatten()] = True
        clip = torch.arange(clips, device=device)
        given = x[clip[:, None], last[:, None], places]  # [B, m, C]
        asked, target, weight = self.asked(given, clip[:, None] * tokens + places, draws)
        batch = FrameBatch(
            listed,
            x.flatten(0, 1)[chosen],
            labels=labels,
            intervals=conditions["intervals"],
            text=text,
            masked=masked,
            asked=asked,
        )
        return Prepared(batch, target, weight)
