"""What a checkpoint of a training run says besides its tensors, read as typed records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mimo import checkpoint, records
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError

KINDS: dict[str, type[MiMoConfig] | type[TrainConfig] | type[SampleConfig]] = {
    "model": MiMoConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
}


@dataclass
class _Weights:
    weights: str | None = None
    sha256: str | None = None


@dataclass
class _Configs:
    """model, train, sample: of a mimo.config record each. data: the dataset in words. told: see
    mimo.training.changes."""

    model: dict[str, Any]
    train: dict[str, Any]
    sample: dict[str, Any]
    data: str
    tokenizer: _Weights = field(default_factory=_Weights)  # not in checkpoints of before it was recorded, like told
    encoder: _Weights = field(default_factory=_Weights)  # of what hidden states are aligned with, if they are
    told: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    OTHER_KEYS: ClassVar[bool] = True


@dataclass
class _RunState:
    configs: _Configs
    ema_updates: int
    OTHER_KEYS: ClassVar[bool] = True


def find_run(path: Path, weights: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path means, whose `weights` ("ema" or "model") are whole, and its state. Says which newer
    ones were passed over, and why. Raises InputError where there is none."""
    folder, passed_over = checkpoint.find(path, parts=[weights])
    for reason in passed_over:
        print(f"passed over: {reason}")
    return folder, read_run_state(folder)


def read_run_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint that a training run has written.

    Raises: InputError naming what in it is missing, of another type, or no configuration of this version.
    """
    state, source = checkpoint.read_state(folder), f"checkpoint {folder}: state.json"
    records.convert(state, _RunState, source)
    check_configs(state["configs"], source)
    return state


def check_configs(configs: dict[str, Any], source: str) -> None:
    """Raises InputError unless these are configurations of this version. source: named when they are not."""
    records.convert(configs, _Configs, source)
    for part, kind in KINDS.items():
        try:
            kind.from_dict(configs[part])
        except ValueError as error:
            words = " ".join(str(error).split())
            raise InputError(f"{source}: its configuration does not fit this version: {words}") from None
