"""Clips in tar shards, as WebDataset packs them: KEY.mp4 and KEY.json with {"label": ...} one after the other.

A shard is listed once, header by header; from then on every clip is a range of bytes in it, read like a file of its
own. That wants an uncompressed tar. What belongs to a clip has its name up to the last dot.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mimo import records
from mimo.data.errors import DataError
from mimo.errors import reason

SUFFIX = ".tar"
COMPRESSED = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst", *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst", "lz4")))
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LARGEST_LABEL_FILE = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file in a shard: `size` bytes from byte `start`."""

    name: str
    start: int
    size: int


@dataclass
class Described:
    """KEY.json. Other keys than the label are nobody's business here."""

    OTHER_KEYS: ClassVar[bool] = True

    label: int | None = None

    def __post_init__(self) -> None:
        if self.label is not None and not 0 <= self.label < 2**31:
            raise ValueError(f"label {self.label}, expected a class, 0 to {2**31 - 1}")


def refuse_compressed(files: list[Path]) -> None:
    """DataError at the first file whose name is that of a compressed tar."""
    for file in files:
        if file.name.lower().endswith(COMPRESSED):
            raise DataError(f"{file}: is a compressed tar, in which no clip can be found: expected it unpacked to .tar")


def list_videos(shard: Path, suffixes: tuple[str, ...], *, use_actions: bool) -> list[tuple[Member, int | None]]:
    """The videos of a shard in its order, each with its label if there is one.

    Args:
        suffixes: of videos, in small letters.
        use_actions: whether actions would be used: those in a shard are not read.

    Raises: DataError for what is no whole, uncompressed tar, for a KEY.json that is none, and for actions.
    """
    videos: list[Member] = []
    labels: dict[str, int | None] = {}
    with shard.open("rb") as stream:
        for member in _members(shard, stream):
            key, dot, suffix = member.name.rpartition(".")
            if (dot + suffix).lower() in suffixes:
                videos.append(member)
            elif suffix == "json":
                labels[key] = _label(shard, stream, member)
            elif suffix == "npz" and use_actions:
                raise DataError(
                    f"{shard}: {member.name}: actions in shards are not read: expected none, or --ignore-actions"
                )
    return [(video, labels.get(video.name.rpartition(".")[0])) for video in videos]


def _members(shard: Path, stream) -> Iterator[Member]:
    """The regular files of a tar that is there to its end."""
    for magic, name in _MAGIC.items():
        stream.seek(0)
        if stream.read(len(magic)) == magic:
            raise DataError(f"{shard}: is compressed ({name}): expected an uncompressed tar")
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for info in archive:
                if info.isreg() and not info.issparse():
                    place = stream.tell()
                    yield Member(info.name, info.offset_data, info.size)
                    stream.seek(place)
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            end = archive.offset
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{shard}: is no whole tar: {reason(error)}") from None
    stream.seek(end)  # where tarfile takes a damaged header for the end, and where it meets a real one
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0") or stream.tell() == end:
        raise DataError(f"{shard}: is no whole tar: damaged or cut off at byte {end}")


def _label(shard: Path, stream, member: Member) -> int | None:
    stream.seek(member.start)
    if member.size > _LARGEST_LABEL_FILE:
        raise DataError(f"{shard}: {member.name} has {member.size} bytes, expected a small JSON object")
    source = f"{shard}: {member.name}"
    value = records.parse(stream.read(member.size), source, error=DataError)
    return records.convert(value, Described, source, error=DataError).label
