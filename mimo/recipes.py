"""One training step of MiMo: what is masked, noised and dropped, and the loss (Algorithms 1 and 3).

L = L_diff + lambda L_mask. ACDiT, the baseline, is the same recipe without the mask; see `acdit`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.diffusion import build_schedule, compute_loss_weight
from mimo_kernels import sample_tube_mask, weighted_squared_error


class LossParts(NamedTuple):
    """Scalars: `total` to differentiate, `diffusion` (L_diff) and `mask` (L_mask) to show; a part not computed is 0."""

    total: Tensor
    diffusion: Tensor
    mask: Tensor


def acdit(config: MiMoConfig) -> MiMoConfig:
    """The baseline: clean history beside noisy future, nothing masked, no decoder, L_diff alone."""
    return dataclasses.replace(config, mask_ratio=(0.0, 0.0), mask_weight=0.0, interleaved=False)


def step_generator(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """The random numbers of one step, over all ranks and micro batches: a function of the arguments and nothing else."""
    return _seeded(f"{seed}/{step}", device)


def _seeded(text: str, device: torch.device | str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def kept_tokens(num_tokens: int, ratio: float, multiple: int = 1) -> int:
    """k = N - floor(ratio N), rounded to a multiple of `multiple`, still less than N if anything was to be dropped."""
    kept = num_tokens - math.floor(ratio * num_tokens)
    if kept == num_tokens:
        return kept
    highest = (num_tokens - 1) // multiple * multiple
    return min(max(round(kept / multiple) * multiple, multiple), highest)


class Recipe:
    """The objective of a config.

    Args:
        config: MiMoConfig.
        unmasked_from: from this step on nothing is masked and L = L_diff (fine-tuning at the end, for high mask ratios).
        backend: of the losses; "reference" is plain PyTorch.
    """

    def __init__(self, config: MiMoConfig, *, unmasked_from: int | None = None, backend: str = "auto") -> None:
        self.config, self.unmasked_from, self.backend = config, unmasked_from, backend
        self.schedule = build_schedule(config.parameterization)

    def loss(
        self,
        model: nn.Module,
        latents: Tensor,
        *,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        generator: torch.Generator,
        step: int | None = None,
        first: int = 0,
        total: int | None = None,
    ) -> LossParts:
        """The loss of one batch. All randomness comes from `generator`; nothing here waits for the device.

        A batch may be a part of a larger one, split over ranks and micro batches. Then the mask ratio is that of the whole,
        and so are all draws, of which a part uses its own: a clip meets the same noise however the batch is split. (To draw
        what the other parts use costs little beside the network, and takes no more launches.)

        Args:
            model: MiMo, or a wrapper that calls as it does.
            latents: clean clips [B, T, H, W, C].
            labels: int64 [B].
            actions: int64 [B, T].
            intervals: int64 [B], for a network with max_interval > 0.
            generator: on the device of `latents`, as `step_generator` makes it, for every part anew.
            step: number of the step; only an interleaved objective and an unmasked phase depend on it, and need it.
            first, total: these are clips first .. first + B - 1 of a batch of `total`; None is this batch alone.
        """
        config = self.config
        with_diffusion, with_mask, masked = self._phase(step)
        x = latents.flatten(2, 3)
        clips, frames, tokens, _ = x.shape
        host = _host_generator(generator)
        total, ours = total or clips, slice(first, first + clips)

        keep = None
        if masked:
            low, high = config.mask_ratio
            ratio = low + (high - low) * torch.rand((), generator=host).item()
            kept = kept_tokens(tokens, ratio, config.mask_round)
            if kept < tokens:
                keep = sample_tube_mask(total, tokens, kept, generator=generator, device=x.device)[ours]
        actions = self._drop(actions, config.num_actions, generator, ours, total)
        zero = x.new_zeros((), dtype=torch.float32)
        if not with_diffusion:
            output = model(x, None, None, keep=keep, actions=actions, intervals=intervals)
            mask_loss = self._mask_loss(output.reconstruction, x, keep)
            return LossParts(config.mask_weight * mask_loss, zero, mask_loss.detach())

        labels = self._drop(labels, config.num_classes, generator, ours, total)
        drop_history = None
        if config.history_dropout > 0:
            drop_history = torch.rand(total, frames, generator=host)[ours] < config.history_dropout
        t = self.schedule.sample_timesteps((total, frames), generator, x.device)[ours]
        eps = torch.randn(total, *x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)[ours]
        output = model(
            x,
            self.schedule.add_noise(x, eps, t),
            self.schedule.embedding(t),
            keep=keep,
            labels=labels,
            actions=actions,
            intervals=intervals,
            drop_history=drop_history,
            reconstruct=with_mask,
        )
        weight = x.new_full((clips, frames), 1 / x.numel(), dtype=torch.float32)
        if config.min_snr_gamma is not None:
            snr = self.schedule.snr(t)
            weight = weight * compute_loss_weight(snr, config.min_snr_gamma, "v_prediction", config.min_snr_decay)
        target = self.schedule.target(x, eps, t).float()
        diffusion = weighted_squared_error(output.velocity.float(), target, weight, backend=self.backend)
        if not output.reconstruction:
            return LossParts(diffusion, diffusion.detach(), zero)
        mask_loss = self._mask_loss(output.reconstruction, x, keep)
        return LossParts(diffusion + config.mask_weight * mask_loss, diffusion.detach(), mask_loss.detach())

    def _phase(self, step: int | None) -> tuple[bool, bool, bool]:
        """(L_diff, L_mask, history is masked) at this step."""
        config = self.config
        if step is None and (config.interleaved or self.unmasked_from is not None):
            raise ValueError("step=None: an interleaved objective and an unmasked phase need the number of the step")
        if self.unmasked_from is not None and step >= self.unmasked_from:
            return True, False, False
        masked = config.mask_ratio[1] > 0
        if config.interleaved:
            return step % 2 == 0, step % 2 == 1, masked
        return True, config.mask_weight > 0, masked

    def _drop(
        self, values: Tensor | None, null: int, generator: torch.Generator, ours: slice, total: int
    ) -> Tensor | None:
        """Every class or action becomes the null one with probability label_dropout."""
        if values is None or null == 0:
            return None
        draws = torch.rand(total, *values.shape[1:], generator=generator, device=values.device)[ours]
        return values.masked_fill(draws < self.config.label_dropout, null)

    def _mask_loss(self, reconstruction: dict[int, Tensor], x: Tensor, keep: Tensor) -> Tensor:
        """Eq. 5: squared error over masked positions, mean over the offsets that exist at frame t, then over frames."""
        clips, frames, tokens, channels = x.shape
        counted = torch.ones(clips, tokens, device=x.device)
        if self.config.mask_region == "dropped":
            counted = counted.scatter(1, keep, 0.0)
        share = (counted / counted.sum(1, keepdim=True))[:, None]  # [B, 1, N]
        t = torch.arange(frames, device=x.device)
        offsets = sum((t + offset < frames).int() for offset in reconstruction)  # [T], how many exist at frame t
        weight = share / (offsets.clamp(min=1) * (offsets > 0).sum() * clips * channels)[:, None]  # [B, T, N]
        return sum(
            weighted_squared_error(
                predicted.float(), x[:, offset:].float(), weight[:, : frames - offset], backend=self.backend
            )
            for offset, predicted in reconstruction.items()
        )


class Objective(nn.Module):
    """A network and its recipe as one module whose forward is the loss: what DDP and FSDP see is one call per micro batch."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, latents: Tensor, **given) -> LossParts:
        return self.recipe.loss(self.model, latents, **given)


def _host_generator(generator: torch.Generator) -> torch.Generator:
    """For numbers that the host needs at once: `generator` itself if it is there, else one that follows from its state."""
    if generator.device.type == "cpu":
        return generator
    return _seeded(
        str(generator.get_state().tolist()), "cpu"
    )  # a GPU's state is a seed and an offset, and lies on the host
