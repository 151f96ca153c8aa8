"""Every decision that could reasonably have gone another way, as typed fields.

A preset (mimo.presets) is three records with one name: what the network is and what it optimises (`MiMoConfig`), how it
is trained (`TrainConfig`) and how it is sampled (`SampleConfig`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from mimo import presets, records, stages
from mimo.recipes import RECIPES


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _require_finite(record) -> None:
    """No number of a record is NaN or infinite, those in its tuples included."""
    for field in fields(record):
        value = getattr(record, field.name)
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        _require(finite, field.name, value, "finite numbers" if len(numbers) > 1 else "a finite number")


def _require_workers(workers: int | None) -> None:
    whole = workers is None or (type(workers) is int and 0 <= workers < 2**15)
    _require(whole, "workers", workers, "a number of processes, 0 or more, or None")


@dataclass
class _Record:
    """What the three configs share: presets, dictionaries, and the checks that follow from a field's type."""

    _PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    _MAY_BE_ZERO: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        _require_finite(self)
        hints = get_type_hints(type(self))
        for field in fields(self):
            name, hint, value = field.name, hints[field.name], getattr(self, field.name)
            if isinstance(value, list):  # JSON has no tuples
                setattr(self, name, value := tuple(value))
            if get_origin(hint) is Literal:
                choices = get_args(hint)
                _require(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))
            elif hint in (bool, str):
                _require(isinstance(value, hint), name, value, f"a {hint.__name__}")
            elif hint in (int, float):
                number = isinstance(value, (int, hint)) and not isinstance(value, bool)
                _require(number, name, value, "a whole number" if hint is int else "a number")
                if name in self._MAY_BE_ZERO:
                    _require(value >= 0, name, value, "zero or more")
                else:
                    _require(value > 0, name, value, "more than zero")
                if hint is int:
                    _require(value < 2**63, name, value, "less than 2**63")
        self._check()

    def _check(self) -> None:
        """The constraints between fields."""
        raise NotImplementedError

    @classmethod
    def from_preset(cls, name: str):
        """The preset's values; ValueError naming the known presets if there is none called `name`."""
        if name not in cls._PRESETS:
            raise ValueError(f"unknown preset {name!r}: known presets are {', '.join(cls._PRESETS)}")
        return cls(**cls._PRESETS[name])

    @classmethod
    def from_dict(cls, values: dict):
        """The inverse of `to_dict`. Missing fields take their defaults; an unknown key is a ValueError, and so is a
        value of another type."""
        return records.convert(values, cls, cls.__name__)

    def to_dict(self) -> dict:
        """Plain values; survives JSON (tuples come back as lists and `from_dict` restores them)."""
        return asdict(self)


