"""What a checkpoint of a cell is measured by, clip by clip, so that variants can be compared pair by pair.

Generation, of held-out clips that are continued (or of as many that are made from nothing, without the first):

    psnr         dB of every frame made against the truth, [clips, frames]
    frechet      distance between DCT features (mimo.evaluation.features) of what was made, context included, and of the
                 truth: one number for all clips. It compares cells of one ablation, and nothing else

Representation, of clean history (mean over its tokens, behind every layer), see mimo.ablation.probes:

    probe        of every factor that clips are labelled with and every layer, whether a linear probe is right, [clips]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mimo.ablation.plan import Measuring
from mimo.ablation.probes import factor_names, probe
from mimo.data import ClipDataset, Clips
from mimo.evaluation.features import DCTFeatures
from mimo.evaluation.metrics import frechet_from_features, psnr
from mimo.sampling.loading import Loaded, load
from mimo.sampling.sampler import Sampler
from mimo.sampling.videos import generate


def measure(
    checkpoint: Path, train_set: ClipDataset, test_set: ClipDataset, how: Measuring, device: str
) -> dict[str, Any]:
    """The record of one checkpoint: plain values."""
    loaded = load(checkpoint, device=torch.device(device))
    record: dict[str, Any] = generation(loaded, test_set, how)
    if how.probe_train and factor_names(test_set):
        record["probe"] = probe(loaded, train_set, test_set, how)
    return record


def generation(loaded: Loaded, test_set: ClipDataset, how: Measuring) -> dict[str, Any]:
    sampler, config = Sampler(loaded.model, loaded.sample_config), loaded.sample_config
    context = loaded.tokenizer.num_frames(config.context_frames) if config.context_frames else 0
    scores, made_features, true_features = [], [], []
    for number, samples in enumerate(chunks(test_set, how.clips, how)):
        truth = torch.from_numpy(np.stack([sample["video"] for sample in samples]))
        given = told(loaded, samples)
        made = generate(
            sampler,
            tokenizer=loaded.tokenizer,
            context=truth if context else None,
            count=len(truth),
            seed=how.seed + number,
            **given,
        )
        if context:
            scores.append(psnr(made[:, context:], truth[:, context : made.shape[1]]))
        made_features.append(DCTFeatures()(made))
        true_features.append(DCTFeatures()(truth[:, : made.shape[1]]))
    distance = frechet_from_features(torch.cat(made_features), torch.cat(true_features))
    return {"frechet": distance} | ({"psnr": torch.cat(scores).tolist()} if context else {})


def told(loaded: Loaded, samples: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """What the network is conditioned on, of the clips."""
    config, found = loaded.model.config, {}
    if config.num_classes:
        found["labels"] = torch.tensor([int(sample["label"]) for sample in samples])
    if config.num_actions:
        frames = loaded.sample_config.num_frames
        found["actions"] = torch.from_numpy(np.stack([sample["actions"][:frames] for sample in samples]))
    if config.max_interval:
        found["intervals"] = torch.tensor([int(sample["interval"]) for sample in samples])
    return found


def chunks(dataset: Clips, count: int, how: Measuring) -> Iterator[list[dict[str, np.ndarray]]]:
    """The first `count` clips, in the order of evaluation where there is one, in batches."""
    order = dataset.evaluation_order() if isinstance(dataset, ClipDataset) else range(len(dataset))
    chosen = list(order[:count])
    for first in range(0, len(chosen), how.measure_batch):
        yield [dataset.sample(index, how.seed) for index in chosen[first : first + how.measure_batch]]
