"""Datasets: folders of videos, npz trajectories with actions, and procedural shapes.

All share one interface. `len(dataset)` clips; `dataset.sample(index, seed)` gives

    video     uint8 [F, H, W, 3]
    label     int64, when the clips have classes
    actions   int64 [F], one per frame, when the clips have actions
    text      fp32 [L, E], the features of a text, when the clips are asked for theirs; see mimo.data.text
    interval  int64, when the frame interval is drawn per clip

and is a pure function of (index, seed). A file that cannot be used raises UnreadableVideo with its name; the loader
reports it and goes on. What is wrong for all of a dataset (a missing folder, a bad annotation) raises DataError at
once. Labels and actions that the network has no place for stop it as well: without those clips it would train on others
than were meant.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mimo.data import tar
from mimo.data.annotation import ClipFile, read_clips, read_entries
from mimo.data.errors import DamagedVideo, DataError, OutOfRange, UnreadableVideo
from mimo.data.factors import FactorClips
from mimo.data.fitting import clip_span
from mimo.data.kept import KeptFrames
from mimo.data.latents import LatentShards, is_latents
from mimo.data.npz import NpzReader, load_actions, npz_names
from mimo.data.protocols import ClipDataset
from mimo.data.shapes import SIDES, TEXTURES, moving_shapes
from mimo.data.text import read_text, text_beside
from mimo.data.video import VIDEO_SUFFIXES, VideoReader, open_clip
from mimo.errors import reason

FRAME_MEMORY = 512  # MiB


class _ClipFiles:
    """What the file datasets share: choosing frames, cropping, labels and actions.

    Args:
        path: a folder, searched recursively, or one file.
        num_frames, height, width: shape of a sample. Frames are resized to cover height x width, then cropped. A clip
            with fewer frames counts as unreadable.
        interval: distance of the frames in the source; a clip too short for it falls back to 1. A pair (low, high)
            draws the interval of every sample uniformly, as far as the clip reaches (MAGI, dynamic interval training),
            and samples gain `interval`.
        annotation: JSON list of {"video_path": ..., "label": ..., "action_path": ...}, the last two optional; see
            mimo.data.annotation.
        allow_outside: what the annotation names may lie elsewhere than in `path` and the annotation's folder.
        split: a subfolder of `path` to use alone, as in Kinetics-600 and TECO's datasets.
        folder_labels: classes are the names of the files' own folders, sorted.
        random_start: draw the first frame; False starts at frame 0.
        random_crop, flip: draw the place of the crop; mirror half of the samples.
        num_classes, num_actions: labels and actions must be below; None takes what the annotation holds.
        text: (tokens, width) of the texts in samples; each clip has to have one then. None looks for none.
        use_actions, use_labels: False leaves them out, for files whose actions are not classes and for networks that
            have no place for them.
        frame_memory: MiB of decoded frames that are kept to be read again, by all workers of a loader together.

    Attributes:
        shortened: what is used of each damaged video that was met so far; see mimo.data.video.
    """

    kind: str
    suffixes: tuple[str, ...]
    decodes = True

    def __init__(
        self,
        path: str | Path,
        *,
        num_frames: int,
        height: int,
        width: int,
        interval: int | tuple[int, int] = 1,
        annotation: str | Path | None = None,
        allow_outside: bool = False,
        split: str | None = None,
        folder_labels: bool = False,
        random_start: bool = True,
        random_crop: bool = False,
        flip: bool = False,
        num_classes: int | None = None,
        num_actions: int | None = None,
        text: tuple[int, int] | None = None,
        use_actions: bool = True,
        use_labels: bool = True,
        frame_memory: int = FRAME_MEMORY,
    ):
        low, high = (interval, interval) if isinstance(interval, int) else interval
        if min(num_frames, height, width) < 1 or not 1 <= low <= high:
            raise ValueError(f"clips of {num_frames} x {height} x {width}, interval {interval}: expected all >= 1")
        self.num_frames, self.height, self.width = num_frames, height, width
        self.interval, self.dynamic = (low, high), not isinstance(interval, int)
        self.random_start, self.random_crop, self.flip = random_start, random_crop, flip
        self.num_actions, self.use_actions, self.use_labels = num_actions, use_actions, use_labels
        self.text = text
        self.kept = KeptFrames(frame_memory << 20)
        self.shortened: dict[str, str] = {}
        self.path = _split_folder(Path(path), split)
        if annotation is not None:
            self.clips = read_clips(Path(annotation), self.path, allow_outside=allow_outside)
        else:
            self.clips = self._find_clips(use_actions)
            if not self.clips:
                raise DataError(f"{self.path}: holds no {self.kind} ({', '.join(self.suffixes)})")
            if folder_labels:
                self.clips = _label_by_folder(self.clips, self.path)
            if self.suffixes == VIDEO_SUFFIXES and use_actions:
                self.clips = _attach_actions(self.clips)
        if text is not None and self.clips[0].text is None:
            self.clips = _attach_texts(self.clips)
        labels = [clip.label for clip in self.clips if clip.label is not None]
        self.num_classes = num_classes
        if labels and use_labels:
            self.num_classes = num_classes or max(labels) + 1
            if max(labels) >= self.num_classes:
                worst = max(self.clips, key=lambda clip: clip.label or 0)
                raise DataError(f"{worst.name}: label {worst.label}, expected one below num_classes {self.num_classes}")
        if flip and use_actions and self.clips[0].actions is not None:
            raise DataError(f"{self.path}: flip mirrors the video but not its actions: turn one of them off")

    def _find_clips(self, use_actions: bool) -> list[ClipFile]:
        return [ClipFile(file) for file in find_files(self.path, self.suffixes)]

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def has_labels(self) -> bool:
        return self.use_labels and self.clips[0].label is not None

    @property
    def has_actions(self) -> bool:
        return self.use_actions and self.clips[0].actions is not None

    def name(self, index: int) -> str:
        """The file of a clip, for reports."""
        return self.clips[index].name

    def sample(self, index: int, seed: int) -> dict[str, np.ndarray]:
        clip = self.clips[index]
        rng = np.random.default_rng((seed, index))
        # All numbers are drawn in one order, whatever the switches, so that a switch changes nothing else.
        at_interval, at_start, at_y, at_x, at_flip = rng.random(5)
        with open_clip(clip.path, self.kept, clip.member) as reader:

            def read() -> tuple[int, int, np.ndarray]:
                interval = self._draw_interval(reader.num_frames, at_interval)
                slack = max(0, reader.num_frames - clip_span(self.num_frames, interval))
                start = int(at_start * (slack + 1)) if self.random_start else 0
                crop = (at_y, at_x) if self.random_crop else (0.5, 0.5)
                size = (self.height, self.width)
                return (
                    start,
                    interval,
                    reader.read(self.num_frames, start=start, interval=interval, size=size, crop=crop),
                )

            try:
                start, interval, video = read()
            except DamagedVideo:
                reader.shorten()
                start, interval, video = read()
            finally:
                if reader.damage:
                    self.shortened[reader.path] = reader.damage
            actions = self.actions_of(clip, reader)
        if self.flip and at_flip < 0.5:
            video = np.ascontiguousarray(video[:, :, ::-1])
        sample: dict[str, Any] = {"video": video}
        if self.has_labels:
            sample["label"] = np.int64(clip.label or 0)
        if actions is not None:
            sample["actions"] = actions[start : start + clip_span(self.num_frames, interval) : interval]
        if self.text is not None and clip.text is not None:
            sample["text"] = read_text(clip.text, tokens=self.text[0], width=self.text[1])
        if self.dynamic:
            sample["interval"] = np.int64(interval)
        return sample

    def _draw_interval(self, total: int, uniform: float) -> int:
        low, high = self.interval
        reach = (total - 1) // (self.num_frames - 1) if self.num_frames > 1 else high
        high = min(high, reach)
        return low + int(uniform * (high - low + 1)) if high >= low else 1

    def actions_of(self, clip: ClipFile, reader: VideoReader | NpzReader) -> np.ndarray | None:
        """int64 [F of the file, or more]; UnreadableVideo when they do not fit the video, OutOfRange beyond
        num_actions."""
        if not self.use_actions:
            return None
        actions = reader.actions if clip.actions is None else load_actions(clip.actions, self.kept)
        if actions is None:
            if self.has_actions:
                raise UnreadableVideo(clip.path, "holds no actions, though other files do")
            return None
        where, total = clip.actions or clip.path, reader.num_frames
        if len(actions) < total:
            raise UnreadableVideo(
                where,
                f"holds {len(actions)} actions for the {total} frames of {clip.path.name}",
            )
        top = self.num_actions
        if actions.size and (actions.min() < 0 or (top is not None and actions.max() >= top)):
            bound = f"in 0..{top - 1}" if top is not None else ">= 0"
            raise OutOfRange(where, f"actions reach from {actions.min()} to {actions.max()}, expected {bound}")
        return actions

    def check_readable(self) -> None:
        """Raises DataError, with the first file's reason, when not a single file gives a sample."""
        first = None
        for index in range(len(self)):
            try:
                self.sample(index, 0)
                return
            except OutOfRange as error:
                raise DataError(str(error)) from None
            except UnreadableVideo as error:
                first = first or error
        raise DataError(f"{self.path}: none of its {len(self)} {self.kind} can be used; the first is {first}")

    def sources(self) -> list[Path]:
        """Every file that is read."""
        files = ((clip.path, clip.actions, clip.text if self.text is not None else None) for clip in self.clips)
        return list(dict.fromkeys(file for three in files for file in three if file is not None))

    def settings(self) -> dict:
        """What decides, besides the files, what a sample is; survives JSON."""
        names = ("dynamic", "random_start", "random_crop", "flip", "use_actions")
        settings = {"interval": list(self.interval)} | {name: getattr(self, name) for name in names}
        return settings if self.use_labels else settings | {"use_labels": False}  # shards of before know no such switch

    def evaluation_order(self) -> list[int]:
        """Indices so that every prefix is as class-balanced as possible: one clip of each class in turn."""
        by_class: dict[int | None, list[int]] = {}
        for index, clip in enumerate(self.clips):
            by_class.setdefault(clip.label, []).append(index)
        turns = [(turn, label or 0, index) for label, many in by_class.items() for turn, index in enumerate(many)]
        return [index for _, _, index in sorted(turns)]

    def __repr__(self) -> str:
        classes = f", {self.num_classes} classes" if self.has_labels else ""
        return f"{type(self).__name__}({self.path}: {len(self)} {self.kind}{classes})"


