"""How files get into place, whole or not at all; and how folders that this package made are deleted: nothing in them
but what it wrote itself, and never through a link.

    claim(out / "unfinished", KNOWN)      the folder is there, is no link, and bears our marker
    remove(out / "unfinished", KNOWN)     every file and folder in it, if all of them are known

`known` lists what we write, as patterns of paths relative to the folder; a `*` stands for any text without a slash:

    KNOWN = ("state.json", "*/shard-*-of-*.safetensors")

Whatever else lies in the folder stops the cleaning before the first file is deleted, and is named.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from mimo.errors import InputError, reason

MARKER = ".made-by-mimo"
_WORDS = "mimo made this folder and deletes it, if nothing is in it that mimo did not write.\n"


class NotOurs(InputError):
    """A file or folder that this package did not write, where it was to delete. `path` is the first one."""

    def __init__(self, folder: Path, path: Path, what: str):
        super().__init__(f"{folder} is left as it is: {path} {what}: move it away, or delete the folder yourself")
        self.path = path


def claim(folder: Path, known: Iterable[str] = ()) -> None:
    """Make a folder, or take one that is empty or holds nothing but what is known, and put our marker into it.

    Raises: NotOurs when it is a link or a file, or holds something else.
    """
    if not os.path.lexists(folder):
        folder.mkdir(parents=True, exist_ok=True)
    elif not is_ours(folder):
        for _ in ours(folder, known):
            pass
    (folder / MARKER).write_text(_WORDS)


def is_ours(folder: Path) -> bool:
    """Whether a folder, and not a link to one, bears our marker."""
    return not folder.is_symlink() and _is_file(folder / MARKER)


def remove(folder: Path, known: Iterable[str] = ()) -> None:
    """Delete a folder that bears our marker, if all that is in it is known. One that is not there is no fault.

    Raises: NotOurs when it bears no marker, is a link, or holds something else; nothing is deleted then.
    """
    if not os.path.lexists(folder):
        return
    if not is_ours(folder):
        raise NotOurs(folder, folder, f"has no {MARKER} in it" if folder.is_dir() else "is no folder")
    remove_known(folder, known)


def remove_known(folder: Path, known: Iterable[str]) -> None:
    """Delete a folder, if all that is in it is known, marker or not: for names that nobody else gives.

    Raises: NotOurs when it is a link, or holds something else; nothing is deleted then.
    """
    found = list(ours(folder, known))
    # The marker goes last, so that a kill in the middle leaves a folder that the next cleaning deletes.
    for path in sorted(found, key=lambda path: path.name == MARKER):
        path.unlink(missing_ok=True)
    for below, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(below)
        except OSError as error:
            raise NotOurs(folder, Path(below), f"cannot be removed ({error.strerror})") from None


def ours(folder: Path, known: Iterable[str]) -> Iterator[Path]:
    """The files of a folder, links not followed. Raises NotOurs at the first that is not known."""
    known = [*known, MARKER]
    if folder.is_symlink() or not folder.is_dir():
        raise NotOurs(folder, folder, "is a link" if folder.is_symlink() else "is no folder")
    yield from _ours(folder, folder, known)


def _ours(folder: Path, below: Path, known: list[str]) -> Iterator[Path]:
    with os.scandir(below) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if not _matches(path.relative_to(folder), known, whole=False):
                    raise NotOurs(folder, path, "was not written by mimo")
                yield from _ours(folder, path, known)
            elif not entry.is_file(follow_symlinks=False):
                raise NotOurs(folder, path, "is a link" if entry.is_symlink() else "is no plain file")
            elif not _matches(path.relative_to(folder), known, whole=True):
                raise NotOurs(folder, path, "was not written by mimo")
            else:
                yield path


def _matches(path: Path, known: list[str], *, whole: bool) -> bool:
    """Whether a path is a known one or, if not `whole`, the beginning of one."""
    parts = path.parts
    for pattern in known:
        wanted = PurePosixPath(pattern).parts
        length = len(parts) == len(wanted) if whole else len(parts) < len(wanted)
        if length and all(map(fnmatchcase, parts, wanted)):
            return True
    return False


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


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
        raise InputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):  # it was never made, or cannot be removed either
            temporary.unlink()
