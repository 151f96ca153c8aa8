"""What recipes share: the loss of a step as frames, network, loss; and randomness that is a function of seed and
step."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.diffusion import build_schedule, compute_loss_weight
from mimo.network.cross import Text
from mimo.network.frames import FrameBatch, Kind, to_tokens
from mimo.recipes.repa import Alignment
from mimo_kernels import weighted_squared_error


class LossParts(NamedTuple):
    """Scalars: `total` to differentiate, `diffusion` (L_diff), `mask` (L_mask) and `alignment` (REPA's) to show; a part
    not computed is 0, or None."""

    total: Tensor
    diffusion: Tensor
    mask: Tensor
    alignment: Tensor | None = None


class HistoryPolicy(NamedTuple):
    """How sampling puts a finished frame into history.

    timestep: it goes through AdaLN at this timestep, with class and action, when its keys and values are cached; None:
        as the clean frames of training.
    coarse_timestep: what a finished frame is told that has become a coarse one, for networks that have them.
    conditions: of "labels", "actions" and "text", what changes its keys and values. A guidance branch that is told the
        null value of one of them sees a history of its own.
    at_once: there is no history; all frames are made together.
    kind: what it is to those that see it, see mimo.network.frames.
    """

    timestep: float | None = None
    conditions: frozenset[str] = frozenset()
    at_once: bool = False
    kind: Kind = "clean"
    coarse_timestep: float | None = None


def conditions_of(config: MiMoConfig) -> frozenset[str]:
    """All that a network is conditioned on."""
    counts = {"labels": config.num_classes, "actions": config.num_actions, "text": config.text_dim}
    return frozenset(name for name, count in counts.items() if count)


class Draws:
    """The random numbers of a step. A batch may be a part of a larger one, split over ranks and micro batches: all
    draws are those of the whole, of which a part uses its own, so a clip meets the same noise however the batch is
    split. (To draw what the other parts use costs little beside the network, and takes no more launches.)

    Args:
        generator: on the device of the batch, as `step_generator` makes it, for every part anew.
        clips: of this part. first, total: it is clips first .. first + clips - 1 of a batch of `total`.
    """

    def __init__(self, generator: torch.Generator, clips: int, first: int = 0, total: int | None = None) -> None:
        self.generator, self.device = generator, generator.device
        self.host = _host_generator(generator)  # for numbers that the host needs at once
        self.ours, self.total = slice(first, first + clips), total or clips

    def on_host(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), [B, *shape] on the host."""
        return torch.rand(self.total, *shape, generator=self.host)[self.ours]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), [B, *shape] on the device."""
        return torch.rand(self.total, *shape, generator=self.generator, device=self.device)[self.ours]

    def normal_like(self, x: Tensor) -> Tensor:
        """x [B, ...] -> N(0, 1) of its shape and dtype."""
        noise = torch.randn(self.total, *x.shape[1:], generator=self.generator, device=self.device, dtype=x.dtype)
        return noise[self.ours]

    def nulled(self, values: Tensor | None, null: int, probability: float) -> Tensor | None:
        """Every class or action becomes the null one with a probability. null: 0 is a network without them."""
        if values is None or null == 0:
            return None
        return values.masked_fill(self.uniform(*values.shape[1:]) < probability, null)


class Prepared(NamedTuple):
    """The frames of a batch and what their loss needs.

    batch: what the network gets. reconstruct: the decoder takes part.
    target: [B, T, N, C], what the network is to predict of the frames that are not clean. weight: fp32 [B, T], of every
        squared error of a frame.
    latents, keep: clean [B, T, N, C] and the tokens that are kept, for a loss of the reconstruction.
    """

    batch: FrameBatch
    target: Tensor | None = None
    weight: Tensor | None = None
    latents: Tensor | None = None
    keep: Tensor | None = None
    reconstruct: bool = False


class Recipe(ABC):
    """A system of the papers: `frames`, `loss_of` and `history_policy`.

    Args:
        config: MiMoConfig.
        unmasked_from: from this step on nothing is masked and L = L_diff (fine-tuning at the end, for high mask
            ratios).
        own_history_from: from this step on history is partly what the network itself makes of it; see
            `TrainConfig.own_history_steps`.
        backend: of the losses; "reference" is plain PyTorch.

    Raises ValueError for a config that the recipe cannot serve.

    teacher_forcing: noisy frames stand beside the clean ones that are their history.
    aligns: of "history" and "future", the frames whose hidden states REPA can align: whole clips of a latent's grid.
    """

    teacher_forcing: ClassVar[bool] = False
    aligns: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        config: MiMoConfig,
        *,
        unmasked_from: int | None = None,
        own_history_from: int | None = None,
        backend: str = "auto",
    ) -> None:
        self.config, self.unmasked_from, self.own_history_from = config, unmasked_from, own_history_from
        self.backend = backend
        self.schedule = build_schedule(config.parameterization, config.prediction, config.timestep_mean)
        self.check(config)
        self.check_history(config)
        self.check_alignment(config)
        self.alignment = Alignment(config, backend) if config.repa_weight > 0 else None
        if unmasked_from is not None and config.mask_ratio[1] == 0:
            raise ValueError(f"unmasked_steps: expected 0, as the recipe {config.recipe!r} masks nothing here")

        if own_history_from is not None and not self.teacher_forcing:
            raise ValueError(f"own_history_steps: expected 0, as the recipe {config.recipe!r} has no clean history")

    @classmethod
    @abstractmethod
    def check(cls, config: MiMoConfig) -> None:
        """ValueError for a config that the recipe cannot serve."""

    @classmethod
    def check_history(cls, config: MiMoConfig) -> None:
        """ValueError for what is asked of clean frames beside noisy ones, by a recipe without them."""
        if not cls.teacher_forcing:
            cls.require(config, history_noise=0.0, residual=False, recent_frames=0)

    @classmethod
    def check_alignment(cls, config: MiMoConfig) -> None:
        """ValueError for frames that the recipe has none of, or whose hidden states it cannot align."""
        if config.repa_weight == 0:
            return
        if not cls.aligns:
            cls.require(config, repa_weight=0.0)
        wanted = {"history", "future"} if config.repa_frames == "both" else {config.repa_frames}
        if not wanted <= cls.aligns:
            expected = "both" if len(cls.aligns) == 2 else next(iter(cls.aligns))
            cls.require(config, repa_frames=expected)

    @classmethod
    @abstractmethod
    def history_policy(cls, config: MiMoConfig) -> HistoryPolicy:
        """How sampling puts a finished frame into history."""

    @abstractmethod
    def frames(self, x: Tensor, conditions: dict[str, Any], draws: Draws, step: int | None) -> Prepared:
        """The frames of a batch.

        Args:
            x: clean clips [B, T, N, C].
            conditions: labels [B], actions [B, T], intervals [B], text of B clips, or None each.
            draws: all randomness.
            step: number of the step, where it is known.
        """

    def prepare(
        self, model: nn.Module, x: Tensor, conditions: dict[str, Any], draws: Draws, step: int | None
    ) -> Prepared:
        """`frames`, for those that need the network too."""
        return self.frames(x, conditions, draws, step)

    def loss_of(self, output, prepared: Prepared) -> LossParts:
        """The loss of what the network made of the frames: here L_diff, the weighted squared error."""
        diffusion = self.diffusion_loss(output.velocity, prepared)
        return LossParts(diffusion, diffusion.detach(), diffusion.new_zeros(()))

    def loss(
        self,
        model: nn.Module,
        latents: Tensor,
        *,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        text: Text | None = None,
        features: Tensor | None = None,
        generator: torch.Generator,
        step: int | None = None,
        first: int = 0,
        total: int | None = None,
    ) -> LossParts:
        """The loss of one batch. All randomness comes from `generator`; nothing here waits for the device.

        Args:
            model: MiMo, or a wrapper that calls as it does.
            latents: clean clips [B, T, H, W, C].
            labels: int64 [B].
            actions: int64 [B, T].
            intervals: int64 [B], for a network with max_interval > 0.
            text: of B clips, for a network with text_dim > 0.
            features: [B, T', H', W', E], what a frozen encoder makes of the clips, for a config with repa_weight > 0.
            generator, first, total: see `Draws`; total=None is this batch alone.
            step: number of the step; only what alternates or ends depends on it, and needs it.
        """
        draws = Draws(generator, len(latents), first, total)
        given = {"labels": labels, "actions": actions, "intervals": intervals, "text": text}
        prepared = self.prepare(model, to_tokens(latents, self.config.patch), given, draws, step)
        if self.alignment is None:
            return self.loss_of(model(prepared.batch, reconstruct=prepared.reconstruct), prepared)
        taps = self.alignment.taps(prepared.batch.frames)
        output = model(prepared.batch, reconstruct=prepared.reconstruct, taps=taps)
        parts = self.loss_of(output, prepared)
        if not taps:  # nothing of what is aligned is in this step
            return parts
        (clips, frames, height, width), patch = latents.shape[:4], self.config.patch
        shape = (clips, frames, height // patch, width // patch)
        assert isinstance(model.projection, nn.Module)  # as repa_weight > 0
        alignment = self.alignment.loss(model.projection, output.features, prepared.keep, features, shape)
        return parts._replace(total=parts.total + self.config.repa_weight * alignment, alignment=alignment.detach())

    def diffusion_loss(self, velocity: Tensor, prepared: Prepared) -> Tensor:
        """sum over clips and frames of weight * squared error."""
        assert prepared.target is not None  # this step optimises L_diff
        return weighted_squared_error(velocity.float(), prepared.target.float(), prepared.weight, backend=self.backend)

    def weight(self, x: Tensor, t: Tensor, snr: Tensor | None = None) -> Tensor:
        """fp32 [B, T]: the mean over all elements, times what the schedule weighs errors at timesteps t [B, T] with and
        (fused) min-SNR where the config says so. snr: fp32 [B, T]; None: that of t."""
        config, snr = self.config, self.schedule.snr(t) if snr is None else snr
        weight = x.new_full(x.shape[:2], 1 / x.numel(), dtype=torch.float32)
        if (of_errors := self.schedule.error_weight(t)) is not None:
            weight = weight * of_errors
        if config.min_snr_gamma is None:
            return weight
        return weight * compute_loss_weight(snr, config.min_snr_gamma, "v_prediction", config.min_snr_decay)

    def dropped_history(self, draws: Draws, frames: int) -> Tensor | None:
        """bool [B, T] on the host: the frames that see themselves alone, for history guidance."""
        if self.config.history_dropout == 0:
            return None
        return draws.on_host(frames) < self.config.history_dropout

    @staticmethod
    def require(config: MiMoConfig, **expected) -> None:
        """ValueError unless the fields have these values."""
        for name, value in expected.items():
            if getattr(config, name) != value:
                found = getattr(config, name)
                raise ValueError(f"{name}={found!r}: expected {value!r} with recipe={config.recipe!r}")


NOTHING_MASKED: dict[str, Any] = {"mask_ratio": (0.0, 0.0), "mask_weight": 0.0, "interleaved": False}


class Objective(nn.Module):
    """A network and its recipe as one module whose forward is the loss: what DDP and FSDP see is one call per micro
    batch."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, latents: Tensor, **given) -> LossParts:
        return self.recipe.loss(self.model, latents, **given)


def step_generator(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """The random numbers of one step, over all ranks and micro batches: a function of the arguments and nothing
    else."""
    return _seeded(f"{seed}/{step}", device)


def _seeded(text: str, device: torch.device | str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _host_generator(generator: torch.Generator) -> torch.Generator:
    """For numbers that the host needs at once: `generator` itself if it is there, else one that follows from its state.
    (A GPU's state is a seed and an offset, and lies on the host.)"""
    if generator.device.type == "cpu":
        return generator
    return _seeded(str(generator.get_state().tolist()), "cpu")
