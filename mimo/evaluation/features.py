"""Features that need no weights: a relative comparison of results with each other runs on any machine.

No published figure is comparable with theirs: tables name them in every score. They tell apart what a judge of videos
has to tell apart (blur, noise, wrong colours, motion that is too slow, repeated clips), and nothing of what is shown.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimo.tokenizers.dct import dct_matrix


class DCTFeatures:
    """The slowest and smoothest waves of a clip: coefficients of its orthonormal DCT over time, rows and columns.

    Frames are brought to 16 x 16 by averaging, as areas; of every colour the 20 coefficients whose three frequencies
    add up to less than 4 are kept, over the root of the number of values, so that their unit is grey levels (0..255)
    at any length. D = 60.
    """

    name = "dct"
    needs_weights = False
    definition = "dct features 1: 16 x 16, degree < 4"  # counted up whenever the features of a clip change

    side, degree = 16, 4

    def __call__(self, video: Tensor) -> Tensor:
        frames = video.shape[1]
        pictures = video.flatten(0, 1).movedim(-1, 1).double()
        small = F.adaptive_avg_pool2d(pictures, self.side)  # [B F, 3, 16, 16]
        x = small.unflatten(0, video.shape[:2])
        slow = dct_matrix(frames).to(x)[: self.degree]
        smooth = dct_matrix(self.side).to(x)[: self.degree]
        waves = torch.einsum("tf,yh,xw,bfchw->bctyx", slow, smooth, smooth, x)
        t, y, x_ = torch.meshgrid(*(torch.arange(n) for n in waves.shape[2:]), indexing="ij")
        kept = (t + y + x_ < self.degree).to(waves.device)
        return (waves[:, :, kept].flatten(1) / (frames * self.side**2) ** 0.5).float()


class RandomFeatures:
    """What an untrained network sees: two random convolutions over space and time, rectified, and their mean and
    standard deviation over the clip. D = 128.

    Random networks keep textures, edges and motion apart (Ulyanov et al. 2018, Saxe et al. 2011); the weights are
    drawn once and for all from numpy's frozen generator, and scaled as He et al. (2015) do.
    """

    name = "random"
    needs_weights = False
    definition = "random features 1: 3x5x5 to 32, 3x3x3 to 64"

    channels = (3, 32, 64)

    def __init__(self) -> None:
        draws = np.random.RandomState(2021)
        self.weights = []
        for kernel, (ins, outs) in zip(((3, 5, 5), (3, 3, 3)), zip(self.channels, self.channels[1:])):
            fan = ins * int(np.prod(kernel))
            drawn = draws.standard_normal((outs, ins, *kernel)) * (2 / fan) ** 0.5
            # Without their mean, they answer to differences and not to brightness.
            drawn -= drawn.mean(axis=(1, 2, 3, 4), keepdims=True)
            self.weights.append(torch.from_numpy(drawn).float())

    def __call__(self, video: Tensor) -> Tensor:
        made = [self._clip(clip) for clip in video]  # one by one: the features of a clip do not depend on its batch
        return torch.stack(made)

    def _clip(self, clip: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] -> [128]."""
        x = clip.movedim(-1, 0).float()[None] / 127.5 - 1  # [1, 3, F, H, W]
        for weight in self.weights:
            around = [size // 2 for size in reversed(weight.shape[2:]) for _ in range(2)]
            x = F.conv3d(F.pad(x, around, mode="replicate"), weight.to(x), stride=(1, 2, 2)).relu()
        flat = x[0].flatten(1).double()
        return torch.cat([flat.mean(1), flat.std(1, correction=0)]).float()


WEIGHT_FREE = {kind.name: kind for kind in (DCTFeatures, RandomFeatures)}
