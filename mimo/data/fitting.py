"""Which frames of a clip are taken, and how a frame is brought to size."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from mimo.data.errors import UnreadableVideo

# Decoding runs in many workers at once, so each takes one thread. Releases before 17 scale in one thread and have no
# such option.
ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


class Fit:
    """Resize to cover `size`, then crop. `crop` = (y, x) in [0, 1] places the window: (0.5, 0.5) is the centre."""

    def __init__(self, height: int, width: int, size: tuple[int, int] | None, crop: tuple[float, float]):
        self.height, self.width = size or (height, width)
        scale = max(self.height / height, self.width / width)
        self.resized = max(self.height, round(height * scale)), max(self.width, round(width * scale))
        self.y = round(crop[0] * (self.resized[0] - self.height))
        self.x = round(crop[1] * (self.resized[1] - self.width))
        self.interpolation = "AREA" if scale < 1 else "BICUBIC"
        self.reformatter = VideoReformatter()

    def resize(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [resized height, resized width, 3], RGB."""
        height, width = self.resized
        frame = self.reformatter.reformat(frame, width, height, "rgb24", interpolation=self.interpolation, **ONE_THREAD)
        return frame.to_ndarray()

    def crop(self, resized: np.ndarray) -> np.ndarray:
        """[height, width, 3]: the window."""
        return resized[self.y : self.y + self.height, self.x : self.x + self.width]


def clip_span(num_frames: int, interval: int) -> int:
    """Source frames that `num_frames` frames, `interval` apart, reach over."""
    return (num_frames - 1) * interval + 1


def check_range(path: str, total: int, num_frames: int, start: int, interval: int) -> None:
    """Raises ValueError for a range that no clip has, UnreadableVideo for one that a clip of `total` frames has not."""
    if num_frames < 1 or start < 0 or interval < 1:
        raise ValueError(
            f"num_frames {num_frames} must be >= 1, start {start} >= 0 and interval {interval} >= 1 (reading {path})"
        )
    if start + clip_span(num_frames, interval) > total:
        asked = f"{num_frames} were asked for (start {start}, interval {interval})"
        raise UnreadableVideo(path, f"has {total} frames, but {asked}")
