"""Weighted squared error in one pass: the diffusion loss (a weight per frame) and the mask loss (a weight per
token)."""

import torch
from torch import Tensor

from mimo_kernels.core import backends, checks
from mimo_kernels.core.launch import (
    DTYPES,
    device_refusals,
    kernels,
    place,
)
from mimo_kernels.core.register import register

BLOCKS = 512  # a constant, so that the order of addition is one


def _squared_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    prediction, target, weight = prediction.contiguous(), target.contiguous(), weight.contiguous()
    loss, partial = prediction.new_empty((), dtype=torch.float32), prediction.new_empty(BLOCKS, dtype=torch.float32)
    kernels().squared_error_forward(
        loss=loss.data_ptr(),
        partial=partial.data_ptr(),
        blocks=BLOCKS,
        prediction=prediction.data_ptr(),
        target=target.data_ptr(),
        weight=weight.data_ptr(),
        count=prediction.numel(),
        group=max(prediction.numel() // max(weight.numel(), 1), 1),
        dtype=DTYPES[prediction.dtype],
        **place(prediction),
    )
    return loss


def _squared_error_backward(dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    prediction, target, weight = prediction.contiguous(), target.contiguous(), weight.contiguous()
    dprediction = torch.empty_like(prediction)
    kernels().squared_error_backward(
        dprediction=dprediction.data_ptr(),
        dloss=dloss.data_ptr(),
        prediction=prediction.data_ptr(),
        target=target.data_ptr(),
        weight=weight.data_ptr(),
        count=prediction.numel(),
        group=max(prediction.numel() // max(weight.numel(), 1), 1),
        dtype=DTYPES[prediction.dtype],
        **place(prediction),
    )
    return dprediction


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dloss):
    return _backward_operator(dloss, *ctx.saved_tensors), None, None


_operator = register(
    "squared_error(Tensor prediction, Tensor target, Tensor weight) -> Tensor",
    _squared_error,
    fake=lambda prediction, target, weight: prediction.new_empty((), dtype=torch.float32),
    sample=lambda rows: (torch.randn(rows, 8), torch.randn(rows, 8), torch.rand(rows)),
    gradients=_gradients,
    save=_save,
)
_backward_operator = register(
    "squared_error_backward(Tensor dloss, Tensor prediction, Tensor target, Tensor weight) -> Tensor",
    _squared_error_backward,
    sample=lambda rows: (torch.tensor(0.5), torch.randn(rows, 8), torch.randn(rows, 8), torch.rand(rows)),
    fake=lambda dloss, prediction, target, weight: torch.empty_like(prediction, memory_format=torch.contiguous_format),
)


def _refusals(device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
    reasons = device_refusals(device)
    if dtype not in DTYPES:
        reasons.append(f"prediction is {dtype}, expected {checks.FLOAT_NAMES}")
    return {"cuda": reasons, "reference": []}


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """Backend -> why it cannot serve bfloat16 predictions on this device."""
    return _refusals(torch.device(device), torch.bfloat16)


def _weight_dtypes(prediction: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float64) if prediction.dtype == torch.float64 else (torch.float32,)


def weighted_squared_error(prediction: Tensor, target: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """loss = sum over i of weight[i] * |prediction[i] - target[i]|^2, with the squares of all that lies behind the
    weight's dimensions.

        diffusion loss   prediction [B, T, N, C]   weight [B, T]      w(tau) / (B T N C)
        mask loss        prediction [B, T, N, C]   weight [B, T, N]   dropped / (number of dropped values)

    Args:
        prediction: float32, float16 or bfloat16; the reference takes float64 too.
        target: of the same shape and dtype; not differentiable.
        weight: float32 (float64 beside float64), its shape the leading dimensions of the prediction; not
            differentiable.
        backend: "auto", "cuda" or "reference".

    Returns a float32 scalar, summed in float32 (float64 both for float64) and in a fixed order. Differentiable in the
    prediction.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for a target or weight that requires a
    gradient.
    """
    op = "weighted_squared_error"
    checks.expect_tensor(op, "prediction", prediction)
    checks.expect_floating(op, "prediction", prediction)
    checks.expect_shape(op, "target", target, *prediction.shape)
    checks.expect_dtype(op, "target", target, prediction.dtype, why="as the prediction")
    checks.expect_tensor(op, "weight", weight)
    if weight.shape != prediction.shape[: weight.ndim]:
        checks.refuse(op, "weight", f"has shape {list(weight.shape)}", f"first dimensions of {list(prediction.shape)}")
    checks.expect_dtype(op, "weight", weight, *_weight_dtypes(prediction))
    checks.expect_device(op, prediction, target=target, weight=weight)
    checks.expect_constant(op, "target", target)
    checks.expect_constant(op, "weight", weight)
    chosen = backends.choose("weighted_squared_error", backend, _refusals(prediction.device, prediction.dtype))
    if chosen == "reference":
        return weighted_squared_error_ref(prediction, target, weight)
    return _operator(prediction, target, weight)


def weighted_squared_error_ref(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`weighted_squared_error` in plain PyTorch."""
    precise = torch.promote_types(prediction.dtype, torch.float32)
    squares = (prediction.to(precise) - target.to(precise)).square()
    return (squares * weight.reshape(weight.shape + (1,) * (prediction.ndim - weight.ndim))).sum()
