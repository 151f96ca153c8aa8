"""Linear probes of clean history, as a cell is measured by: features of clips behind every layer, mean over tokens.

Clean frames alone run through the network as they do when a finished frame becomes history: teacher-forced systems have
norms of its own for them, others tell them a timestep. Every clip is also seen mirrored, and the protocol is that of
mimo.evaluation.linear_probe, with as many epochs as make its optimiser's steps 1000 at least: an ablation has fewer
clips than Kinetics.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mimo.ablation.plan import Measuring
from mimo.data import Clips, to_float
from mimo.data.factors import FACTORS, FactorClips, mirrored
from mimo.errors import InputError
from mimo.evaluation.linear_probe import ProbeConfig, linear_probe
from mimo.network.frames import clean_and_noisy, noisy_alone, to_tokens
from mimo.recipes import build_recipe
from mimo.sampling.loading import Loaded

STEPS = 1000  # of a probe's optimiser at least, of batches of 128 clips
LR = 1e-2  # at which they suffice


def factor_names(dataset: Clips) -> tuple[str, ...]:
    """What clips are labelled with."""
    if isinstance(dataset, FactorClips):
        return tuple(name for name in FACTORS if name not in dataset.fixed)
    return ("label",) if dataset.has_labels else ()


def probed_layers(depth: int) -> list[int]:
    """Behind the last block there is no history: training reads none there."""
    return [*range(1, depth)]


def probe(loaded: Loaded, train_set: Clips, test_set: Clips, how: Measuring) -> dict[str, dict[str, list[int]]]:
    """Factor -> layer -> of every held-out clip whether its probe is right, 0 or 1."""
    seen, asked = _videos(train_set, how.probe_train, how.seed), _videos(test_set, how.probe_test, how.seed)
    layers = probed_layers(loaded.model.config.depth)
    if not layers:
        raise InputError("--probe-train: a network of one layer has no history to probe, expected 0")
    names, labels = factor_names(test_set), np.stack([seen[1], seen[2]])
    if factor_names(train_set) != names:
        raise InputError(f"probes: held-out clips are labelled with {', '.join(names)}, those of training are not")
    classes = (
        [len(FACTORS[name]) for name in names] if names[0] in FACTORS else [1 + int(max(labels.max(), asked[1].max()))]
    )
    views = [history_features(loaded, video, layers, how.measure_batch) for video in (seen[0], seen[0][:, :, :, ::-1])]
    test = history_features(loaded, asked[0], layers, how.measure_batch)
    epochs = math.ceil(STEPS / max(1, len(seen[0]) // 128))
    config, found = ProbeConfig(epochs=epochs, lr=LR), {name: {} for name in names}
    for number, layer in enumerate(layers):
        right = linear_probe(
            torch.stack([view[number] for view in views]),
            torch.from_numpy(labels),
            test[number],
            torch.from_numpy(asked[1]),
            classes,
            config,
            seed=how.seed,
        )
        for name, column in zip(names, right.int().T.tolist(), strict=True):
            found[name][str(layer)] = column
    return found


def history_features(loaded: Loaded, videos: np.ndarray, layers: list[int], batch: int) -> list[Tensor]:
    """Of every layer fp32 [N, D], of videos uint8 [N, F, H, W, 3]."""
    model, config = loaded.model, loaded.model.config
    device = next(model.parameters()).device
    timestep = build_recipe(config).history_policy(config).timestep
    kind, parts = "clean" if timestep is None else "noisy", []
    for first in range(0, len(videos), batch):
        video = torch.from_numpy(np.ascontiguousarray(videos[first : first + batch])).to(device)
        with torch.no_grad():
            x = to_tokens(loaded.tokenizer.encode(to_float(video)), config.patch)  # [B, T, N, C]
            if timestep is None:
                frames = clean_and_noisy(x, None, None)
            else:
                frames = noisy_alone(x, torch.full(x.shape[:2], timestep, device=device))
            output = model(frames, reconstruct=False, taps=[(layer, kind) for layer in layers])
        rows = (output.features[layer, kind] for layer in layers)
        parts.append([each.view(len(video), -1, config.dim).float().mean(1).cpu() for each in rows])
    return [torch.cat(each) for each in zip(*parts, strict=True)]


@lru_cache(maxsize=4)  # the same for every cell and step
def _videos(dataset: Clips, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Videos uint8 [N, F, H, W, 3], their labels int64 [N, factors], and what labels are in a mirror."""
    samples = [dataset.sample(index, seed) for index in range(min(count, len(dataset)))]
    videos = np.stack([sample["video"] for sample in samples])
    if isinstance(dataset, FactorClips):
        asked = [number for number, name in enumerate(FACTORS) if name not in dataset.fixed]
        labels = np.stack([sample["factors"] for sample in samples])
        return videos, labels[:, asked], mirrored(labels)[:, asked]
    labels = np.array([[int(sample["label"])] for sample in samples])
    return videos, labels, labels
