"""The plots of an ablation: a metric against steps and against floating-point operations, and PSNR over the horizon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mimo.ablation.results import Found, Metric
from mimo.ablation.variants import VARIANTS
from mimo.folders import atomic_path


def plot_metric(path: Path, found: Found, variants: tuple[str, ...], metric: Metric) -> Path:
    """Mean over seeds, and from the lowest to the highest of them as a band."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for variant in variants:
        by_seed = found.values[variant, metric.name].mean(-1)  # [seeds, steps]
        _line(left, np.array(found.steps), by_seed, VARIANTS[variant].label)
        _line(right, found.gflop[variant], by_seed, VARIANTS[variant].label)
    left.set(xlabel="steps", ylabel=metric.unit)
    right.set(xlabel="GFLOP of training, counted")
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path, f"{len(found.seeds)} seeds: mean, lowest and highest")


def plot_horizon(path: Path, found: Found, variants: tuple[str, ...]) -> Path:
    """PSNR of every predicted frame, at the last step."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for variant in variants:
        by_seed = found.horizon[variant]  # [seeds, frames]
        _line(axes, np.arange(1, by_seed.shape[1] + 1), by_seed, VARIANTS[variant].label)
    axes.set(xlabel="predicted frame", ylabel="PSNR, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path, f"after {found.steps[-1]} steps, {len(found.seeds)} seeds")


def _line(axes: Axes, x: np.ndarray, by_seed: np.ndarray, label: str) -> None:
    (line,) = axes.plot(x, by_seed.mean(0), marker="o", markersize=3, label=label)
    axes.fill_between(x, by_seed.min(0), by_seed.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path, title: str) -> Path:
    figure.suptitle(title, fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})
    return path
