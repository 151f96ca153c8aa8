"""Linear probes of clean history, as a cell is measured by: hidden states behind every layer, mean over all tokens.

They are those of `mimo probe` (mimo.evaluation.representation, mimo.evaluation.linear_probe), every clip also seen
mirrored, with two differences: ablations have fewer clips than Kinetics, so the learning rate is ten times higher, and
there are as many epochs as make 1000 steps of the optimiser; and what is kept is which clips are right.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import numpy as np
import torch

from mimo.ablation.plan import Measuring
from mimo.data import ClipDataset, LatentShards, VideoDataset
from mimo.data.factors import FACTORS, FactorClips
from mimo.errors import InputError
from mimo.evaluation.history_features import Chosen, batch_of_history, require_conditions
from mimo.evaluation.linear_probe import ProbeConfig, linear_probe
from mimo.evaluation.representation import pooled_history
from mimo.sampling.loading import Loaded

STEPS = 1000  # of a probe's optimiser at least
LR = 1e-2


def factor_names(dataset: ClipDataset) -> tuple[str, ...]:
    """What clips are labelled with, and differ in."""
    if isinstance(dataset, FactorClips):
        return tuple(name for name in FACTORS if name not in dataset.fixed)
    return ("class",) if dataset.has_labels else ()


def probe(
    loaded: Loaded, train_set: ClipDataset, test_set: ClipDataset, how: Measuring
) -> dict[str, dict[str, list[int]]]:
    """Factor -> layer -> of every held-out clip whether its probe is right, 0 or 1."""
    names = factor_names(test_set)
    if factor_names(train_set) != names:
        raise InputError(f"probes: held-out clips are labelled with {', '.join(names)}, those of training are not")
    # Behind the last layer there is no history where training reads none there: no variant is asked about it.
    layers = range(1, loaded.model.config.depth)
    if not layers:
        raise InputError("--probe-train: a network of one layer has no history to probe, expected 0")
    if isinstance(train_set, LatentShards):
        raise InputError(f"--probe-train: {train_set!r} holds no videos to learn probes from, expected 0")
    train_videos, test_videos = cast(VideoDataset, train_set), cast(VideoDataset, test_set)
    require_conditions(loaded.model.config, test_videos)
    seen = [_features(loaded, train_videos, how.probe_train, mirrored, how, layers) for mirrored in (False, True)]
    asked = _features(loaded, test_videos, how.probe_test, False, how, layers)
    labels = torch.stack([labels for _, labels in seen])
    classes = [len(FACTORS[name]) for name in names if name in FACTORS] or [1 + int(max(labels.max(), asked[1].max()))]
    epochs = math.ceil(STEPS / max(1, labels.shape[1] // 128))
    found: dict[str, dict[str, list[int]]] = {name: {} for name in names}
    for number, layer in enumerate(layers):
        views = torch.stack([features[:, number] for features, _ in seen])
        config = ProbeConfig(epochs=epochs, lr=LR)
        right = linear_probe(views, labels, asked[0][:, number], asked[1], classes, config, seed=how.seed)
        for name, column in zip(names, right.int().T.tolist(), strict=True):
            found[name][str(layer)] = column
    return found


def _features(
    loaded: Loaded, dataset: VideoDataset, count: int, mirrored: bool, how: Measuring, layers: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `count` clips fp32 [N, L, D], and their labels int64 [N, factors]."""
    # Datasets are told apart by identity, which a protocol does not say.
    batches = _batches(dataset, count, mirrored, how.seed, how.measure_batch)  # type: ignore[arg-type]
    features = [pooled_history(loaded.model, batch_of_history(loaded, batch), layers).cpu() for batch in batches]
    differs = [number for number, name in enumerate(FACTORS) if name in factor_names(dataset)]
    labels = torch.from_numpy(np.concatenate([batch["labels"] for batch in batches]))
    return torch.cat(features), labels[:, differs] if isinstance(dataset, FactorClips) else labels


@lru_cache(maxsize=4)  # the same for every cell and step
def _batches(dataset: VideoDataset, count: int, mirrored: bool, seed: int, size: int) -> list[dict[str, np.ndarray]]:
    chosen = Chosen(dataset, tuple(dataset.evaluation_order()[:count]), seed, mirrored)
    return list(chosen.batches(chosen.indices, size))
