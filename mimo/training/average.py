"""The average of the weights that is sampled from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimo.training.distributed import local


class EMA:
    """Weights that follow those of a model. Update number n = 0, 1, ... is

        ema = d_n ema + (1 - d_n) model,    d_0 = 0,    d_n = min(decay, (n + 1) / (n + 18))

    The second bound warms the decay up: it averages over the last twentieth or so of a run that is too short for
        `decay`,
    and forgets what its first steps were. It weighs step i by i^16, the power function average of relative width 0.05
    (Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, Sec. 3.1). It ends at
    n = 17 / (1 - decay) - 18. An average that was begun without it forgets its beginning likewise.

    tensors: by name, one for every parameter, on its device and sharded as it is.
    updates: int64 [] on that device, how many there were.

    torch.optim.swa_utils.AveragedModel counts on the host: it cannot leave out a step that only the device knows
    is bad.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.tensors.values())).device)

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: Tensor) -> None:
        """skipped: [] on the device, 0, or 1 for a step that left the model as it was, and leaves everything here so
        too. The host does not look at it: the weight of the model is computed where it is used."""
        ours, theirs = local(self.tensors.values()), local(model.parameters())
        warm = (17 / (18 + self.updates)).clamp(min=1 - self.decay)  # 1 - d_n
        weight = torch.where(self.updates == 0, 1.0, warm) * (1 - skipped)
        torch._foreach_lerp_(ours, theirs, [weight] * len(ours))
        self.updates += skipped == 0
