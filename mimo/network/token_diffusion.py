"""The head of networks that predict masked tokens: a small diffusion model of one token, given what the network says of
it (MAR's diffusion loss).

Letters: n tokens, C latent channels, D width of the network, W width of the head, G branches of guidance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.diffusion import EpsilonSchedule
from mimo.network.blocks import sinusoid
from mimo_kernels import guided_step


class TokenBlock(nn.Module):
    """x + gate MLP(LN(x) (1 + scale) + shift), of width W throughout; c [n, W] says shift, scale, gate (AdaLN-zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


class TokenDiffusion(nn.Module):
    """eps of noisy tokens, each by itself: an MLP of `token_depth` blocks of width `token_width`, told the timestep and
    z, the network's output for the token.

    The loss is E |eps - eps(x_t | t, z)|^2 with several (t, eps) per z (MAR, Eq. 1 and Sec. 3.2); the recipe draws them
    and takes the error. A token is drawn in `sample`.

    Source: Li et al. 2024, arXiv 2406.11838 (MAR), Sec. 3.2 and 4; MAGI, App. A.1; VideoMAR, Sec. 5.1.
    """

    def __init__(self, config: MiMoConfig, backend: str) -> None:
        super().__init__()
        width = config.token_width
        self.backend = backend
        self.embed = nn.Linear(config.token_channels, width)
        self.told = nn.Linear(config.dim, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(TokenBlock(width) for _ in range(config.token_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.token_channels)

    def initialise(self) -> None:
        """Modulation and output zero, so that every block starts as the identity; the rest is the network's."""
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, timestep: Tensor, z: Tensor) -> Tensor:
        """eps, [..., C], of noisy tokens x [..., C] at `timestep` [...], given z [..., D]; dimensions broadcast."""
        return self._eps(x, self._time(timestep) + self.told(z))

    @torch.no_grad()
    def sample(
        self, z: Tensor, start: Tensor, noise: Tensor, weights: Tensor, schedule: EpsilonSchedule, steps: int
    ) -> Tensor:
        """Tokens, fp32 [n, C], in `steps` ancestral steps.

        Args:
            z: [G, n, D], of every branch of guidance. weights: fp32 [G], whose sum is 1: of the branches' eps.
            start: N(0, 1), fp32 [n, C], that the first step begins with.
            noise: fp32 [steps, n, C], N(0, 1) times the temperature, added in every step but the last.
        """
        coefficients = schedule.coefficients(steps, z.device)
        times = self._time(schedule.sampling_timesteps(steps, z.device))
        told, x = self.told(z), start.clone()
        every = torch.arange(steps, device=z.device)
        for i in range(steps):
            eps = self._eps(x.to(z.dtype).expand(len(z), *x.shape), told + times[i])
            guided_step(x, eps, weights, coefficients, every[i : i + 1], noise=noise[i], backend=self.backend)
        return x

    def _time(self, timestep: Tensor) -> Tensor:
        """[...] -> [..., W]."""
        waves = sinusoid(timestep.flatten()).to(self.out.weight.dtype)
        return self.time(waves).unflatten(0, timestep.shape)

    def _eps(self, x: Tensor, c: Tensor) -> Tensor:
        c, x = F.silu(c), self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        return self.out(self.norm(x) * (1 + scale) + shift)
