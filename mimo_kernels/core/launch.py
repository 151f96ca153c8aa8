"""What the op families share: which device the compiled kernels serve, and how tensors are handed to them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mimo_kernels.core import backends, torch_private

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the numbers of csrc/common.cuh


@functools.cache
def _remembered(ask: Callable[[torch.device], list[str]], device: torch.device) -> tuple[str, ...]:
    return tuple(ask(device))


@torch.compiler.assume_constant_result
def device_refusals(device: torch.device) -> list[str]:
    """Why the compiled kernels cannot work on tensors of this device; empty when they can. Every call asks, so it is
    remembered."""
    return list(_remembered(backends.cuda_refusals, device))


@torch.compiler.assume_constant_result
def triton_refusals(device: torch.device) -> list[str]:
    """The same of Triton kernels."""
    return list(_remembered(backends.triton_refusals, device))


def kernels():
    """The compiled module. Only for code that runs after `device_refusals` said nothing."""
    return backends.extension()


def place(tensor: Tensor) -> dict[str, int]:
    """What a launcher has to know of where this tensor is: the index of the device, and the raw stream."""
    index = tensor.get_device()
    return {"device": index, "stream": torch_private.raw_stream(index)} if index >= 0 else {"device": 0, "stream": 0}


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself when it is contiguous and 16-byte aligned, a copy otherwise."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def aligned_rows(tensor: Tensor) -> Tensor:
    """As `aligned` for a matrix, but rows may lie apart: chunks of a wider projection need no copy."""
    step = 16 // tensor.element_size()
    if tensor.stride(1) == 1 and tensor.stride(0) % step == 0 and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def pointer(tensor: Tensor | None) -> int:
    """Where the values are; 0 for a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(matrix: Tensor | None) -> tuple[int, int]:
    """Where the values are, and how far apart the rows: Rows of csrc/launcher.h."""
    return (0, 0) if matrix is None else (matrix.data_ptr(), matrix.stride(0))


def list_of(table: Tensor) -> tuple[int, int]:
    """Where the entries are, and how many: List of csrc/launcher.h."""
    return table.data_ptr(), table.shape[0]
