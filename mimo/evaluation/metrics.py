"""Distances between videos, between sets of them, and how sure a figure is: plain functions on tensors.

    psnr, ssim                of a video and its truth, a value per frame
    frechet_distance, mmd     of two sets of feature vectors: FID, FVD, VMMD, by what the features are of
    bootstrap_interval        of any statistic

Letters: N videos of a set, F frames, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

MOST_PSNR = 100.0  # dB, of a frame that is equal to the truth
SSIM_SIDE = 11  # pixels of its window
SIGMA, SCALE = 10.0, 1000.0  # of CMMD's kernel, and what its value is multiplied by
_ROWS = 4096  # of a kernel matrix at once


@runtime_checkable
class Features(Protocol):
    """What videos are compared by: uint8 [B, F, H, W, 3] -> fp32 [B, D].

    Attributes:
        name: in tables.
        needs_weights: whether a network has to be read for them. Features that need none compare results with each
            other, and with no published figure.
    """

    name: str
    needs_weights: bool

    def __call__(self, video: Tensor) -> Tensor: ...


def psnr(video: Tensor, truth: Tensor) -> Tensor:
    """10 log10(255^2 / MSE) of every frame, in dB, at most 100: uint8 [..., F, H, W, 3] twice -> fp64 [..., F].

    Raises ValueError for other dtypes, and for shapes that differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _require_pair(video, truth)
    frames, true = (x.flatten(0, -4).double() for x in (video, truth))
    values = peak_signal_noise_ratio(frames, true, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=MOST_PSNR).reshape(video.shape[:-3])


