"""Features in two dimensions, to look at."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from mimo.errors import InputError

Projection = Literal["umap", "pca"]


def default_projection() -> Projection:
    """UMAP, as the paper has it, where umap-learn is installed."""
    return "umap" if find_spec("umap") else "pca"


def project(features: Tensor, projection: Projection, seed: int) -> Tensor:
    """[N, D] -> fp64 [N, 2].

    "umap": McInnes et al. 2018, of umap-learn, with its defaults (15 neighbours, least distance 0.1); the same seed
    gives the same map. "pca": the two directions of greatest variance, each so that its largest value is positive.

    Raises InputError where umap-learn is not installed, and for fewer than 3 clips.
    """
    count = len(features)
    if count < 3:
        raise InputError(f"a map of {count} clips: expected at least 3")
    x = features.double().cpu()
    if projection == "pca":
        u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        places = torch.zeros(count, 2, dtype=torch.float64)
        places[:, : len(s)] = (u * s)[:, :2]
        largest = places.gather(0, places.abs().argmax(0, keepdim=True))
        return places * torch.where(largest < 0, -1.0, 1.0)
    if not find_spec("umap"):
        raise InputError("--projection umap: umap-learn is not installed: pip install 'mimo-kernels[umap]'")
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a seed, that one thread is used: as it should be
        mapper = umap.UMAP(n_neighbors=min(15, count - 1), min_dist=0.1, random_state=seed, n_jobs=1)
        return torch.from_numpy(mapper.fit_transform(x.float().numpy())).double()
