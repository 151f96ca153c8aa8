"""The pictures of `mimo probe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.data import contact_sheet
from mimo.data.factors import FACTORS
from mimo.evaluation.attention_maps import latent_frames, overlay
from mimo.folders import atomic_path

MOST_CLASSES = 20  # that a map tells apart by colours with a legend


def curves(out: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Value against layer, a line per network with its interval: linear probes, a panel per factor; and CKNNA, a panel
    per definition."""
    paths = []
    for name, title, chosen, panel in (
        ("linear_probe", "linear probe accuracy", "linear probe", "of"),
        ("cknna", "CKNNA", "CKNNA", "measure"),
    ):
        mine = [row for row in rows if row["measure"].startswith(chosen)]
        if mine:
            paths.append(_curves(out / f"{name}.png", title, mine, panel))
    return paths


def _curves(path: Path, title: str, rows: Sequence[Mapping[str, Any]], panel: str) -> Path:
    panels = list(dict.fromkeys(row[panel] for row in rows))
    figure, axes = _panels(len(panels))
    for ax, name in zip(axes, panels):
        here = [row for row in rows if row[panel] == name]
        for network in dict.fromkeys(row["network"] for row in here):
            line = [row for row in here if row["network"] == network and row["value"] is not None]
            layers = [row["layer"] for row in line]
            (drawn,) = ax.plot(layers, [row["value"] for row in line], marker="o", markersize=3, label=network)
            ends = [[row[end] for row in line] for end in ("low", "high")]
            ax.fill_between(layers, *ends, alpha=0.2, color=drawn.get_color(), linewidth=0)
        if here[0].get("chance") is not None:
            ax.axhline(here[0]["chance"], color="0.5", linestyle=":", linewidth=1)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(title)
    axes[0].legend(fontsize=8)
    return _save(figure, path)


def scatter(path: Path, title: str, places: Tensor, labels: Tensor, names: Sequence[str]) -> Path:
    """Clips at their places [N, 2], a panel per factor, coloured by its classes labels [N, factors]; one without
    colours where nothing is known."""
    figure, axes = _panels(max(1, len(names)), side=3.4)
    x, y = places.T.tolist()
    if not names:
        axes[0].scatter(x, y, s=5, linewidths=0)
    for column, (ax, name) in enumerate(zip(axes, names)):
        classes = labels[:, column].unique().tolist()
        many = len(classes) > MOST_CLASSES
        for number, label in enumerate(classes):
            mine = (labels[:, column] == label).nonzero()[:, 0].tolist()
            color = _color(number, len(classes))
            word = FACTORS[name][label] if name in FACTORS else str(label)
            ax.scatter([x[i] for i in mine], [y[i] for i in mine], s=5, linewidths=0, color=color, label=word)
        ax.set_title(f"{name} ({len(classes)} classes)" if many else name, fontsize=10)
        if not many:
            ax.legend(fontsize=6, markerscale=2, loc="upper right")
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def attention(
    path: Path, video: np.ndarray, weights: Mapping[int, Tensor], heads: Sequence[int], config: MiMoConfig
) -> Path:
    """A row of frames per layer and head with the weights [1, heads, T, N] over them; above them the frames. video:
    uint8 [F, H, W, 3]."""
    count = next(iter(weights.values())).shape[2]
    frames = latent_frames(video, count, config.compression[0])
    rows = {"frames": frames}
    for layer, of_layer in weights.items():
        for place, head in enumerate(heads):
            shown = overlay(frames, of_layer[0, place].float().cpu().numpy(), config.grid)
            rows[f"layer {layer}, head {head + 1}"] = shown
    return contact_sheet(path, rows)


def _color(number: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](number) if count <= 10 else colormaps["turbo"](number / max(1, count - 1))


def _panels(count: int, side: float = 3.0) -> tuple[Any, list[Any]]:
    """A figure with so many panels, three in a row."""
    from matplotlib.figure import Figure

    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(4.0, side * 1.15 * columns), side * lines), layout="constrained")
    axes = [*figure.subplots(lines, columns, squeeze=False).flat]
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _save(figure: Any, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path