def ssim(video: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of every frame (Wang et al. 2004): uint8 [..., F, H, W, 3] twice -> fp64 [..., F].

    A Gaussian window of sigma 1.5 and 11 pixels over each colour, K1 = 0.01, K2 = 0.03, frames reflected at their
    borders; the mean over pixels and colours.

    Raises ValueError for other dtypes, shapes that differ, and frames smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _require_pair(video, truth)
    if min(video.shape[-3:-1]) < SSIM_SIDE:
        height, width = video.shape[-3:-1]
        raise ValueError(f"ssim: frames of {height} x {width}: expected at least {SSIM_SIDE} x {SSIM_SIDE}, its window")
    pairs = zip(*(x.flatten(0, -4).movedim(-1, 1).split(64) for x in (video, truth)), strict=True)
    values = [
        structural_similarity_index_measure(x.double(), y.double(), data_range=255.0, reduction="none")
        for x, y in pairs
    ]
    return torch.cat([torch.as_tensor(value).reshape(-1) for value in values]).reshape(video.shape[:-3])


def _require_pair(video: Tensor, truth: Tensor) -> None:
    for name, x in (("video", video), ("truth", truth)):
        if x.dtype != torch.uint8 or x.ndim < 4 or x.shape[-1] != 3 or not x.numel():
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: expected torch.uint8 [..., F, H, W, 3]")
    if video.shape != truth.shape:
        raise ValueError(f"video {list(video.shape)} and truth {list(truth.shape)}: expected one shape")


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of vectors [N, D]: fp64 [D] and [D, D], the unbiased covariance (N - 1), as numpy.cov has it.

    Raises ValueError for fewer than 2 vectors, and values that are not finite.
    """
    x = _set("features", features, 2)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.mT @ centred / (len(x) - 1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared Wasserstein-2 distance of two Gaussians, in fp64
    (Dowson & Landau 1982; FID, Heusel et al. 2017; FVD, Unterthiner et al. 2018).

    The trace of the root is that of (A C_b A)^(1/2) with A = C_a^(1/2), which is symmetric: no complex numbers, and
    covariances may be singular.

    Args:
        mean_a, mean_b: [D]. cov_a, cov_b: [D, D], symmetric and positive semi-definite.

    Raises ValueError for shapes that do not fit.
    """
    shape = (len(mean_a), len(mean_a))
    if mean_a.ndim != 1 or mean_b.shape != mean_a.shape or cov_a.shape != shape or cov_b.shape != shape:
        shapes = ", ".join(str(list(x.shape)) for x in (mean_a, cov_a, mean_b, cov_b))
        raise ValueError(f"frechet_distance: shapes {shapes}: expected [D], [D, D] twice")
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return _positive((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def frechet_from_features(a: Tensor, b: Tensor) -> float:
    """`frechet_distance` of two sets of vectors [N_a, D] and [N_b, D], by their means and covariances.

    With X the centred vectors over (N - 1)^(1/2), C = X^T X, and the trace of (C_a C_b)^(1/2) is the sum of the
    singular values of X_a X_b^T: of sets smaller than D, that is the smaller problem.

    It is biased upwards by about 1/N: compare sets of one size only.

    Raises ValueError for fewer than 2 vectors, another D, and values that are not finite.
    """
    x, y = _two_sets(a, b, 2)
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))
    means = x.mean(0), y.mean(0)
    x, y = ((z - mean) / math.sqrt(len(z) - 1) for z, mean in zip((x, y), means))
    shared = torch.linalg.svdvals(x @ y.mT).sum()
    return _positive((means[0] - means[1]).square().sum() + x.square().sum() + y.square().sum() - 2 * shared)


def mmd(a: Tensor, b: Tensor, *, sigma: float = SIGMA, scale: float = SCALE) -> float:
    """scale (mean k(a, a') + mean k(b, b') - 2 mean k(a, b)), k(u, v) = exp(-|u - v|^2 / (2 sigma^2)), in fp64.

    The squared maximum mean discrepancy with the means over all pairs, those of a vector with itself included, as CMMD
    has it (Jayasumana et al. 2024; MiMo's VMMD differs in the features alone). It is biased: two sets of N vectors far
    apart from each other give 2 scale / N even if they are of one distribution. Always say N.

    Args:
        a, b: [N_a, D] and [N_b, D].

    Raises ValueError for an empty set, another D, and values that are not finite.
    """
    x, y = _two_sets(a, b, 1)
    wx, wy = (torch.full((1, len(z)), 1 / len(z), dtype=torch.float64, device=z.device) for z in (x, y))
    return float(_weighted_mmd(x, y, wx, wy, sigma)[0]) * scale


def mmd_interval(
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    *,
    each: int = 1,
    sigma: float = SIGMA,
    scale: float = SCALE,
    seed: int = 0,
    resamples: int = 200,
    level: float = 0.95,
    paired: bool = False,
) -> tuple[float, float]:
    """`bootstrap_interval` of `mmd`, centred; the kernel is computed once for all resamples, as a vector that is drawn
    k times is one of weight k / N.

    Args:
        b: one set, or several of one size, over whose distances from `a` the mean is taken.
        each: vectors per sample, one behind the other, which are drawn together (frames of a clip).
    """
    pairs = [_two_sets(a, other, 1) for other in ([b] if isinstance(b, Tensor) else b)]
    sizes = [len(x) // each for x in pairs[0]]
    drawn = _resampled(sizes, seed, resamples, paired)
    wx, wy = (_weights(rows).repeat_interleave(each, 1).to(a.device) / each for rows in drawn)
    values = sum(_weighted_mmd(x, y, wx, wy, sigma) for x, y in pairs) / len(pairs) * scale
    centre = sum(mmd(x, y, sigma=sigma, scale=scale) for x, y in pairs) / len(pairs)
    return _interval(torch.as_tensor(values).cpu().numpy(), level, centre)


def _weights(rows: np.ndarray) -> Tensor:
    """How often each of n rows is drawn, over n: int64 [R, n] -> fp64 [R, n]."""
    counts = np.stack([np.bincount(drawn, minlength=rows.shape[1]) for drawn in rows])
    return torch.from_numpy(counts / rows.shape[1])


def _weighted_mmd(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, sigma: float) -> Tensor:
    """[n, D], [m, D], weights [R, n] and [R, m] -> fp64 [R]."""

    def mean(u: Tensor, v: Tensor, wu: Tensor, wv: Tensor) -> Tensor:
        total = torch.zeros(len(wu), dtype=torch.float64, device=u.device)
        for start in range(0, len(u), _ROWS):
            rows = slice(start, start + _ROWS)
            squared = u[rows].square().sum(1)[:, None] + v.square().sum(1) - 2 * u[rows] @ v.mT
            kernel = squared.clamp(min=0).div(-2 * sigma**2).exp()  # [rows, len(v)]
            total += (wu[:, rows] * (wv @ kernel.mT)).sum(1)
        return total

    return mean(x, x, wx, wx) + mean(y, y, wy, wy) - 2 * mean(x, y, wx, wy)


def bootstrap_interval(
    values: Tensor | np.ndarray | Sequence[float] | Sequence[Tensor | np.ndarray],
    statistic: Callable[..., float] | None = None,
    seed: int = 0,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    paired: bool = True,
    centred: bool = False,
) -> tuple[float, float]:
    """The interval of a statistic over samples, by drawing as many samples with replacement, again and again.

    Args:
        values: [N, ...], whose rows are independent samples (clips); or several such, for a statistic of several.
        statistic: of what was drawn, as it takes `values`; None: the mean of all.
        seed: the same seed gives the same interval.
        level: the share of resamples inside, half of the rest at either end.
        paired: several are drawn together, row i with row i. False: each by itself.
        centred: the spread of the resamples is laid around the statistic of `values`. For distances between sets: a
            resample repeats rows, which by itself moves two sets apart, and its distances are all too large.

    Raises ValueError for no rows, several of different lengths that are paired, and values that are not finite.
    """
    arrays: list[Tensor] = []
    if isinstance(values, (list, tuple)) and all(isinstance(x, (Tensor, np.ndarray)) for x in values):
        arrays += [torch.as_tensor(x) for x in values]
    else:  # one sample, be it a list of numbers
        arrays += [torch.as_tensor(values)]
    for x in arrays:
        if x.ndim < 1 or not len(x):
            raise ValueError(f"bootstrap_interval: values of shape {list(x.shape)}: expected at least one row")
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError("bootstrap_interval: values that are not finite")
    measure = statistic or (lambda x: float(x.double().mean()))
    drawn = _resampled([len(x) for x in arrays], seed, resamples, paired)
    made = [measure(*(x[rows] for x, rows in zip(arrays, several_rows))) for several_rows in zip(*drawn)]
    return _interval(np.array(made, np.float64), level, float(measure(*arrays)) if centred else None)


def _resampled(sizes: list[int], seed: int, resamples: int, paired: bool) -> list[np.ndarray]:
    """For each set int64 [resamples, size]: the rows that are drawn."""
    if paired and len(set(sizes)) > 1:
        raise ValueError(f"sets of {' and '.join(map(str, sizes))} samples: expected one size, as they are paired")
    draws = [np.random.default_rng((seed, 0 if paired else number)) for number in range(len(sizes))]
    return [rng.integers(0, size, (resamples, size)) for rng, size in zip(draws, sizes)]


def _interval(made: np.ndarray, level: float, centre: float | None) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected between 0 and 1")
    shift = 0.0 if centre is None else centre - made.mean()
    low, high = np.quantile(made, [(1 - level) / 2, (1 + level) / 2])
    return float(low + shift), float(high + shift)


def _set(name: str, features: Tensor, least: int) -> Tensor:
    """fp64 [N, D], checked."""
    if features.ndim != 2 or len(features) < least or not features.shape[1]:
        raise ValueError(f"{name} are {list(features.shape)}: expected [N, D], at least {least} vectors")
    if not features.isfinite().all():
        raise ValueError(f"{name}: not all of them are finite")
    return features.double()


def _two_sets(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = _set("features of the first set", a, least), _set("features of the second set", b, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} values: expected one width")
    return x, y


def _positive(distance: Tensor) -> float:
    """A distance that rounding may have brought below 0."""
    return max(0.0, float(distance))
