"""From what was measured to tables and pictures.

table.json, .csv, .md     a row per set of videos and score: the value, its interval, of how many clips, at what size,
                          and what was compared with what
curves.json, .csv, .md    a row per set, score and frame, of distances from the truth
curves.png                the same, drawn
sheet.png                 the first clips and what each set has in their place
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo.data import contact_sheet
from mimo.errors import InputError
from mimo.evaluation.evaluate import LEAST, Evaluation, Measured
from mimo.evaluation.judges import SCORES, judge_checksum
from mimo.evaluation.metrics import bootstrap_interval, frechet_from_features, mmd, mmd_interval
from mimo.evaluation.tables import Cell, as_markdown, write_tables
from mimo.folders import atomic_path

LEVEL = 0.95
RESAMPLES = {"frames": 1000, "frechet": 100, "mmd": 200}
COLUMNS = ("videos", "score", "value", "low", "high", "n", "over", "frames", "pixels", "compared with")
SHOWN_CLIPS = 4


def report(evaluation: Evaluation, about: dict[str, Any]) -> list[Path]:
    """Write and print the results; the paths that were written."""
    e, out = evaluation, evaluation.out
    reals = e.measured(0)
    rows: list[dict[str, Cell]] = []
    curves: list[dict[str, Cell]] = []
    for number in range(1, len(e.everything)):
        found = e.measured(number)
        for name in e.scores:
            if name in found.frames:
                rows += _from_truth(e, name, found)
                curves += _curve(e, name, found)
            elif SCORES[name].distance is not None:
                rows.append(_between_sets(e, name, found, reals))
    judges = {name: judge_checksum(judge) for name, judge in e.judges.items()}
    about = about | {"judges": judges, "level": LEVEL, "resamples": RESAMPLES}
    notes = _notes(e, reals)
    paths = write_tables(out, "table", rows, about=about, shown=COLUMNS, notes=notes)
    if curves:
        paths += write_tables(out, "curves", curves, about=about)
        paths.append(plot_curves(out / "curves.png", curves))
    paths.append(_sheet(e, out / "sheet.png"))
    print(as_markdown(rows, COLUMNS))
    for note in notes:
        print(note)
    return paths


def _from_truth(e: Evaluation, name: str, found: Measured) -> list[dict[str, Cell]]:
    """Rows of the distance of videos from their clips: the mean over frames of each, the best of K, and their mean."""
    values = found.frames[name].mean(2)  # [N, K]
    copies = values.shape[1]
    best = values.amax(1) if SCORES[name].higher else values.amin(1)
    rows = [_row(e, name, found, best, f"best of {copies}" if copies > 1 else "")]
    return rows + ([_row(e, name, found, values.mean(1), f"mean of {copies}")] if copies > 1 else [])


def _row(e: Evaluation, name: str, found: Measured, values: Tensor, over: str) -> dict[str, Cell]:
    low, high = bootstrap_interval(values, resamples=RESAMPLES["frames"], level=LEVEL)
    return _cells(e, name, found.subject.label, float(values.mean()), low, high, len(values), over, e.predicted) | {
        "compared with": "its own clip"
    }


def _cells(
    e: Evaluation, name: str, label: str, value: float, low: float, high: float, n: int, over: str, frames: range
) -> dict[str, Cell]:
    d = e.reals.dataset
    height, width = (e.protocol.size,) * 2 if e.protocol.size else (d.height, d.width)
    return {
        "videos": label,
        "score": SCORES[name].title,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "over": over,
        "frames": f"{frames.start + 1}-{frames.stop}",
        "pixels": f"{height} x {width}",
        "better": "higher" if SCORES[name].higher else "lower",
    }


def _between_sets(e: Evaluation, name: str, found: Measured, reals: Measured) -> dict[str, Cell]:
    """The row of a distance between a set of videos and the real clips: the mean over trajectories."""
    made, true = found.features.get(name), reals.features.get(name)
    paired = found.subject.paired
    if made is not None and true is not None:
        if paired:  # the same clips, one beside the other
            there = {number: row for row, number in enumerate(reals.numbers)}
            both = [row for row, number in enumerate(found.numbers) if number in there]
            true, made = true[[there[found.numbers[row]] for row in both]], made[both]
        else:  # as many of each
            n = min(len(true), len(made))
            true, made = true[:n], made[:n]
    n = 0 if made is None or true is None else len(made)
    if made is None or true is None or n < LEAST:
        raise InputError(
            f"{found.subject.label}: {SCORES[name].title} of {n} videos and {n} clips says nothing, expected at least "
            f"{LEAST} (--clips)"
        )
    true, sets = true[:, 0], list(made.unbind(1))  # [N, D] or [N, F, D]
    value, (low, high) = _distance(name, true, sets, paired)
    copies = len(sets)
    cells = _cells(
        e,
        name,
        found.subject.label,
        value,
        low,
        high,
        n,
        f"mean of {copies}" if copies > 1 else "",
        e.judged,
    )
    return cells | {"compared with": f"{n} real clips"}


def _distance(name: str, true: Tensor, sets: list[Tensor], paired: bool) -> tuple[float, tuple[float, float]]:
    """Of every set from the true one, the mean over sets, and its interval. Frames of a clip are drawn together."""
    kind = SCORES[name].distance
    if kind == "mmd":
        flat, others = true.flatten(0, -2), [x.flatten(0, -2) for x in sets]
        value = sum(mmd(flat, other) for other in others) / len(others)
        options: dict[str, Any] = {"resamples": RESAMPLES["mmd"], "level": LEVEL, "paired": paired}
        return value, mmd_interval(flat, others, each=flat.shape[0] // len(true), **options)

    def mean_distance(a: Tensor, *others: Tensor) -> float:
        return sum(frechet_from_features(a.flatten(0, -2), b.flatten(0, -2)) for b in others) / len(others)

    stacked = torch.stack(sets, 1)

    def statistic(a: Tensor, b: Tensor) -> float:
        return mean_distance(a, *b.unbind(1))

    interval = bootstrap_interval(
        [true, stacked], statistic, resamples=RESAMPLES["frechet"], level=LEVEL, paired=paired, centred=True
    )
    return statistic(true, stacked), interval


def _curve(e: Evaluation, name: str, found: Measured) -> list[dict[str, Cell]]:
    """Rows of every frame: the mean over clips and trajectories."""
    values = found.frames[name].mean(1)  # [N, F']
    rows: list[dict[str, Cell]] = []
    for frame, column in zip(e.predicted, values.unbind(1), strict=True):
        low, high = bootstrap_interval(column, resamples=RESAMPLES["frames"], level=LEVEL)
        cells: dict[str, Cell] = {"videos": found.subject.label, "score": SCORES[name].title, "frame": frame + 1}
        rows.append(cells | {"value": float(column.mean()), "low": low, "high": high, "n": len(column)})
    return rows


def _notes(e: Evaluation, reals: Measured) -> list[str]:
    n, notes = len(reals.numbers), [f"Intervals hold {LEVEL:.0%} of the resamples of clips."]
    for name in e.scores:
        score = SCORES[name]
        if score.distance == "frechet" and (x := reals.features.get(name)) is not None:
            vectors, width = n * math.prod(x.shape[2:-1]), x.shape[-1]
            if vectors <= width:
                notes.append(
                    f"{score.title}: {vectors} vectors of {width} values have a singular covariance: it is biased "
                    "upwards, compare it at this n alone."
                )
        if score.distance == "mmd":
            notes.append(f"{score.title}: its estimator is biased upwards by up to {2000 / n:.3g} at n = {n}.")
    free = [SCORES[name].title for name in e.scores if name.startswith("fd-")]
    if free:
        notes.append(f"{' and '.join(free)}: features without weights, comparable with each other alone.")
    return notes


def plot_curves(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Scores over the frames, a panel per score, with their intervals."""
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(row["score"] for row in rows))
    figure = Figure(figsize=(5 * len(titles), 3.5), layout="constrained")
    for panel, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles):
        for label in dict.fromkeys(row["videos"] for row in rows):
            own = [row for row in rows if row["score"] == title and row["videos"] == label]
            frames = [row["frame"] for row in own]
            panel.plot(frames, [row["value"] for row in own], marker="." if len(own) < 40 else "", label=label)
            panel.fill_between(frames, [row["low"] for row in own], [row["high"] for row in own], alpha=0.2)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set(xlabel="frame", ylabel=title + (" (dB)" if title == "PSNR" else ""))
        panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _sheet(e: Evaluation, path: Path) -> Path:
    """The first clips, and below each what the sets have in its place."""
    shown = [(subject.label, e.shown(number, SHOWN_CLIPS)) for number, subject in enumerate(e.everything)]
    rows = {}
    for clip in range(min(SHOWN_CLIPS, len(e.reals.order))):
        for label, (read, videos) in shown:
            if clip in read:
                rows[f"clip {clip + 1}: {label}"] = videos[read.index(clip), : e.frames].numpy()
    return contact_sheet(path, rows, e.context)
