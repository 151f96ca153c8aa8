"""`mimo data check`: what a folder holds, what cannot be read and why, in numbers."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mimo.data.annotation import ClipFile
from mimo.data.datasets import find_kinds, layout_options
from mimo.data.errors import DamagedVideo, DataError, UnreadableVideo
from mimo.data.latents import LatentShards, is_latents
from mimo.data.text import read_text
from mimo.data.video import open_clip


@dataclass
class Report:
    """What `check` found. `str(report)` is the text for people.

    Args:
        path: what was looked at.
        kind: what it holds.
        files: number of clips.
        unreadable: (file, why) of every clip that cannot be used.
        damaged: (file, what of it is used) of every clip that is not whole.
        frames: usable frames of each readable clip.
        sizes, rates, actions, labels: how many readable clips have each height x width, frame rate, action and class.
            Actions are counted per frame.
        short: readable clips with fewer frames than asked for.
        num_frames: how many frames were asked for; 0 is any.
    """

    path: str
    kind: str
    files: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
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
        for name, found in (("damaged", self.damaged), ("unreadable", self.unreadable)):
            for (path, why), count in Counter(found).items():
                lines.append(f"  {name:11} {path}: {why}" + (f" ({count} clips)" if count > 1 else ""))
        return "\n".join(lines)


def _counts(counts: Counter, most: int = 8) -> str:
    parts = [f"{key} ({count})" for key, count in counts.most_common(most)]
    return ", ".join(parts) + (f", and {len(counts) - most} more" if len(counts) > most else "")


def check(
    path: str | Path,
    *,
    layout: str | None = None,
    annotation: str | Path | None = None,
    allow_outside: bool = False,
    split: str | None = None,
    num_frames: int = 0,
    decode_all: bool = False,
    workers: int | None = None,
) -> list[Report]:
    """Opens every clip and decodes its first and last frame, or with `decode_all` every frame. Of latent shards it
    compares sizes and checksums, and with `decode_all` looks for clips that are not finite.

    Args:
        path, layout, annotation, allow_outside, split: as for `open_dataset`; a folder may hold several kinds here.
        num_frames: clips with fewer are counted as too short; 0 takes those of the layout.
        workers: processes that read; 0 reads in this one, None takes one per core, or fewer for few clips.

    Returns: a report for each kind. Raises DataError for what `open_dataset` refuses before it opens a clip.
    """
    if is_latents(Path(path)):
        return [_check_latents(LatentShards(path, allow_outside=allow_outside), decode_all)]
    asked = layout_options(layout)
    num_frames, split = num_frames or asked.get("num_frames", 0), split or asked.get("split")
    options = {name: asked[name] for name in ("num_classes", "num_actions", "use_actions") if name in asked}
    options |= {"annotation": annotation, "allow_outside": allow_outside, "split": split}
    kinds, folder, options = find_kinds(Path(path), options)
    if not kinds:
        raise DataError(f"{path}: holds no video, no npz file and no tar shard, expected videos or npz trajectories")
    return [
        _check_clips(
            kind(folder, num_frames=1, height=1, width=1, **options), kind.kind, num_frames, decode_all, workers
        )
        for kind in kinds
    ]


def _check_clips(dataset, kind: str, num_frames: int, decode_all: bool, workers: int | None) -> Report:
    report = Report(str(dataset.path), kind, files=len(dataset), num_frames=num_frames)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(dataset) // 8)
    looks = DataLoader(_Looks(dataset, decode_all), batch_size=8, collate_fn=list, num_workers=workers)
    with tqdm(total=len(dataset), unit="clip", desc="check", disable=None) as bar:
        for clip, found in zip(dataset.clips, itertools.chain.from_iterable(looks), strict=True):
            bar.update()
            if isinstance(found, UnreadableVideo):
                report.unreadable.append((found.path, found.why))
                continue
            frames, damage, size, rate, actions = found
            report.damaged += [(clip.name, damage)] if damage else []
            report.frames.append(frames)
            report.short += frames < num_frames
            report.sizes[size] += 1
            report.rates.update([rate] if rate else [])
            report.actions.update(actions)
            if clip.label is not None:
                report.labels[clip.label] += 1
    return report


class _Looks(Dataset):
    """Map from a clip's number to (frames, damage, size, rate, actions counted), or the UnreadableVideo it raised."""

    def __init__(self, dataset, decode_all: bool):
        self.dataset, self.decode_all = dataset, decode_all

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int):
        try:
            return self._look(self.dataset.clips[number])
        except UnreadableVideo as error:
            return error

    def _look(self, clip: ClipFile) -> tuple[int, str | None, str, str | None, Counter]:
        with open_clip(clip.path, member=clip.member) as reader:
            try:
                if self.decode_all:
                    reader.shorten()
                else:
                    reader.read(1, size=(8, 8))
                    reader.read(1, start=reader.num_frames - 1, size=(8, 8))
            except DamagedVideo:
                reader.shorten()
            actions = self.dataset.actions_of(clip, reader)
            if clip.text is not None:
                read_text(clip.text)
            size, rate = f"{reader.height}x{reader.width}", reader.fps and f"{reader.fps:.4g}"
        counted = Counter([] if actions is None else actions.tolist())
        return reader.num_frames, reader.damage, size, rate, counted


def _check_latents(dataset: LatentShards, decode_all: bool) -> Report:
    shape = " x ".join(map(str, dataset.latent_shape))
    report = Report(str(dataset.path), f"clips of latents {shape} ({dataset.index.tokenizer})", files=len(dataset))
    if (features := dataset.index.features_shape) is not None:
        report.kind += f" with features {' x '.join(map(str, features))} ({dataset.index.encoder})"
        dataset.read_features(str(dataset.index.encoder), features[-1])
    report.frames = [dataset.num_frames] * len(dataset)
    report.sizes[f"{dataset.height}x{dataset.width}"] = len(dataset)
    last = 0
    for number, entry in enumerate(dataset.index.shards):
        first, last = last, last + entry.clips
        try:
            dataset.require_checksum(number)
            shard = dataset.open_shard(number)
        except UnreadableVideo as error:
            report.unreadable += [(error.path, error.why)] * entry.clips
            continue
        for key, counts in (("label", report.labels), ("actions", report.actions)):
            if key in shard.keys():  # noqa: SIM118 (an open shard is not a mapping)
                counts.update(shard.get_tensor(key).flatten().tolist())
        for clip in range(first, last) if decode_all else ():
            try:
                dataset.sample(clip, 0)
            except UnreadableVideo as error:
                report.unreadable.append((error.path, error.why))
    return report


def run(path: str | Path, *, strict: bool = False, **options) -> None:
    """Prints the reports of `check`; raises DataError when nothing at all can be read, or, if `strict`, when anything
    is unreadable, damaged or too short."""
    reports = check(path, **options)
    for report in reports:
        print(report, flush=True)
    clips, unreadable = (sum(numbers) for numbers in zip(*((r.files, len(r.unreadable)) for r in reports), strict=True))
    if unreadable == clips:
        raise DataError(f"{path}: none of its {clips} clips can be read")
    damaged, short = sum(len(report.damaged) for report in reports), sum(report.short for report in reports)
    if strict and unreadable + damaged + short:
        raise DataError(
            f"{path}: of its {clips} clips {unreadable} are unreadable, {damaged} damaged and {short} too short"
        )
