"""`mimo data check`: what a folder holds, what cannot be read and why, in numbers."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mimo.data.datasets import ClipFile, find_kinds
from mimo.data.errors import DataError, UnreadableVideo
from mimo.data.latents import LatentShards, is_latents
from mimo.data.video import load_actions, open_clip


@dataclass
class Report:
    """What `check` found. `str(report)` is the text for people.

    Args:
        path: what was looked at.
        kind: what it holds.
        files: number of clips.
        unreadable: (file, why) of those that cannot be used.
        frames: frames of each readable clip.
        sizes, rates, actions, labels: how many readable clips have each height x width, frame rate, action and class.
            Actions are counted per frame.
        short: readable clips with fewer frames than asked for.
        num_frames: how many frames were asked for; 0 is any.
    """

    path: str
    kind: str
    files: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)
    rates: Counter = field(default_factory=Counter)
    actions: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    short: int = 0
    num_frames: int = 0

    def __str__(self) -> str:
        good = self.files - len(self.unreadable)
        lines = [f"{self.path}: {self.files} {self.kind}, {good} readable, {len(self.unreadable)} not"]
        if self.frames:
            low, middle, high = min(self.frames), int(np.median(self.frames)), max(self.frames)
            lines.append(f"  frames      {low} to {high}, median {middle}, {sum(self.frames)} in all")
            if self.num_frames:
                lines.append(f"  too short   {self.short} have fewer than {self.num_frames} frames and will be skipped")
        for name, counts in (("sizes", self.sizes), ("frame rates", self.rates), ("actions", self.actions)):
            if counts:
                lines.append(f"  {name:11} {_counts(counts)}")
        if self.labels:
            fewest, most = min(self.labels.values()), max(self.labels.values())
            lines.append(
                f"  classes     {len(self.labels)} (labels 0 to {max(self.labels)}), {fewest} to {most} clips each"
            )
        lines += [f"  unreadable  {path}: {why}" for path, why in self.unreadable]
        return "\n".join(lines)


def _counts(counts: Counter, most: int = 8) -> str:
    parts = [f"{key} ({count})" for key, count in counts.most_common(most)]
    return ", ".join(parts) + (f", and {len(counts) - most} more" if len(counts) > most else "")


def check(
    path: str | Path,
    *,
    annotation: str | Path | None = None,
    split: str | None = None,
    num_frames: int = 0,
    decode_all: bool = False,
    workers: int = 0,
) -> list[Report]:
    """Opens every clip and decodes its first and last frame, or with `decode_all` every frame.

    Args:
        path, annotation, split: as for `open_dataset`; a folder may hold several kinds here.
        num_frames: clips with fewer are counted as too short.
        workers: processes that read; 0 reads in this one.

    Returns: a report for each kind. Raises DataError for what `open_dataset` refuses before it opens a clip.
    """
    if is_latents(Path(path)):
        return [_check_latents(LatentShards(path))]
    kinds, folder, options = find_kinds(Path(path), {"annotation": annotation, "split": split})
    if not kinds:
        raise DataError(f"{path}: holds no video and no npz file, expected videos or npz trajectories")
    return [
        _check_clips(
            kind(folder, num_frames=1, height=1, width=1, **options), kind.kind, num_frames, decode_all, workers
        )
        for kind in kinds
    ]


def _check_clips(dataset, kind: str, num_frames: int, decode_all: bool, workers: int) -> Report:
    report = Report(str(dataset.path), kind, files=len(dataset), num_frames=num_frames)
    jobs = [(clip, decode_all) for clip in dataset.clips]
    with tqdm(total=len(jobs), unit="clip", desc="check", disable=None) as bar:
        for clip, found in zip(dataset.clips, _run(jobs, workers), strict=True):
            bar.update()
            if isinstance(found, UnreadableVideo):
                report.unreadable.append((found.path, found.why))
                continue
            frames, size, rate, actions = found
            report.frames.append(frames)
            report.short += frames < num_frames
            report.sizes[size] += 1
            report.rates.update([rate] if rate else [])
            report.actions.update(actions)
            if clip.label is not None:
                report.labels[clip.label] += 1
    return report


def _run(jobs: list, workers: int):
    if workers == 0:
        yield from map(_look, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_look, jobs, chunksize=8)


def _look(job: tuple[ClipFile, bool]):
    """(frames, size, rate, actions counted) of a clip, or the UnreadableVideo it raised."""
    clip, decode_all = job
    try:
        with open_clip(clip.path) as reader:
            total = reader.num_frames
            steps = range(0, total, 64) if decode_all else ()
            for start in steps:
                reader.read(min(64, total - start), start=start, size=(8, 8))
            if not decode_all:
                reader.read(1, size=(8, 8))
                reader.read(1, start=total - 1, size=(8, 8))
            actions = load_actions(clip.actions) if clip.actions else reader.actions
            size, rate = f"{reader.height}x{reader.width}", reader.fps and f"{reader.fps:.4g}"
        if actions is not None and len(actions) < total:
            raise UnreadableVideo(clip.actions or clip.path, f"holds {len(actions)} actions for {total} frames")
        return total, size, rate, Counter([] if actions is None else actions.tolist())
    except UnreadableVideo as error:
        return error


def _check_latents(dataset: LatentShards) -> Report:
    shape = " x ".join(map(str, dataset.latent_shape))
    report = Report(str(dataset.path), f"clips of latents {shape} ({dataset.index['tokenizer']})", files=len(dataset))
    report.frames = [dataset.num_frames] * len(dataset)
    report.sizes[f"{dataset.height}x{dataset.width}"] = len(dataset)
    for number, entry in enumerate(dataset.index["shards"]):
        try:
            dataset.open_shard(number)
        except UnreadableVideo as error:
            report.unreadable += [(error.path, error.why)] * entry["clips"]
    return report


def run(path: str | Path, **options) -> None:
    """Prints the reports of `check`; raises DataError when nothing at all can be read."""
    reports = check(path, **options)
    for report in reports:
        print(report)
    if all(len(report.unreadable) == report.files for report in reports):
        raise DataError(f"{path}: none of its {sum(report.files for report in reports)} clips can be read")
