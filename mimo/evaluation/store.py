"""What an evaluation has measured so far, in files of some clips each, so that it is continued after an interruption.

    OUT/cache/NAME-0123456789abcdef/     a set of videos: its kind, and the digest of what decides them
        set.json                         what that is
        videos-00003.npz                 videos uint8 [b, K, F, H, W, 3] of the clips `numbers` int64 [b], as far
                                         as the clips `asked` can be had
        i3d-01234567-00003.npz           values of a judge: its name, and the beginning of its weights' checksum

A file is whole or not there; one that is damaged is made anew. Processes write different files.
"""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mimo import records
from mimo.folders import atomic_path

log = logging.getLogger("mimo.eval")


class Store:
    """The files of one set of videos.

    Args:
        folder: of all sets. name: of the kind of this one. identity: all that decides its videos, as JSON can hold it.
    """

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]):
        self.identity = json.loads(json.dumps(identity))
        self.digest = records.digest(self.identity)
        self.folder = folder / f"{name}-{self.digest[:16]}"

    def describe(self) -> None:
        """Write set.json, for readers."""
        with atomic_path(self.folder / "set.json") as temporary:
            temporary.write_text(json.dumps(self.identity, indent=1) + "\n")

    def _file(self, kind: str, chunk: int) -> Path:
        return self.folder / f"{kind}-{chunk:05d}.npz"

    def read(self, kind: str, chunk: int, asked: list[int], name: str) -> tuple[list[int], np.ndarray] | None:
        """The clips' numbers and the array called `name`; None where there is none, or none that is whole and of the
        clips that are asked for: the last part grows with the number of clips."""
        file = self._file(kind, chunk)
        if not file.exists():
            return None
        try:
            with np.load(file) as arrays:
                numbers, values, part = arrays["numbers"], arrays[name], arrays["asked"]
            if numbers.ndim != 1 or values.ndim < 1 or len(values) != len(numbers):
                raise ValueError(f"{values.shape} values of {numbers.shape} clips")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            log.warning("%s: is damaged, and made anew (%s)", file, type(error).__name__)
            return None
        return (numbers.tolist(), values) if part.tolist() == asked else None

    def write(self, kind: str, chunk: int, asked: list[int], name: str, numbers: list[int], values: np.ndarray) -> None:
        with atomic_path(self._file(kind, chunk)) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {"numbers": np.array(numbers, np.int64), "asked": np.array(asked, np.int64)}
            arrays[name] = values
            np.savez_compressed(file, **arrays)
