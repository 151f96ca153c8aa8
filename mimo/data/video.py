"""Video files in: exact frame access with PyAV, of local files alone.

Frames are uint8 RGB arrays [F, H, W, 3] everywhere in `mimo.data`; `to_float` and `to_uint8` convert them to and from
the network's [B, F, 3, H, W] in [-1, 1].

A damaged video is as long as its frames before the first one that does not decode: "28 of 50 frames used". What its
container or its length tells is seen when it is opened; damage that only decoding meets raises DamagedVideo, and
whoever chose the frames chooses again after `VideoReader.shorten`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from einops import rearrange

from mimo.data.errors import DamagedVideo, UnreadableVideo
from mimo.data.fitting import Fit, check_range, clip_span
from mimo.data.kept import KeptFrames, identity
from mimo.data.local import local_file
from mimo.data.npz import NpzReader
from mimo.data.tar import Member
from mimo.errors import reason

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v")

# What PyAV raises on damaged files: its own errors are only partly OSError and ValueError; damaged headers overflow
# numbers.
_BROKEN = (av.error.FFmpegError, OSError, ValueError, ArithmeticError)

# Containers that hold their pictures themselves. A playlist would lead to other files, whatever the name of its own.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
_LOCAL_ONLY = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
_IN_A_SHARD = _LOCAL_ONLY | {"protocol_whitelist": "subfile,file"}


@dataclass(frozen=True)
class _Listing:
    """The packets of a file, without decoding.

    Args:
        count: frames that are there.
        total: frames that should be there; more than `count` when the file was cut short.
        timed: whether every packet has a presentation time of its own; otherwise frames are counted from the first one.
        pts: of every frame, in the order they are shown, if timed.
        starts: indices of the key frames, where decoding can start, and of the first frame: they begin the runs.
    """

    height: int
    width: int
    fps: float
    count: int
    total: int
    timed: bool
    pts: tuple[int, ...]
    starts: tuple[int, ...]

    def run(self, index: int) -> tuple[int, range]:
        """The number of the run that a frame lies in, and its frames."""
        after = bisect_right(self.starts, index)
        end = self.starts[after] if after < len(self.starts) else self.count
        return after - 1, range(self.starts[after - 1], end)

    def index(self, time: int | None) -> int | None:
        """The frame that is shown at a time, if one is."""
        place = bisect_left(self.pts, time) if time is not None else self.count
        return place if place < self.count and self.pts[place] == time else None


class VideoReader:
    """One video file, opened: `num_frames`, `fps`, `height`, `width`, and `read` for exact frames.

    The packets' time stamps are listed once without decoding, so frame i means the i-th shown frame also at a variable
    frame rate. Every frame is decoded from the key frame at or before it, so that it does not depend on what else is
    read. Raises UnreadableVideo for anything that is not a decodable video.

    Args:
        path: a local file.
        kept: where frames that are read again are held.
        member: the part of the file that is the video, if it is a tar shard.
    """

    actions = None  # a video file has none; see NpzReader

    def __init__(self, path: str | Path, kept: KeptFrames | None = None, member: Member | None = None):
        self.path = str(path) if member is None else f"{path}: {member.name}"
        self._kept = KeptFrames(0) if kept is None else kept
        self._container: InputContainer | None = None
        file, status = local_file(path)
        self._url, self._identity, self._options = f"file:{file}", identity(file, status), _LOCAL_ONLY
        if member is not None:
            self._url = f"subfile,,start,{member.start},end,{member.start + member.size},,:file:{file}"
            self._identity, self._options = (*self._identity, member.start), _IN_A_SHARD
        try:
            self._listing = self._kept.get(("listing", self._identity)) or self._list_packets()
            self.height, self.width, self.fps = self._listing.height, self._listing.width, self._listing.fps
            self.num_frames = self._kept.get(("whole", self._identity)) or self._listing.count
            if self._listing.count < self._listing.total:
                self.shorten()
        except _BROKEN as error:
            self.close()
            if isinstance(error, UnreadableVideo):
                raise
            raise UnreadableVideo(self.path, f"not a readable video: {reason(error)}") from None

    @property
    def damage(self) -> str | None:
        """What of a damaged file is used, None of a whole one."""
        total = self._listing.total
        return f"{self.num_frames} of {total} frames used, the next is damaged" if self.num_frames < total else None

    def shorten(self) -> int:
        """Leaves out the first frame that does not decode and all after it. Returns `num_frames`, which is not 0: a
        video of which nothing decodes is UnreadableVideo."""
        whole = self._kept.get(("whole", self._identity))
        if whole is None:
            whole = self._count_whole()
            self._kept.add(("whole", self._identity), whole, 8)
        if not whole:
            raise UnreadableVideo(self.path, f"none of its {self._listing.total} frames decodes")
        self.num_frames = whole
        return whole

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
        check_range(self.path, self.num_frames, num_frames, start, interval)
        fit = Fit(self.height, self.width, size, crop)
        out = np.empty((num_frames, fit.height, fit.width, 3), np.uint8)
        missing: dict[int, int] = {}  # frame -> its place in `out`
        for place, index in enumerate(range(start, start + clip_span(num_frames, interval), interval)):
            kept = self._kept.get(self._key(fit, index))
            if kept is None:
                missing[index] = place
            else:
                out[place] = fit.crop(kept)
        while missing:
            number, run = self._listing.run(min(missing))
            for index, frame in self._resized(number, run, missing, fit):
                if index in missing:
                    out[missing.pop(index)] = fit.crop(frame)
        return out

    def _resized(self, number: int, run: range, missing: dict[int, int], fit: Fit) -> Iterator[tuple[int, np.ndarray]]:
        """The missing frames of a run, and where there is room all of them, which are kept then."""
        if self._kept.has_room(len(run) * fit.resized[0] * fit.resized[1] * 3, len(run)):
            with suppress(
                DamagedVideo
            ):  # another frame's damage is no concern of the missing ones: they are tried again
                for index, frame in self._take(number, run, run):
                    resized = fit.resize(frame)
                    self._kept.add(self._key(fit, index), resized, resized.nbytes)
                    yield index, resized
        if wanted := [index for index in run if index in missing]:
            for index, frame in self._take(number, run, wanted):
                yield index, fit.resize(frame)

    def _take(self, number: int, run: range, wanted: Collection[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """The wanted frames of a run, decoded; DamagedVideo at the first that does not decode."""
        left = set(wanted)
        try:
            for index, frame in self._decoded(number, None if len(left) == len(run) else left):
                if index in left:
                    if frame.is_corrupt:
                        raise DamagedVideo(self.path, f"frame {index} is damaged")
                    left.remove(index)
                    yield index, frame
                if not left or index >= run.stop:
                    break
        except _BROKEN as error:
            self.close()
            raise error if isinstance(error, UnreadableVideo) else DamagedVideo(self.path, reason(error)) from None
        if left:
            raise DamagedVideo(self.path, f"frame {min(left)} of {self._listing.count} does not decode")

    def _count_whole(self) -> int:
        """How many frames decode before the first that does not."""
        whole = 0
        with suppress(DamagedVideo):
            while whole < self._listing.count:
                number, run = self._listing.run(whole)
                frames = self._take(number, run, run)
                while whole < run.stop and next(frames)[0] == whole:
                    whole += 1
                if whole < run.stop:
                    break
        return whole

    def _key(self, fit: Fit, index: int) -> tuple:
        return "frame", self._identity, fit.resized, index

    # ---- the file

    def _open(self) -> tuple[InputContainer, VideoStream]:
        """The file from its beginning, and its first video."""
        self.close()
        self._container = container = av.open(self._url, metadata_errors="ignore", options=self._options)
        if not container.streams.video:
            raise UnreadableVideo(self.path, "holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnreadableVideo(self.path, "its codec is unknown here")
        stream.codec_context.thread_count = 1
        return container, stream

    def _list_packets(self) -> _Listing:
        container, stream = self._open()
        packets, damaged = [], 0
        others = -1  # the last packet is an empty one that ends the stream
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                others += 1
            elif packet.is_corrupt:
                damaged += 1
            else:
                packets.append(packet)
        count, height, width = len(packets), stream.height, stream.width
        if not packets or not height or not width:
            raise UnreadableVideo(self.path, "holds no readable frame")
        pts = [packet.pts for packet in packets]
        # AVI keeps no presentation times (what the demuxer invents is wrong when there are B-frames), raw streams none
        # at all: there frames are counted from the first one.
        times = {time for time in pts if time is not None}
        told_apart = len(times) == count
        keys = {packet.pts for packet in packets if packet.is_keyframe}
        timed = told_apart and container.format.name != "avi"
        shown = sorted(times) if timed else []
        lasts = _length_in_header(container, stream, times) if told_apart else 0
        listing = _Listing(
            *(height, width, float(stream.average_rate or stream.guessed_rate or 25)),
            count=count,
            total=max(count + damaged, stream.frames - others, lasts),
            timed=timed,
            pts=tuple(shown),
            starts=(0, *(index for index, time in enumerate(shown) if time in keys and index)),
        )
        self._kept.add(("listing", self._identity), listing, 100 * count)
        return listing

    def _decoded(self, number: int, wanted: set[int] | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) from the start of a run on; None wants all, else those not wanted may be missing."""
        listing = self._listing
        if listing.timed:
            container = self._container or self._open()[0]
            stream = container.streams.video[0]
            times = None if wanted is None else {listing.pts[i] for i in wanted}
            begin = listing.pts[listing.starts[number]]
            # A container may miss the key frame it was sent to (seek tables can be wrong): then the one before is
            # tried.
            for start in reversed(listing.starts[: number + 1]):
                with suppress(av.error.FFmpegError):
                    container.seek(listing.pts[start], stream=stream)
                frames = self._decode(container, stream, times)
                first = next(frames, None)
                if first is not None and first.pts is not None and first.pts <= begin:
                    for frame in chain([first], frames):
                        if (index := listing.index(frame.pts)) is not None:
                            yield index, frame
                    return
        yield from enumerate(self._decode(*self._open(), None))

    def _decode(
        self, container: InputContainer, stream: VideoStream, wanted: set[int] | None
    ) -> Iterator[av.VideoFrame]:
        """The frames from where the file stands; what is not wanted is decoded only if other frames refer to it.

        At a packet that does not decode, the frames before it that wait for their turn still come, then the error is
        raised.
        """
        context = stream.codec_context
        try:
            for packet in container.demux(stream):
                skips = wanted is not None and packet.pts is not None and packet.pts not in wanted
                context.skip_frame = "NONREF" if skips else "DEFAULT"
                for frame in packet.decode():
                    self._kept.decoded += 1
                    yield frame
        except av.error.FFmpegError:
            with suppress(av.error.FFmpegError):
                yield from context.decode(None)
            raise

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _length_in_header(container: InputContainer, stream: VideoStream, times: set[int]) -> int:
    """About how many frames a Matroska file lasts for, whose header says how long but not how many; 0: unknown."""
    alone = container.format.name.startswith("matroska") and len(container.streams) == 1
    if not alone or not container.duration or len(times) < 2 or stream.time_base is None:
        return 0
    shown = float((max(times) - min(times)) * stream.time_base)
    frame, lasts = shown / (len(times) - 1), container.duration / av.time_base
    return round(lasts / frame) if lasts > shown + 2.5 * frame else 0


