"""Mask sampling: a frame token by token, in a random order, more of them in every step (MaskGIT's cosine schedule).

Letters: S sequences, N tokens per frame, C latent channels, G branches of guidance.
"""

import math

import torch
from torch import Tensor

from mimo.config import SampleConfig
from mimo.diffusion import EpsilonSchedule
from mimo.network.network import MiMo
from mimo.network.token_diffusion import TokenDiffusion
from mimo.sampling.frame_run import FrameRun, frame_generator
from mimo.sampling.guidance import Conditions, RunKey
from mimo.sampling.history import History


def mask_counts(tokens: int, steps: int) -> list[int]:
    """How many of a frame's tokens each step predicts; their sum is `tokens`.

    Behind step k = 1 .. steps a share cos(pi / 2 * k / steps) of the tokens is still masked, rounded down, but at least
    one until the last step and always fewer than before. A frame of few tokens has as many steps as it can have.

    Source: Chang et al. 2022 (MaskGIT), Sec. 3.3; Li et al. 2024 (MAR), Sec. 4.
    """
    if tokens < 1 or steps < 1:
        raise ValueError(f"tokens={tokens}, steps={steps}: expected 1 or more of both")
    masked, counts = tokens, []
    for k in range(1, steps):
        left = max(1, min(masked - 1, math.floor(tokens * math.cos(math.pi / 2 * k / steps))))
        if left < masked:
            counts.append(masked - left)
        masked = left
    return [*counts, masked]


def frame_temperature(ends: tuple[float, float], position: int) -> float:
    """last + (first - last) 10^-t at frame t: with (1, 0.9) VideoMAR's 0.9 + 10^-(t+1) (App. B)."""
    first, last = ends
    return last + (first - last) * 10.0**-position


class MaskedRun(FrameRun):
    """A run whose frames are predicted token by token. A step runs all branches of guidance as one batch over the frame
    as it is, and then draws the tokens whose turn it is through the token head, whose eps are what guidance sums.

    What is drawn for a token (its turn, the noise that it starts from and that of its every step) is a function of the
    seed, the sequence and the frame, so a sequence is the same alone and in any batch.
    """

    def __init__(self, model: MiMo, config: SampleConfig, key: RunKey, history: History, conditions: Conditions):
        super().__init__(model, config, key, history, conditions)
        c, device = model.config, self.x.device
        assert isinstance(model.head, TokenDiffusion)  # which token_depth > 0 means
        self.head = model.head
        self.counts, self.schedule = mask_counts(c.tokens, config.mask_steps), EpsilonSchedule()
        self.masked = torch.ones(self.size, c.tokens, dtype=torch.bool, device=device)
        self.order = torch.zeros(self.size, c.tokens, dtype=torch.int64, device=device)
        self.noise = torch.zeros(config.steps, self.size, c.tokens, c.token_channels, device=device)

    def draw(self, seed: int, ids: list[int], positions: list[int]) -> None:
        """The order of the next frame's tokens and the noise of their steps, scaled by the temperature."""
        for row, (number, position) in enumerate(zip(ids, positions, strict=True)):
            turns = frame_generator(seed, number, position, "order")
            self.order[row] = torch.randperm(self.order.shape[1], generator=turns)
            drawn = torch.empty(self.noise.shape[0], *self.noise.shape[2:])
            drawn.normal_(generator=frame_generator(seed, number, position, "steps"))
            self.noise[:, row] = drawn.mul_(frame_temperature(self.config.token_temperature, position))

    def denoise(self, noise: Tensor, extra: Tensor | None = None) -> None:
        """As `FrameRun.denoise`; `noise` is what every token starts from."""
        self._add_later(extra)
        self.x.zero_()
        self.masked.fill_(True)
        start, done = noise.to(self.x.device), 0
        told = self.model.told(len(self.branches) * self.size, **self.conditions.of_branches())
        for count in self.counts:
            turn = self.order[:, done : done + count]  # [S, n]
            places = turn[..., None].expand(-1, -1, self.x.shape[-1])
            z = self._features(told)
            z = z.gather(2, turn[..., None].expand(*z.shape[:2], count, z.shape[-1])).flatten(1, 2)
            starts = start.gather(1, places).flatten(0, 1)
            steps = self.noise.gather(2, places.expand(len(self.noise), *places.shape)).flatten(1, 2)
            tokens = self.head.sample(z, starts, steps, self.weights, self.schedule, self.config.steps)
            self.x.scatter_(1, places, tokens.view(places.shape))
            self.masked.scatter_(1, turn, False)
            done += count

    def _features(self, told: list | None) -> Tensor:
        """What the head is given, [G, S, N, D]."""
        branches, conditions = len(self.branches), self.conditions
        self.history.prepare()
        z = self.model.masked_frame(
            self.x.to(self.model.embed.weight.dtype).repeat(branches, 1, 1),
            self.masked.repeat(branches, 1),
            conditions.time(conditions.position).repeat(branches),
            self.history.attend,
            intervals=None if conditions.intervals is None else conditions.intervals.repeat(branches),
            told=told,
        )
        return z.unflatten(0, (branches, self.size))
