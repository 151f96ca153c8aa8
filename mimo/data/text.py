"""What a text says, as features of a language model: a safetensors file per clip with the tensor `text` [L, E],
float16, bfloat16 or float32, a row per token of the text, without padding.

Where files lie: beside a video, `NAME.text.safetensors` for `NAME.mp4`; or where an annotation says, `text_path`. In a
sample all texts have one length, so that they can be stacked: shorter ones are followed by zeros, which is how the end
of a text is known from there on, and longer ones are cut.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mimo.data.errors import UnreadableVideo
from mimo.data.local import local_file
from mimo.errors import reason

SUFFIX = ".text.safetensors"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def text_beside(video: Path) -> Path:
    """Where the text of a video lies, if no annotation says."""
    return video.with_name(video.stem + SUFFIX)


def read_text(path: str | Path, *, tokens: int | None = None, width: int | None = None) -> np.ndarray:
    """The features in a file, fp32 [L, E]; with `tokens` [tokens, E], cut or followed by zeros.

    Raises UnreadableVideo, naming what there is and what was expected, for a file that is none, for another width than
    asked for, and for features that are not finite or end with a row of zeros.
    """
    file, _ = local_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            if "text" not in names:
                raise UnreadableVideo(path, f"has no tensor 'text', only {sorted(names)}")
            features = opened.get_tensor("text")
    except (OSError, SafetensorError) as error:
        raise UnreadableVideo(path, f"not a readable safetensors file: {reason(error)}") from None
    shape = list(features.shape)
    if features.dtype not in _DTYPES or features.dim() != 2 or not features.numel():
        raise UnreadableVideo(path, f"'text' is {features.dtype} {shape}, expected float [tokens, width], at least one")
    if width is not None and shape[1] != width:
        raise UnreadableVideo(path, f"'text' is {shape}, expected features {width} wide")
    features = features.float()
    if not features.isfinite().all():
        raise UnreadableVideo(path, "'text' is not finite")
    if tokens is not None:
        features = torch.nn.functional.pad(features[:tokens], (0, 0, 0, max(0, tokens - shape[0])))
    if not features[min(shape[0], len(features)) - 1].any():
        raise UnreadableVideo(path, "'text' ends with a row of zeros, which stands for padding: expected none")
    return features.numpy()
