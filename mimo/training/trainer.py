"""The training loop: AdamW, warm-up and cosine, accumulation, clipping, EMA, checkpoints, previews.

Whatever is random in step i is drawn from (seed, i), and so is its batch. A run resumed at step i therefore needs no
stored generator state to continue exactly as if it had never stopped. All ranks and micro batches of step i draw the same
numbers and use their own part: how a global batch is split changes nothing but the order of sums.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import LatentShards, batches
from mimo.errors import InputError
from mimo.network.fp8 import use_float8
from mimo.network.network import MiMo
from mimo.recipes import Objective, Recipe, step_generator
from mimo.runtime import autocast, best_device, config_tokenizer, recorded_tokenizer, to_latents
from mimo.tokenizers.weights import checksum
from mimo.training.average import EMA
from mimo.training.distributed import StopRequest, World, distribute, reducing, whole
from mimo.training.log import RunLog, Sums, only_process_in

# Changing these on --resume changes what is reported and kept, how far the run goes or how the work is shared, but no step
# already made.
MAY_DIFFER = frozenset(
    f"train.{name}"
    for name in (
        *("steps", "workers", "log_every", "save_every", "keep", "preview_every", "max_skipped"),
        *("accumulate", "strategy", "cpu_offload", "recompute"),
    )
)


class Trainer:
    """Everything that changes while training, and one step of it. All ranks make and use it alike.

    Args:
        dataset: any of mimo.data; its samples have the shape model_config.video_shape, or were encoded from such clips.
        tokenizer_weights, trust_pickle: see `config_tokenizer`. Checkpoints remember where the weights lay, and their
            checksum.
        device: None picks this process's GPU, or the CPU.
        compile: run the network through torch.compile; not with strategy "fsdp".
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
        self.model_config, self.sample_config, self.dataset = model_config, sample_config, dataset
        with self.world.together():
            self._prepare(tokenizer_weights, trust_pickle, compile)
        strategy = "ddp" if self.world.size > 1 else "none"
        if train_config.strategy == "fsdp":
            strategy = "fsdp"
        blocks = [*self.model.blocks, *(self.model.decoder.blocks if self.model.decoder else ())]
        for block in blocks:
            block.recompute = train_config.recompute
        # Which parts of the network take part in a step, and get a gradient, is not always the same.
        varies = model_config.interleaved or train_config.unmasked_steps > 0
        if self.model.decoder is not None:
            varies |= int(model_config.mask_ratio[0] * model_config.tokens) == 0
        self.objective = Objective(self.model, self.recipe)
        self.shared = distribute(
            self.objective, blocks, strategy, self.device, offload=train_config.cpu_offload, varies=varies
        )
        self.ema = EMA(self.model, train_config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=train_config.lr,
            betas=train_config.betas,
            weight_decay=train_config.weight_decay,
            fused=True,  # the one that can leave out a step on the device's word; see `train_step`
        )
        self.step = 0
        self.sums = Sums(self.device, self.world, train_config.max_skipped)
        self.waited = 0.0  # seconds in which this process waited for data, since the last record

    def _prepare(self, tokenizer_weights: str | Path | None, trust_pickle: bool, compile: bool) -> None:
        """What a rank does for itself: tokenizer, network, objective."""
        config, model_config, dataset = self.config, self.model_config, self.dataset
        shares = config.accumulate * self.world.size
        if config.batch_size % shares:
            raise InputError(
                f"batch_size={config.batch_size}: expected a multiple of accumulate={config.accumulate} "
                f"times {self.world.size} processes"
            )
        if compile and config.strategy == "fsdp":
            raise InputError("strategy='fsdp': expected 'ddp' with --compile, which takes the network in one piece")
        check_interval(model_config, config)
        self.micro_batch = config.batch_size // shares
        self.tokenizer = config_tokenizer(model_config, tokenizer_weights, trust_pickle=trust_pickle)
        sha256 = checksum(self.tokenizer)
        if isinstance(dataset, LatentShards):
            cut = {"interval": config.interval, "flip": config.flip}
            dataset.require_made_by(model_config.tokenizer, self.tokenizer, sha256, **cut)
        self.configs = {
            "model": model_config.to_dict(),
            "train": config.to_dict(),
            "sample": self.sample_config.to_dict(),
            "data": repr(dataset),
            "tokenizer": {"weights": _absolute(tokenizer_weights), "sha256": sha256},
        }
        torch.manual_seed(config.seed)
        self.model = MiMo(model_config)  # in the host's memory, with the weights of one process alone; see `distribute`
        if config.precision == "fp8":
            use_float8(self.model, self.device)
        if compile:  # the device's half of the network; the host's half plans each batch
            self.model.run = torch.compile(self.model.run, fullgraph=True)
        self.tokenizer.to(self.device)
        unmasked_from = config.steps - config.unmasked_steps if config.unmasked_steps else None
        self.recipe = Recipe(model_config, unmasked_from=unmasked_from)

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

    def fetch(self) -> list[dict[str, Tensor]]:
        """This rank's micro batches of the step, as the loader gives them; InputError if they do not fit the network."""
        start = time.monotonic()
        micro_batches = [next(self.stream) for _ in range(self.config.accumulate)]
        self.waited += time.monotonic() - start
        for batch in micro_batches:
            check_conditions(batch, self.model_config)
        return micro_batches

    def train_step(self, micro_batches: list[dict[str, Tensor]] | None = None) -> None:
        """One optimiser step: its loss, gradient norm and token count are added to `sums`.

        micro_batches: as `fetch` gives them, and by default does. Whatever can be wrong with them alone has to be known
            before the step begins: in the middle of it the other ranks would wait.
        """
        micro_batches = micro_batches or self.fetch()
        config, world = self.config, self.world
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        for micro, batch in enumerate(micro_batches):
            place = {
                "generator": step_generator(config.seed, self.step, self.device),
                "step": self.step,
                "first": (micro * world.size + world.rank) * self.micro_batch,  # as mimo.data.loader deals out clips
                "total": config.batch_size,
            }
            latents, conditions = to_latents(batch, self.tokenizer, self.model_config, self.device)
            with reducing(self.shared, last=micro + 1 == config.accumulate):
                with autocast(self.device, config.precision):
                    loss = self.shared(latents, **conditions, **place)
                (loss.total / config.accumulate).backward()
            self.sums.add(loss.diffusion, loss.mask, config.accumulate, latents.shape[:4].numel() * world.size)
        grad_norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        self.step += 1
        # A step with found_inf set changes neither weights, moments and their counts nor the average. All of them read it on
        # the device, so that nobody waits for the norm.
        self.optimizer.found_inf = self.sums.end_step(self.step, grad_norm).to(grad_norm.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, self.optimizer.found_inf)

    def averaged(self) -> MiMo | None:
        """A network with the averaged weights, whole, to sample from: all ranks have to call it, the first one gets it."""
        tensors = {}
        for name, average in self.ema.tensors.items():
            tensor = whole(average)  # what the other ranks gather they let go again, one by one
            if self.world.leads:
                tensors[name] = tensor.to(self.device)
        if not self.world.leads:
            return None
        with torch.device("meta"):
            model = MiMo(self.model_config)
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_(False).eval()

    def save(self, run: Path, *, keep_every: int | None = None) -> Path:
        """Write a checkpoint, each rank its part."""
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.tensors,
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.model),
        }
        state = {
            "configs": self.configs,
            "ema_updates": int(self.ema.updates),
            "rng": {"seed": self.config.seed, "step": self.step},  # all there is: see the top of this file
        }
        keep = {"keep_last": self.config.keep, "keep_every": keep_every}
        return checkpoint.save(run, self.step, tensors, state, world=self.world, **keep)

    def load(self, folder: Path) -> list[str]:
        """Continue from a step folder made with the same configurations (up to MAY_DIFFER), by however many ranks. Returns
        what the user should know."""
        state = checkpoint.read_state(folder)
        kinds = {"model": MiMoConfig, "train": TrainConfig}  # fields younger than the checkpoint have their old meaning
        here, there = (
            {part: kind.from_dict(configs[part]).to_dict() for part, kind in kinds.items()}
            | {"tokenizer": recorded_tokenizer(configs)["sha256"]}
            for configs in (self.configs, state["configs"])
        )
        checkpoint.require_same_config(there, here, folder, may_differ=MAY_DIFFER)
        shards = {"state": state, "like": dict(self.model.named_parameters()), "world": self.world}
        checkpoint.load_module(self.model, checkpoint.read_tensors(folder, "model", **shards), folder)
        checkpoint.load_tensors(self.ema.tensors, checkpoint.read_tensors(folder, "ema", **shards), folder)
        moments = checkpoint.read_tensors(folder, "optimizer", **shards)
        checkpoint.load_optimizer(self.optimizer, self.model, moments, folder)
        self.step = state["step"]
        self.ema.updates.fill_(state["ema_updates"])
        then, now = (configs["data"] for configs in (state["configs"], self.configs))
        if then == now:
            return []
        return [f"the data was {then} and is {now} now: with other clips it is another run from here"]


