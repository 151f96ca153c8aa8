"""Linear probes: how much of what is known of clips a linear classifier reads from frozen features.

    logits = W norm(x) + b,   norm: BatchNorm without parameters

AdamW over `epochs` epochs of batches of 128 clips, learning rate 1e-3 to 0 along a cosine, weight decay 0.01, cross
entropy; every clip is seen as it is or mirrored, by chance, once an epoch (MiMo's App. F, after MAE's linear probing).
What these leave open is decided so:

- The optimiser is AdamW; weights and biases begin at zero: the problem is convex, and what few steps leave of random
  ones is noise.
- The last batch of an epoch is left out where it is not whole, but for fewer clips than a batch, which are one.
- norm's mean and variance for unseen clips are the averages over all batches: features are frozen, so that there is no
  reason to forget the first ones.
- Several factors are several classifiers on the same features. AdamW treats every weight by itself, so they train as
  one layer, side by side, and learn what they would learn apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ProbeConfig:
    """How classifiers are trained.

    Args:
        epochs, batch_size, lr, weight_decay: see above; the paper's.
        seeds: how many classifiers are trained, each in another order.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size={self.batch_size}: expected at least 2, of which BatchNorm takes the variance"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: expected more than 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: expected 0 or more")


def linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: Sequence[int],
    config: ProbeConfig | None = None,
    *,
    seed: int = 0,
) -> Tensor:
    """Which of the test clips one classifier per factor gets right: bool [M, factors], top 1.

    Args:
        features: [V, N, D], V views of every clip: itself, and mirrored where it is ever seen so.
        labels: int64 [V, N, factors], of every view: a mirror exchanges left and right.
        test_features: [M, D], of clips as they are. test_labels: int64 [M, factors].
        classes: of each factor; labels lie below.
        seed: of the order and the views.

    Raises ValueError for shapes that do not fit, fewer than 2 clips, labels out of range, and values not finite.
    """
    config = config or ProbeConfig()
    _check(features, labels, test_features, test_labels, classes)
    views, clips, dim = features.shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(sum(classes), dim, device=features.device, requires_grad=True)
    bias = torch.zeros(sum(classes), device=features.device, requires_grad=True)
    norm = nn.BatchNorm1d(dim, eps=1e-6, momentum=None, affine=False).to(features.device)
    optimizer = torch.optim.AdamW([weight, bias], lr=config.lr, weight_decay=config.weight_decay)
    size = min(config.batch_size, clips)
    steps = clips // size * config.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(config.epochs):
        order = torch.randperm(clips, generator=generator)
        view = torch.randint(views, (clips,), generator=generator)
        for batch in order[: clips // size * size].split(size):
            chosen = view[batch].to(features.device), batch.to(features.device)
            logits = F.linear(norm(features[chosen].float()), weight, bias)
            loss = torch.stack(
                [F.cross_entropy(each, truth) for each, truth in zip(logits.split([*classes], 1), labels[chosen].T)]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    norm.eval()
    with torch.no_grad():
        logits = F.linear(norm(test_features.float()), weight, bias)
    answers = torch.stack([each.argmax(1) for each in logits.split([*classes], 1)], 1)
    return answers == test_labels


def _check(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, classes: Sequence[int]
) -> None:
    shapes = [list(x.shape) for x in (features, labels, test_features, test_labels)]
    views, clips, dim = [*shapes[0], 0, 0, 0][:3]
    factors = len(classes)
    expected = [[views, clips, dim], [views, clips, factors], [len(test_features), dim], [len(test_features), factors]]
    if shapes != expected or views < 1 or dim < 1 or not len(test_features):
        raise ValueError(f"linear_probe: {shapes}: expected [V, N, D], [V, N, {factors}], [M, D], [M, {factors}]")
    if clips < 2:
        raise ValueError(f"{clips} clips to train a linear probe on: expected at least 2")
    if not (features.isfinite().all() and test_features.isfinite().all()):
        raise ValueError("features: not all of them are finite")
    bounds = torch.tensor([*classes], device=labels.device)
    for name, given in (("labels", labels), ("test_labels", test_labels)):
        if ((given < 0) | (given >= bounds)).any():
            raise ValueError(f"{name}: expected each below the classes of its factor, {[*classes]}")
