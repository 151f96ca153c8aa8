"""The clips of `mimo demo`: windows of a few real ones, held in memory, whose ends are kept for the test."""

from pathlib import Path

import numpy as np

from mimo.data import UnreadableVideo
from mimo.data.datasets import find_files
from mimo.data.errors import DamagedVideo
from mimo.data.npz import NpzReader
from mimo.data.video import VIDEO_SUFFIXES, VideoReader, open_clip
from mimo.errors import InputError

HELD_OUT = 0.25  # of every real clip, its end
MAX_FRAMES = 1000  # read of every real clip


class Windows:
    """Windows of clips held in memory: `sample` as in mimo.data, and `test_windows` from the held-out ends.

    Args:
        clips: (name, video uint8 [F, H, W, 3], actions int64 [F] or None), each at least 2 num_frames long.
    """

    num_classes: int | None = None
    num_actions: int | None
    has_labels = False
    decodes = False

    def __init__(self, clips: list[tuple[str, np.ndarray, np.ndarray | None]], num_frames: int):
        self.clips, self.num_frames = clips, num_frames
        self.splits = [
            min(len(v) - num_frames, round(len(v) * (1 - HELD_OUT))) for _, v, _ in clips
        ]  # first test frame
        with_actions = [actions is not None for _, _, actions in clips]
        if any(with_actions) and not all(with_actions):
            raise InputError(f"{clips[with_actions.index(False)][0]} has no actions, though other clips have")
        self.num_actions = 1 + max(int(a.max()) for _, _, a in clips if a is not None) if all(with_actions) else 0
        self.has_actions = all(with_actions)

    def __len__(self) -> int:
        return len(self.clips)

    def __repr__(self) -> str:
        frames = sum(len(video) for _, video, _ in self.clips)
        return f"{len(self)} clip{'s' if len(self) > 1 else ''}, {frames} frames" + (
            f", {self.num_actions} actions" if self.num_actions else ""
        )

    def name(self, index: int) -> str:
        return self.clips[index][0]

    def sample(self, index: int, seed: int) -> dict[str, np.ndarray]:
        latest = self.splits[index] - self.num_frames
        return self._window(index, int(np.random.default_rng((seed, index)).integers(0, latest + 1)))

    def test_windows(self, count: int) -> list[dict[str, np.ndarray]]:
        """`count` held-out windows: one of each clip in turn, spread over its end."""
        windows = []
        for number in range(count):
            index, turn = number % len(self), number // len(self)
            turns = -(-(count - index) // len(self))
            first, latest = self.splits[index], len(self.clips[index][1]) - self.num_frames
            windows.append(self._window(index, first + (latest - first) * turn // max(1, turns - 1)))
        return windows

    def _window(self, index: int, start: int) -> dict[str, np.ndarray]:
        _, video, actions = self.clips[index]
        cut = slice(start, start + self.num_frames)
        return {"video": video[cut]} | ({} if actions is None else {"actions": actions[cut]})


def read_windows(data: Path, num_frames: int, height: int, width: int, interval: int) -> Windows:
    """Read every clip under `data`, small; the unreadable and the short ones are named and left out."""
    files = find_files(data, (*VIDEO_SUFFIXES, ".npz"))
    clips = []
    for file in files:
        try:
            with open_clip(file) as reader:
                video = _read_from_start(reader, height, width, interval)
                actions = None if reader.actions is None else reader.actions[: len(video) * interval : interval]
                damage = reader.damage
        except UnreadableVideo as error:
            print(f"skipped {error}")
            continue
        if damage:
            print(f"{file}: {damage}")
        if len(video) < 2 * num_frames:
            print(f"skipped {file}: {len(video)} frames, expected at least {2 * num_frames}")
            continue
        clips.append((file.name, video, actions))
    if not clips:
        raise InputError(
            f"{data}: none of its {len(files)} videos and npz files can be used"
            if files
            else f"{data}: holds no video and no npz file"
        )
    return Windows(clips, num_frames)


def _read_from_start(reader: VideoReader | NpzReader, height: int, width: int, interval: int) -> np.ndarray:
    """Every interval-th frame, at most MAX_FRAMES, of a damaged video those before the damage: uint8 [F, H, W, 3]."""

    def read() -> np.ndarray:
        count = min(MAX_FRAMES, 1 + (reader.num_frames - 1) // interval)
        return reader.read(count, interval=interval, size=(height, width))

    try:
        return read()
    except DamagedVideo:
        reader.shorten()
        return read()