def train(
    trainer: Trainer,
    out: Path | None = None,
    *,
    resume: bool = False,
    keep_every: int | None = None,
    preview: Callable[[Trainer], list[Path]] | None = None,
    heading: str = "",
) -> list[dict[str, float]]:
    """Train to config.steps and return the records of the log, one per interval.

    With a run folder, SIGTERM and SIGINT end training early, with a checkpoint; SIGINT then goes on as KeyboardInterrupt.

    Args:
        out: run folder for checkpoints, log.jsonl and TensorBoard; None writes nothing.
        resume: continue from the newest whole checkpoint in `out`; without it, a folder that has one is an error.
        keep_every: checkpoints whose step is a multiple of it are never deleted.
        preview: called every config.preview_every steps; returns the files it wrote.
        heading: printed when the run folder and the first batch are known to fit.

    Raises: InputError for a run folder, checkpoint or dataset that does not fit, or when another process trains in the
        run folder, and when a loss stops being finite.
    """
    config, world = trainer.config, trainer.world
    folder = out if world.leads else None
    with (
        nullcontext([]) if out is None else _open_run(trainer, out, resume) as notes,
        StopRequest(enabled=out is not None, world=world) as stop,
        RunLog(folder, config.steps, start=trainer.step, device=trainer.device, shown=world.leads) as log,
    ):
        records, logged, saved, stopped = [], trainer.step, trainer.step, 0
        for note in notes:
            log.say(note)
        trainer.start_data()
        while trainer.step < config.steps and not stopped:
            micro_batches, stopped = _next_batches(trainer, stop)
            if not stopped:
                if heading:
                    log.say(heading)
                    heading = ""
                trainer.train_step(micro_batches)
                log.advance()
            step, ends = trainer.step, stopped or trainer.step == config.steps
            logs = step > logged and (ends or step % config.log_every == 0)
            saves = step > saved and out is not None and (ends or step % config.save_every == 0)
            if logs or saves or trainer.device.type == "cpu":  # on a GPU this waits for the device
                trainer.sums.require_finite()
            if logs:
                records.append(log.write(step, *trainer.sums.take(), learning_rate(step - 1, config), trainer.waited))
                logged, trainer.waited = step, 0.0
            with log.aside():
                if saves:
                    log.say(f"saved {trainer.save(out, keep_every=keep_every)}")
                    saved = step
                previews = preview and not stopped and config.preview_every and step % config.preview_every == 0
                if previews and not world.agree(stop.signal):
                    for path in preview(trainer):
                        log.say(f"preview {path}")
        if stopped:
            name = signal.Signals(stopped).name
            log.say(f"stopped by {name} after step {trainer.step}: --resume continues from there")
    if stopped == signal.SIGINT:  # whoever pressed it also wants what would come next not to come
        raise KeyboardInterrupt
    return records


