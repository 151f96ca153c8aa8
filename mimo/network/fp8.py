"""Float8 products for the large matrices of the network: an option of training, off by default.

A projection y = x W^T + b has three products in a training step. Their operands are rounded to 8 bits, sums are fp32:

    y      =  x   W^T     e4m3 x e4m3     the autocast dtype, without autocast that of x
    dL/dx  =  dy  W       e5m2 x e4m3     the dtype of x
    dL/dW  =  dy^T x      e5m2 x e4m3     the dtype of W: fp32, which is finer than under bf16 autocast

e4m3 has the mantissa that values need, e5m2 the range that gradients need (Micikevicius et al. 2022, FP8 Formats for
Deep Learning). An operand A is scaled as a whole, by what it holds now (dynamic scaling, no history of earlier steps):

    s = largest float8 / max |A|,    A8 = round(s A),    A B ~ A8 B8 / (s_A s_B)

Weights, their names, gradients and optimiser state stay as they are, so checkpoints do not know of it. Rounding is a
few passes over an operand, which torch.compile fuses with what made it. `python benchmarks/fp8_check.py` is the check
that says whether a network may use it on a machine, and on a GPU what it saves.

It lies with the network, whose blocks are made of `Projection`; training only switches it on.

Letters: R rows, K inputs, N outputs of a projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of the sizes that torch's scaled product takes on a GPU: K, N, and the R rows that dL/dW sums over
_SMALLEST = 1e-30  # a peak below it would overflow the scale; all zeros stay zeros


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, any shape -> x8 of `dtype`, contiguous, and fp32 [] with x ~ x8 * scale. What is not finite comes out as
    NaN."""
    largest = torch.finfo(dtype).max
    scale = torch.linalg.vector_norm(x, torch.inf).float().clamp(min=_SMALLEST) / largest
    x8 = (x.float() / scale).clamp(-largest, largest).to(dtype)  # unclamped, the peak may round up to NaN
    return x8.contiguous(), scale


class _Product(torch.autograd.Function):
    """x [R, K], weight [N, K] -> x W^T, [R, N] of `dtype`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x8, x_scale = to_float8(x, VALUES)
        w8, w_scale = to_float8(weight, VALUES)
        # The weight itself and not w8: it is there anyway, and a sharded one is gathered again when it is needed.
        ctx.save_for_backward(x8, x_scale, weight)
        ctx.x_dtype = x.dtype
        return _multiply(x8, w8, x_scale, w_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, x_scale, weight = ctx.saved_tensors
        dy8, dy_scale = to_float8(dy, GRADIENTS)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            w8, w_scale = to_float8(weight, VALUES)
            dx = _multiply(dy8, _transposed(w8), dy_scale, w_scale, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dw = _multiply(_transposed(dy8), _transposed(x8), dy_scale, x_scale, weight.dtype)
        return dx, dw, None


def _multiply(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """a [M, K] times the transpose of b [N, K], both contiguous, -> [M, N]. fast: a GPU may add up in fewer bits."""
    with torch.autocast(a.device.type, enabled=False):  # it would round what a CPU's product is composed of once more
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


def _transposed(x8: Tensor) -> Tensor:
    """[R, K] -> contiguous [K, R'], R rounded up to a multiple of 16 with zeros, which add nothing to a sum over R."""
    columns, missing = x8.view(torch.uint8).t(), -len(x8) % MULTIPLE  # zero has the same byte in every format
    return (F.pad(columns, (0, missing)) if missing else columns).contiguous().view(x8.dtype)


class Projection(nn.Linear):
    """y W^T + b over rows; `product` is the part before the bias. With `float8` set the products are float8's."""

    float8 = False

    def product(self, y: Tensor) -> Tensor:
        """y [..., in_features] -> [..., out_features]."""
        if not self.float8:
            return F.linear(y, self.weight)
        kind = y.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else y.dtype
        return _Product.apply(y.reshape(-1, self.in_features), self.weight, dtype).view(*y.shape[:-1], -1)

    def forward(self, y: Tensor) -> Tensor:
        if not self.float8:
            return super().forward(y)
        out = self.product(y)
        return out + self.bias.to(out.dtype)


def use_float8(model: nn.Module, device: torch.device | None = None) -> None:
    """Float8 products for every projection of a model: qkv, proj, up and down of all blocks, those of the decoder
    included. Embeddings, modulation, conditioning and heads are no projections and stay as they are.

    device: where the model will run; None is where it lies.

    Raises ValueError where the device has no float8 product, or a projection's sizes are not multiples of 16. The
    number of rows is free.
    """
    projections = {name: module for name, module in model.named_modules() if isinstance(module, Projection)}
    for name, module in projections.items():
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            raise ValueError(
                f"precision='fp8': {name} has {module.in_features} inputs and {module.out_features} outputs: expected "
                f"multiples of {MULTIPLE}"
            )
    require_float8(device or next(model.parameters()).device)
    for module in projections.values():
        module.float8 = True


def require_float8(device: torch.device) -> None:
    """Raises ValueError with the reason unless `device` multiplies float8 matrices in both combinations of formats."""
    one = torch.ones((), device=device)
    square = torch.ones(MULTIPLE, MULTIPLE, device=device)
    try:
        for left in (VALUES, GRADIENTS):
            _multiply(square.to(left), square.to(VALUES), one, one, torch.bfloat16)
    except (RuntimeError, ValueError, TypeError) as error:  # how torch refuses differs between releases and devices
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"precision='fp8': torch {torch.__version__} has no float8 matrix product on {name}, expected "
            f"a GPU of compute capability 8.9 or more: {why}"
        ) from None
