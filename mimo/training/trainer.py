"""One training step and its state: AdamW, accumulation, clipping, EMA, checkpoints.

Whatever is random in step i is drawn from (seed, i), and so is its batch. A run resumed at step i therefore needs no
stored generator state to continue exactly as if it had never stopped. All ranks and micro batches of step i draw the
same numbers and use their own part: how a global batch is split changes nothing but the order of sums.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import Clips, LatentShards, batches
from mimo.errors import InputError
from mimo.network.fp8 import use_float8
from mimo.network.network import MiMo
from mimo.recipes import build_recipe
from mimo.recipes.base import Objective, Recipe, step_generator
from mimo.run_state import read_run_state
from mimo.runtime import autocast, best_device, config_encoder, config_tokenizer, to_features, to_latents
from mimo.stages import Stage, parse_stages, stage_at, stage_config
from mimo.tokenizers.protocols import require_posterior
from mimo.tokenizers.weights import checksum
from mimo.training.average import EMA
from mimo.training.changes import changes, require_same_run
from mimo.training.conditions import check_conditions, check_interval, check_places
from mimo.training.distributed import World, distribute, reducing, whole
from mimo.training.initial import begin_with
from mimo.training.log import Sums
from mimo.training.schedule import learning_rate


class Trainer:
    """Everything that changes while training, and one step of it. All ranks make and use it alike.

    Args:
        dataset: any of mimo.data; its samples have the shape model_config.video_shape, or were encoded from such clips.
        stages: the datasets of config.stages, which differ from `dataset` in the shape of their samples alone.
        tokenizer_weights, trust_pickle: see `config_tokenizer`. Checkpoints remember where the weights lay, and their
            checksum.
        init: a run folder, a checkpoint or an exported network whose averaged weights training begins with; its shapes
            of clips and its tokenizer may be others.
        encoder_weights: the folder of the encoder that a network with repa_weight > 0 is aligned with; not needed where
            the dataset holds its features. Remembered as the tokenizer's are.
        device: None picks this process's GPU, or the CPU.
        compile: run the network through torch.compile; not with strategy "fsdp".
        ignore: "labels", "actions": what the clips may have though the network has no place for it.
        told: what else decides the run, for checkpoints to remember: plain values, by the names of `mimo train`'s
            options.
    """

    def __init__(
        self,
        model_config: MiMoConfig,
        train_config: TrainConfig,
        sample_config: SampleConfig,
        dataset: Clips,
        *,
        stages: Sequence[Clips] = (),
        tokenizer_weights: str | Path | None = None,
        trust_pickle: bool = False,
        init: Path | None = None,
        encoder_weights: str | Path | None = None,
        device: torch.device | None = None,
        compile: bool = False,
        ignore: Collection[str] = (),
        told: dict[str, Any] | None = None,
    ):
        self.config, self.world, self.device = train_config, World.current(), device or best_device()
        self.model_config, self.sample_config, self.dataset = model_config, sample_config, dataset
        with self.world.together():
            check_places(dataset, model_config, ignore)
            self._prepare(tokenizer_weights, trust_pickle, compile)
            if init is not None:
                begin_with(self.model, init)
            self._prepare_stages(stages)
            self._prepare_encoder(encoder_weights)
        self.configs["told"] = told or {}
        strategy = "ddp" if self.world.size > 1 else "none"
        if train_config.strategy == "fsdp":
            strategy = "fsdp"
        blocks = [*self.model.blocks, *(self.model.decoder.blocks if self.model.decoder else ())]
        for block in blocks:
            block.recompute = train_config.recompute
        # Which parts of the network take part in a step, and get a gradient, is not always the same.
        varies = model_config.interleaved or train_config.unmasked_steps > 0
        varies |= model_config.coarse_stride > 0  # of whose frames a step may draw none
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
        self._enter_stage()
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
        require_posterior(self.tokenizer, model_config.tokenizer, config.posterior)
        sha256 = checksum(self.tokenizer)
        if isinstance(dataset, LatentShards):
            dataset.require_made_by(
                model_config.tokenizer,
                self.tokenizer,
                sha256,
                interval=config.interval,
                flip=config.flip,
                posterior=config.posterior,
            )
        self.configs: dict[str, Any] = {
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
            setattr(self.model, "compute", torch.compile(self.model.compute, fullgraph=True))  # noqa: B010 (a method)
        self.tokenizer.to(self.device)
        self.recipe = self._build_recipe(model_config)

    def _build_recipe(self, model_config: MiMoConfig) -> Recipe:
        config = self.config
        unmasked_from = config.steps - config.unmasked_steps if config.unmasked_steps else None
        own_from = config.steps - config.own_history_steps if config.own_history_steps else None
        return build_recipe(model_config, unmasked_from=unmasked_from, own_history_from=own_from)

    def end_at(self, steps: int, *, own_history_steps: int) -> None:
        """From here on the run is one of another length."""
        self.config = replace(self.config, steps=steps, own_history_steps=own_history_steps)
        self.configs["train"] = self.config.to_dict()
        self.recipe = self.objective.recipe = self._build_recipe(self.shape)

    def _prepare_stages(self, datasets: Sequence[Clips]) -> None:
        """The network's configuration and the dataset of every stage, and of what follows them."""
        listed = parse_stages(self.config.stages)
        if len(datasets) != len(listed):
            raise ValueError(f"{len(datasets)} datasets of stages: expected {len(listed)}, as stages has so many words")
        self.stages: dict[Stage | None, tuple[MiMoConfig, Clips]] = {None: (self.model_config, self.dataset)}
        for stage, dataset in zip(listed, datasets, strict=True):
            if isinstance(dataset, LatentShards):
                raise InputError(f"stages={stage.text!r}: expected videos, {dataset!r} holds latents of one shape")
            self.stages[stage] = stage_config(self.model_config, stage, self.tokenizer), dataset
            self.model.reshape(self.stages[stage][0])
        self.model.reshape(self.model_config)
        self.stage: Stage | None = None  # of the current step
        self.shape, self.clips = self.stages[None]

    def _enter_stage(self) -> None:
        """Network, objective and clips in the shape of the current step."""
        stage = stage_at(self.config, self.step)
        if stage == self.stage:
            return
        self.stage, (self.shape, self.clips) = stage, self.stages[stage]
        self.model.reshape(self.shape)
        self.recipe = self.objective.recipe = self._build_recipe(self.shape)

    def _prepare_encoder(self, weights: str | Path | None) -> None:
        """What hidden states are aligned with: features that the dataset holds, or an encoder beside the network."""
        config, dataset, stored = self.model_config, self.dataset, None
        if isinstance(dataset, LatentShards) and config.repa_weight > 0:
            stored = dataset.read_features(config.repa_encoder, config.repa_channels)
        self.encoder = None if stored and weights is None else config_encoder(config, weights)
        if self.encoder is not None:
            for shape, _ in self.stages.values():
                self.encoder.grid(*shape.video_shape)
        if config.repa_weight == 0:
            return
        sha256 = stored if self.encoder is None else checksum(cast(nn.Module, self.encoder))
        if stored not in (None, sha256):
            raise InputError(
                f"{dataset!r}: was encoded with an encoder of checksum {stored}, that of {weights} is {sha256}"
            )
        self.configs["encoder"] = {"weights": _absolute(weights), "sha256": sha256}
        self.encoder = None if stored or self.encoder is None else self.encoder.to(self.device)

    def start_data(self) -> None:
        """Begin, or after `load` and in a new stage begin again, at the batch of the current step."""
        self._enter_stage()
        self.stream = batches(
            self.clips,
            self.micro_batch,
            seed=self.config.seed,
            start_step=self.step * self.config.accumulate,
            num_workers=self.config.workers,
            rank=self.world.rank,
            world_size=self.world.size,
            pin_memory=self.device.type == "cuda",
        )

    def fetch(self) -> list[dict[str, Tensor]]:
        """This rank's micro batches of the step, from the loader; InputError if they do not fit the network."""
        start = time.monotonic()
        if stage_at(self.config, self.step) != self.stage:
            self.start_data()
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
            latents, conditions = to_latents(batch, self.tokenizer, self.model_config, self.device, config.posterior)
            with autocast(self.device, config.precision):
                features = to_features(batch, self.encoder, self.device)
            with reducing(self.shared, last=micro + 1 == config.accumulate):
                with autocast(self.device, config.precision):
                    loss = self.shared(latents, features=features, **conditions, **place)
                (loss.total / config.accumulate).backward()
            tokens = latents.shape[:4].numel() // self.model_config.patch**2
            self.sums.add(loss, config.accumulate, tokens * world.size)
        grad_norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        self.step += 1
        # A step with found_inf set changes neither weights, moments and their counts nor the average. All of them read
        # it on the device, so that nobody waits for the norm.
        found_inf = self.sums.end_step(self.step, grad_norm).to(grad_norm.device)
        setattr(self.optimizer, "found_inf", found_inf)  # noqa: B010 (torch reads it, and declares it nowhere)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, found_inf)

    def averaged(self) -> MiMo | None:
        """A network with the averaged weights, whole, to sample from: all ranks call it, the first one gets it."""
        tensors = {}
        for name, average in self.ema.tensors.items():
            tensor = whole(average)  # what the other ranks gather they let go again, one by one
            if self.world.leads:
                tensors[name] = tensor.to(self.device)
        if not self.world.leads:
            return None
        with torch.device("meta"):
            model = MiMo(self.shape)
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
        return checkpoint.save(
            run, self.step, tensors, state, keep_last=self.config.keep, keep_every=keep_every, world=self.world
        )

    def load(self, folder: Path) -> list[str]:
        """Continue from a step folder of the same run (see mimo.training.changes), made by however many ranks. Returns
        a line for everything that is different from here on."""
        state = read_run_state(folder)
        require_same_run(state["configs"], self.configs, folder)
        like = dict(self.model.named_parameters())
        parts = {
            part: checkpoint.read_tensors(folder, part, state, like=like, world=self.world)
            for part in ("model", "ema", "optimizer")
        }
        checkpoint.load_module(self.model, parts["model"], folder)
        checkpoint.load_tensors(self.ema.tensors, parts["ema"], folder)
        checkpoint.load_optimizer(self.optimizer, self.model, parts["optimizer"], folder)
        self.step = state["step"]
        self.ema.updates.fill_(state["ema_updates"])
        return changes(state["configs"], self.configs, self.step)


def _absolute(weights: str | Path | None) -> str | None:
    """A path that holds in every folder; a hub id stays as it is."""
    if weights is None:
        return None
    return str(Path(weights).resolve()) if Path(weights).exists() else str(weights)
