"""What is compared with what: the paper's ablations as named overrides of one base, and what it claims of them.

A variant is a name and what it changes of the base's network and training; the same name is the same variant in every
ablation, so that ablations in one folder share what they have in common. An ablation lists variants and claims: which
variant is better than which, by what was generated, by what representations know, or in floating-point operations.

The paper's tables compare networks of 12 layers on Kinetics-600 by FVD (`mimo-b-k600-l12` here); with another --preset
they are the same comparisons at another scale. Where a variant depends on the depth, it counts from the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError
from mimo.presets import ACDIT, DFOT, FAR
from mimo.recipes import build_recipe

Changes = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]  # of a config, or made from it
Judge = Literal["generation", "representation", "cost"]


@dataclass(frozen=True)
class Variant:
    """label: in tables and plots. model, train: the fields of the base's network and training that it changes, or a
    function that makes them of the base's."""

    label: str
    model: Changes = field(default_factory=dict)
    train: Changes = field(default_factory=dict)

    def configs(self, name: str, model: MiMoConfig, train: TrainConfig) -> tuple[MiMoConfig, TrainConfig]:
        """The base with its changes; InputError where the two do not go together."""
        try:
            changed = (
                replace(model, **(self.model(model) if callable(self.model) else self.model)),
                replace(train, **(self.train(train) if callable(self.train) else self.train)),
            )
            unmasked = changed[1].steps - changed[1].unmasked_steps if changed[1].unmasked_steps else None
            build_recipe(changed[0], unmasked_from=unmasked)
        except ValueError as error:
            raise InputError(f"variant {name!r}: {error}") from None
        return changed


@dataclass(frozen=True)
class Claim:
    """`better` is better than `worse`; both are names of variants.

    by: what is looked at. "generation": every metric of what was generated; "representation": every linear probe of
    history features; "cost": floating-point operations of a training step.
    source: where it is claimed.
    """

    better: str
    worse: str
    by: Judge
    source: str


@dataclass(frozen=True)
class Ablation:
    """title: what is ablated. preset: the base, with `model`, `train` and `sample` over it. data: the clips it is made
    for; measuring: how, as the options of `mimo ablate`. paper: what the paper measured, by variant, and its name."""

    title: str
    variants: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    preset: str = "mimo-b-k600-l12"
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    sample: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    measuring: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_metric: str = "FVD"

    def base(self) -> tuple[MiMoConfig, TrainConfig, SampleConfig]:
        kinds = ((MiMoConfig, self.model), (TrainConfig, self.train), (SampleConfig, self.sample))
        model, train, sample = (replace(kind.from_preset(self.preset), **changes) for kind, changes in kinds)
        return model, train, sample


def from_the_end(layers: int) -> Callable[[MiMoConfig], dict[str, Any]]:
    """The decoder reads history so many layers before the last one."""

    def changes(base: MiMoConfig) -> dict[str, Any]:
        if base.depth <= layers:
            raise ValueError(f"depth={base.depth}: expected more than {layers} layers to leave out the last {layers}")
        return {"decoder_layer": base.depth - layers}

    return changes


