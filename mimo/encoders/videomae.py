"""VideoMAE (Tong et al. 2022, arXiv 2203.12602), frozen, out of a local folder in the layout of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.encoders.local import read_folder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which all released weights were trained with


class VideoMAE(nn.Module):
    """The hidden states behind VideoMAE's last layer, one per tube of frames and patch of pixels.

    A clip of another length or size than the network's is brought to it: frames are picked evenly, the first and the
    last among them; pictures are interpolated, bilinearly with antialiasing.

    Args:
        model: a transformers.VideoMAEModel.
    """

    model: Any  # a transformers.VideoMAEModel
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.frames, self.tube, self.size, self.patch = (
            config.num_frames,
            config.tubelet_size,
            config.image_size,
            config.patch_size,
        )
        self.channels: int = config.hidden_size
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the features, the same for every clip."""
        return self.frames // self.tube, self.size // self.patch, self.size // self.patch

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> features fp32 [B, T', H', W', E]."""
        clips, frames = video.shape[:2]
        picked = torch.linspace(0, frames - 1, self.frames, dtype=torch.float64).round().long()
        x = video[:, picked.to(video.device)].flatten(0, 1).float()
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        hidden = self.model(x.unflatten(0, (clips, -1)).to(self.model.dtype)).last_hidden_state
        return hidden.float().unflatten(1, self.grid(*video.shape[1:2], *video.shape[3:]))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> VideoMAE:
        """The encoder in a folder with config.json and weights, of VideoMAE pre-trained or fine-tuned; its decoder or
        classifier stays on disk. Nothing is fetched.

        Raises: InputError for a folder that is not there, or holds no whole VideoMAE.
        """
        return cls(read_folder(source, "VideoMAEModel", who="the encoder 'videomae'", what="VideoMAE"))
