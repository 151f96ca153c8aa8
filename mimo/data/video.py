"""Video files in and out: exact frame access with PyAV, H.264, GIF and contact sheets.

Frames are uint8 RGB arrays [F, H, W, 3] everywhere in `mimo.data`; `to_float` and `to_uint8` convert them to and from the
network's [B, F, 3, H, W] in [-1, 1]. Every file is written to a temporary name first and renamed when it is whole.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from mimo.data.errors import UnreadableVideo
from mimo.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v")

# Decoding runs in many workers at once, so each takes one thread. Releases before 17 scale in one thread and have no such option.
_ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

# What PyAV raises on damaged files: its own errors are only partly OSError and ValueError; damaged headers overflow numbers.
_BROKEN = (av.error.FFmpegError, OSError, ValueError, ArithmeticError)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Fit:
    """Resize to cover `size`, then crop. `crop` = (y, x) in [0, 1] places the window in the slack; (0.5, 0.5) is the centre."""

    def __init__(
        self,
        height: int,
        width: int,
        size: tuple[int, int] | None,
        crop: tuple[float, float],
    ):
        self.height, self.width = size or (height, width)
        scale = max(self.height / height, self.width / width)
        self.resized = (
            max(self.height, round(height * scale)),
            max(self.width, round(width * scale)),
        )
        self.y = round(crop[0] * (self.resized[0] - self.height))
        self.x = round(crop[1] * (self.resized[1] - self.width))
        self.interpolation = "AREA" if scale < 1 else "BICUBIC"
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        frame = self.reformatter.reformat(
            frame,
            self.resized[1],
            self.resized[0],
            "rgb24",
            interpolation=self.interpolation,
            **_ONE_THREAD,
        )
        return frame.to_ndarray()[self.y : self.y + self.height, self.x : self.x + self.width]


def clip_span(num_frames: int, interval: int) -> int:
    """Source frames that `num_frames` frames, `interval` apart, reach over."""
    return (num_frames - 1) * interval + 1


def _check_range(path: str, total: int, num_frames: int, start: int, interval: int) -> None:
    if num_frames < 1 or start < 0 or interval < 1:
        raise ValueError(
            f"num_frames {num_frames} must be >= 1, start {start} >= 0 and interval {interval} >= 1 (reading {path})"
        )
    if start + clip_span(num_frames, interval) > total:
        raise UnreadableVideo(
            path,
            f"has {total} frames, but {num_frames} were asked for (start {start}, interval {interval})",
        )


class VideoReader:
    """One video file, opened: `num_frames`, `fps`, `height`, `width`, and `read` for exact frames.

    The packets' time stamps are listed once without decoding, so frame i means the i-th shown frame also at a variable
    frame rate, and a read decodes from the nearest key frame only. Damaged packets at the end of a truncated file do not
    count as frames. Raises UnreadableVideo for anything that is not a decodable video.
    """

    actions = None  # a video file has none; see NpzReader

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._container = None
        try:
            self._open()
            self._list_packets()
        except _BROKEN as error:
            self.close()
            if isinstance(error, UnreadableVideo):
                raise
            kind = "" if isinstance(error, OSError) else "not a readable video: "
            raise UnreadableVideo(path, kind + _reason(error)) from None

    def _open(self) -> None:
        self._container = av.open(self.path, metadata_errors="ignore")
        if not self._container.streams.video:
            raise UnreadableVideo(self.path, "holds no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise UnreadableVideo(self.path, "its codec is unknown here")
        self._stream.codec_context.thread_count = 1

    def _list_packets(self) -> None:
        stream = self._stream
        packets = [p for p in self._container.demux(stream) if p.size and not p.is_corrupt and not p.is_discard]
        self.num_frames, self.height, self.width = (
            len(packets),
            stream.height,
            stream.width,
        )
        if not packets or not self.height or not self.width:
            raise UnreadableVideo(self.path, "holds no readable frame")
        self.fps = float(stream.average_rate or stream.guessed_rate or 25)
        pts = [p.pts for p in packets]
        # AVI keeps no presentation times (what the demuxer invents is wrong when there are B-frames), raw streams none
        # at all: there frames are counted from the first one.
        self._timed = self._container.format.name != "avi" and None not in pts and len(set(pts)) == len(pts)
        self._pts = sorted(pts) if self._timed else []
        self._keys = sorted(
            (p.pts, p.dts if p.dts is not None else p.pts) for p in packets if p.is_keyframe and self._timed
        )

    def read(
        self,
        num_frames: int,
        *,
        start: int = 0,
        interval: int = 1,
        size: tuple[int, int] | None = None,
        crop: tuple[float, float] = (0.5, 0.5),
    ) -> np.ndarray:
        """Frames start, start + interval, ... as uint8 [num_frames, H, W, 3]; see `read_clip`."""
        _check_range(self.path, self.num_frames, num_frames, start, interval)
        wanted = range(start, start + clip_span(num_frames, interval), interval)
        places = {index: place for place, index in enumerate(wanted)}  # those not found yet
        fit = _Fit(self.height, self.width, size, crop)
        out = np.empty((num_frames, fit.height, fit.width, 3), np.uint8)
        try:
            for index, frame in self._frames(wanted):
                place = places.pop(index, None)
                if place is None:
                    continue
                if frame.is_corrupt:
                    raise UnreadableVideo(self.path, f"frame {index} is damaged")
                out[place] = fit(frame)
                if not places:
                    return out
        except _BROKEN as error:
            raise (
                error if isinstance(error, UnreadableVideo) else UnreadableVideo(self.path, _reason(error))
            ) from None
        raise UnreadableVideo(self.path, f"frame {min(places)} of {self.num_frames} does not decode")

    def _frames(self, wanted: range) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) from a key frame at or before the first wanted one; those not wanted may be missing."""
        start, index = wanted[0], {pts: i for i, pts in enumerate(self._pts)}
        keys = self._keys[: bisect_right(self._keys, (self._pts[start], float("inf")))] if self._timed else []
        # A container may miss the key frame it was sent to (seek tables can be wrong): then the one before is tried.
        for _, dts in reversed(keys):
            self._container.seek(dts, stream=self._stream)
            frames = self._decode({self._pts[i] for i in wanted})
            first = next(frames, None)
            if first is not None and first.pts is not None and first.pts <= self._pts[start]:
                for frame in chain([first], frames):
                    if frame.pts in index:
                        yield index[frame.pts], frame
                return
        self._container.close()
        self._open()
        yield from enumerate(self._container.decode(self._stream))

    def _decode(self, wanted: set[int]) -> Iterator[av.VideoFrame]:
        """The frames from where the file stands; what is not wanted is decoded only if other frames refer to it."""
        context = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            yield from packet.decode()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class NpzReader:
    """One npz trajectory with the interface of VideoReader: `video` uint8 [F, H, W, 3] and, if there, `actions` int [F]."""

    fps = None  # the file does not say

    def __init__(self, path: str | Path):
        self.path = str(path)
        arrays = _read_npz(path, "video", "actions")
        if "video" not in arrays:
            raise UnreadableVideo(path, "has no array 'video'")
        self._video = arrays["video"]
        self.actions = _check_actions(path, arrays["actions"]) if "actions" in arrays else None
        if self._video.dtype != np.uint8 or self._video.ndim != 4 or self._video.shape[-1] != 3:
            raise UnreadableVideo(
                path,
                f"'video' is {self._video.dtype} {list(self._video.shape)}, expected uint8 [F, H, W, 3]",
            )
        self.num_frames, self.height, self.width = self._video.shape[:3]

    def read(self, num_frames, *, start=0, interval=1, size=None, crop=(0.5, 0.5)) -> np.ndarray:
        _check_range(self.path, self.num_frames, num_frames, start, interval)
        clip = self._video[start : start + clip_span(num_frames, interval) : interval]
        if size is None or size == clip.shape[1:3]:
            return np.ascontiguousarray(clip)
        fit = _Fit(self.height, self.width, size, crop)
        return np.stack([fit(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))) for frame in clip])

    def close(self) -> None:
        self._video = None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays in an npz file; UnreadableVideo when it is none."""
    with _open_npz(path) as arrays:
        return arrays.files


def load_actions(path: str | Path) -> np.ndarray:
    """The array `actions` int [F] of an npz file, as int64."""
    arrays = _read_npz(path, "actions")
    if "actions" not in arrays:
        raise UnreadableVideo(path, "has no array 'actions'")
    return _check_actions(path, arrays["actions"])


def _check_actions(path: str | Path, actions: np.ndarray) -> np.ndarray:
    if actions.ndim != 1 or actions.dtype.kind not in "iu":
        raise UnreadableVideo(path, f"'actions' is {actions.dtype} {list(actions.shape)}, expected integers [F]")
    return actions.astype(np.int64)


@contextmanager
def _open_npz(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The open file; whatever is wrong with it, up to the end of the block, is UnreadableVideo. Pickles are never loaded."""
    try:
        if not is_zipfile(path):  # numpy takes any other file for a pickle, and says so
            raise ValueError("it is no zip archive" if Path(path).stat().st_size else "it is empty")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, EOFError, KeyError, TypeError, NotImplementedError, BadZipFile, zlib.error) as error:
        raise UnreadableVideo(path, f"not a readable npz file: {_reason(error)}") from None


