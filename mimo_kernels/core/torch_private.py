"""Every private name of torch that the package uses. tests/kernels/test_torch_private.py tries each one on its own, so that
a torch that has moved or changed one is named by the test that fails."""

import torch
from torch.autograd import forward_ad

below_autograd = torch._C._AutoDispatchBelowAutograd  # context: what is called inside skips the autograd kernels
AFTER_AUTOGRAD = torch._C._after_autograd_keyset  # the dispatch keys that follow autograd's, for OpOverload.redispatch

functorch_active = torch._C._are_functorch_transforms_active  # whether a torch.func transform is under way


def forward_level() -> int:
    """The level of forward-mode differentiation that is under way, -1 for none. unpack_dual asks it too, per tensor."""
    return forward_ad._current_level