class VideoFolder(_ClipFiles):
    """Videos (mp4, avi, mkv, webm, mov, m4v). An npz of the same name beside each holds its actions, as in TECO."""

    kind = "videos"
    suffixes = VIDEO_SUFFIXES


class NpzTrajectories(_ClipFiles):
    """Npz files with `video` uint8 [F, H, W, 3] and, if there, `actions` int [F], as in TECO's DMLab."""

    kind = "npz trajectories"
    suffixes = (".npz",)

    @property
    def has_actions(self) -> bool:
        """Whether one of the first files that can be read holds any; all others have to, then."""
        return self.use_actions and (super().has_actions or self._holds_actions)

    @cached_property
    def _holds_actions(self) -> bool:
        looked_at = 0
        for clip in self.clips:
            with suppress(UnreadableVideo):
                if "actions" in npz_names(clip.path):
                    return True
                looked_at += 1
            if looked_at == 8:
                break
        return False


class TarShards(_ClipFiles):
    """Videos in tar shards, KEY.mp4 with {"label": ...} in KEY.json, as WebDataset packs them; see mimo.data.tar.
    Actions and texts are not read out of shards."""

    kind = "videos in tar shards"
    suffixes = (tar.SUFFIX,)

    def _find_clips(self, use_actions: bool) -> list[ClipFile]:
        clips = [
            ClipFile(shard, label, member=member)
            for shard in find_files(self.path, self.suffixes)
            for member, label in tar.list_videos(shard, VIDEO_SUFFIXES, use_actions=use_actions)
        ]
        labelled = [clip.label is not None for clip in clips]
        if any(labelled) and not all(labelled):
            raise DataError(f"{clips[labelled.index(False)].name}: has no label, though others do")
        return clips


