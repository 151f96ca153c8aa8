"""A clip made all at once, for networks whose frames all see each other (`HistoryPolicy.at_once`): there is no history,
and the first frame that is asked for makes all of them.

Letters: S sequences, T frames, N tokens per frame, C latent channels, G branches of guidance.
"""

import torch
from torch import Tensor

from mimo.config import SampleConfig
from mimo.diffusion import build_schedule
from mimo.network.frames import noisy_alone
from mimo.network.network import MiMo
from mimo.sampling.guidance import RunKey
from mimo_kernels import guided_step


class AtOnceRun:
    """The state of one run, in the form of `mimo.sampling.sampler.Run`.

    noise: gives the noise of all frames, [T, S, N, C] on the host, when the clips are made.
    """

    def __init__(self, model: MiMo, config: SampleConfig, key: RunKey):
        self.model, self.config, self.key = model, config, key
        self.device = model.embed.weight.device
        c = model.config
        self.x = torch.zeros(
            key.sequences, c.tokens, c.token_channels, device=self.device
        )  # the frame that is asked for
        self.clips: Tensor | None = None  # [S, T, N, C], once they are made
        self.given: dict[str, Tensor] = {}
        self.next = 0

    def begin(self, given: dict[str, Tensor], noise: Tensor) -> None:
        """Take the conditions, one row per sequence, and make the clips."""
        self.given, self.next = given, 0
        self.clips = self._denoise(noise.to(self.device).transpose(0, 1).contiguous())

    def denoise(self, noise: Tensor, extra: Tensor | None = None) -> None:
        """The next frame, in `x`. Its noise was there when the clips were made."""
        assert self.clips is not None  # `begin` has made them
        self.x.copy_(self.clips[:, self.next])

    def remember(self) -> None:
        self.next += 1

    def end(self) -> None:
        self.clips = None

    def state_dict(self) -> dict[str, Tensor]:
        """What the frames to come depend on, as tensors on the host."""
        assert self.clips is not None  # `begin` has made them
        return {"clips": self.clips.cpu()}

    def load_state_dict(self, state: dict[str, Tensor], positions: list[int]) -> None:
        """Instead of `begin`: go on where `state_dict` was called."""
        self.clips, self.next = state["clips"].to(self.device), positions[0]

    def _denoise(self, x: Tensor) -> Tensor:
        """Noise [S, T, N, C] -> clips."""
        key, model = self.key, self.model
        schedule = build_schedule(model.config.parameterization, model.config.prediction)
        sequences, frames = x.shape[:2]
        branches, dtype = len(key.branches), model.embed.weight.dtype
        timesteps = schedule.embedding(schedule.sampling_timesteps(self.config.steps, self.device))
        every = torch.arange(self.config.steps, device=self.device)
        coefficients = schedule.coefficients(self.config.steps, self.device)
        weights = torch.tensor([branch.weight for branch in key.branches], dtype=torch.float32, device=self.device)
        null = {"labels": model.config.num_classes, "actions": model.config.num_actions}
        told = {}
        for name, values in self.given.items():
            nothing = values if name == "intervals" else torch.full_like(values, null[name])
            told[name] = torch.cat([values if branch.condition else nothing for branch in key.branches])
        x = x.flatten(1, 2)
        for i in range(self.config.steps):
            noisy = x.unflatten(1, (frames, -1)).to(dtype).repeat(branches, 1, 1, 1)
            timestep = timesteps[i].expand(branches * sequences, frames)
            v = model(noisy_alone(noisy, timestep, sees="bidirectional", **told)).velocity
            v = v.flatten(1, 2).unflatten(0, (branches, sequences))
            guided_step(x, v, weights, coefficients, every[i : i + 1], backend=model.backend)
        return x.unflatten(1, (frames, -1))