def open_clip(
    path: str | Path, kept: KeptFrames | None = None, member: Member | None = None
) -> VideoReader | NpzReader:
    """The reader for a file, by its suffix. kept, member: see VideoReader."""
    return NpzReader(path, kept) if Path(path).suffix.lower() == ".npz" else VideoReader(path, kept, member)


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
        num_frames: how many; None takes all that are left, of a damaged video those before the damage.
        size: (height, width) of the result: resized to cover it, then cropped. None keeps the source size.
        crop: (y, x) in [0, 1], where the crop lies: 0 top or left, 0.5 centre, 1 bottom or right.

    Returns: uint8 [num_frames, height, width, 3], RGB.
    Raises: UnreadableVideo when the file does not decode or holds fewer frames.
    """
    with open_clip(path) as reader:

        def read() -> np.ndarray:
            left = max(1, -(-(reader.num_frames - start) // max(1, interval)))
            return reader.read(
                left if num_frames is None else num_frames, start=start, interval=interval, size=size, crop=crop
            )

        try:
            return read()
        except DamagedVideo:
            if num_frames is not None:
                raise
            reader.shorten()
            return read()


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


def to_float(video: torch.Tensor) -> torch.Tensor:
    """uint8 [..., F, H, W, 3] -> fp32 [..., F, 3, H, W] in [-1, 1]: x / 127.5 - 1."""
    channels_first = rearrange(video, "... h w c -> ... c h w").contiguous()
    return channels_first.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """[..., F, 3, H, W] in [-1, 1] -> uint8 [..., F, H, W, 3], rounded and clamped; the inverse of `to_float`."""
    levels = video.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(levels, "... c h w -> ... h w c").contiguous()
