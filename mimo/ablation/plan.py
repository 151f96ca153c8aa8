"""What an ablation runs: cells, each a variant with a seed, all over one base, in one folder.

    OUT/base.json                            what every cell shares; another one is refused
    OUT/cells/VARIANT/seed-S/                what `mimo train` makes of it: checkpoints, log
    OUT/cells/VARIANT/seed-S/measured/       a file per measured step
    OUT/NAME/                                tables, plots and verdicts of the ablation NAME

A variant is the same in every ablation, so ablations in one folder train what they share once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mimo import records
from mimo.ablation.variants import VARIANTS
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import ClipDataset
from mimo.errors import InputError

FORMAT = "mimo-ablation-1"


@dataclass(frozen=True)
class Measuring:
    """How a network is measured.

    Args:
        every: steps between measurements; the last step is always measured.
        clips: held-out clips that are continued, or as many that are made from nothing.
        probe_train, probe_test: clips whose history features linear probes learn from, and held-out ones that they
            are asked about; 0 asks nothing.
        measure_batch: clips at once.
        seed: of the clips and of the noise that videos start from, the same for every cell.
    """

    every: int
    clips: int = 96
    probe_train: int = 1200
    probe_test: int = 480
    measure_batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("clips", 2), ("probe_train", 0), ("probe_test", 0), ("measure_batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")
        if (self.probe_train == 0) != (self.probe_test == 0):
            raise InputError(f"--probe-train {self.probe_train}: expected 0 together with --probe-test, or neither")

    def steps(self, last: int) -> list[int]:
        return [*range(self.every, last, self.every), last]


@dataclass(frozen=True)
class Cell:
    variant: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.variant / f"seed-{self.seed}"

    def measured(self, out: Path, step: int) -> Path:
        return self.folder(out) / "measured" / f"step_{step:08d}.json"

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All that cells share.

    model, train, sample: the base. train_set, test_set: clips to train on, and held-out ones to measure with.
    told: what `mimo train` would remember of its options, so that it can continue a cell.
    weights: tokenizer_weights and encoder_weights, where there are any.
    """

    out: Path
    preset: str
    model: MiMoConfig
    train: TrainConfig
    sample: SampleConfig
    measuring: Measuring
    train_set: ClipDataset
    test_set: ClipDataset
    told: dict[str, Any]
    weights: dict[str, Path | None]
    device: str = "cpu"

    @property
    def steps(self) -> list[int]:
        return self.measuring.steps(self.train.steps)

    def configs(self, cell: Cell) -> tuple[MiMoConfig, TrainConfig]:
        """Of a cell. There are checkpoints wherever it is measured."""
        every = self.measuring.every
        saves = self.train.save_every if every % self.train.save_every == 0 else every
        train = replace(self.train, seed=cell.seed, save_every=saves, preview_every=0)
        return VARIANTS[cell.variant].configs(cell.variant, self.model, train)

    def record(self) -> dict[str, Any]:
        """What base.json says."""
        return {
            "format": FORMAT,
            "preset": self.preset,
            "model": self.model.to_dict(),
            "train": self.train.to_dict(),
            "sample": self.sample.to_dict(),
            "measuring": asdict(self.measuring),
            "train_set": repr(self.train_set),
            "test_set": repr(self.test_set),
            "weights": {name: None if path is None else str(path.resolve()) for name, path in self.weights.items()},
        }

    def claim_folder(self) -> None:
        """Write base.json, or see that what is there is the same: InputError names what differs."""
        file, ours = self.out / "base.json", json.loads(json.dumps(self.record()))
        if not file.exists():
            if self.out.exists() and any(self.out.iterdir()):
                raise InputError(f"--out {self.out}: holds something else than an ablation (no base.json)")
            self.out.mkdir(parents=True, exist_ok=True)
            records.write(file, ours)
            return
        there = flat(records.read(file, dict))
        for name, value in flat(ours).items():
            if there.get(name) != value:
                raise InputError(
                    f"--out {self.out}: was begun with {name}={there.get(name)!r}, not {value!r}: expected the same, "
                    "or another folder"
                )


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": item for inner, item in flat(value).items()}
        else:
            found[name] = value
    return found


def cells(variants: tuple[str, ...], seeds: list[int]) -> list[Cell]:
    """Seed after seed, so that whenever it is stopped, variants have been trained about equally often."""
    return [Cell(variant, seed) for seed in seeds for variant in variants]
