"""Whether clips and a network fit: it is told what it asks for, and nothing that clips carry is passed over unsaid."""

from collections.abc import Collection

from torch import Tensor

from mimo.config import MiMoConfig, TrainConfig
from mimo.data import Clips
from mimo.errors import InputError

PLACES = {
    "labels": "num_classes",
    "actions": "num_actions",
}  # what clips may carry, and the field that gives it a place


def check_places(dataset: Clips, config: MiMoConfig, ignore: Collection[str]) -> None:
    """InputError for clips with labels or actions that the network has no place for, unless they are in `ignore`."""
    carried = {"labels": dataset.has_labels, "actions": dataset.has_actions}
    for name, field in PLACES.items():
        if carried[name] and not getattr(config, field) and name not in ignore:
            raise InputError(
                f"{field}=0, but the clips have {name}: expected --model.{field.replace('_', '-')} with their number, "
                f"or --ignore-{name}"
            )


def check_interval(config: MiMoConfig, training: TrainConfig) -> None:
    """ValueError unless the clips' intervals are drawn and known where the network is told them. A network that is not
    told may still train on drawn ones: MAGI's ablation."""
    if not config.max_interval:
        return
    if isinstance(training.interval, int):
        raise ValueError(
            f"interval={training.interval}: expected a pair LOW HIGH, as the network is told it (max_interval="
            f"{config.max_interval})"
        )
    if training.interval[1] > config.max_interval:
        raise ValueError(f"interval={training.interval}: expected at most max_interval={config.max_interval}")


def check_conditions(batch: dict[str, Tensor], config: MiMoConfig) -> None:
    """InputError for a batch that lacks what the network is conditioned on, or holds values out of range."""
    if config.text_dim and "text" not in batch:
        raise InputError(f"text_dim={config.text_dim}, but the clips have no text")
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
