"""Annotations: a JSON list of clips, [{"video_path": ..., "label": ..., "action_path": ..., "text_path": ...}, ...], as
FAR has them but for the texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mimo import records
from mimo.data.errors import DataError
from mimo.data.local import require_inside
from mimo.data.tar import Member

_MAX_LABEL = 2**31 - 1


@dataclass(frozen=True)
class ClipFile:
    """One clip on disk: its file (or its place in a shard), its class, the npz that holds its actions, and the features
    of its text."""

    path: Path
    label: int | None = None
    actions: Path | None = None
    text: Path | None = None
    member: Member | None = None

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.path}" if self.member is None else f"{self.path}: {self.member.name}"


@dataclass
class Entry:
    """One entry of an annotation. Other keys than these are nobody's business here."""

    OTHER_KEYS: ClassVar[bool] = True

    video_path: str
    label: int | None = None
    action_path: str | None = None
    text_path: str | None = None

    def __post_init__(self) -> None:
        if self.label is not None and not 0 <= self.label <= _MAX_LABEL:
            raise ValueError(f"label {self.label}, expected a class, 0 to {_MAX_LABEL}")


def read_entries(path: Path) -> list[Entry]:
    """The entries of an annotation; DataError naming the first that is none."""
    entries = records.read(path, list[Entry], error=DataError)
    if not entries:
        raise DataError(f'{path}: expected a list [{{"video_path": ..., "label": ...}}, ...] with at least one entry')
    for key in ("label", "action_path", "text_path"):
        having = [getattr(entry, key) is not None for entry in entries]
        if any(having) and not all(having):
            raise DataError(f"{path}: entry {having.index(False)} has no {key!r}, though others do")
    return entries


def read_clips(path: Path, folder: Path, *, allow_outside: bool = False) -> list[ClipFile]:
    """The clips that an annotation names.

    Args:
        folder: that of the videos. Relative paths are relative to it, to the annotation's folder or to the current one,
            whichever holds the first.
        allow_outside: the files may lie elsewhere than in `folder` and the annotation's folder, links followed.
    """
    entries = read_entries(path)
    first = entries[0].video_path
    base = next((base for base in (folder, path.parent, Path()) if (base / first).is_file()), folder)
    clips = [
        ClipFile(
            base / entry.video_path,
            entry.label,
            None if entry.action_path is None else base / entry.action_path,
            None if entry.text_path is None else base / entry.text_path,
        )
        for entry in entries
    ]
    named = [file for clip in clips for file in (clip.path, clip.actions, clip.text) if file is not None]
    if not allow_outside:
        require_inside(named, (folder, path.parent), path)
    missing = [file for file in named if not file.is_file()]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of the {len(named)} files it names are missing, the first is {missing[0]}"
        )
    return clips