def _next_batches(trainer: Trainer, stop: StopRequest) -> tuple[list[dict[str, Tensor]], int]:
    """The micro batches of the next step, or the number of the signal on which all ranks stop before it.

    The ranks agree before every step, as in the middle of one nobody can leave: bad input and signals reach one rank
    first. They exchange two numbers between hosts, while the GPUs still run the step before.
    """
    micro_batches, error = [], None
    try:
        if not stop.signal:
            micro_batches = trainer.fetch()
    except ValueError as caught:
        error = caught
    except (RuntimeError, OSError, EOFError):
        if not stop.signal:  # else it also reached the worker processes that the next batch comes from
            raise
    return micro_batches, trainer.world.agree(stop.signal, error)


@contextmanager
def _open_run(trainer: Trainer, out: Path, resume: bool) -> Iterator[list[str]]:
    """Load the newest checkpoint if `resume`, and keep others from the folder; gives what the user should know."""
    world, lock = trainer.world, nullcontext()
    with world.together():
        if world.leads and not resume and checkpoint.step_folders(out):
            raise InputError(f"{out} already holds checkpoints: pass --resume to continue it, or another --out")
    newest, passed_over = checkpoint.latest(out, world=world)
    with world.together():
        if world.leads and newest is None and passed_over:
            raise InputError(
                f"{out} has no whole checkpoint to resume from: {passed_over[0]}; another --out begins anew"
            )
    notes = [f"passed over: {reason}" for reason in passed_over]
    with world.together():
        if newest is not None:
            notes += [*trainer.load(newest), f"resuming from {newest}"]
            if trainer.step > trainer.config.steps:
                raise InputError(
                    f"steps={trainer.config.steps}: {out} is at step {trainer.step} already, expected no less"
                )
            if trainer.step == trainer.config.steps:
                notes.append(f"nothing to do: step {trainer.step} of {trainer.config.steps} is reached")
        elif resume:
            notes.append(f"{out} has no checkpoint yet: starting from step 0")
        if world.leads:
            try:
                out.mkdir(parents=True, exist_ok=True)
                lock = only_process_in(out)
            except OSError as error:
                raise InputError(f"cannot write to the run folder {out}: {error.strerror}") from None
            notes += [f"deleted {folder}, left by an interrupted save" for folder in checkpoint.delete_unfinished(out)]
    with lock:
        yield notes


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, ...: linear from lr / warmup to lr over `warmup` steps, then half a cosine to lr_end, or lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - 1 - config.warmup))
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def check_interval(config: MiMoConfig, training: TrainConfig) -> None:
    """ValueError unless the clips' intervals are drawn and known where the network is told them. A network that is not told
    may still train on drawn ones: MAGI's ablation."""
    if not config.max_interval:
        return
    if isinstance(training.interval, int):
        raise ValueError(
            f"interval={training.interval}: expected a pair LOW HIGH, as the network is told it (max_interval="
            f"{config.max_interval})"
        )
    if training.interval[1] > config.max_interval:
        raise ValueError(f"interval={training.interval}: expected at most max_interval={config.max_interval}")


def _absolute(weights: str | Path | None) -> str | None:
    """A path that holds in every folder; a hub id stays as it is."""
    if weights is None:
        return None
    return str(Path(weights).resolve()) if Path(weights).exists() else str(weights)


def check_conditions(batch: dict[str, Tensor], config: MiMoConfig) -> None:
    """InputError for a batch of the loader that lacks what the network is conditioned on, or holds values out of range."""
    for condition, field, first in (
        ("label", "num_classes", 0),
        ("actions", "num_actions", 0),
        ("interval", "max_interval", 1),
    ):
        count = getattr(config, field)
        if count and condition not in batch:
            raise InputError(f"{field}={count}, but the clips have no {condition}")
        if count and not 0 <= (worst := _farthest(batch[condition] - first, count)) < count:
            raise InputError(f"{condition} {worst + first} in the data, expected {first}..{first + count - 1}")


def _farthest(values: Tensor, count: int) -> int:
    """The value that lies outside 0..count - 1, if one does."""
    low, high = (int(bound) for bound in values.aminmax())
    return low if low < 0 else high
