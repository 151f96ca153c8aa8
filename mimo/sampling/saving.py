"""Runs that are continued after an interruption.

    FOLDER/
        checkpoints/step_00000020/   the two newest states: the cache's pages and page tables, the conditions, the seed
        frames/checkpoints/step_*/   the frames made between two saves, each written once

Both are written as checkpoints are (mimo.checkpoint): they are whole or not there, and carry checksums; a state carries
those of the frames made before it. The noise of a frame is a function of the seed and the frame's position, so a
continued run makes the frames that it would have made. The folder bears the marker of mimo.folders, and is deleted with
nothing in it but these.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mimo import checkpoint, folders, records
from mimo.errors import InputError

log = logging.getLogger("mimo.sample")

# All that lies in the folder; see mimo.folders.
FILES = (*checkpoint.RUN_FILES, *(f"frames/{name}" for name in checkpoint.RUN_FILES))


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
class Chunk:
    """The frames made between two saves. done: of the run, at the second one, which names their folder; sha256: of what
    its state says, the checksum of the frames included."""

    done: int
    sha256: str


@dataclass
class Progress:
    """How far a run is.

    total: frames to make. seed, ids: of the noise. positions: of the frames to be made next, per sequence.
    chunks: one per save.
    """

    total: int
    seed: int
    ids: list[int]
    positions: list[int]
    done: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    def __post_init__(self) -> None:
        saves = [chunk.done for chunk in self.chunks]
        if saves != sorted(set(saves)) or not 0 <= self.done <= self.total or any(done < 1 for done in saves):
            raise ValueError(f"done={self.done} of total={self.total}, saved after {saves}: expected growing numbers")
        if not self.ids or len(self.ids) != len(self.positions):
            raise ValueError(f"{len(self.ids)} ids and {len(self.positions)} positions: expected one each per sequence")


@dataclass
class _State:
    """What a state says, besides what every checkpoint does. run: the fields of the `RunKey` that were asked for."""

    step: int
    configs: dict[str, Any]
    run: tuple[int, int, int, int, bool, bool] | tuple[int, int, int, int, bool, bool, int]
    progress: Progress
    OTHER_KEYS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.step != self.progress.done or [chunk.done for chunk in self.progress.chunks][-1:] != [self.step]:
            raise ValueError(f"step {self.step} and {self.progress}: expected to be saved at this step")


@dataclass(frozen=True)
class SavedRun:
    """What a saved run is continued from: how far it is, the numbers of its `RunKey`, and its tensors."""

    progress: Progress
    key: tuple[int, ...]
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
        self._identify = identity
        self._identity: dict | None = None

    def add(self, frame: Tensor, progress: Progress) -> None:
        """The frame that `progress.done` counts last. Saves when it is time, and after the last frame."""
        self.unsaved.append(frame.clone())  # the caller may change his
        if progress.done == progress.total or progress.done % self.saving.every == 0:
            self._save(progress)

    def _save(self, now: Progress) -> None:
        folder = self.saving.folder
        self._identity = self._identity or self._identify()
        frames = torch.stack(self.unsaved).cpu()
        chunk = checkpoint.save(folder / "frames", now.done, {"frames": {"frames": frames}}, {}, keep_every=1)
        now.chunks.append(Chunk(now.done, records.digest(checkpoint.read_state(chunk))))
        self.unsaved = []
        state: dict[str, Any] = {"configs": self._identity, "run": self.key, "progress": asdict(now)}
        checkpoint.save(folder, now.done, {"run": self.state()}, state, keep_last=2)


def begin_folder(folder: Path) -> None:
    """Make the folder of a new run. InputError when a saved run lies in it, or anything else."""
    if checkpoint.step_folders(folder):
        raise InputError(f"{folder} holds a saved run: resume it, or save into another folder")
    folders.claim(folder, FILES)


def delete_folder(folder: Path) -> None:
    """Delete the folder of a run. InputError when anything is in it that no run saved; nothing is deleted then."""
    folders.claim(folder, FILES)  # one of before there were markers
    folders.remove(folder, FILES)


def load_run(folder: Path, identity: dict) -> SavedRun:
    """The newest whole state in the folder, to go on from; the log says why newer ones were passed over.

    Raises: InputError when there is none, and when what has to be the same is not: the message says what there is and
    what is expected.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: expected the folder of a saved run")
    passed_over = []
    for newest in reversed(checkpoint.step_folders(folder)):
        try:
            state = _whole_state(folder, newest)
            break
        except InputError as error:
            passed_over.append(str(error))
    else:
        why = f"no whole state: {passed_over[0]}; delete it to begin anew" if passed_over else "no saved run"
        raise InputError(f"{folder} holds {why}")
    checkpoint.require_same_config(state.configs, identity, newest)
    for reason in passed_over:
        log.warning("passed over: %s", reason)
    folders.claim(folder, FILES)
    for leftovers in (folder, folder / "frames"):
        checkpoint.delete_unfinished(leftovers)
    tensors = checkpoint.read_tensors(newest, "run", checkpoint.read_state(newest))
    return SavedRun(state.progress, state.run, tensors)


def _whole_state(folder: Path, newest: Path) -> _State:
    """What a state says, once it and all frames before it are as they were written."""
    checkpoint.find(newest)
    state = records.convert(checkpoint.read_state(newest), _State, newest / "state.json")
    for chunk in state.progress.chunks:
        place = checkpoint.step_folder(folder / "frames", chunk.done)
        checkpoint.find(place)
        if records.digest(checkpoint.read_state(place)) != chunk.sha256:
            raise InputError(f"{place} holds other frames than those before {newest}")
    return state


def load_frames(folder: Path, progress: Progress) -> Iterator[Tensor]:
    """The saved frames, each ``[S, N, C]`` on the host, in the order in which they were made."""
    for chunk in progress.chunks:
        place = checkpoint.step_folder(folder / "frames", chunk.done)
        yield from checkpoint.read_tensors(place, "frames", checkpoint.read_state(place))["frames"]
