"""Centred kernel nearest-neighbour alignment of two sets of features (Huh et al. 2024), as MiMo's paper writes it and
as the public code computes it that figures are usually compared with. The two differ by far: never mix them.

With k(i, j) = <phi_i, phi_j>, l(i, j) = <psi_i, psi_j>, and a(i, j) = 1 where j is among the k nearest of i (those of
the greatest inner product, i not among them) in both sets of features:

    "paper"   Align(K, L) = sum_ij a(i, j) (k(i, j) - mean_m k(i, m)) (l(i, j) - mean_m l(i, m))          Eqs. 28-30
              CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L))                                         Eq. 31
    "public"  Align(K, L) = HSIC(a k, a l), the unbiased estimator of Song et al. 2012 (Eq. 5) of kernels that are not
              centred before: its first sum is over pairs a(i, j) a(j, i), each among the nearest of the other
              CKNNA = Align(K, L) / (sqrt(Align(K, K) Align(L, L)) + 1e-6)       github.com/minyoungg/platonic-rep
              not symmetric, as a k and a l are not: phi, the first, are the features that are judged

In Align(K, K) both sets are the first one. No matrix of all pairs is kept: O(N) memory, and a product of N x N x D.

Letters: N clips, D features, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Definition = Literal["paper", "public"]
DEFINITIONS: tuple[Definition, ...] = ("paper", "public")
GROUPS = 10  # of clips, that are left out in turn for an interval
Z = 1.959963984540054  # of a normal distribution, 95% lie within
_ROWS = 1024  # of the matrix of all pairs at once


class Neighbours(NamedTuple):
    """index: int64 [N, k], the nearest of every row. product: fp64 [N, k], the inner products with them. mean: fp64
    [N], the mean of its inner products with all rows, its own included."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    product: Tensor
    mean: Tensor


def nearest(features: Tensor, k: int, groups: Sequence[Tensor] = ()) -> list[Neighbours]:
    """The neighbours of all rows of features [N, D], in fp64; then, for each group of rows, those of all the others
    among themselves, numbered as if the group had never been there.

    Raises ValueError for fewer than k + 1 rows besides a group, and values that are not finite.
    """
    count = len(features)
    left = count - max((len(group) for group in groups), default=0)
    if features.dim() != 2 or k < 1 or left < max(k + 1, 4):
        without = f", {left} without a tenth of them" if groups else ""
        raise ValueError(f"{k} nearest neighbours of {count} clips{without}: expected more than max({k}, 3) clips")
    if not features.isfinite().all():
        raise ValueError("features: not all of them are finite")
    x = features.double()
    kept = [torch.ones(count, dtype=torch.bool, device=x.device) for _ in range(1 + len(groups))]
    for mask, group in zip(kept[1:], groups, strict=True):
        mask[group] = False
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in kept]
    for start in range(0, count, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, count), device=x.device)
        products = x[rows] @ x.mT
        products[torch.arange(len(rows), device=x.device), rows] = -torch.inf
        for mask, parts in zip(kept, found, strict=True):
            best = products[mask[rows]].masked_fill(~mask, -torch.inf).topk(k, dim=1)
            parts.append((best.indices, best.values))
    result = []
    for mask, parts in zip(kept, found, strict=True):
        place = mask.cumsum(0) - 1
        index, product = (torch.cat(part) for part in zip(*parts, strict=True))
        result.append(Neighbours(place[index], product, x[mask] @ x[mask].mean(0)))
    return result


def cknna(phi: Tensor, psi: Tensor, k: int = 10, definition: Definition = "paper") -> float:
    """CKNNA of features [N, D] and [N, D'] of the same clips, with k nearest neighbours; see above.

    Raises ValueError for other numbers of clips, too few of them for k, and values that are not finite.
    """
    _require_pair(phi, psi)
    (a,), (b,) = nearest(phi, k), nearest(psi, k)
    return from_neighbours(a, b, definition)


