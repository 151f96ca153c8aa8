"""The training loop: AdamW, warm-up and cosine, accumulation, clipping, EMA, checkpoints, previews.

Whatever is random in step i is drawn from (seed, i), and so is its batch. A run resumed at step i therefore needs no
stored generator state to continue exactly as if it had never stopped.
"""

import math
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import LatentShards, batches, to_float
from mimo.errors import InputError
from mimo.model import MiMo
from mimo.recipes import LossParts, Recipe, make_ema, step_generator
from mimo.runlog import RunLog
from mimo.tokenizers import build_tokenizer
from mimo.tokenizers.weights import checksum

# Changing these on --resume changes what is reported and kept, or how far the run goes, but no step already made.
MAY_DIFFER = frozenset(
    f"train.{name}" for name in ("steps", "workers", "log_every", "save_every", "keep", "preview_every")
)


@dataclass(frozen=True)
class World:
    """This process among those that train together. The only place that asks: data, seeds and output follow from it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes checkpoints, logs and previews."""
        return self.rank == 0


class Trainer:
    """Everything that changes while training, and one step of it.

    Args:
        dataset: any of mimo.data; its samples have the shape model_config.video_shape, or were encoded from such clips.
        tokenizer_weights, trust_pickle: see `config_tokenizer`. Checkpoints remember where the weights lay, and their
            checksum.
        device: None picks the first GPU, or the CPU.
        compile: run the network through torch.compile.
    """

    def __init__(
        self,
        model_config: MiMoConfig,
        train_config: TrainConfig,
        sample_config: SampleConfig,
        dataset: Any,
        *,
        tokenizer_weights: str | Path | None = None,
        trust_pickle: bool = False,
        device: torch.device | None = None,
        compile: bool = False,
    ):
        self.config, self.world, self.device = train_config, World.current(), device or best_device()
        shares = train_config.accumulate * self.world.size
        if train_config.batch_size % shares:
            raise InputError(
                f"batch_size={train_config.batch_size}: expected a multiple of accumulate={train_config.accumulate} "
                f"times {self.world.size} processes"
            )
        self.model_config, self.sample_config, self.dataset = model_config, sample_config, dataset
        self.micro_batch = train_config.batch_size // shares
        self.tokenizer = config_tokenizer(model_config, tokenizer_weights, trust_pickle=trust_pickle)
        sha256 = checksum(self.tokenizer)
        if isinstance(dataset, LatentShards):
            cut = {"interval": train_config.interval, "flip": train_config.flip}
            dataset.require_made_by(model_config.tokenizer, self.tokenizer, sha256, **cut)
        self.configs = {
            "model": model_config.to_dict(),
            "train": train_config.to_dict(),
            "sample": sample_config.to_dict(),
            "data": repr(dataset),
            "tokenizer": {"weights": _absolute(tokenizer_weights), "sha256": sha256},
        }
        torch.manual_seed(train_config.seed)
        self.model = MiMo(model_config).to(self.device)
        self.ema = make_ema(self.model, train_config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=train_config.lr,
            betas=train_config.betas,
            weight_decay=train_config.weight_decay,
            fused=self.device.type == "cuda",
        )
        if compile:  # the device's half of the network; the host's half plans each batch
            self.model.run = torch.compile(self.model.run, fullgraph=True)
        self.tokenizer.to(self.device)
        unmasked_from = train_config.steps - train_config.unmasked_steps if train_config.unmasked_steps else None
        self.recipe = Recipe(model_config, unmasked_from=unmasked_from)
        self.step = 0
        self.sums = _Sums(self.device)

    def start_data(self) -> None:
        """Begin, or after `load` begin again, at the batch of the current step."""
        self.stream = batches(
            self.dataset,
            self.micro_batch,
            seed=self.config.seed,
            start_step=self.step * self.config.accumulate,
            num_workers=self.config.workers,
            rank=self.world.rank,
            world_size=self.world.size,
            pin_memory=self.device.type == "cuda",
        )

    def train_step(self) -> None:
        """One optimiser step: its loss, gradient norm and token count are added to `sums`."""
        micro_batches = [next(self.stream) for _ in range(self.config.accumulate)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        for micro, batch in enumerate(micro_batches):
            part = micro * self.world.size + self.world.rank
            generator = step_generator(self.config.seed, self.step, self.device, part)
            latents, conditions = encode(batch, self.tokenizer, self.model_config, self.device)
            with autocast(self.device, self.config.precision):
                loss = self.recipe.loss(self.model, latents, **conditions, generator=generator, step=self.step)
            (loss.total / self.config.accumulate).backward()
            self.sums.add(loss, self.config.accumulate, latents.shape[:4].numel() * self.world.size)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        self.step += 1
        self.sums.end_step(self.step, grad_norm)

    def save(self, run: Path, *, keep_every: int | None = None) -> Path:
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.model),
        }
        state = {
            "configs": self.configs,
            "ema_updates": int(self.ema.n_averaged),
            "rng": {"seed": self.config.seed, "step": self.step},  # all there is: see the top of this file
        }
        return checkpoint.save(run, self.step, tensors, state, keep_last=self.config.keep, keep_every=keep_every)

    def load(self, folder: Path) -> None:
        """Continue from a step folder made with the same configurations (up to MAY_DIFFER)."""
        state = checkpoint.read_state(folder)
        here, there = (
            {part: configs[part] for part in ("model", "train")} | {"tokenizer": recorded_tokenizer(configs)["sha256"]}
            for configs in (self.configs, state["configs"])
        )
        checkpoint.require_same_config(there, here, folder, may_differ=MAY_DIFFER)
        checkpoint.load_module(self.model, checkpoint.read_tensors(folder, "model", state), folder)
        checkpoint.load_module(self.ema.module, checkpoint.read_tensors(folder, "ema", state), folder)
        self.ema.n_averaged.fill_(state["ema_updates"])
        optimizer_tensors = checkpoint.read_tensors(folder, "optimizer", state)
        checkpoint.load_optimizer(self.optimizer, self.model, optimizer_tensors, folder)
        self.step = state["step"]