def _read_npz(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the arrays that the file has."""
    with _open_npz(path) as arrays:
        return {name: arrays[name] for name in names if name in arrays}


def open_clip(path: str | Path) -> VideoReader | NpzReader:
    """The reader for a file, by its suffix."""
    return NpzReader(path) if Path(path).suffix.lower() == ".npz" else VideoReader(path)


def read_clip(
    path: str | Path,
    num_frames: int | None = None,
    *,
    start: int = 0,
    interval: int = 1,
    size: tuple[int, int] | None = None,
    crop: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """Reads frames start, start + interval, ... of a video (or npz) file.

    Args:
        num_frames: how many; None takes all that are left.
        size: (height, width) of the result: resized to cover it, then cropped. None keeps the source size.
        crop: (y, x) in [0, 1], where the crop lies: 0 top or left, 0.5 centre, 1 bottom or right.

    Returns: uint8 [num_frames, height, width, 3], RGB.
    Raises: UnreadableVideo when the file does not decode or holds fewer frames.
    """
    with open_clip(path) as reader:
        if num_frames is None:
            num_frames = max(1, -(-(reader.num_frames - start) // interval))
        return reader.read(num_frames, start=start, interval=interval, size=size, crop=crop)


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


def to_float(video: torch.Tensor) -> torch.Tensor:
    """uint8 [..., F, H, W, 3] -> fp32 [..., F, 3, H, W] in [-1, 1]: x / 127.5 - 1."""
    return video.movedim(-1, -3).contiguous().to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """[..., F, 3, H, W] in [-1, 1] -> uint8 [..., F, H, W, 3], rounded and clamped; the inverse of `to_float`."""
    return (
        video.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not.

    Raises InputError naming `path` when it cannot be written: a disk that is full, a folder that may not be changed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        with suppress(OSError):  # it was never made, or cannot be removed either
            temporary.unlink()


def _check_frames(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [F, H, W, 3] with F, H, W >= 1"
        )
    return frames


def check_fps(fps: float) -> None:
    """Raises ValueError for a rate that videos and GIFs cannot both have."""
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps {fps:g}: expected 0.01 to 1000 frames per second")


def upscale(frames: np.ndarray, min_side: int) -> np.ndarray:
    """Repeats pixels by the smallest whole factor that brings the shorter side to `min_side` or more."""
    factor = max(1, -(-min_side // min(frames.shape[1:3])))
    return frames if factor == 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float = 10,
    *,
    min_side: int = 0,
    quality: int = 14,
    codec: str | None = None,
) -> Path:
    """Writes frames uint8 [F, H, W, 3] as yuv420p video; an odd side repeats its last row or column.

    Args:
        min_side: tiny clips are magnified by whole factors until their shorter side has so many pixels.
        quality: constant rate factor of H.264 (0 lossless, 51 worst).
        codec: encoder name; None takes H.264 (VP9 for .webm), or MPEG-4 part 2 where PyAV came without H.264.
    """
    path = Path(path)
    check_fps(fps)
    frames = upscale(_check_frames(frames), min_side)
    frames = np.pad(
        frames,
        ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)),
        mode="edge",
    )
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(f"cannot write {path}: expected one of {', '.join(VIDEO_SUFFIXES)}")
    if codec is None:
        preferred = ("libvpx-vp9",) if path.suffix.lower() == ".webm" else ("libx264", "mpeg4")
        codec = next((name for name in preferred if name in av.codecs_available), None)
        if codec is None:
            raise ValueError(f"cannot write {path}: this PyAV has none of the encoders {', '.join(preferred)}")
    rate = Fraction(fps).limit_denominator(1001)
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = int(frames.shape[1] * frames.shape[2] * rate * 4)
        else:
            stream.options = {"crf": str(quality)}
        # swscale converts RGB with BT.601 coefficients in the limited range: say so, or players guess.
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1
        reformatter = VideoReformatter()
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            picture = reformatter.reformat(picture, format="yuv420p", dst_colorspace="ITU601", **_ONE_THREAD)
            picture.pts = i
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_gif(path: str | Path, frames: np.ndarray, fps: float = 10, *, min_side: int = 0) -> Path:
    """Writes frames uint8 [F, H, W, 3] as a GIF that repeats forever; the format counts time in 1/100 s."""
    check_fps(fps)
    frames = upscale(_check_frames(frames), min_side)
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    duration = max(20, round(100 / fps) * 10)
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=duration,
            loop=0,
            disposal=1,
        )
    return Path(path)


_PAPER, _INK, _CONTEXT, _PLAIN = (
    (255, 255, 255),
    (40, 40, 40),
    (235, 120, 20),
    (200, 200, 200),
)


def contact_sheet(
    path: str | Path,
    rows: Mapping[str, np.ndarray],
    marks: int = 0,
    *,
    min_side: int = 96,
    max_columns: int = 20,
) -> Path:
    """Writes a PNG with one labelled row of frames per entry of `rows` (label -> uint8 [F, H, W, 3]).

    The first `marks` frames of every row are context: they get an orange border, and their numbers are orange too. Rows
    longer than `max_columns` are thinned evenly, the last frame kept; the numbers above the columns are frame numbers.
    """
    if not rows:
        raise ValueError("contact_sheet: rows is empty, expected at least one label with frames")
    clips = {label: upscale(_check_frames(frames), min_side) for label, frames in rows.items()}
    longest = max(len(clip) for clip in clips.values())
    shown = np.unique(np.linspace(0, longest - 1, min(longest, max_columns)).round().astype(int))
    height = max(clip.shape[1] for clip in clips.values())
    width = max(clip.shape[2] for clip in clips.values())
    border, gap = 3, 4
    font = ImageFont.load_default(max(12, height // 9))
    line = sum(font.getmetrics()) + 4
    cell_h, cell_w = height + 2 * border + gap, width + 2 * border + gap
    legend = f"orange: context ({marks} frame{'s' if marks != 1 else ''})" if marks else ""
    text_w = max(int(font.getlength(text)) for text in [*clips, legend]) + 4 * gap
    sheet = Image.new(
        "RGB",
        (
            max(cell_w * len(shown) + gap, text_w),
            line * 2 + (cell_h + line) * len(clips) + gap,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 2), legend, _CONTEXT, font)
    for column, index in enumerate(shown):
        draw.text(
            (gap + column * cell_w + border, line + 2),
            str(index),
            _CONTEXT if index < marks else _INK,
            font,
        )
    for row, (label, clip) in enumerate(clips.items()):
        top = line * 2 + row * (cell_h + line)
        draw.text((gap, top + 2), label, _INK, font)
        for column, index in enumerate(shown):
            if index >= len(clip):
                continue
            x, y = gap + column * cell_w, top + line
            box = (
                x,
                y,
                x + clip.shape[2] + 2 * border - 1,
                y + clip.shape[1] + 2 * border - 1,
            )
            draw.rectangle(box, outline=_CONTEXT if index < marks else _PLAIN, width=border)
            sheet.paste(
                Image.fromarray(np.ascontiguousarray(clip[index])),
                (x + border, y + border),
            )
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(path)
