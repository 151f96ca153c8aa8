"""Only local files are opened: no path is taken for a URL, and no list of clips leads out of its folder unasked."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mimo.data.errors import DataError, UnreadableVideo


def local_file(path: str | Path) -> tuple[Path, os.stat_result]:
    """The absolute path of a regular file, and its status; UnreadableVideo for a folder, a pipe or a device."""
    file = Path(os.path.abspath(path))
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise UnreadableVideo(path, getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableVideo(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file")
    return file, status


def require_inside(files: Iterable[Path], folders: Iterable[Path], source: Path) -> None:
    """Raises DataError, naming `source`, at the first file that lies, links followed, in none of the folders."""
    roots = list(dict.fromkeys(os.path.realpath(folder) for folder in folders))
    inside = tuple(os.path.join(root, "") for root in roots)
    real_folder = lru_cache(maxsize=None)(os.path.realpath)  # a million files lie in a few folders
    for file in files:
        folder, name = os.path.split(file)
        path = os.path.join(real_folder(folder), name)
        if not (os.path.realpath(path) if name == ".." or os.path.islink(path) else path).startswith(inside):
            raise DataError(
                f"{source}: {file} lies outside of {' and '.join(roots)}, expected files inside"
                " (--allow-outside takes any)"
            )