def train(
    trainer: Trainer,
    out: Path | None = None,
    *,
    resume: bool = False,
    keep_every: int | None = None,
    preview: Callable[[Trainer], list[Path]] | None = None,
) -> list[dict[str, float]]:
    """Train to config.steps and return the records of the log, one per interval.

    With a run folder, SIGTERM and SIGINT end training early, with a checkpoint.

    Args:
        out: run folder for checkpoints, log.jsonl and TensorBoard; None writes nothing.
        resume: continue from the newest whole checkpoint in `out`; without it, a folder that has one is an error.
        keep_every: checkpoints whose step is a multiple of it are never deleted.
        preview: called every config.preview_every steps; returns the files it wrote.

    Raises: InputError for a run folder, checkpoint or dataset that does not fit, and when a loss stops being finite.
    """
    config, leads = trainer.config, trainer.world.leads
    notes = [] if out is None else _open_run(trainer, out, resume)
    records, saved = [], trainer.step
    with (
        _StopRequest(enabled=out is not None) as stop,
        RunLog(out if leads else None, config.steps, start=trainer.step, device=trainer.device) as log,
    ):
        for note in notes:
            log.say(note)
        trainer.start_data()
        while trainer.step < config.steps and not stop.signal:
            try:
                trainer.train_step()
            except RuntimeError:
                if stop.signal:  # the signal also reached the worker processes that the next batch comes from
                    break
                raise
            log.advance()
            step = trainer.step
            ends = step == config.steps or stop.signal
            logs, saves = ends or step % config.log_every == 0, ends or step % config.save_every == 0
            if logs or saves or trainer.device.type == "cpu":  # on a GPU this waits for the device
                trainer.sums.require_finite()
            if logs:
                records.append(log.write(step, *trainer.sums.take(), learning_rate(step - 1, config)))
            with log.aside():
                if saves and out is not None and leads:
                    log.say(f"saved {trainer.save(out, keep_every=keep_every)}")
                    saved = step
                if preview and leads and config.preview_every and step % config.preview_every == 0:
                    for path in preview(trainer):
                        log.say(f"preview {path}")
        if stop.signal:
            trainer.sums.require_finite()
            if out is not None and leads and saved != trainer.step:
                log.say(f"saved {trainer.save(out, keep_every=keep_every)}")
            log.say(f"stopped by {stop.signal.name} after step {trainer.step}: --resume continues from there")
    return records


def _open_run(trainer: Trainer, out: Path, resume: bool) -> list[str]:
    """Load the newest checkpoint if `resume`; returns what the user should know."""
    newest, passed_over = checkpoint.latest(out)
    if not resume and checkpoint.step_folders(out):
        raise InputError(f"{out} already holds checkpoints: pass --resume to continue it, or another --out")
    if newest is None and passed_over:
        raise InputError(f"{out} has no whole checkpoint to resume from: {passed_over[0]}")
    notes = [f"passed over: {reason}" for reason in passed_over]
    if newest is not None:
        trainer.load(newest)
        notes.append(f"resuming from {newest}")
        if trainer.step >= trainer.config.steps:
            notes.append(f"nothing to do: step {trainer.step} of {trainer.config.steps} is reached")
    elif resume:
        notes.append(f"{out} has no checkpoint yet: starting from step 0")
    if trainer.world.leads:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run folder {out}: {error.strerror}") from None
        notes += [f"deleted {folder}, left by an interrupted save" for folder in checkpoint.delete_unfinished(out)]
    return notes


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, ...: linear from lr / warmup to lr over `warmup` steps, then half a cosine to lr_end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - 1 - config.warmup))
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_tokenizer(config: MiMoConfig, weights: str | Path | None = None, *, trust_pickle: bool = False) -> nn.Module:
    """The tokenizer of a network; ValueError when its latents are not what the network expects.

    Args:
        weights, trust_pickle: as `build_tokenizer` takes them; "dct" has none.
    """
    tokenizer = build_tokenizer(
        config.tokenizer,
        compression=config.compression,
        channels=config.channels,
        weights=weights,
        trust_pickle=trust_pickle,
    )
    shape = tokenizer.latent_shape(*config.video_shape)
    if shape != config.latent_shape:
        raise ValueError(
            f"clips of {' x '.join(map(str, config.video_shape))} give latents (frames, height, width, channels) = "
            f"{shape}, the network expects {config.latent_shape}"
        )
    if config.num_actions and tokenizer.num_frames(config.frames) != config.frames:
        raise ValueError(
            f"num_actions={config.num_actions}: expected a tokenizer with one latent frame per video frame"
        )
    return tokenizer


