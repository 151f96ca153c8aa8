"""Video files, GIFs and contact sheets out: H.264 with PyAV, the pictures with Pillow.

Frames are uint8 RGB arrays [F, H, W, 3]. Every file is written to a temporary name first and renamed when it is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from mimo.data.fitting import ONE_THREAD
from mimo.data.video import VIDEO_SUFFIXES
from mimo.folders import atomic_path

_UNDATED = {"fflags": "+bitexact"}  # of a container: neither the time nor the muxer is noted


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

    The same frames make the same file, bit for bit, with the same release of PyAV on the same kind of processor: one
    thread encodes (how many cores there are would decide what is encoded together), and neither the time nor the muxer
    is noted.

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
    with atomic_path(path) as temporary, av.open(f"file:{temporary.absolute()}", "w", options=_UNDATED) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.thread_count = 1
        stream.options = {"flags": "+bitexact"}
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = int(frames.shape[1] * frames.shape[2] * rate * 4)
        else:
            stream.options |= {"crf": str(quality)}
        # swscale converts RGB with BT.601 coefficients in the limited range: say so, or players guess.
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1
        reformatter = VideoReformatter()
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            space: Any = "ITU601"  # PyAV takes the name, and declares a number
            picture = reformatter.reformat(picture, format="yuv420p", dst_colorspace=space, **ONE_THREAD)
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


_PAPER, _INK, _CONTEXT, _PLAIN = (255, 255, 255), (40, 40, 40), (235, 120, 20), (200, 200, 200)
_BORDER, _GAP = 3, 4  # pixels


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
    font: Any = ImageFont.load_default(max(12, height // 9))  # a FreeTypeFont, where a size is given
    line = sum(font.getmetrics()) + 4
    cell_h, cell_w = height + 2 * _BORDER + _GAP, width + 2 * _BORDER + _GAP
    legend = f"orange: context ({marks} frame{'s' if marks != 1 else ''})" if marks else ""
    text_w = max(int(font.getlength(text)) for text in [*clips, legend]) + 4 * _GAP
    size = max(cell_w * len(shown) + _GAP, text_w), line * 2 + (cell_h + line) * len(clips) + _GAP
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2), legend, _CONTEXT, font)
    for column, index in enumerate(shown):
        place = _GAP + column * cell_w + _BORDER, line + 2
        draw.text(place, str(index), _CONTEXT if index < marks else _INK, font)
    for row, (label, clip) in enumerate(clips.items()):
        top = line * 2 + row * (cell_h + line)
        draw.text((_GAP, top + 2), label, _INK, font)
        for column, index in enumerate(shown[shown < len(clip)]):
            _draw_frame(sheet, draw, clip[index], _GAP + column * cell_w, top + line, index < marks)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(path)


def _draw_frame(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, frame: np.ndarray, x: int, y: int, context: bool
) -> None:
    """A frame [H, W, 3] with its border, whose upper left corner is (x, y)."""
    corner = x + frame.shape[1] + 2 * _BORDER - 1, y + frame.shape[0] + 2 * _BORDER - 1
    draw.rectangle((x, y, *corner), outline=_CONTEXT if context else _PLAIN, width=_BORDER)
    sheet.paste(Image.fromarray(np.ascontiguousarray(frame)), (x + _BORDER, y + _BORDER))