class ShapesDataset:
    """Procedural clips of moving shapes; every (index, seed) is another clip.

    Args:
        num_frames, height, width: shape of a sample.
        length: clips per epoch.
        shapes, speed, textures, sides, color: as for `moving_shapes`.
    """

    num_classes: int | None = None
    num_actions: int | None = None
    has_labels = False
    has_actions = False
    decodes = False

    def __init__(
        self,
        *,
        num_frames: int,
        height: int,
        width: int,
        length: int = 10_000,
        shapes: tuple[int, int] = (1, 3),
        speed: tuple[float, float] = (0.02, 0.07),
        textures: tuple[str, ...] = TEXTURES,
        sides: tuple[int, ...] = SIDES,
        color: tuple[float, float, float] | None = None,
    ):
        if min(num_frames, height, width, length) < 1:
            raise ValueError(f"{length} clips of {num_frames} x {height} x {width}: expected all >= 1")
        self.num_frames, self.height, self.width, self.length = num_frames, height, width, length
        self.options: dict[str, Any] = {
            "shapes": shapes,
            "speed": speed,
            "textures": textures,
            "sides": sides,
            "color": color,
        }

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"shapes {index}"

    def sample(self, index: int, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, index))
        return {"video": moving_shapes(self.num_frames, self.height, self.width, rng, **self.options)}

    def sources(self) -> list[Path]:
        return []

    def settings(self) -> dict:
        return json.loads(json.dumps(self.options))  # as it comes back from the shards' record

    def check_readable(self) -> None:
        """Nothing is read."""

    def evaluation_order(self) -> list[int]:
        return list(range(self.length))

    def __repr__(self) -> str:
        return f"ShapesDataset({self.length} procedural clips)"


