"""An analytic tokenizer: an orthonormal DCT of every patch of pixels. It needs no weights and inverts exactly."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn

from mimo.errors import InputError

# Standard deviation of the mean of a patch of video in [-1, 1]: 0.3 in the demo's clips, 0.4 to 0.5 in real ones.
_PATCH_MEAN_STD = 0.4


def dct_matrix(n: int) -> torch.Tensor:
    """The orthonormal DCT-II, fp64 [n, n]: row k is sqrt((2 - [k = 0]) / n) cos(pi k (i + 1/2) / n)."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(torch.pi / n * k[:, None] * (k + 0.5)) * (2 / n) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


class DCTTokenizer(nn.Module):
    """Space-to-depth and an orthonormal DCT over frames, rows, columns and RGB of every patch.

        z = B x * s,   x = B^T z / s

    x holds the P = 3 t h w values of a patch in [-1, 1] and B [C, P] the C basis functions of lowest frequency, where
    colour differences count as higher frequencies. With C = P it inverts exactly (to fp32 rounding), and because B is
    orthonormal a squared error of latents is the same as one of pixels.

    s brings the first channel, the mean of the patch, to about unit variance; all others have less. A patch's mean adds
    up all its pixels: were it the average channel that has unit variance, the mean would have several, and unit noise
    would seldom hide what a frame shows. A network learns motion where noise leaves it nothing but the frames before.

    With temporal patches (t > 1) the first frame is repeated t - 1 times in front, so that it is a latent frame of its
    own and (T - 1) t + 1 frames give T latent frames; patches never look beyond their own frames.

    Args:
        compression: frames, rows and columns (t, h, w) of a patch.
        channels: C, at most P; None keeps all.
    """

    # To be counted up whenever the latents of a clip change: what was made with other ones is refused then. In 1, unit
    # variance was that of the average channel.
    definition = "dct 2"
    basis: torch.Tensor

    def __init__(self, compression: tuple[int, int, int] = (1, 8, 8), channels: int | None = None):
        super().__init__()
        t, h, w = compression
        self.compression = t, h, w
        total = 3 * t * h * w
        self.channels = total if channels is None else channels
        if min(compression) < 1 or not 1 <= self.channels <= total:
            raise InputError(f"dct: {self.channels} channels from patches of {t} x {h} x {w}: expected 1 to {total}")
        axes = [torch.arange(n, dtype=torch.float64) for n in (t, h, w, 3)]
        f_t, f_y, f_x, f_c = (grid.flatten() for grid in torch.meshgrid(*axes, indexing="ij"))
        # The energy of natural video falls like 1 / f^2, and by about 4 more from each colour axis to the next.
        order = ((f_t**2 + f_y**2 + f_x**2 + 0.5) * 4**f_c).argsort(stable=True)[: self.channels]
        basis = torch.ones(self.channels, 1, dtype=torch.float64)
        for n, f in (
            (t, f_t),
            (h, f_y),
            (w, f_x),
            (3, f_c),
        ):  # row-wise Kronecker product: [C, P], P ordered (t, h, w, c)
            rows = dct_matrix(n)[f[order].long()]
            basis = (basis[:, :, None] * rows[:, None, :]).flatten(1)
        self.register_buffer("basis", basis.float(), persistent=False)
        self.scale = 1 / (total**0.5 * _PATCH_MEAN_STD)  # channel 0 is sqrt(P) times the mean

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a clip's latents; ValueError when the patches do not tile it."""
        t, h, w = self.compression
        if (frames - 1) % t or frames < 1 or height % h or width % w or height < 1 or width < 1:
            lengths = f"1 + a multiple of {t} frames" if t > 1 else "at least one frame"
            raise ValueError(
                f"dct: a clip of {frames} x {height} x {width}: expected {lengths}, height a multiple of {h},"
                f" width of {w}"
            )
        return (frames - 1) // t + 1, height // h, width // w, self.channels

    def num_frames(self, latent_frames: int) -> int:
        """Video frames that so many latent frames decode to."""
        return (latent_frames - 1) * self.compression[0] + 1

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> latents fp32 [B, T, H/h, W/w, C]."""
        _, frames, _, height, width = video.shape
        self.latent_shape(frames, height, width)
        t, h, w = self.compression
        video = torch.cat([video[:, :1].expand(-1, t - 1, -1, -1, -1), video], dim=1).float()
        patches = rearrange(video, "b (T t) c (H h) (W w) -> b T H W (t h w c)", t=t, h=h, w=w)
        with torch.autocast(video.device.type, enabled=False):  # exactness is the point
            return patches @ self.basis.T * self.scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, T, H, W, C] -> video fp32 [B, F, 3, H h, W w], about in [-1, 1], not clamped."""
        if latents.shape[-1] != self.channels:
            raise ValueError(f"dct: latents {list(latents.shape)}: expected {self.channels} channels")
        t, h, w = self.compression
        with torch.autocast(latents.device.type, enabled=False):
            patches = (latents.float() / self.scale) @ self.basis
        video = rearrange(patches, "b T H W (t h w c) -> b (T t) c (H h) (W w)", t=t, h=h, w=w)
        return video[:, t - 1 :]
