"""What all runs share that make one frame after the other: conditions, history, the finished frame on its way there.

Letters: S sequences, N tokens per frame, C latent channels.
"""

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mimo.config import SampleConfig
from mimo.network.network import MiMo
from mimo.sampling.guidance import Conditions, RunKey
from mimo.sampling.history import History


def frame_generator(seed: int, sequence: int, position: int, use: str) -> torch.Generator:
    """Of what is drawn for a frame: a function of the arguments alone, on the host, the same on every device."""
    digest = hashlib.blake2b(repr((seed, sequence, position, use)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class FrameRun(ABC):
    """The state of one run: the frame being made in `x`, [S, N, C], and what has been made in `history`.

    A subclass makes a frame in `denoise(noise, extra)`.
    """

    def __init__(self, model: MiMo, config: SampleConfig, key: RunKey, history: History, conditions: Conditions):
        self.key, self.model, self.config, self.history, self.conditions = key, model, config, history, conditions
        c, device = model.config, model.embed.weight.device
        self.size, self.branches = key.sequences, key.branches
        self.weights = torch.tensor([branch.weight for branch in key.branches], dtype=torch.float32, device=device)
        self.x = torch.zeros(self.size, c.tokens, c.token_channels, device=device)
        self.extra = torch.zeros_like(self.x)  # what is added to the finished frame before it becomes history
        # The frames before, as history has them, the latest first, [S, N, n C], of a network that is told them or makes
        # what changes.
        kept = max(c.recent_frames, int(c.residual))
        self.recent = torch.zeros(self.size, c.tokens, kept * c.token_channels, device=device) if kept else None

    def begin(self, clips: list[Tensor], given: dict[str, Tensor], positions: list[int]) -> None:
        """Take the conditions, one row per sequence, and the context."""
        self._tell(given, positions)
        self.history.begin(clips)
        if self.recent is not None:
            channels = self.x.shape[-1]
            self.recent.zero_()
            for sequence in range(self.size):
                clip = clips[sequence // self.key.trajectories]
                for i, frame in enumerate(clip.flip(0)[: self.recent.shape[-1] // channels]):
                    self.recent[sequence, :, i * channels : (i + 1) * channels] = frame

    @abstractmethod
    def denoise(self, noise: Tensor, extra: Tensor | None = None) -> None:
        """Makes the next frame, in `x`, from noise; `extra` is added to it when it becomes history."""

    def remember(self) -> None:
        """The finished frame, plus what is added to it, joins the history."""
        self.history.reserve()
        self._record()
        self._commit()

    def end(self) -> None:
        self.history.end()

    def state_dict(self) -> dict[str, Tensor]:
        """What the frames to come depend on, as tensors on the host."""
        conditions = {name: static.cpu() for name, static in self.conditions.tensors.items()}
        recent = {} if self.recent is None else {"recent": self.recent.cpu()}
        return self.history.state_dict() | conditions | recent

    def load_state_dict(self, state: dict[str, Tensor], positions: list[int]) -> None:
        """Instead of `begin`: go on where `state_dict` was called."""
        self.history.load_state_dict(state)
        self._tell(state, positions)
        if self.recent is not None:
            self.recent.copy_(state["recent"])

    def _add_later(self, extra: Tensor | None) -> None:
        if extra is None:
            self.extra.zero_()
        else:
            self.extra.copy_(extra, non_blocking=True)

    def _finish(self) -> None:
        """What was made becomes a frame."""
        if self.model.config.residual and self.recent is not None:
            self.x.add_(self.recent[..., : self.x.shape[-1]])

    def _record(self) -> None:
        finished = self.x + self.extra
        if self.recent is not None:
            older = self.recent[..., : -self.x.shape[-1]]
            self.recent.copy_(torch.cat([finished, older], dim=-1))
        self.history.record(finished)

    def _commit(self) -> None:
        self.history.commit()
        self.conditions.position.add_(1)

    def _tell(self, given: dict[str, Tensor], positions: list[int]) -> None:
        self.conditions.take(given, positions)