def cknna_interval(
    phi: Tensor, psi: Tensor, k: int = 10, definition: Definition = "paper", *, seed: int = 0
) -> tuple[float, float, float]:
    """CKNNA, and the ends of its 95% interval: 1.96 standard errors of a jackknife that leaves out a tenth of the clips
    at a time. A bootstrap would not do: a clip that is drawn twice is its own nearest neighbour."""
    _require_pair(phi, psi)
    groups = jackknife_groups(len(phi), seed)
    a, b = nearest(phi, k, groups), nearest(psi, k, groups)
    return interval_from_neighbours(a, b, definition)


def jackknife_groups(count: int, seed: int = 0) -> list[Tensor]:
    """All of `count` clips in GROUPS parts, drawn from `seed`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [*order.tensor_split(GROUPS)]


def interval_from_neighbours(
    a: Sequence[Neighbours], b: Sequence[Neighbours], definition: Definition
) -> tuple[float, float, float]:
    """`cknna_interval` of what `nearest` has made with the same groups."""
    whole, *parts = (from_neighbours(x, y, definition) for x, y in zip(a, b, strict=True))
    mean = sum(parts) / len(parts)
    error = math.sqrt((len(parts) - 1) / len(parts) * sum((part - mean) ** 2 for part in parts))
    return whole, whole - Z * error, whole + Z * error


def from_neighbours(a: Neighbours, b: Neighbours, definition: Definition) -> float:
    """`cknna` of what `nearest` has made."""
    if definition == "paper":
        whole = math.sqrt(_centred(a, a) * _centred(b, b))
        return _centred(a, b) / whole if whole > 0 else 0.0
    # The estimate of a kernel with itself can be negative: there is no root of it, in the public code neither.
    product = _unbiased(a, a) * _unbiased(b, b)
    return _unbiased(a, b) / (math.sqrt(product) + 1e-6) if product >= 0 else math.nan


def _require_pair(phi: Tensor, psi: Tensor) -> None:
    if phi.dim() != 2 or psi.dim() != 2 or len(phi) != len(psi):
        raise ValueError(f"features {list(phi.shape)} and {list(psi.shape)}: expected [N, D] and [N, D'] of one N")


def _shared(a: Neighbours, b: Neighbours) -> tuple[Tensor, Tensor]:
    """Which neighbours in `a` are such in `b`, bool [N, k], and the product in `b` with each of them (0 otherwise)."""
    equal = a.index[:, :, None] == b.index[:, None]  # [N, k, k]
    return equal.any(2), torch.where(equal, b.product[:, None], 0.0).sum(2)


def _centred(a: Neighbours, b: Neighbours) -> float:
    """Align of Eq. 29."""
    shared, of_b = _shared(a, b)
    product = (a.product - a.mean[:, None]) * (of_b - b.mean[:, None])
    return float(torch.where(shared, product, 0.0).sum())


def _unbiased(a: Neighbours, b: Neighbours) -> float:
    """The unbiased HSIC of the two kernels, each zero but for neighbours in both sets."""
    n = len(a.index)
    shared, of_b = _shared(a, b)
    first, second = torch.where(shared, a.product, 0.0), torch.where(shared, of_b, 0.0)  # of row i, in a's order
    # sum_ij K_ij L_ji: j's own list of neighbours has i, and L_ji is what stands there.
    back = a.index[a.index] == torch.arange(n, device=a.index.device)[:, None, None]  # [N, k, k]
    returned = torch.where(back, second[a.index], 0.0).sum(2)
    # sum_ij (K L)_ij: over j, the sum of K's column j times that of L's row j.
    columns = torch.zeros(n, dtype=first.dtype, device=first.device).index_add(0, a.index.flatten(), first.flatten())
    total = (
        (first * returned).sum()
        + first.sum() * second.sum() / ((n - 1) * (n - 2))
        - 2 * (columns * second.sum(1)).sum() / (n - 2)
    )
    return float(total) / (n * (n - 3))
