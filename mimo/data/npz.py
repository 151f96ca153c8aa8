"""Npz trajectories: `video` uint8 [F, H, W, 3] and `actions` int [F]; what their headers claim is not trusted."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError

import av
import numpy as np

from mimo.data.errors import UnreadableVideo
from mimo.data.fitting import Fit, check_range, clip_span
from mimo.data.kept import KeptFrames, identity
from mimo.data.local import local_file
from mimo.errors import reason

_BROKEN = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, SyntaxError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, TokenError),
)
_INFLATES = 1032  # Deflate makes at most so many bytes of one.


class NpzReader:
    """One npz trajectory with the interface of VideoReader."""

    fps = None  # the file does not say
    damage = None  # an npz file is whole or cannot be read

    def __init__(self, path: str | Path, kept: KeptFrames | None = None):
        self.path = str(path)
        arrays = _read_npz(path, ("video", "actions"), kept)
        if "video" not in arrays:
            raise UnreadableVideo(path, "has no array 'video'")
        self._video = arrays["video"]
        self.actions = _check_actions(path, arrays["actions"]) if "actions" in arrays else None
        if self._video.dtype != np.uint8 or self._video.ndim != 4 or self._video.shape[-1] != 3:
            found = f"{self._video.dtype} {list(self._video.shape)}"
            raise UnreadableVideo(path, f"'video' is {found}, expected uint8 [F, H, W, 3]")
        if not self._video.size:
            raise UnreadableVideo(path, f"'video' is {list(self._video.shape)}, expected at least one frame and pixel")
        self.num_frames, self.height, self.width = self._video.shape[:3]

    def shorten(self) -> int:
        """As VideoReader.shorten."""
        return self.num_frames

    def read(self, num_frames, *, start=0, interval=1, size=None, crop=(0.5, 0.5)) -> np.ndarray:
        """As VideoReader.read."""
        check_range(self.path, self.num_frames, num_frames, start, interval)
        clip = self._video[start : start + clip_span(num_frames, interval) : interval]
        if size is None or size == clip.shape[1:3]:
            return clip.copy()
        fit = Fit(self.height, self.width, size, crop)
        frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame)) for frame in clip)
        return np.stack([fit.crop(fit.resize(frame)) for frame in frames])

    def close(self) -> None:
        del self._video

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load_actions(path: str | Path, kept: KeptFrames | None = None) -> np.ndarray:
    """The array `actions` int [F] of an npz file, as int64."""
    arrays = _read_npz(path, ("actions",), kept)
    if "actions" not in arrays:
        raise UnreadableVideo(path, "has no array 'actions'")
    return _check_actions(path, arrays["actions"])


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays in an npz file; UnreadableVideo when it is none."""
    with _open_npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _check_actions(path: str | Path, actions: np.ndarray) -> np.ndarray:
    if actions.ndim != 1 or actions.dtype.kind not in "iu":
        raise UnreadableVideo(path, f"'actions' is {actions.dtype} {list(actions.shape)}, expected integers [F]")
    if actions.size and int(actions.max()) >= 2**63:
        raise UnreadableVideo(path, f"'actions' holds {int(actions.max())}, expected less than 2**63")
    return actions.astype(np.int64)


@contextmanager
def _open_npz(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """The open archive; whatever is wrong with it, up to the end of the block, is UnreadableVideo."""
    file, status = local_file(path)
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no zip archive" if status.st_size else "it is empty")
        with zipfile.ZipFile(file) as archive:
            yield archive
    except _BROKEN as error:
        raise UnreadableVideo(path, f"not a readable npz file: {reason(error)}") from None


def _read_npz(path: str | Path, names: tuple[str, ...], kept: KeptFrames | None) -> dict[str, np.ndarray]:
    """Those of the arrays that the file has."""
    file, status = local_file(path)
    key = "npz", identity(file, status), names
    if kept is not None and (arrays := kept.get(key)) is not None:
        return arrays
    with _open_npz(path) as archive:
        arrays = {name: _read_array(archive, f"{name}.npy") for name in names if f"{name}.npy" in archive.namelist()}
    if kept is not None:
        kept.add(key, arrays, sum(array.nbytes for array in arrays.values()))
    return arrays


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, whole, so that its CRC is checked; ValueError before memory is taken for what cannot be true."""
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is packed by method {entry.compress_type}, expected one that numpy writes")
    most = entry.compress_size * (_INFLATES if entry.compress_type == zipfile.ZIP_DEFLATED else 1) + 64
    if entry.file_size > most:
        raise ValueError(
            f"{name!r} claims {entry.file_size} bytes, {entry.compress_size} packed ones hold at most {most}"
        )
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name!r} is of npy version {version}, expected 1.0 or 2.0")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = header(member)
        if dtype.hasobject:
            raise ValueError(f"{name!r} holds pickled objects, which are never loaded")
        claimed, there = math.prod(shape) * dtype.itemsize, entry.file_size - member.tell()
        if min(shape, default=0) < 0 or claimed != there:
            raise ValueError(f"{name!r} claims to be {dtype} {list(shape)}, {claimed} bytes, and holds {there}")
        data = member.read()
    if len(data) != there:
        raise ValueError(f"{name!r} ends after {len(data)} of {there} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