@dataclass
class MiMoConfig(_Record):
    """The network and its objective.

    Args:
        recipe: the system of the papers that is trained, one of mimo.recipes.RECIPES.
        depth: number of transformer blocks.
        dim: width D.
        heads: attention heads; D / heads is the head dimension, a multiple of 8.
        attention: "joint": a token attends to all tokens of the frames that its frame sees; "factorized": blocks are
            spatial and temporal in turn, a token attends to its own frame and then to its own place in the frames that
            its frame sees (MAGI; `depth` counts both).
        mlp_ratio: hidden width of the MLP over D.
        frames: latent frames T of a training clip.
        height: latent height H.
        width: latent width W.
        channels: latent channels.
        patch: rows and columns of latent positions that are one token; 1: N = H * W tokens per frame. A token has the
            channels of all its positions, C of them.
        positions: "rope" (axial 3D RoPE), "sincos" (the ablation "vanilla DiT": fixed sines and cosines of time and of
            the place in the frame, added to the tokens) or "learned" (a table for each instead; frames beyond
            `frames` have none).
        learned_places: tokens of clean frames, those of masked frames and what the token head is told of them have a
            learned vector per place in the frame each, beside `positions` (MAGI).
        rope_theta: base of the RoPE frequencies.
        rope_split: channels of a head that turn with t, y and x, even numbers whose sum is the head dimension; None is
            a third each, see `mimo_kernels.AxialRoPE`. FAR has 16, 24, 24 of 64.
        qk_norm: RMS-normalise queries and keys.
        separate_ln: history tokens have their own affine LayerNorm; False sends them through AdaLN at tau = 0.
        decoder_depth: blocks of the masked-history decoder.
        decoder_layer: the decoder reads history after this many blocks (the paper's l), 1..depth.
        mask_offsets: the decoder predicts frame t + o from history up to t, for every o here (any of 0, 1, 2).
        mask_ratio: bounds of the draw of the share of tokens masked; (0, 0) masks nothing. Of history tokens dropped it
            is uniform; of the tokens that a network with a token head predicts, a normal distribution cut off at the
            bounds, whose mean is the upper one and whose deviation is 0.25 (MAR; 0.7 to 1 there).
        mask_round: the kept number of tokens is rounded to a multiple of this, so that few distinct shapes occur.
        mask_weight: lambda, weight of L_mask; 0 is ACDiT, a network without a decoder.
        mask_region: L_mask over "dropped" positions or over "all".
        interleaved: alternate steps that optimise only L_diff and only L_mask, instead of their weighted sum.
        num_classes: class labels; 0 is unconditional. One null class is added.
        num_actions: discrete actions per frame; 0 is none. One null action is added.
        max_interval: the network is told the frame interval of its clips, 1..max_interval (MAGI; 25 there); 0 is not
            told.
        cross_attention: a clip's class, or the text it is told, is a sequence of embeddings that every block
            attends to.
        text_dim: width of the features of the clips' texts; 0 is no texts. Texts need cross_attention.
        text_tokens: tokens of a text at most; longer ones are cut.
        label_dropout: probability that a clip's class or text, or a frame's action, is replaced by the null one in
            training.
        history_dropout: probability that a future frame sees no history in training; history guidance needs it.
        clean_context: probability that a training frame is clean and told so (FAR, 0.1 there).
        coarse_stride: distant frames are coarse: one token stands for coarse_stride x coarse_stride of them, through an
            embedding and projections of its own (FAR-Long, 4 there); 0: the network has no coarse frames.
        fine_frames: the latest frames that are not coarse, the one being made included (FAR-Long's short-term context
            window, 16 there); 0 without coarse frames.
        repa_weight: weight of the alignment of hidden states with the features of a frozen video encoder (REPA; 0.5 in
            MiMo's App. E); 0 is none, a network without a projection.
        repa_frames: which frames are aligned: "history" (clean ones), "future" (all others) or "both".
        repa_layer: the hidden states behind this many blocks are aligned, 1..depth.
        repa_encoder: name of the encoder, one of mimo.encoders.ENCODERS.
        repa_channels: channels of its features; 1024 of VideoMAE-L.
        repa_hidden: width of the projection's two hidden layers; 2048 in REPA's published code.
        teacher_forcing: what masked frames see of those before them (MAGI): "complete" ones, CTF, or the "masked" ones
            themselves, MTF.
        noise_levels: levels of the noise that training adds to the frames that others see, 0 .. noise_levels - 1; the
            network is told which (MAGI). 0 adds none.
        max_noise: standard deviation of the highest level; the lowest is 0.
        token_depth: blocks of the token head, a diffusion model of every single masked token (MAR; see
            mimo.network.token_diffusion); 0 is a network that predicts the frames itself, whole.
        token_width: width of the token head.
        token_draws: timesteps and noises that the token head is trained at per token and step (MAR: 4).
        parameterization: "v" (v-prediction, linear betas, zero terminal SNR), "flow" (rectified flow), or for a token
            head "epsilon" (cosine schedule, noise prediction).
        prediction: what a "flow" network predicts, the "velocity" or the "clean" latents, whose error is weighed as one
            of the velocity (JiT; see mimo.diffusion.FlowSchedule).
        timestep_mean: of the normal distribution whose sigmoid is the timestep of "flow" training; more than 0 trains
            more at much noise, where a frame shows less than those before it.
        history_noise: standard deviation of the noise that training adds to the clean frames that others see, at most:
            each frame's is uniform from 0 to it, and the network is not told. A sampled frame is not quite clean
            either.
        residual: a noisy frame is what changes, its latents minus those of the frame before it as history has it; the
            first frame is whole. The network predicts what moves, and what does not is kept.
        recent_frames: a noisy frame is told so many frames right before it, as history has them, in its tokens: each
            its own place and the eight around it (mimo.network.recent); 0 leaves it to attention.
        min_snr_gamma: clip threshold of the min-SNR weight of L_diff; None weighs every frame 1.
        min_snr_decay: decay of fused min-SNR; None is plain min-SNR.
        tokenizer: name of the tokenizer whose latents the network sees.
        compression: video frames, rows and columns per latent position.
        video_frames: frames of a training clip before the tokenizer.
    """

    recipe: str = "mimo"
    depth: int = 12
    dim: int = 768
    heads: int = 12
    attention: Literal["joint", "factorized"] = "joint"
    mlp_ratio: float = 4.0
    frames: int = 5
    height: int = 16
    width: int = 16
    channels: int = 16
    patch: int = 1
    positions: Literal["rope", "sincos", "learned"] = "rope"
    learned_places: bool = False
    rope_theta: float = 100.0
    rope_split: tuple[int, int, int] | None = None
    qk_norm: bool = True
    separate_ln: bool = True
    decoder_depth: int = 4
    decoder_layer: int = 9
    mask_offsets: tuple[int, ...] = (0, 1)
    mask_ratio: tuple[float, float] = (0.25, 0.5)
    mask_round: int = 1
    mask_weight: float = 0.5
    mask_region: Literal["dropped", "all"] = "dropped"
    interleaved: bool = False
    num_classes: int = 0
    num_actions: int = 0
    max_interval: int = 0
    cross_attention: bool = False
    text_dim: int = 0
    text_tokens: int = 128
    label_dropout: float = 0.1
    history_dropout: float = 0.0
    clean_context: float = 0.0
    coarse_stride: int = 0
    fine_frames: int = 0
    repa_weight: float = 0.0
    repa_frames: Literal["history", "future", "both"] = "both"
    repa_layer: int = 4
    repa_encoder: Literal["videomae", "hog"] = "videomae"
    repa_channels: int = 1024
    repa_hidden: int = 2048
    teacher_forcing: Literal["complete", "masked"] = "complete"
    noise_levels: int = 0
    max_noise: float = 0.7
    token_depth: int = 0
    token_width: int = 1024
    token_draws: int = 4
    parameterization: Literal["v", "flow", "epsilon"] = "v"
    prediction: Literal["velocity", "clean"] = "velocity"
    timestep_mean: float = 0.0
    history_noise: float = 0.0
    residual: bool = False
    recent_frames: int = 0
    min_snr_gamma: float | None = None
    min_snr_decay: float | None = None
    tokenizer: str = "dct"
    compression: tuple[int, int, int] = (4, 8, 8)
    video_frames: int = 17

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def cached_depth(self) -> int:
        """Blocks whose attention sees other frames, and so has keys and values in a cache."""
        return self.depth // 2 if self.attention == "factorized" else self.depth

    @property
    def tokens(self) -> int:
        """Tokens per frame, N."""
        return math.prod(self.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame in tokens."""
        return self.height // self.patch, self.width // self.patch

    @property
    def token_channels(self) -> int:
        """Channels of a token, C."""
        return self.channels * self.patch**2

    @property
    def tracks(self) -> int:
        """Parts of a frame, of as many tokens each, that have a history of their own: 1, or every place."""
        return self.tokens if self.attention == "factorized" else 1

    @property
    def coarse_tokens(self) -> int:
        """Tokens per coarse frame; 0 where there are none."""
        return self.tokens // self.coarse_stride**2 if self.coarse_stride else 0

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Frames, rows, columns and channels of a clip's latents."""
        return self.frames, self.height, self.width, self.channels

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a training clip in pixels."""
        return self.video_frames, self.height * self.compression[1], self.width * self.compression[2]

    _MAY_BE_ZERO = (
        *("decoder_depth", "mask_weight", "num_classes", "num_actions", "max_interval"),
        *("label_dropout", "history_dropout", "clean_context", "repa_weight", "token_depth", "text_dim"),
        *("noise_levels", "timestep_mean", "history_noise", "recent_frames"),
        *("coarse_stride", "fine_frames"),
    )

    def _check(self) -> None:
        _require(self.recipe in RECIPES, "recipe", self.recipe, "one of " + ", ".join(map(repr, RECIPES)))
        for name in ("label_dropout", "history_dropout", "clean_context"):
            _require(getattr(self, name) <= 1, name, getattr(self, name), "a probability")
        divides = self.dim % self.heads == 0 and self.head_dim % 8 == 0
        _require(divides, "heads", self.heads, f"a divisor of dim={self.dim} with a head dimension that 8 divides")
        fits = self.height % self.patch == 0 and self.width % self.patch == 0
        _require(fits, "patch", self.patch, f"a divisor of height={self.height} and width={self.width}")
        if self.attention == "factorized":
            _require(self.depth % 2 == 0, "depth", self.depth, "an even number, of spatial and temporal blocks in turn")
            whole = self.mask_ratio[1] == 0 or self.token_depth > 0
            _require(whole, "mask_ratio", self.mask_ratio, "(0, 0) with attention='factorized', but for a token head")
        if (split := self.rope_split) is not None:
            even = len(split) == 3 and all(type(n) is int and n >= 0 and n % 2 == 0 for n in split)
            fits = even and sum(split) == self.head_dim
            _require(fits, "rope_split", split, f"three even numbers with the sum {self.head_dim}, or None")
        _require(self.decoder_layer <= self.depth, "decoder_layer", self.decoder_layer, f"1..depth={self.depth}")
        if (stride := self.coarse_stride) > 0:
            divides = stride > 1 and not any(side % stride for side in self.grid)
            _require(divides, "coarse_stride", stride, f"2 or more, dividing {self.grid[0]} x {self.grid[1]} tokens")
            fits = 1 <= self.fine_frames <= self.frames
            _require(fits, "fine_frames", self.fine_frames, f"1..frames={self.frames} with coarse_stride={stride}")
        else:
            _require(self.fine_frames == 0, "fine_frames", self.fine_frames, "0 when coarse_stride is 0")
        offsets, ratio = self.mask_offsets, self.mask_ratio
        distinct = set(offsets) <= {0, 1, 2} and len(set(offsets)) == len(offsets)
        _require(distinct, "mask_offsets", offsets, "distinct offsets out of 0, 1, 2")
        expected = f"(low, high) with 0 {'< low <= high <=' if self.token_depth else '<= low <= high <'} 1"
        low_high = len(ratio) == 2 and 0 <= ratio[0] <= ratio[1] <= 1
        fits = low_high and (ratio[0] > 0 if self.token_depth else ratio[1] < 1)
        _require(fits, "mask_ratio", ratio, expected)
        wanted = "'epsilon' with a token head (token_depth > 0), and only then"
        fits = (self.parameterization == "epsilon") == (self.token_depth > 0)
        _require(fits, "parameterization", self.parameterization, wanted)
        if self.token_depth:
            _require(self.separate_ln, "separate_ln", self.separate_ln, "True with a token head: nothing is modulated")
            _require(self.mask_weight == 0, "mask_weight", self.mask_weight, "0 with a token head: it has no decoder")
        levels, headless = self.noise_levels, not self.token_depth
        for name, value in (("learned_places", self.learned_places), ("noise_levels", levels)):
            _require(not (value and headless), name, value, "none without a token head (token_depth=0)")
        _require(levels != 1, "noise_levels", levels, "two or more, of which the lowest is none, or 0")
        cross = self.cross_attention
        _require(
            not cross or self.token_depth > 0, "cross_attention", cross, "False without a token head (token_depth=0)"
        )
        one = (self.num_classes > 0) != (self.text_dim > 0)
        _require(not cross or one, "cross_attention", cross, "either num_classes or text_dim, and not both, with it")
        _require(cross or not self.text_dim, "text_dim", self.text_dim, "0 without cross_attention")
        told = cross or not (self.token_depth and self.num_classes)
        _require(told, "num_classes", self.num_classes, "0 with a token head, unless cross_attention tells the classes")
        if self.mask_weight > 0:
            served = min(offsets, default=self.frames) < self.frames
            _require(served, "mask_offsets", offsets, f"an offset below frames={self.frames} when mask_weight > 0")
            _require(ratio[1] > 0, "mask_ratio", ratio, "a positive upper bound when mask_weight > 0")
            fits = self.mask_round < self.tokens
            _require(fits, "mask_round", self.mask_round, f"less than the {self.tokens} tokens of a frame")
            drops = int(ratio[0] * self.tokens) >= 1
            _require(drops or not self.interleaved, "mask_ratio", ratio, "bounds that always mask if interleaved")
        else:
            _require(not self.interleaved, "interleaved", self.interleaved, "False when mask_weight is 0")
        aligns = self.repa_weight == 0 or self.repa_layer <= self.depth
        _require(aligns, "repa_layer", self.repa_layer, f"1..depth={self.depth} when repa_weight > 0")
        flow = self.parameterization == "flow"
        _require(flow or self.prediction == "velocity", "prediction", self.prediction, "'velocity' unless 'flow'")
        _require(
            flow or not self.timestep_mean, "timestep_mean", self.timestep_mean, "0 unless parameterization='flow'"
        )
        gamma, decay = self.min_snr_gamma, self.min_snr_decay
        _require(gamma is None or self.parameterization == "v", "min_snr_gamma", gamma, "None unless v-prediction")
        _require(gamma is None or gamma > 0, "min_snr_gamma", gamma, "more than zero, or None")
        _require(decay is None or gamma is not None, "min_snr_decay", decay, "None when min_snr_gamma is None")
        _require(decay is None or 0 < decay < 1, "min_snr_decay", decay, "a number between 0 and 1, or None")
        triple = len(self.compression) == 3 and min(self.compression) > 0
        _require(triple, "compression", self.compression, "three positive numbers: frames, rows, columns")

    @classmethod
    def from_dict(cls, values: dict):
        """As for every record; a network of before `rope_split` keeps the channels that it was trained with."""
        config = super().from_dict(values)
        pairs = config.head_dim // 2
        if "rope_split" not in values and pairs % 3 == 1:  # a single spare pair was y's then, and is time's now
            config.rope_split = 2 * (pairs // 3), 2 * (pairs // 3 + 1), 2 * (pairs // 3)
        return config


@dataclass
class TrainConfig(_Record):
    """How the network is trained: AdamW, linear warm-up, cosine decay or a constant rate, EMA.

    Args:
        batch_size: clips per optimiser step, over all accumulation steps.
        accumulate: forward/backward passes that one optimiser step is split into; divides batch_size.
        steps: optimiser steps.
        lr: peak learning rate.
        lr_schedule: after warm-up, half a "cosine" down to lr_end, or "constant".
        lr_end: learning rate at the last step of a cosine.
        warmup: steps of linear warm-up from 0.
        betas: AdamW's.
        weight_decay: AdamW's.
        grad_clip: largest global gradient norm.
        ema_decay: decay of the weight average that samples are drawn from, once it is warm (mimo.training.average).
        stages: a curriculum, a word UNTIL:FRAMESxHEIGHTxWIDTH per stage: until that step clips have this shape in
            pixels, behind the last stage that of the network (VideoMAR; see mimo.stages).
        unmasked_steps: the last steps of training drop no history tokens (the paper's fine-tuning for high ratios).
        own_history_steps: in the last steps of training the clean frames behind the third are, two times out of three,
            what the network itself makes of those before them, in one step or in two, without gradient: in sampling
            they are its own too, and errors add up unless they are met in training (Bengio et al. 2015, scheduled
            sampling). For systems with clean frames beside noisy ones.
        precision: "bf16" (autocast, fp32 weights), "fp32", or "fp8": bf16 with the blocks' projections in float8
            (mimo.network.fp8; ask benchmarks/fp8_check.py before).
        strategy: how processes share the model: "ddp" (each has all of it), "fsdp" (each has a part of every parameter)
            or "auto", ddp if there are several.
        cpu_offload: with fsdp, parameters, averages and optimizer state live in the host's memory and are updated
            there.
        recompute: keep no activations inside blocks, compute them again in the backward (activation checkpointing).
        max_skipped: how many steps in a row are skipped because their gradient is not finite; 0 stops at the first. A
            skipped step counts, but leaves weights, moments and averages as they are.
        interval: take every n-th frame of a video. With two numbers, LOW HIGH, every clip draws its n between them
            (MAGI's dynamic interval training); --model.max-interval tells the network n, and needs two.
        flip: mirror half of the clips.
        seed: of everything random.
        posterior: which latents of a tokenizer that gives a distribution: its "mean", or a "sample" of it, as DFoT
            trains.
        workers: processes that decode videos; 0 decodes in the training process. None, the default, takes as many as
            pay: see mimo.data.loader.default_workers.
        log_every: steps between status lines.
        save_every: steps between checkpoints.
        keep: newest checkpoints kept.
        preview_every: steps between preview videos; 0 makes none.
    """

    batch_size: int = 256
    accumulate: int = 1
    steps: int = 100_000
    lr: float = 8e-4
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    lr_end: float = 1e-5
    warmup: int = 10_000
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.001
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    stages: tuple[str, ...] = ()
    unmasked_steps: int = 0
    own_history_steps: int = 0
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    cpu_offload: bool = False
    recompute: bool = False
    max_skipped: int = 0
    interval: int | tuple[int, int] = 1
    flip: bool = False
    seed: int = 0
    posterior: Literal["mean", "sample"] = "mean"
    workers: int | None = None
    log_every: int = 50
    save_every: int = 5_000
    keep: int = 2
    preview_every: int = 5_000

    _MAY_BE_ZERO = (
        *("lr_end", "warmup", "weight_decay", "ema_decay", "unmasked_steps", "seed"),
        "own_history_steps",
        *("max_skipped", "preview_every"),
    )

    def _check(self) -> None:
        splits = self.batch_size % self.accumulate == 0
        _require(splits, "accumulate", self.accumulate, f"a divisor of batch_size={self.batch_size}")
        sharded = self.strategy == "fsdp" or not self.cpu_offload
        _require(sharded, "cpu_offload", self.cpu_offload, "False unless strategy is 'fsdp'")
        _require(self.ema_decay < 1, "ema_decay", self.ema_decay, "less than 1")
        stages.parse_stages(self.stages)
        _require_workers(self.workers)
        unit = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(unit, "betas", self.betas, "two numbers in [0, 1)")
        bounds = self.interval if isinstance(self.interval, tuple) else (self.interval, self.interval)
        whole = len(bounds) == 2 and all(type(bound) is int for bound in bounds) and 1 <= bounds[0] <= bounds[1]
        _require(whole, "interval", self.interval, "a whole number >= 1, or a pair LOW HIGH with 1 <= LOW <= HIGH")


@dataclass
class SampleConfig(_Record):
    """How videos are sampled, frame by frame (Algorithms 2 and 4).

    Args:
        sampler: "ddim" (for v-prediction), "euler" (for flow) or "ddpm" (for noise prediction).
        steps: denoising steps per frame; of a network with a token head per token.
        mask_steps: steps in which a network with a token head predicts the tokens of a frame, more in each than before;
            other networks have none.
        history_guidance: w of (1 - w) v(no history) + w v(history); 1 is none.
        class_guidance: w of (1 - w) v(null) + w v(class or action); 1 is none. "null" is told no class and no action,
            in any frame, those of its history included (FAR's protocol).
        context_frames: latent frames given when a clip is predicted; 0 generates from nothing.
        num_frames: latent frames of the result, context included.
        window: how many latent frames a frame sees, the latest, itself included; None: all. Memory no longer grows
            then.
        sink: the first frames of the video, which stay visible beside the window.
        temperature: factor on the noise that a frame starts from, for the first and the last frame made, linear in
            between; of no paper, and not for networks with a token head.
        token_temperature: of networks with a token head: factor on the noise that every step of the token diffusion
            adds, at the first frame of the video (t = 0) and at late ones: last + (first - last) 10^-t. (1, 0.9) is
            VideoMAR's 0.9 + 10^-(t+1) (App. B).
        history_noise: standard deviation of the noise added to a finished frame before it becomes history, for the
            first and the last frame made, linear in between; of no paper. A network with noise_levels, which MAGI
            injects in training, is told the nearest level, others are told nothing.
        interpolate: the frames of a video longer than a training clip stand between the times that training knows,
            evenly spaced from the first to the last (MAGI, App. A.4); for positions="sincos".
    """

    sampler: Literal["ddim", "euler", "ddpm"] = "ddim"
    steps: int = 50
    mask_steps: int = 64
    history_guidance: float = 1.0
    class_guidance: float = 1.0
    context_frames: int = 0
    num_frames: int = 5
    window: int | None = None
    sink: int = 0
    temperature: tuple[float, float] = (1.0, 1.0)
    token_temperature: tuple[float, float] = (1.0, 1.0)
    history_noise: tuple[float, float] = (0.0, 0.0)
    interpolate: bool = False

    _MAY_BE_ZERO = ("history_guidance", "class_guidance", "context_frames", "sink")

    def _check(self) -> None:
        _require(self.window is None or self.window >= 1, "window", self.window, "1 or more frames, or None")
        for name in ("temperature", "token_temperature", "history_noise"):
            ends = getattr(self, name)
            _require(len(ends) == 2 and all(x >= 0 for x in ends), name, ends, "two numbers of zero or more")
        fewer = self.context_frames < self.num_frames
        _require(fewer, "context_frames", self.context_frames, f"fewer than num_frames={self.num_frames}")


@dataclass
class Encoding(_Record):
    """How a dataset is encoded.

    Args:
        passes: how often every clip is taken; each pass draws its own start, crop and flip.
        shard_clips: clips per shard.
        batch_size: clips that go through the tokenizer at once.
        dtype: of the stored latents: "fp16", "bf16" or "fp32".
        seed: of the random starts, crops and flips.
        workers: processes that decode videos; None takes as many as pay.
        posterior: which latents of a tokenizer that gives a distribution: its "mean", or a "sample" of it, as DFoT
            trains.
    """

    passes: int = 1
    shard_clips: int = 256
    batch_size: int = 8
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    seed: int = 0
    workers: int | None = None
    posterior: Literal["mean", "sample"] = "mean"

    _MAY_BE_ZERO = ("seed",)

    def _check(self) -> None:
        _require_workers(self.workers)


@dataclass
class TokenizerTraining(_Record):
    """How a DC-AE is trained; the defaults are FAR's.

    Args:
        compression: pixels per latent position and axis: 8, 16 or 32.
        channels: latent channels.
        width: channels of the first level; 128 is FAR's.
        frames: frames that a sample contributes to a batch.
        batch_size: clips per step.
        steps: optimiser steps.
        lr: constant learning rate of AdamW with betas (0.5, 0.9) and no weight decay.
        grad_clip: largest global gradient norm.
        ema_decay: decay of the average that is saved.
        lpips_vgg: torchvision's VGG-16 weights; with lpips_linear it turns the perceptual loss on.
        lpips_linear: LPIPS's published linear weights.
        perceptual_weight: weight of LPIPS.
        disc_weight: weight of the discriminator's part; 0 trains without one.
        disc_start: step from which the discriminator takes part and the encoder stands still.
        precision: "bf16" (autocast, fp32 weights) or "fp32".
        seed: of the weights and of the order of the data.
        workers: processes that decode videos; None takes as many as pay.
        log_every: steps between status lines.
        save_every: steps between checkpoints.
    """

    compression: int = 32
    channels: int = 32
    width: int = 128
    frames: int = 4
    batch_size: int = 32
    steps: int = 200_000
    lr: float = 1e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    lpips_vgg: Path | None = None
    lpips_linear: Path | None = None
    perceptual_weight: float = 1.0
    disc_weight: float = 0.0
    disc_start: int = 100_000
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    workers: int | None = None
    log_every: int = 100
    save_every: int = 5_000

    _MAY_BE_ZERO = ("perceptual_weight", "disc_weight", "disc_start", "seed", "ema_decay")

    def _check(self) -> None:
        together = (self.lpips_vgg is None) == (self.lpips_linear is None)
        _require(together, "lpips_vgg", self.lpips_vgg, "to be given together with lpips_linear, or neither")
        _require(self.ema_decay < 1, "ema_decay", self.ema_decay, "less than 1")
        _require_workers(self.workers)


MiMoConfig._PRESETS, TrainConfig._PRESETS, SampleConfig._PRESETS = presets.NETWORK, presets.TRAINING, presets.SAMPLING
PRESETS = tuple(presets.NETWORK)
