"""The average of the weights that is sampled from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimo.training.distributed import local


class EMA:
    """Weights that follow those of a model: after each `update`, ema = decay ema + (1 - decay) model; the first one copies.

    tensors: by name, one for every parameter, on its device and sharded as it is.
    updates: int64 [] on that device, how many there were.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.tensors.values())).device)

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: Tensor) -> None:
        """skipped: [] on the device, 0, or 1 for a step that left the model as it was, and leaves everything here so too.
        The host does not look at it: the weight of the model is computed where it is used."""
        ours, theirs = local(self.tensors.values()), local(model.parameters())
        weight = torch.where(self.updates == 0, 1.0, 1 - self.decay) * (1 - skipped)
        torch._foreach_lerp_(ours, theirs, [weight] * len(ours))
        self.updates += skipped == 0
