"""What a resumed run is told anew, and what that changes. All else it remembers from its checkpoint.

    train.*     only what leaves every step already made as it was (`MAY_CHANGE`)
    sample.*    anything
    the rest    (`told`: data, layout, ... as the command line has them) anything

The network, the other training options, the tokenizer and the encoder cannot change: that would be another run.
"""

from collections.abc import Callable
from typing import Any

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.runtime import recorded_encoder, recorded_tokenizer
from mimo.training.schedule import learning_rate

Configs = dict[str, Any]  # as a checkpoint records them: model, train, sample, tokenizer, encoder, data, told
_KINDS: dict[str, type[MiMoConfig] | type[TrainConfig]] = {"model": MiMoConfig, "train": TrainConfig}
_OTHER_RUN = "with other clips it is another run from here"


def _of_steps(then: TrainConfig, now: TrainConfig, step: int) -> str:
    before, after = (learning_rate(step, config) for config in (then, now))
    words = f"the learning rate at step {step} goes from {before:.3g} to {after:.3g}"
    if before == after:
        words = f"the learning rate at step {step} stays {after:.3g}"
    if now.unmasked_steps:
        ends = [max(0, config.steps - config.unmasked_steps) for config in (then, now)]
        words += f", and masking ends at step {ends[1]} in place of {ends[0]}"
    return words


_SAME_STEPS = "no step is made otherwise"
_SUMS = "the batches stay the same, their sums are taken in another order"
MAY_CHANGE: dict[str, str | Callable[[TrainConfig, TrainConfig, int], str]] = {
    "steps": _of_steps,
    "workers": "the batches stay the same",
    "log_every": _SAME_STEPS,
    "save_every": _SAME_STEPS,
    "keep": "older checkpoints are deleted at the next save",
    "preview_every": _SAME_STEPS,
    "max_skipped": "so many steps in a row may have a gradient that is not finite",
    "accumulate": _SUMS,
    "strategy": _SUMS,
    "cpu_offload": "where parameters lie changes, and no step",
    "recompute": "what is kept for the backward changes, and no step",
}
_TOLD = {  # and whatever else was told says which clips there are
    **dict.fromkeys(("ignore_labels", "ignore_actions"), "the network never sees them"),
    "frame_memory": "the batches stay the same",
    "allow_outside": "the same files, wherever they lie",
    **dict.fromkeys(("tokenizer_weights", "encoder_weights"), "the same weights, from there"),
    "keep_every": "from the next save on",
    "log": _SAME_STEPS,
    "compile": "the same arithmetic, rounded otherwise",
    "device": "the same arithmetic, rounded otherwise",
}


def require_same_run(there: Configs, here: Configs, source: Any) -> None:
    """InputError naming every field in which two runs differ that cannot change."""
    saved, wanted = (
        {part: _KINDS[part].from_dict(configs[part]).to_dict() for part in ("model", "train")}
        | {"tokenizer": recorded_tokenizer(configs)["sha256"], "encoder": recorded_encoder(configs)["sha256"]}
        for configs in (there, here)  # through the records: fields younger than the checkpoint have their old meaning
    )
    may_differ = frozenset(f"train.{name}" for name in MAY_CHANGE)
    checkpoint.require_same_config(saved, wanted, source, may_differ=may_differ)


def _differing(then: TrainConfig | SampleConfig, now: TrainConfig | SampleConfig) -> list[tuple[str, Any, Any]]:
    """(field, value then, value now) of every field that has changed."""
    pairs = ((name, getattr(then, name), getattr(now, name)) for name in now.to_dict())
    return [(name, before, value) for name, before, value in pairs if before != value]


def changes(there: Configs, here: Configs, step: int) -> list[str]:
    """A line for all in which a run that goes on at `step` differs from what it was, and what follows from it."""
    lines = []
    old, new = (TrainConfig.from_dict(configs["train"]) for configs in (there, here))
    for name, before, value in _differing(old, new):
        effect = MAY_CHANGE[name]
        lines.append(f"{name} {before} -> {value}: {effect if isinstance(effect, str) else effect(old, new, step)}")
    samples = [SampleConfig.from_dict(configs["sample"]) for configs in (there, here)]
    for name, before, value in _differing(*samples):
        lines.append(f"sample.{name} {before} -> {value}: previews and later samples are drawn so")
    then, now = (
        configs.get("told", {})
        | {"tokenizer_weights": recorded_tokenizer(configs)["weights"]}
        | {"encoder_weights": recorded_encoder(configs)["weights"]}
        for configs in (there, here)
    )
    told = [name for name in now if name in then and then[name] != now[name]]
    effects = {name: _TOLD.get(name, _OTHER_RUN) for name in told}
    lines += [f"{name} {then[name]} -> {now[name]}: {effect}" for name, effect in effects.items()]
    if there["data"] != here["data"] and _OTHER_RUN not in effects.values():
        lines.append(f"the data was {there['data']} and is {here['data']} now: {_OTHER_RUN}")
    return lines
