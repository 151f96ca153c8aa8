"""Bias and GELU in one pass, between the two matrix products of an MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels.core import backends, checks
from mimo_kernels.core.launch import (
    DTYPES,
    aligned,
    device_refusals,
    kernels,
    place,
    pointer,
)
from mimo_kernels.core.register import register

GRAD_ROWS = 64  # rows per block of the backward


def _bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    x, bias = aligned(x), None if bias is None else aligned(bias)
    y = torch.empty_like(x)
    kernels().bias_gelu_forward(
        y=y.data_ptr(),
        x=x.data_ptr(),
        bias=pointer(bias),
        bias_float=bias is not None and bias.dtype == torch.float32,
        rows=x.shape[0],
        dim=x.shape[1],
        dtype=DTYPES[x.dtype],
        **place(x),
    )
    return y


def _bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dy, x, bias = aligned(dy), aligned(x), None if bias is None else aligned(bias)
    rows, dim = x.shape
    dx, dbias = _backward_results(dy, x, bias)
    parts = (rows + GRAD_ROWS - 1) // GRAD_ROWS if bias is not None else 0
    partial = torch.empty(parts, dim, dtype=torch.float32, device=x.device)
    kernels().bias_gelu_backward(
        dx=dx.data_ptr(),
        dbias=0 if bias is None else dbias.data_ptr(),
        partial=partial.data_ptr(),
        dy=dy.data_ptr(),
        x=x.data_ptr(),
        bias=pointer(bias),
        bias_float=bias is not None and bias.dtype == torch.float32,
        rows=rows,
        dim=dim,
        rows_per_block=GRAD_ROWS,
        dtype=DTYPES[x.dtype],
        **place(x),
    )
    return dx, dbias


def _backward_results(dy, x, bias):
    """What the backward writes; dbias is empty where there is no bias."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = _backward_operator(dy, x, bias)
    return dx, None if bias is None else dbias


_operator = register(
    "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
    _bias_gelu,
    fake=lambda x, bias: torch.empty_like(x, memory_format=torch.contiguous_format),
    sample=lambda rows: (torch.randn(rows, 16), torch.randn(16)),
    gradients=_gradients,
    save=_save,
)
_backward_operator = register(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)",
    _bias_gelu_backward,
    fake=_backward_results,
    sample=lambda rows: (torch.randn(rows, 16), torch.randn(rows, 16), torch.randn(16)),
)


def _refusals(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, list[str]]:
    reasons = device_refusals(device)
    if dtype not in DTYPES:
        reasons.append(f"x is {dtype}, expected {checks.FLOAT_NAMES}")
    if dim % 8 or not dim:
        reasons.append(f"x has {dim} columns, expected a multiple of 8 of at least 8")
    return {"cuda": reasons, "reference": []}


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """Backend -> why it cannot serve bfloat16 rows of 4608 columns on this device."""
    return _refusals(torch.device(device), torch.bfloat16, 4608)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = gelu(x + bias), gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))).

    Put behind a matrix product without bias. The backward reads x again and computes the activation anew, so nothing
    but x is kept.

    Args:
        x: [..., D], float32, float16 or bfloat16; the cuda backend wants D a multiple of 8.
        bias: [D] of x's dtype or float32, or None.
        backend: "auto", "cuda" or "reference".

    Returns y with the shape and dtype of x. Differentiable in x and bias; the bias gradient sums in a fixed order.
    Raises ValueError for an x that is not floating, and for a bias that does not fit.
    Source: Hendrycks and Gimpel, arXiv 1606.08415, Sec. 2.
    """
    checks.expect_shape("bias_gelu", "x", x, "...", "D")
    checks.expect_floating("bias_gelu", "x", x)
    if bias is not None:
        checks.expect_shape("bias_gelu", "bias", bias, x.shape[-1])
        checks.expect_dtype("bias_gelu", "bias", bias, x.dtype, torch.float32, why="as x, or single")
        checks.expect_device("bias_gelu", x, bias=bias)
    if backends.choose("bias_gelu", backend, _refusals(x.device, x.dtype, x.shape[-1])) == "reference":
        return bias_gelu_ref(x, bias)
    return _operator(x.reshape(-1, x.shape[-1]), bias).view(x.shape)


def bias_gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`bias_gelu` in plain PyTorch."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate="tanh")