def unmasked_at_the_end(base: TrainConfig) -> dict[str, Any]:
    """Sec. 4.3's fine-tuning without masks, in the last third."""
    return {"unmasked_steps": base.steps // 3}


def aligned(frames: str, **others: Any) -> dict[str, Any]:
    return {"repa_weight": 0.5, "repa_frames": frames} | others


MIMO: dict[str, Any] = {}  # the base itself
VARIANTS: dict[str, Variant] = {
    "mimo": Variant("MiMo", MIMO),
    "acdit": Variant("ACDiT", ACDIT),
    "dfot": Variant("DFoT", DFOT),
    "far": Variant("FAR", FAR),
    "repa-history": Variant("REPA, history", aligned("history", **ACDIT)),
    "repa-future": Variant("REPA, future", aligned("future", **ACDIT)),
    "repa-both": Variant("REPA, both", aligned("both", **ACDIT)),
    "mimo-repa-both": Variant("MiMo + REPA, both", aligned("both")),
    "mimo-current": Variant("MiMo, current frame", {"mask_offsets": (0,)}),
    "mimo-next": Variant("MiMo, next frame", {"mask_offsets": (1,)}),
    "mimo-three": Variant("MiMo, current + next + next but one", {"mask_offsets": (0, 1, 2)}),
    "mimo-l0": Variant("MiMo, decoder behind the last layer", from_the_end(0)),
    "mimo-l1": Variant("MiMo, decoder 1 layer before", from_the_end(1)),
    "mimo-l2": Variant("MiMo, decoder 2 layers before", from_the_end(2)),
    "mimo-l3": Variant("MiMo, decoder 3 layers before", from_the_end(3)),
    "mimo-vanilla": Variant("MiMo, vanilla DiT", {"positions": "sincos", "separate_ln": False}),
    "mimo-rope": Variant("MiMo, + RoPE", {"separate_ln": False}),
    "mimo-lambda-0.1": Variant("MiMo, lambda 0.1", {"mask_weight": 0.1}),
    "mimo-lambda-1": Variant("MiMo, lambda 1", {"mask_weight": 1.0}),
    "mimo-lambda-2": Variant("MiMo, lambda 2", {"mask_weight": 2.0}),
    "mimo-ratio-0.25": Variant("MiMo, ratio 0.25", {"mask_ratio": (0.25, 0.25)}),
    "mimo-ratio-0.25-0.5": Variant("MiMo, ratio 0.25 to 0.5", {"mask_ratio": (0.25, 0.5)}),
    "mimo-ratio-0.5-0.75": Variant("MiMo, ratio 0.5 to 0.75", {"mask_ratio": (0.5, 0.75)}),
    "mimo-unmasked-end": Variant("MiMo, the last third unmasked", train=unmasked_at_the_end),
    "mimo-interleaved": Variant("MiMo, interleaved", {"interleaved": True}),
    "mimo-depth-1": Variant("MiMo, decoder of 1 block", {"decoder_depth": 1}),
    "mimo-depth-2": Variant("MiMo, decoder of 2 blocks", {"decoder_depth": 2}),
    "mimo-depth-8": Variant("MiMo, decoder of 8 blocks", {"decoder_depth": 8}),
    # Masked as MiMo, but nothing has to be predicted of what was masked: is it the masks, or what is learnt from them?
    "mimo-no-loss": Variant("masked history, no L_mask", {"mask_weight": 0.0}),
}


def beats(better: str, worse: tuple[str, ...], by: Judge, source: str) -> tuple[Claim, ...]:
    return tuple(Claim(better, each, by, source) for each in worse)


# A network that a core trains in a minute or two, on clips whose shape, texture and direction are known: 16 tokens per
# frame, of which a shape covers four to nine. It predicts clean latents and trains more at much noise, as all its
# variants do: networks this small learn next to nothing in as many steps without.
MINIATURE: dict[str, Any] = {
    "model": {"depth": 4, "dim": 64, "heads": 4, "decoder_depth": 1, "decoder_layer": 3, "mask_ratio": (0.25, 0.5)}
    | {"parameterization": "flow", "prediction": "clean", "timestep_mean": 1.0}
    | {"frames": 5, "height": 4, "width": 4, "channels": 48, "tokenizer": "dct", "compression": (1, 8, 8)}
    | {"video_frames": 5, "repa_encoder": "hog", "repa_layer": 2, "repa_channels": 28, "repa_hidden": 64},
    "train": {"batch_size": 8, "steps": 400, "lr": 4e-3, "lr_schedule": "cosine", "warmup": 30, "ema_decay": 0.99}
    | {"precision": "fp32", "workers": 0, "save_every": 200, "log_every": 50},
    "sample": {"sampler": "euler", "steps": 4, "context_frames": 2, "num_frames": 5},
}
_REPA = ("repa-history", "repa-future", "repa-both")
_NOT_BASE_RATIOS = ("mimo-ratio-0.25", "mimo-ratio-0.5-0.75")
# The FVDs of Tables 3 to 7 and 9 at 100,000 steps.
ABLATIONS: dict[str, Ablation] = {
    "table-1": Ablation(
        "Representations of history, of future, or of both",
        ("acdit", *_REPA),
        beats("repa-history", ("acdit",), "generation", "Table 1")
        + beats("repa-history", ("acdit",), "representation", "Table 1")
        + beats("repa-future", ("acdit",), "generation", "Table 1")
        + beats("repa-both", ("repa-history", "repa-future"), "generation", "Sec. 3.2")
        + beats("repa-both", ("repa-history", "repa-future"), "representation", "Table 1"),
        paper={"acdit": 54.814, "repa-history": 40.022, "repa-future": 40.253, "repa-both": 36.542},
    ),
    "table-3": Ablation(
        "MiMo beside alignment with a video encoder",
        ("acdit", *_REPA, "mimo", "mimo-repa-both"),
        beats("mimo", ("acdit", "repa-history", "repa-future"), "generation", "Table 3")
        + beats("mimo-repa-both", ("mimo", "repa-both"), "generation", "Table 3"),
        paper={"acdit": 54.814, "repa-history": 40.022, "repa-future": 40.253, "repa-both": 36.542}
        | {"mimo": 36.601, "mimo-repa-both": 34.133},
    ),
    "table-4": Ablation(
        "What the decoder predicts",
        ("acdit", "mimo-current", "mimo-next", "mimo", "mimo-three"),
        beats("mimo", ("acdit", "mimo-current", "mimo-next"), "generation", "Table 4")
        + beats("mimo-next", ("mimo-current",), "generation", "Table 4")
        + beats("mimo-three", ("mimo",), "generation", "Table 4"),
        paper={"acdit": 54.814, "mimo-current": 41.832, "mimo-next": 37.782, "mimo": 36.601, "mimo-three": 36.263},
    ),
    "table-5": Ablation(
        "Behind which layer the decoder reads",
        ("acdit", "mimo-l0", "mimo-l1", "mimo-l2", "mimo-l3"),
        tuple(Claim(each, "acdit", "generation", "Table 5") for each in ("mimo-l0", "mimo-l1", "mimo-l2", "mimo-l3")),
        paper={"acdit": 54.814, "mimo-l0": 36.601, "mimo-l1": 35.815, "mimo-l2": 35.838, "mimo-l3": 37.593},
    ),
    "table-6": Ablation(
        "Positions, and norms of history's own",
        ("mimo-vanilla", "mimo-rope", "mimo"),
        beats("mimo", ("mimo-rope",), "generation", "Table 6")
        + beats("mimo-rope", ("mimo-vanilla",), "generation", "Table 6"),
        paper={"mimo-vanilla": 37.763, "mimo-rope": 37.313, "mimo": 36.601},
    ),
    "table-7-lambda": Ablation(
        "Weight of the loss of masked history",
        ("mimo-lambda-0.1", "mimo", "mimo-lambda-1", "mimo-lambda-2"),
        beats("mimo", ("mimo-lambda-0.1", "mimo-lambda-1", "mimo-lambda-2"), "generation", "Table 7"),
        model={"mask_weight": 0.5},
        paper={"mimo-lambda-0.1": 40.213, "mimo": 36.601, "mimo-lambda-1": 37.443, "mimo-lambda-2": 38.910},
    ),
    "table-7-ratio": Ablation(
        "Share of history that is masked",
        ("mimo-ratio-0.25", "mimo-ratio-0.25-0.5", "mimo-ratio-0.5-0.75"),
        beats("mimo-ratio-0.25-0.5", _NOT_BASE_RATIOS, "generation", "Table 7"),
        paper={"mimo-ratio-0.25": 37.539, "mimo-ratio-0.25-0.5": 36.601, "mimo-ratio-0.5-0.75": 39.121},
    ),
    "table-8": Ablation(
        "Cost of a training step",
        ("mimo", "acdit", "far"),
        beats("mimo", ("acdit",), "cost", "Table 8") + beats("far", ("mimo",), "cost", "Table 8"),
        preset="mimo-xl-k600",
        paper={"mimo": 8.22, "acdit": 8.81, "far": 5.94},
        paper_metric="GFLOPs, as the paper prints them",
    ),
    "table-9": Ablation(
        "Two losses at once or in turn",
        ("acdit", "mimo-interleaved", "mimo"),
        beats("mimo", ("mimo-interleaved",), "generation", "Table 9")
        + beats("mimo-interleaved", ("acdit",), "generation", "Table 9"),
        paper={"acdit": 54.814, "mimo-interleaved": 38.543, "mimo": 36.601},
    ),
    "figure-1": Ablation(
        "Convergence of the systems",
        ("acdit", "dfot", "far", "mimo"),
        beats("mimo", ("acdit", "dfot", "far"), "generation", "Fig. 1")
        + beats("mimo", ("acdit",), "representation", "Fig. 2"),
    ),
    "miniature": Ablation(
        "The paper's argument in miniature",
        ("mimo", "acdit", "mimo-current", "mimo-no-loss", *_REPA, "far", "dfot"),
        beats("mimo", ("acdit",), "representation", "Fig. 2")
        + beats("mimo", ("acdit",), "generation", "Fig. 1")
        + beats("mimo", ("far", "dfot"), "generation", "Fig. 1")
        + beats("mimo", ("mimo-current",), "generation", "Table 4")
        + beats("mimo", ("mimo-no-loss",), "representation", "Sec. 3.3")
        + beats("mimo", ("mimo-no-loss",), "generation", "Sec. 3.3")
        + beats("repa-history", ("acdit",), "generation", "Table 1")
        + beats("repa-both", ("repa-future",), "generation", "Sec. 3.2")
        + beats("repa-history", ("repa-future",), "generation", "Table 1"),
        preset="mimo-tiny",
        data="factors:number=one,occlusion=none,speed=fast",
        measuring={"every": 200, "clips": 96, "probe_train": 480, "probe_test": 240},
        **MINIATURE,
    ),
    "decoder-depth": Ablation(
        "Depth of the decoder, which the paper does not vary (4 there)",
        ("mimo-depth-1", "mimo-depth-2", "mimo", "mimo-depth-8"),
    ),
}


def find(name: str) -> Ablation:
    """InputError, with the known names, for an unknown one."""
    if name not in ABLATIONS:
        raise InputError(f"unknown ablation {name!r}: expected one of {', '.join(ABLATIONS)}")
    return ABLATIONS[name]
