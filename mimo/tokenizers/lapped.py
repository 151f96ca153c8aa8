"""An analytic tokenizer without seams: the DCT of patches that overlap their neighbours."""

from __future__ import annotations

from functools import lru_cache

import torch

from mimo.tokenizers.dct import DCTTokenizer, dct_matrix

_GAIN = 4.0  # over the latents of DCTTokenizer


class LappedTokenizer(DCTTokenizer):
    """The lapped orthogonal transform: `DCTTokenizer` behind a filter across the borders of the patches.

        z = B x' * s,   x' = P_y x P_x^T;     x = P_y^T x' P_x,   x' = B^T z / s

    P is orthogonal and mixes, around every border between patches of n pixels, the h = n // 2 pixels on either side:

        F = 1/2 [[I, J], [J, -I]] [[I, 0], [0, V]] [[I, J], [J, -I]],   V = J C2^T C4 J

    with the exchange J and the DCTs of type II and IV of h. A basis function so reaches half a patch into its
    neighbours and fades out there: what a network gets wrong, or channels that are left out, show no edges of patches.
    Everything else is as with `DCTTokenizer`: it needs no weights, with all channels it inverts exactly, and a squared
    error of latents is the same as one of pixels. Of time nothing is mixed. But it is the average of two dozen channels
    that s brings to about unit variance, and the mean of a patch has several: beside noise, small networks see the rest
    too. A timestep_mean of 1.4 makes up for it.

    Source: Tran, Liang and Tu 2003, Lapped transform via time-domain pre- and post-filtering, Sec. III (the type-II
    LOT of Malvar 1992).
    """

    definition = "lapped 1"

    def __init__(self, compression: tuple[int, int, int] = (1, 8, 8), channels: int | None = None) -> None:
        super().__init__(compression, channels)
        self.scale *= _GAIN

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> latents fp32 [B, T, H/h, W/w, C]."""
        self.latent_shape(video.shape[1], *video.shape[-2:])
        p_y, p_x = self._filters(video)
        with torch.autocast(video.device.type, enabled=False):
            return super().encode(p_y @ video.float() @ p_x.T)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, T, H, W, C] -> video fp32 [B, F, 3, H h, W w], about in [-1, 1], not clamped."""
        video = super().decode(latents)
        p_y, p_x = self._filters(video)
        with torch.autocast(latents.device.type, enabled=False):
            return p_y.T @ video @ p_x

    def _filters(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P of the rows and of the columns of a video [..., H, W]."""
        sides = zip(video.shape[-2:], self.compression[1:], strict=True)
        p_y, p_x = (border_filter(length, patch).to(video.device) for length, patch in sides)
        return p_y, p_x


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def border_filter(length: int, patch: int) -> torch.Tensor:
    """P for `length` pixels in patches of `patch`: orthogonal, fp32 [length, length]."""
    half, whole = patch // 2, torch.eye(length, dtype=torch.float64)
    if half == 0:
        return whole.float()
    one, exchange = torch.eye(half, dtype=torch.float64), torch.eye(half, dtype=torch.float64).flip(0)
    i = torch.arange(half, dtype=torch.float64) + 0.5
    dct4 = (2 / half) ** 0.5 * torch.cos(torch.pi / half * i[:, None] * i)
    v = exchange @ dct_matrix(half).T @ dct4 @ exchange
    butterfly = torch.cat([torch.cat([one, exchange], 1), torch.cat([exchange, -one], 1)])
    across = butterfly @ torch.block_diag(one, v) @ butterfly / 2
    for border in range(patch, length, patch):
        whole[border - half : border + half, border - half : border + half] = across
    return whole.float()
