"""Training a DC-AE, as FAR does: L1 + LPIPS first, then, with a frozen encoder, a patch discriminator too."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mimo import checkpoint, records
from mimo.config import TokenizerTraining
from mimo.data import batches, to_float
from mimo.errors import InputError
from mimo.tokenizers.dcae import DCAETokenizer, autoencoder_class, far_config
from mimo.tokenizers.losses import LPIPS, adaptive_weight, patch_discriminator

log = logging.getLogger("mimo.tokenizers")

# Settings that a resumed run may change.
_FREE = frozenset(("steps", "workers", "log_every", "save_every"))


@dataclass
class _State:
    config: dict[str, Any]
    ema_updates: int
    OTHER_KEYS: ClassVar[bool] = True


class TokenizerTrainer:
    """A DC-AE, its average, and one step of its training."""

    def __init__(self, config: TokenizerTraining, dataset, device: torch.device | str = "cpu"):
        self.config, self.dataset, self.device, self.step = config, dataset, torch.device(device), 0
        torch.manual_seed(config.seed)
        self.model = autoencoder_class()(**far_config(config.compression, config.channels, config.width))
        self.model = self.model.to(self.device).train()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
        self.lpips = None
        if config.lpips_vgg is not None and config.lpips_linear is not None:
            self.lpips = LPIPS(config.lpips_vgg, config.lpips_linear).to(self.device)
        self.disc = patch_discriminator().to(self.device).train() if config.disc_weight > 0 else nn.Module()
        self.optimizer, self.disc_optimizer = (self._optimizer(module) for module in (self.model, self.disc))

    def _optimizer(self, module: nn.Module) -> torch.optim.AdamW | None:
        parameters = list(module.parameters())
        return torch.optim.AdamW(parameters, self.config.lr, (0.5, 0.9), weight_decay=0) if parameters else None

    def train_step(self, video: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on frames uint8 [B, F, H, W, 3]; returns the parts of the loss."""
        x = to_float(video.to(self.device)).flatten(0, 1)
        adversarial = self.disc_optimizer is not None and self.step >= self.config.disc_start
        self.model.encoder.requires_grad_(not adversarial)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            y = self.model.decode(self.model.encode(x).latent).sample
        y = y.float()
        parts = {"l1": F.l1_loss(y, x)}
        if self.lpips is not None:
            parts["lpips"] = self.config.perceptual_weight * self.lpips(y, x)
        if adversarial:
            self.disc.requires_grad_(False)
            reconstruction, fooling = _total(parts), -self.disc(y).mean()
            last = [p for p in self.model.decoder.conv_out.parameters() if p.dim() == 4][-1]
            parts["adversarial"] = self.config.disc_weight * adaptive_weight(reconstruction, fooling, last) * fooling
        self._update(self.optimizer, _total(parts), self.model)
        if adversarial:
            self.disc.requires_grad_(True)
            real, fake = self.disc(x), self.disc(y.detach())
            parts["discriminator"] = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            self._update(self.disc_optimizer, parts["discriminator"], self.disc)
        self.ema.update_parameters(self.model)
        self.step += 1
        return {name: value.detach() for name, value in parts.items()} | {"mse": (y.detach() - x).square().mean()}

    def _update(self, optimizer: torch.optim.Optimizer | None, loss: torch.Tensor, module: nn.Module) -> None:
        if not torch.isfinite(loss):
            raise InputError(f"the loss of step {self.step} is {loss.item()}: lower lr ({self.config.lr})")
        assert optimizer is not None, "a module with parameters has one"
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), self.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def tokenizer(self, count: int = 8) -> DCAETokenizer:
        """The averaged model, scaled so that latents of `count` batches have unit root mean square."""
        tokenizer = DCAETokenizer(self.ema.module, scale=1.0)
        stream = batches(self.dataset, self.config.batch_size, seed=self.config.seed + 1)
        latents = [tokenizer.encode(to_float(next(stream)["video"].to(self.device))) for _ in range(count)]
        tokenizer.scale = 1.0 / torch.cat([z.square().flatten() for z in latents]).mean().sqrt().item()
        return tokenizer

    def save(self, run: Path) -> Path:
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "disc": self.disc.state_dict(),
        }
        for name, optimizer, module in self._optimizers():
            tensors[name] = checkpoint.optimizer_tensors(optimizer, module)
        state = {"config": self._settings(), "ema_updates": int(self.ema.n_averaged)}
        return checkpoint.save(run, self.step, tensors, state, keep_last=2)

    def load(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        records.convert(state, _State, f"checkpoint {folder}: state.json")
        checkpoint.require_same_config(state["config"], self._settings(), folder, may_differ=_FREE)
        for name, module in (("model", self.model), ("ema", self.ema.module), ("disc", self.disc)):
            checkpoint.load_module(module, checkpoint.read_tensors(folder, name, state), folder)
        for name, optimizer, module in self._optimizers():
            checkpoint.load_optimizer(optimizer, module, checkpoint.read_tensors(folder, name, state), folder)
        self.ema.n_averaged.fill_(state["ema_updates"])
        self.step = state["step"]

    def _optimizers(self):
        both = (("optimizer", self.optimizer, self.model), ("disc_optimizer", self.disc_optimizer, self.disc))
        return [entry for entry in both if entry[1] is not None]

    def _settings(self) -> dict:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.config).items()} | {
            "data": repr(self.dataset)
        }