def recorded_tokenizer(configs: dict[str, Any]) -> dict[str, str | None]:
    """Path and checksum of the tokenizer's weights in a checkpoint; one of before they were recorded knows "dct" only."""
    return configs.get("tokenizer", {"weights": None, "sha256": None})


def _absolute(weights: str | Path | None) -> str | None:
    """A path that holds in every folder; a hub id stays as it is."""
    if weights is None:
        return None
    return str(Path(weights).resolve()) if Path(weights).exists() else str(weights)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 arithmetic over fp32 weights, or nothing for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def encode(
    batch: dict[str, Tensor], tokenizer: nn.Module, config: MiMoConfig, device: torch.device
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """A batch of the loader -> latents [B, T, H, W, C] and what the network is conditioned on, all on the device."""
    for condition, count in (("label", config.num_classes), ("actions", config.num_actions)):
        if count and condition not in batch:
            raise InputError(
                f"num_{'classes' if condition == 'label' else condition}={count}, but the clips have no {condition}"
            )
        if count and not 0 <= (worst := _farthest(batch[condition], count)) < count:
            raise InputError(f"{condition} {worst} in the data, expected 0..{count - 1}")
    if "latents" in batch:
        latents = batch["latents"].to(device, non_blocking=True)
    else:
        with torch.no_grad():
            latents = tokenizer.encode(to_float(batch["video"].to(device, non_blocking=True)))
    labels = batch["label"].to(device) if config.num_classes else None
    actions = batch["actions"].to(device) if config.num_actions else None
    return latents, {"labels": labels, "actions": actions}


def _farthest(values: Tensor, count: int) -> int:
    """The value that lies outside 0..count - 1, if one does."""
    low, high = (int(bound) for bound in values.aminmax())
    return low if low < 0 else high


class _Sums:
    """Sums since the last record, on the device: training waits for the device only when a record is due."""

    def __init__(self, device: torch.device):
        self.device = device
        self.first_bad = torch.full((4,), -1.0, dtype=torch.float64, device=device)  # step, L_diff, L_mask, grad norm
        self._clear()

    def _clear(self) -> None:
        self.total = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.current = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.counted = torch.zeros(3, dtype=torch.int64, device=self.device)
        self.tokens = 0

    def add(self, loss: LossParts, accumulate: int, tokens: int) -> None:
        self.current += torch.stack([loss.diffusion.detach(), loss.mask.detach()]) / accumulate
        self.tokens += tokens

    def end_step(self, step: int, grad_norm: Tensor) -> None:
        values = torch.cat([self.current, grad_norm.detach().double().reshape(1)])
        is_first_bad = ~values.isfinite().all() & (self.first_bad[0] < 0)
        self.first_bad = torch.where(is_first_bad, torch.cat([values.new_tensor([step]), values]), self.first_bad)
        self.total += values
        self.counted += values != 0
        self.current = torch.zeros_like(self.current)

    def require_finite(self) -> None:
        step, diffusion, mask, grad_norm = self.first_bad.tolist()
        if step >= 0:
            raise InputError(
                f"training diverged at step {step:.0f}: diffusion loss {diffusion:g}, mask loss {mask:g}, gradient "
                f"norm {grad_norm:g}; nothing after the last checkpoint is kept (a smaller learning rate may help)"
            )

    def take(self) -> tuple[dict[str, float], int]:
        """Means of the steps since the last call, and the tokens of those steps."""
        # A part that a step did not compute is exactly 0: the mean is over the steps that did.
        diffusion, mask, grad_norm = (self.total / self.counted.clamp(min=1)).tolist()
        tokens = self.tokens
        self._clear()
        return {"diffusion": diffusion, "mask": mask, "grad_norm": grad_norm}, tokens


class _StopRequest:
    """Turns the first SIGTERM or SIGINT into `signal`; a second one acts as usual, and so does every one if not enabled."""

    def __init__(self, *, enabled: bool) -> None:
        self.signal: signal.Signals | None = None
        self.enabled = (
            enabled and threading.current_thread() is threading.main_thread()
        )  # only there can handlers be set
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        if self.enabled:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