def made(name: str) -> str | None:
    """The kind of clips that lie nowhere and are made, "shapes" or "factors"; None for a path. Behind "factors:" may
    stand what is the same in every clip: "factors:number=one,occlusion=none"."""
    kind = name.partition(":")[0]
    return kind if name == "shapes" or kind == "factors" else None


def _fixed(name: str) -> dict[str, str]:
    """What stands behind "factors:"."""
    words = [word.partition("=") for word in name.partition(":")[2].split(",") if word]
    if odd := next(("".join(word) for word in words if not word[1] or not word[2]), None):
        raise DataError(f"{name}: {odd!r} is no FACTOR=CLASS, expected such as factors:number=one,occlusion=none")
    return {factor: kind for factor, _, kind in words}


# How the papers read their datasets, as options of `open_dataset`.
LAYOUTS: dict[str, dict[str, Any]] = {
    # train/ and val/ folders of videos, searched recursively
    "kinetics600": {"num_frames": 17, "height": 128, "width": 128, "split": "train"},
    # FAR: an annotation with video_path and label
    "ucf101": {"num_frames": 16, "height": 256, "width": 256, "interval": 3, "random_crop": True, "flip": True}
    | {"num_classes": 101},
    # TECO: videos with their actions in an npz beside each; or FAR's annotation with video_path and action_path
    "minecraft": {"num_frames": 300, "height": 128, "width": 128, "num_actions": 4},
    # TECO: npz files with video and actions
    "dmlab": {"num_frames": 300, "height": 64, "width": 64, "num_actions": 4},
    # FAR: videos; the robot's actions are continuous and are not used
    "bair": {"num_frames": 30, "height": 64, "width": 64, "use_actions": False},
}


def open_dataset(path: str | Path, *, layout: str | None = None, **options) -> ClipDataset:
    """The dataset that `path` holds: a folder of videos, of npz trajectories or of latent shards, one such file, or an
    annotation (.json); or clips that are made, "shapes" or "factors", see `made`.

    Args:
        layout: a name in LAYOUTS, whose options hold where `options` says nothing else.
        options: num_frames, height, width, and what VideoFolder and NpzTrajectories take, or for "shapes"
            ShapesDataset, for "factors" FactorClips.

    Raises: DataError when there is nothing there, nothing in it, two kinds in it, or not one readable file.
    """
    options = layout_options(layout) | options
    if str(path) == "shapes":
        return ShapesDataset(**options)
    if made(str(path)) == "factors":
        return FactorClips(fixed=_fixed(str(path)), **options)
    if is_latents(Path(path)):
        names = ("num_classes", "num_actions", "use_labels", "use_actions", "allow_outside")
        shape = tuple(options[key] for key in ("num_frames", "height", "width"))
        shards = LatentShards(path, clip_shape=shape, **{name: options[name] for name in names if name in options})
        shards.check_readable()
        return shards
    kinds, path, options = find_kinds(Path(path), options)
    if len(kinds) != 1:
        contents = " and ".join(f"{count} {kind.kind}" for kind, count in kinds.items()) or "no video and no npz file"
        expected = "one kind: name a folder or file of it" if kinds else "videos or npz trajectories"
        raise DataError(f"{path}: holds {contents}, expected {expected}")
    dataset = next(iter(kinds))(path, **options)
    dataset.check_readable()
    return dataset


