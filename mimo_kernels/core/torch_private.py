"""Every private name of torch that the package uses. tests/kernels/test_torch_private.py tries each one on its own:
the test that fails names what a torch has moved or changed."""

import contextlib
from collections.abc import Iterator

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

below_autograd = torch._C._AutoDispatchBelowAutograd  # context: what is called inside skips the autograd kernels
AFTER_AUTOGRAD = torch._C._after_autograd_keyset  # the dispatch keys that follow autograd's, for OpOverload.redispatch

functorch_active = torch._C._are_functorch_transforms_active  # whether a torch.func transform is under way


OpOverload = torch._ops.OpOverload  # what torch.ops.<library>.<operator>.default is

# Fused attention with its log-sum-exp, which scaled_dot_product_attention does not tell.
cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
cuda_attention = torch.ops.aten._efficient_attention_forward
cuda_attention_backward = torch.ops.aten._efficient_attention_backward


def forward_level() -> int:
    """The level of forward-mode differentiation that is under way, -1 for none. unpack_dual asks it too, per tensor."""
    return forward_ad._current_level


dispatch_modes = torch._C._len_torch_dispatch_stack  # how many are active: FakeTensorMode, functional tensors, tracing
without_dispatch_modes = _disable_current_modes  # context: what is called inside works on real tensors
_NO_MODE = contextlib.nullcontext()


def plain_tensors() -> contextlib.AbstractContextManager:
    """What is made inside has values and serves training: neither a dispatch mode nor inference mode is active. Free
    where none was."""
    return _without_modes() if dispatch_modes() or torch.is_inference_mode_enabled() else _NO_MODE


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    with torch.inference_mode(False), without_dispatch_modes():
        yield


def fake_mode() -> FakeTensorMode | None:
    """The FakeTensorMode that is active, if one is."""
    return detect_fake_mode()


def is_fake(x: torch.Tensor) -> bool:
    """Whether the tensor has a shape but no values."""
    return isinstance(x, FakeTensor) or x.device.type == "meta"


def saved_tensors_are_packed() -> bool:
    """Whether hooks put away what autograd saves: activation checkpointing, torch.autograd.graph.save_on_cpu."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def raw_stream(device_index: int) -> int:
    """The current stream of a CUDA device as the number that CUDA knows it by. A CPU build of torch has none."""
    return torch._C._cuda_getCurrentRawStream(device_index)