def _total(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the losses, from left to right."""
    total, *others = parts.values()
    for part in others:
        total = total + part
    return total


def train_tokenizer(
    dataset, out: str | Path, config: TokenizerTraining, *, resume: bool = False, device: torch.device | str = "cpu"
) -> Path:
    """Trains to config.steps and writes the tokenizer; returns its folder, which `build_tokenizer("dcae")` reads.

    Args:
        dataset: any of mimo.data, with samples of config.frames frames.
        out: run folder: checkpoints/ and, at the end, tokenizer/.
        resume: continue from the newest whole checkpoint in `out`, exactly as if never stopped.
    """
    out = Path(out)
    sides = dataset.height, dataset.width
    if any(side % config.compression for side in sides):
        raise InputError(
            f"frames of {sides[0]} x {sides[1]}: expected sides that compression {config.compression} divides"
        )
    if checkpoint.step_folders(out) and not resume:
        raise InputError(f"{out} already holds checkpoints: pass --resume to continue it, or another --out")
    trainer = TokenizerTrainer(config, dataset, device)
    newest, passed_over = checkpoint.latest(out)
    if newest is None and passed_over:
        raise InputError(f"{out} has no whole checkpoint to resume from: {passed_over[0]}; another --out begins anew")
    for reason in passed_over:
        log.warning("passed over: %s", reason)
    if newest is not None:
        trainer.load(newest)
    checkpoint.delete_unfinished(out)
    stream = batches(
        dataset,
        config.batch_size,
        seed=config.seed,
        start_step=trainer.step,
        num_workers=config.workers,
        pin_memory=trainer.device.type == "cuda",
    )
    began, first = time.monotonic(), trainer.step
    while trainer.step < config.steps:
        parts = trainer.train_step(next(stream)["video"])
        ends = trainer.step == config.steps
        if ends or trainer.step % config.log_every == 0:
            psnr = -10 * torch.log10(parts.pop("mse") / 4).item()
            eta = (time.monotonic() - began) / (trainer.step - first) * (config.steps - trainer.step)
            values = "  ".join(f"{name} {value.item():.4f}" for name, value in parts.items())
            print(f"step {trainer.step}/{config.steps}  {values}  PSNR {psnr:.2f} dB  ETA {eta:.0f} s", flush=True)
        if ends or trainer.step % config.save_every == 0:
            trainer.save(out)
    tokenizer = trainer.tokenizer()
    tokenizer.save(out / "tokenizer")
    print(f"wrote {out / 'tokenizer'}, scale {tokenizer.scale:.4f}", flush=True)
    return out / "tokenizer"