def layout_options(layout: str | None) -> dict:
    """The options that a name in LAYOUTS stands for; None stands for nothing."""
    if layout is not None and layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}: known layouts are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout] if layout is not None else {}


def find_kinds(path: Path, options: dict) -> tuple[dict[type[_ClipFiles], int], Path, dict]:
    """Which dataset classes serve a path and for how many files; and path and options as they take them."""
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise DataError(
            f"{path}: {'no such file or folder' if isinstance(error, FileNotFoundError) else reason(error)}"
        ) from None
    if path.suffix.lower() == ".json":
        path, options = path.parent, {**options, "annotation": path}
    if options.get("annotation") is not None:
        files = [Path(entry.video_path) for entry in read_entries(Path(options["annotation"]))]
        odd = next((file for file in files if file.suffix.lower() not in (*VIDEO_SUFFIXES, ".npz")), None)
        if odd is not None:
            raise DataError(f"{options['annotation']}: {odd} is neither a video nor an npz file")
        found: dict[type[_ClipFiles], list[Path]] = {
            kind: [file for file in files if file.suffix.lower() in kind.suffixes]
            for kind in (VideoFolder, NpzTrajectories)
        }
    else:
        folder = _split_folder(path, options.get("split"))
        found = {kind: find_files(folder, kind.suffixes) for kind in (VideoFolder, NpzTrajectories)}
        if found[VideoFolder]:  # npz files beside videos of the same name are their actions
            videos = {file.with_suffix("") for file in found[VideoFolder]}
            found[NpzTrajectories] = [f for f in found[NpzTrajectories] if f.with_suffix("") not in videos]
        if not any(found.values()):  # shards beside what was unpacked from them are nobody's business
            tar.refuse_compressed(find_files(folder, tuple(Path(name).suffix for name in tar.COMPRESSED)))
            found = {TarShards: find_files(folder, TarShards.suffixes)}
    return {kind: len(files) for kind, files in found.items() if files}, path, options


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with one of these suffixes under a folder, sorted, hidden ones left out; or the file itself.

    Links to folders are followed, each folder is entered once.
    """
    if path.is_file():
        return [path] if path.suffix.lower() in suffixes else []
    if not path.is_dir():
        raise DataError(f"{path}: {'is neither a file nor a folder' if path.exists() else 'no such file or folder'}")
    found, entered = [], set()
    for folder, inside, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            inside.clear()
            continue
        entered.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        found += [Path(folder, n) for n in names if Path(n).suffix.lower() in suffixes and not n.startswith(".")]
    return sorted(found)


def _split_folder(path: Path, split: str | None) -> Path:
    if split is None:
        return path
    if not (path / split).is_dir():
        there = sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
        raise DataError(f"{path}: has no split {split!r}, only the folders {there}")
    return path / split


def _label_by_folder(clips: list[ClipFile], path: Path) -> list[ClipFile]:
    if clips[0].member is not None:
        raise DataError(f"{path}: classes of videos in tar shards are those of KEY.json: expected no --folder-labels")
    classes = {name: label for label, name in enumerate(sorted({clip.path.parent.name for clip in clips}))}
    return [ClipFile(clip.path, classes[clip.path.parent.name]) for clip in clips]


def _attach_actions(clips: list[ClipFile]) -> list[ClipFile]:
    beside = [clip.path.with_suffix(".npz") for clip in clips]
    there = [file.exists() for file in beside]
    if not any(there):
        return clips
    if not all(there):
        raise DataError(
            f"{beside[there.index(False)]}: missing, though {sum(there)} of the {len(there)} videos have actions beside"
            " them"
        )
    return [replace(clip, actions=actions) for clip, actions in zip(clips, beside, strict=True)]


def _attach_texts(clips: list[ClipFile]) -> list[ClipFile]:
    if clips[0].member is not None:
        raise DataError(f"{clips[0].path}: texts in tar shards are not read: expected videos with a text beside each")
    beside = [text_beside(clip.path) for clip in clips]
    missing = [file for file in beside if not file.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: no such file: expected the features of a text beside each of the {len(clips)} clips "
            f"({len(missing)} have none), or an annotation with text_path"
        )
    return [replace(clip, text=text) for clip, text in zip(clips, beside, strict=True)]
