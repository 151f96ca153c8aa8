"""Runs that are continued after an interruption.

    FOLDER/
        checkpoints/step_00000020/   the newest state: the cache's pages and page tables, the conditions, the seed
        frames/checkpoints/step_*/   the frames made between two saves, each written once

Both are written as checkpoints are (mimo.checkpoint): they are whole or not there, and carry checksums. The noise of a
frame is a function of the seed and the frame's position, so a continued run makes the frames that it would have made.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo import checkpoint
from mimo.errors import InputError


@dataclass(frozen=True)
class Saving:
    """Where a stream saves itself, and how often.

    Args:
        folder: holds the newest state and the frames made so far.
        every: frames between two saves.
        request: what the run was asked for, as JSON can hold it; a run is continued under an equal one only.
    """

    folder: Path
    every: int = 10
    request: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: expected 1 or more frames between two saves")


@dataclass
class Progress:
    """How far a run is.

    total: frames to make. seed, ids: of the noise. positions: of the frames to be made next, per sequence.
    chunks: `done` at every save, which names the folder of the frames made since the save before.
    """

    total: int
    seed: int
    ids: list[int]
    positions: list[int]
    done: int = 0
    chunks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SavedRun:
    """What a saved run is continued from: how far it is, the numbers of its `RunKey`, and its tensors."""

    progress: Progress
    key: list
    tensors: dict[str, Tensor]


class Saver:
    """Collects the frames of a run and saves it every few of them.

    Args:
        identity: called once, at the first save: what has to be the same for the run to be continued.
        key: the numbers that SavedRun gives back.
        state: called at every save: the tensors that the frames to come depend on.
    """

    def __init__(
        self, saving: Saving, identity: Callable[[], dict], key: list, state: Callable[[], dict[str, Tensor]]
    ) -> None:
        self.saving, self.key, self.state = saving, key, state
        self.unsaved: list[Tensor] = []
        self._identify, self._identity = identity, None

    def add(self, frame: Tensor, progress: Progress) -> None:
        """The frame that `progress.done` counts last. Saves when it is time, and after the last frame."""
        self.unsaved.append(frame.clone())  # the caller may change his
        if progress.done == progress.total or progress.done % self.saving.every == 0:
            self._save(progress)

    def _save(self, now: Progress) -> None:
        folder = self.saving.folder
        self._identity = self._identity or self._identify()
        frames = torch.stack(self.unsaved).cpu()
        checkpoint.save(folder / "frames", now.done, {"frames": {"frames": frames}}, {}, keep_every=1)
        now.chunks.append(now.done)
        self.unsaved = []
        state: dict[str, Any] = {"configs": self._identity, "run": self.key, "progress": asdict(now)}
        checkpoint.save(folder, now.done, {"run": self.state()}, state, keep_last=1)


def require_unused(folder: Path) -> None:
    """InputError when a saved run lies in the folder."""
    if checkpoint.step_folders(folder):
        raise InputError(f"{folder} holds a saved run: resume it, or save into another folder")


def load_run(folder: Path, identity: dict) -> SavedRun:
    """The newest state in the folder, to go on from. InputError when there is none, when it is damaged, and when what has to
    be the same is not: the message says what there is and what is expected."""
    newest, damaged = checkpoint.find(folder)
    if damaged:
        raise InputError(damaged[0])
    state = checkpoint.read_state(newest)
    checkpoint.require_same_config(state["configs"], identity, newest)
    for leftovers in (folder, folder / "frames"):
        checkpoint.delete_unfinished(leftovers)
    return SavedRun(Progress(**state["progress"]), state["run"], checkpoint.read_tensors(newest, "run", state))


def load_frames(folder: Path, progress: Progress) -> Iterator[Tensor]:
    """The saved frames, each ``[S, N, C]`` on the host, in the order in which they were made."""
    for step in progress.chunks:
        chunk = checkpoint.step_folder(folder / "frames", step)
        yield from checkpoint.read_tensors(chunk, "frames", checkpoint.read_state(chunk))["frames"]
