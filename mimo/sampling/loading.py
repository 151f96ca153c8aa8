"""A network for sampling, out of a checkpoint or an exported folder: what only training needs stays on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimo import checkpoint, pretrained
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError
from mimo.network.network import TRAINING_ONLY, MiMo
from mimo.run_state import KINDS, check_configs, find_run
from mimo.runtime import best_device, config_tokenizer, recorded_tokenizer
from mimo.stages import stage_at, stage_config
from mimo.tokenizers.protocols import Tokenizer
from mimo.tokenizers.weights import checksum

# The folder, its configurations, its steps of training, and its tensors without those of some names.
Described = tuple[Path, dict[str, Any], int | None, Callable[[set[str]], dict[str, Tensor]]]


@dataclass
class Loaded:
    """A network for sampling, as a checkpoint describes it."""

    model: MiMo
    tokenizer: Tokenizer
    train_config: TrainConfig
    sample_config: SampleConfig
    folder: Path


def load(
    path: Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    tokenizer_weights: str | Path | None = None,
    trust_pickle: bool = False,
    device: torch.device | None = None,
) -> Loaded:
    """The network in a run folder (its newest whole checkpoint), in one step folder or in what `mimo export` wrote, and
    its tokenizer.

    Args:
        weights: the averaged ones, or those of the last step; an exported network has one of them.
        tokenizer_weights: where the tokenizer's weights lie now; None takes the path that the checkpoint remembers.
            Weights with another checksum than those of training are refused.
        trust_pickle: see `build_tokenizer`.
    """
    folder, configs, step, read = _exported(path, weights) if pretrained.is_export(path) else _of_run(path, weights)
    model_config, train_config, sample_config = (kind.from_dict(configs[part]) for part, kind in KINDS.items())
    try:
        with torch.device("meta"):  # drawing weights and throwing them away takes longer than reading them
            model = MiMo(model_config)
    except ValueError as error:
        raise InputError(f"checkpoint {folder}: its configuration does not fit this version: {error}") from None
    training_only = _strip(model)
    tensors = read(training_only)
    checkpoint.load_module(model, tensors, folder)  # on the meta device: names and shapes fit, nothing is copied
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    device = device or best_device()
    recorded = recorded_tokenizer(configs)
    tokenizer = _load_tokenizer(folder, model_config, recorded, tokenizer_weights, trust_pickle)
    stage = None if step is None else stage_at(train_config, step - 1)  # of the latest step
    model.reshape(stage_config(model_config, stage, tokenizer))
    return Loaded(
        model.to(device).requires_grad_(False).eval(), tokenizer.to(device), train_config, sample_config, folder
    )


def _of_run(path: Path, weights: str) -> Described:
    folder, state = find_run(path, weights)
    return (
        folder,
        state["configs"],
        state["step"],
        lambda skip: checkpoint.read_tensors(folder, weights, state, skip=skip),
    )


def _exported(folder: Path, weights: str) -> Described:
    record, source = pretrained.read_config(folder), folder / pretrained.CONFIG
    if record.weights not in (None, weights):
        raise InputError(f"--weights {weights}: {folder} holds the weights {record.weights!r} alone")
    if missing := [name for name in (*KINDS, "tokenizer") if name not in record.configs]:
        what = "; expected a folder that `mimo export` wrote of a training run"
        raise InputError(f"{source}: configs has no {missing[0]}{what}")
    check_configs(record.configs, str(source))
    return folder, record.configs, record.step, lambda skip: pretrained.read_tensors(folder, skip=skip)


def round_weights(model: MiMo) -> None:
    """Keep in bf16 what autocast rounds to it before every product: a captured graph would do so in every step."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()


def _strip(model: MiMo) -> set[str]:
    """Take from the network what only training needs; the names of those tensors."""
    names = set(model.state_dict())
    for name in TRAINING_ONLY:
        setattr(model, name, None)
    return names - set(model.state_dict())


def _load_tokenizer(
    folder: Path, config: MiMoConfig, recorded: dict, given: str | Path | None, trust_pickle: bool
) -> Tokenizer:
    try:
        tokenizer = config_tokenizer(config, given or recorded["weights"], trust_pickle=trust_pickle)
    except ValueError as error:  # of the weights, or of a configuration that does not fit the tokenizer
        where = "--tokenizer-weights" if given else "its tokenizer, which --tokenizer-weights can name anew"
        raise InputError(f"checkpoint {folder}: {where}: {error}") from None
    if (found := checksum(tokenizer)) != recorded["sha256"]:
        what = given or recorded["weights"] or f"this version's {config.tokenizer!r}"
        raise InputError(
            f"checkpoint {folder}: {what} is not the tokenizer it was trained with: its checksum is {found}, expected "
            f"{recorded['sha256']}"
        )
    return tokenizer
