"""MiMo: clean history beside noisy future, a part of the history masked, and the masked tokens to be predicted
(Algorithms 1 and 3).

    L = L_diff + lambda L_mask
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.frames import clean_and_noisy
from mimo.network.recent import recent_frames
from mimo.recipes.base import Draws, HistoryPolicy, LossParts, Prepared, Recipe
from mimo_kernels import sample_tube_mask, weighted_squared_error

OWN_FROM = 3  # frames before it are never the network's own: motion follows from them


def kept_tokens(num_tokens: int, ratio: float, multiple: int = 1) -> int:
    """k = N - floor(ratio N), rounded to a multiple of `multiple`, still less than N if anything was to be dropped."""
    kept = num_tokens - math.floor(ratio * num_tokens)
    if kept == num_tokens:
        return kept
    highest = (num_tokens - 1) // multiple * multiple
    return min(max(round(kept / multiple) * multiple, multiple), highest)


def changes(x: Tensor, seen: Tensor) -> Tensor:
    """What a network with `residual` makes: frames x [B, T, N, C] minus those before them in history, [B, T, N, C]."""
    return torch.cat([x[:, :1], x[:, 1:] - seen[:, :-1]], dim=1)


class MaskedHistory(Recipe):
    """Teacher forcing. The history drops a tube of its tokens, of a ratio drawn once per step and a pattern per clip;
    the decoder predicts them from the features of those that are kept. A finished frame becomes history as it was in
    training: through norms of its own and with its action; class and timestep it never knew."""

    teacher_forcing = True
    aligns = frozenset({"history", "future"})

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        cls.require(config, clean_context=0.0, coarse_stride=0)

    @classmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        return HistoryPolicy(None, frozenset({"actions"} if config.num_actions else ()))

    def prepare(
        self, model: nn.Module, x: Tensor, conditions: dict[str, Any], draws: Draws, step: int | None
    ) -> Prepared:
        history = x
        if self.own_history_from is not None:
            if step is None:
                raise ValueError("step=None: steps whose history is the network's own need the number of the step")
            if step >= self.own_history_from:
                history = self._own_history(model, x, conditions, draws)
        return self.frames(x, conditions, draws, step, history)

    def frames(
        self,
        x: Tensor,
        conditions: dict[str, Tensor | None],
        draws: Draws,
        step: int | None,
        history: Tensor | None = None,
    ) -> Prepared:
        """history: [B, T, N, C], what the clean frames have become; None: they are x."""
        config, history = self.config, x if history is None else history
        with_diffusion, with_mask, masked = self._phase(step)
        frames, tokens = x.shape[1:3]
        keep = None
        if masked:
            low, high = config.mask_ratio
            ratio = low + (high - low) * torch.rand((), generator=draws.host).item()
            kept = kept_tokens(tokens, ratio, config.mask_round)
            if kept < tokens:
                keep = sample_tube_mask(draws.total, tokens, kept, generator=draws.generator, device=x.device)
                keep = keep[draws.ours]
        actions = draws.nulled(conditions["actions"], config.num_actions, config.label_dropout)
        given = {"actions": actions, "intervals": conditions["intervals"]}
        if not with_diffusion:
            batch = clean_and_noisy(history, None, None, keep=keep, **given)
            return Prepared(batch, latents=x, keep=keep, reconstruct=True)
        labels = draws.nulled(conditions["labels"], config.num_classes, config.label_dropout)
        drop = self.dropped_history(draws, frames)
        t = self.schedule.sample_timesteps((draws.total, frames), draws.generator, x.device)[draws.ours]
        eps = draws.normal_like(x)
        seen = self._seen(history, draws)
        made = changes(x, seen) if config.residual else x
        if config.recent_frames:
            given["recent"] = self._recent(seen, drop)
        batch = clean_and_noisy(
            seen,
            self.schedule.add_noise(made, eps, t),
            self.schedule.embedding(t),
            keep=keep,
            drop_history=drop,
            labels=labels,
            **given,
        )
        target = self.schedule.target(made, eps, t)
        return Prepared(batch, target, self.weight(x, t), x, keep, reconstruct=with_mask)

    def loss_of(self, output, prepared: Prepared) -> LossParts:
        assert prepared.latents is not None  # `frames` gives them
        zero = prepared.latents.new_zeros((), dtype=torch.float32)
        diffusion, mask = zero, zero
        if prepared.target is not None:
            diffusion = self.diffusion_loss(output.velocity, prepared)
        if output.reconstruction:
            assert prepared.keep is not None  # some history was dropped
            mask = self._mask_loss(output.reconstruction, prepared.latents, prepared.keep)
        if prepared.target is None:
            return LossParts(self.config.mask_weight * mask, zero, mask.detach())
        total = diffusion + self.config.mask_weight * mask if output.reconstruction else diffusion
        return LossParts(total, diffusion.detach(), mask.detach())

    @torch.no_grad()
    def _own_history(self, model: nn.Module, x: Tensor, conditions: dict[str, Tensor | None], draws: Draws) -> Tensor:
        """Clips whose frames from OWN_FROM on are what the network makes of those before them, in one step from noise,
        all at once; once more from that, or not at all: one of the three, drawn per step. [B, T, N, C]."""
        config, schedule, history = self.config, self.schedule, x
        t = schedule.sampling_timesteps(1, x.device).expand(x.shape[:2])
        for _ in range(int(3 * torch.rand((), generator=draws.host))):
            noise = draws.normal_like(x)
            recent = self._recent(history, None) if config.recent_frames else None
            batch = clean_and_noisy(history, noise, schedule.embedding(t), recent=recent, **conditions)
            made = schedule.step(model(batch, reconstruct=False).velocity.to(x.dtype), noise, 0)
            if config.residual:
                made = torch.cat([made[:, :1], made[:, 1:] + history[:, :-1]], dim=1)
            history = torch.cat([x[:, :OWN_FROM], made[:, OWN_FROM:]], dim=1)
        return history

    def _seen(self, x: Tensor, draws: Draws) -> Tensor:
        """The clean frames as others see them: with config.history_noise a little noisy, like sampled ones."""
        if not (most := self.config.history_noise):
            return x
        deviation = most * draws.uniform(x.shape[1])[..., None, None]  # [B, T, 1, 1]
        return x + deviation.to(x.dtype) * draws.normal_like(x)

    def _recent(self, seen: Tensor, drop: Tensor | None) -> Tensor:
        """What noisy frames are told of those before them, [B * T, N, n C]; nothing where they see no history."""
        recent = recent_frames(seen, self.config.recent_frames)
        if drop is not None:
            recent = recent.masked_fill(drop.to(seen.device)[..., None, None], 0.0)
        return recent.flatten(0, 1)

    def _phase(self, step: int | None) -> tuple[bool, bool, bool]:
        """(L_diff, L_mask, history is masked) at this step."""
        config = self.config
        if step is None and (config.interleaved or self.unmasked_from is not None):
            raise ValueError("step=None: an interleaved objective and an unmasked phase need the number of the step")
        if self.unmasked_from is not None and step is not None and step >= self.unmasked_from:
            return True, False, False
        masked = config.mask_ratio[1] > 0
        if config.interleaved and step is not None:
            return step % 2 == 0, step % 2 == 1, masked
        return True, config.mask_weight > 0, masked

    def _mask_loss(self, reconstruction: dict[int, Tensor], x: Tensor, keep: Tensor) -> Tensor:
        """Eq. 5: squared error over masked positions, mean over the offsets that exist at frame t, then over frames."""
        clips, frames, tokens, channels = x.shape
        counted = torch.ones(clips, tokens, device=x.device)
        if self.config.mask_region == "dropped":
            counted = counted.scatter(1, keep, 0.0)
        share = (counted / counted.sum(1, keepdim=True))[:, None]  # [B, 1, N]
        t = torch.arange(frames, device=x.device)
        offsets: Any = sum((t + offset < frames).int() for offset in reconstruction)  # [T], how many exist at frame t
        weight = share / (offsets.clamp(min=1) * (offsets > 0).sum() * clips * channels)[:, None]  # [B, T, N]
        return sum(
            weighted_squared_error(
                predicted.float(), x[:, offset:].float(), weight[:, : frames - offset], backend=self.backend
            )
            for offset, predicted in reconstruction.items()
        )
