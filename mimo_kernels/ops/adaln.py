"""AdaLN and separate LayerNorm in one pass over packed rows, with or without the gated residual in front.

y = LN(x) * (1 + scale[g]) + shift[g]      rows of a noisy frame, g its row of the modulation
y = LN(x) * weight + bias                  rows of clean history, g = -1
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels.core import backends, checks
from mimo_kernels.core.launch import (
    DTYPES,
    aligned,
    aligned_rows,
    device_refusals,
    kernels,
    list_of,
    place,
    pointer,
    rows_of,
)
from mimo_kernels.core.register import register
from mimo_kernels.ops.frame_rows import FrameRows

MAX_DIM = 8192


def _is_float(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.dtype == torch.float32 for t in tensors)


def _forward(x, branch, gate, scale, shift, weight, bias, row, eps):
    x, scale, shift = aligned(x), aligned_rows(scale), aligned_rows(shift)
    branch = None if branch is None else aligned(branch)
    gate = None if gate is None else aligned_rows(gate)
    weight, bias = (None if p is None else aligned(p) for p in (weight, bias))
    x_new = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    kernels().modulate_forward(
        x_new=pointer(x_new),
        y=y.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        x=x.data_ptr(),
        branch=pointer(branch),
        scale=rows_of(scale),
        shift=rows_of(shift),
        gate=rows_of(gate),
        modulation_float=scale.dtype == torch.float32,
        weight=pointer(weight),
        bias=pointer(bias),
        affine_float=_is_float(weight, bias),
        row=row.data_ptr(),
        rows=x.shape[0],
        dim=x.shape[1],
        eps=eps,
        dtype=DTYPES[x.dtype],
        **place(x),
    )
    return x_new, y, mean, rstd


def _modulate(x, scale, shift, weight, bias, row, chunks, first, eps):
    return _forward(x, None, None, scale, shift, weight, bias, row, eps)[1:]


def _gated(x, branch, gate, scale, shift, weight, bias, row, chunks, first, eps):
    return _forward(x, branch, gate, scale, shift, weight, bias, row, eps)


def _backward(dy, dx_new, x, mean, rstd, branch, gate, scale, weight, bias, chunks, first):
    dy, x, scale = aligned(dy), aligned(x), aligned_rows(scale)
    dx_new = None if dx_new is None else aligned(dx_new)
    branch = None if branch is None else aligned(branch)
    gate = None if gate is None else aligned_rows(gate)
    weight = None if weight is None else aligned(weight)
    dx, dbranch, dgate, dscale, dshift, dweight, dbias = _backward_results(x, branch, gate, scale, weight, bias)
    sums = 2 if branch is None else 3
    partial = torch.empty(chunks.shape[0], sums, x.shape[1], dtype=torch.float32, device=x.device)
    kernels().modulate_backward(
        dx=dx.data_ptr(),
        dbranch=0 if branch is None else dbranch.data_ptr(),
        dscale=dscale.data_ptr(),
        dshift=dshift.data_ptr(),
        dgate=0 if branch is None else dgate.data_ptr(),
        dweight=0 if weight is None else dweight.data_ptr(),
        dbias=0 if bias is None else dbias.data_ptr(),
        partial=partial.data_ptr(),
        dy=dy.data_ptr(),
        dx_new=pointer(dx_new),
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        branch=pointer(branch),
        scale=rows_of(scale),
        gate=rows_of(gate),
        modulation_float=scale.dtype == torch.float32,
        gated=branch is not None,
        weight=pointer(weight),
        affine_float=_is_float(weight, bias),
        chunks=list_of(chunks),
        first=list_of(first),
        modulation_rows=scale.shape[0],
        dim=x.shape[1],
        dtype=DTYPES[x.dtype],
        **place(x),
    )
    return dx, dbranch, dgate, dscale, dshift, dweight, dbias


def _backward_results(x, branch, gate, scale, weight, bias):
    """What the backward writes; empty for an input that is not there."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbranch, dgate, dweight, dbias = (
        x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (branch, gate, weight, bias)
    )
    return dx, dbranch, dgate, scale.new_empty(scale.shape), scale.new_empty(scale.shape), dweight, dbias


def _save_for_backward(ctx, x, mean, rstd, branch, gate, scale, weight, bias, chunks, first):
    ctx.save_for_backward(x, mean, rstd, branch, gate, scale, weight, bias, chunks, first)
    ctx.set_materialize_grads(False)


def _save_modulate(ctx, inputs, output):
    x, scale, _, weight, bias, _, chunks, first, _ = inputs
    _save_for_backward(ctx, x, output[1], output[2], None, None, scale, weight, bias, chunks, first)


def _save_gated(ctx, inputs, output):
    _, branch, gate, scale, _, weight, bias, _, chunks, first, _ = inputs
    x_new, _, mean, rstd = output
    _save_for_backward(ctx, x_new, mean, rstd, branch, gate, scale, weight, bias, chunks, first)


def _gradients(ctx, dx_new, dy):
    x, mean, rstd, branch, gate, scale, weight, bias, chunks, first = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    return _backward_operator(dy, dx_new, x, mean, rstd, branch, gate, scale, weight, bias, chunks, first)


def _modulate_gradients(ctx, dy, dmean, drstd):
    dx, _, _, dscale, dshift, dweight, dbias = _gradients(ctx, None, dy)
    return dx, dscale, dshift, *_parameters(ctx, 3, dweight, dbias), None, None, None, None


def _gated_gradients(ctx, dx_new, dy, dmean, drstd):
    dx, dbranch, dgate, dscale, dshift, dweight, dbias = _gradients(ctx, dx_new, dy)
    return dx, dbranch, dgate, dscale, dshift, *_parameters(ctx, 5, dweight, dbias), None, None, None, None


def _parameters(ctx, at, *gradients):
    return (g if ctx.needs_input_grad[at + i] else None for i, g in enumerate(gradients))


_ROWS = "Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, Tensor row, Tensor chunks, Tensor first, float eps"
_BRANCH = "Tensor? branch, Tensor? gate, Tensor scale, Tensor? weight, Tensor? bias, Tensor chunks, Tensor first"


def _fake_modulate(x, scale, shift, weight, bias, row, chunks, first, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))


def _fake_gated(x, branch, gate, scale, shift, weight, bias, row, chunks, first, eps):
    x_new, y = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return x_new, y, *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))


def _fake_backward(dy, dx_new, x, mean, rstd, branch, gate, scale, weight, bias, chunks, first):
    return _backward_results(x, branch, gate, scale, weight, bias)


def _sample(rows: int) -> tuple:
    """Three frames: history, one of the first group, one of the second."""
    frames = FrameRows([rows, rows, rows], [-1, 0, 1])
    x, branch, scale, shift, gate = (torch.randn(n, 16) for n in (3 * rows, 3 * rows, 2, 2, 2))
    return (
        x,
        branch,
        gate,
        scale,
        shift,
        torch.randn(16),
        torch.randn(16),
        frames.row_on("cpu"),
        *frames.chunks_on("cpu"),
    )


def _sample_modulate(rows: int) -> tuple:
    x, _, _, *others = _sample(rows)
    return x, *others, 1e-6


def _sample_backward(rows: int) -> tuple:
    x, branch, gate, scale, _, weight, bias, _, chunks, first = _sample(rows)
    mean, rstd = x.mean(1), 1 / (0.1 + x.square().mean(1))
    return x.cos(), x.sin(), x, mean, rstd, branch, gate, scale, weight, bias, chunks, first


_operator = register(
    f"modulate(Tensor x, {_ROWS}) -> (Tensor y, Tensor mean, Tensor rstd)",
    _modulate,
    fake=_fake_modulate,
    sample=_sample_modulate,
    gradients=_modulate_gradients,
    save=_save_modulate,
)
_gated_operator = register(
    f"gated_residual_modulate(Tensor x, Tensor branch, Tensor gate, {_ROWS})"
    " -> (Tensor x_new, Tensor y, Tensor mean, Tensor rstd)",
    _gated,
    fake=_fake_gated,
    sample=lambda rows: (*_sample(rows), 1e-6),
    gradients=_gated_gradients,
    save=_save_gated,
)
_backward_operator = register(
    f"modulate_backward(Tensor dy, Tensor? dx_new, Tensor x, Tensor mean, Tensor rstd, {_BRANCH}) -> "
    "(Tensor dx, Tensor dbranch, Tensor dgate, Tensor dscale, Tensor dshift, Tensor dweight, Tensor dbias)",
    _backward,
    fake=_fake_backward,
    sample=_sample_backward,
)


def _refusals(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, list[str]]:
    reasons = device_refusals(device)
    if dtype not in DTYPES:
        reasons.append(f"x is {dtype}, expected {checks.FLOAT_NAMES}")
    if dim % 8 or not 8 <= dim <= MAX_DIM:
        reasons.append(f"D is {dim}, expected a multiple of 8 up to {MAX_DIM}")
    return {"cuda": reasons, "reference": []}


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """Backend -> why it cannot serve bfloat16 rows of 1152 channels on this device."""
    return _refusals(torch.device(device), torch.bfloat16, 1152)


def _check(
    op: str, x: Tensor, rows: FrameRows, branch: Tensor | None, modulation: dict, affine: dict, eps: float
) -> None:
    checks.expect_shape(op, "x", x, "rows", "D")
    checks.expect_floating(op, "x", x)
    if not isinstance(rows, FrameRows):
        checks.refuse(op, "rows", f"is a {type(rows).__name__}", "FrameRows(lens, groups)")
    if x.shape[0] != rows.num_rows:
        checks.refuse(op, "x", f"has shape {list(x.shape)}", f"[{rows.num_rows}, D], the rows of FrameRows")
    if branch is not None:
        checks.expect_shape(op, "branch", branch, *x.shape)
        checks.expect_dtype(op, "branch", branch, x.dtype, why="as x")
    checks.expect_shape(op, "scale", modulation["scale"], "groups", x.shape[1])
    groups = modulation["scale"].shape[0]
    if groups < rows.num_groups:
        checks.refuse(op, "scale", f"has {groups} rows", f"at least the {rows.num_groups} that FrameRows uses")
    checks.expect_shapes(op, (groups, x.shape[1]), **modulation)
    checks.expect_shapes(op, (x.shape[1],), **affine)
    for together in (modulation, affine):
        first = None
        for name, tensor in together.items():
            if tensor is None:
                continue
            checks.expect_dtype(op, name, tensor, x.dtype, torch.float32, why="as x, or single")
            if first is None:
                first = name
            else:
                checks.expect_dtype(op, name, tensor, together[first].dtype, why=f"as {first}")
    checks.expect_number(op, "eps", eps)
    checks.expect_device(op, x, branch=branch, **modulation, **affine)


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: FrameRows,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """y = LN(x) * (1 + scale[g]) + shift[g] for a row of group g, y = LN(x) * weight + bias for a row of group -1.

    LN subtracts the mean of the row's D channels and divides by sqrt(variance + eps); statistics are in float32.

    Args:
        x: [rows, D] packed tokens, float32, float16 or bfloat16; the cuda backend wants D a multiple of 8 up to 8192.
        scale, shift: [groups, D], both of x's dtype or both float32. Slices of a wider projection are read in place.
        rows: the group of every row.
        weight, bias: [D], of x's dtype or both float32; None means 1 and 0.
        backend: "auto", "cuda" or "reference".

    Returns y [rows, D] in x's dtype. Differentiable in all five tensors; sums over rows have a fixed order, so
    gradients are the same bits in every run. Raises ValueError for shapes, dtypes or devices that do not fit.

    Source: adaptive LayerNorm of DiT (Peebles and Xie, arXiv 2212.09748, Sec. 3.2), and MiMo's separate LayerNorm for
    history.
    """
    _check("modulate", x, rows, None, {"scale": scale, "shift": shift}, {"weight": weight, "bias": bias}, eps)
    if backends.choose("modulate", backend, _refusals(x.device, x.dtype, x.shape[1])) == "reference":
        return modulate_ref(x, scale, shift, rows, weight=weight, bias=bias, eps=eps)
    row, (chunks, first) = rows.row_on(x.device), rows.chunks_on(x.device)
    return _operator(x, scale, shift, weight, bias, row, chunks, first, eps)[0]


def gated_residual_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: FrameRows,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate[g] * branch (gate 1 for a row of group -1), and y = modulate(x_new), in one pass.

    Args:
        x, branch: [rows, D] of one dtype.
        gate: [groups, D], with the dtype of scale and shift.
        The others as in `modulate`. LN sees x_new as it is stored, rounded to x's dtype.

    Returns (x_new, y), both [rows, D] in x's dtype. Differentiable in all seven tensors. Raises ValueError as
    `modulate`.
    """
    modulation = {"scale": scale, "shift": shift, "gate": gate}
    _check("gated_residual_modulate", x, rows, branch, modulation, {"weight": weight, "bias": bias}, eps)
    if backends.choose("gated_residual_modulate", backend, _refusals(x.device, x.dtype, x.shape[1])) == "reference":
        return gated_residual_modulate_ref(x, branch, gate, scale, shift, rows, weight=weight, bias=bias, eps=eps)
    row, (chunks, first) = rows.row_on(x.device), rows.chunks_on(x.device)
    return _gated_operator(x, branch, gate, scale, shift, weight, bias, row, chunks, first, eps)[:2]


def _per_row(
    row: Tensor, has_history: bool, history: Tensor | None, neutral: float, modulation: Tensor, dtype: torch.dtype
) -> Tensor:
    """The row of `modulation` that every packed row uses, [rows, D]; for group -1 `history`, [D], or the neutral
    number where there is none."""
    # A history that wants a gradient gets one, be it zeros, as from the kernel.
    if not has_history and not (history is not None and history.requires_grad and torch.is_grad_enabled()):
        return modulation.to(dtype).index_select(0, row)
    if history is None:
        history = modulation.new_full(modulation.shape[1:], neutral)
    table = torch.cat([history.to(modulation.dtype)[None], modulation])
    return table.to(dtype).index_select(0, row + 1)


def modulate_ref(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: FrameRows,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`modulate` in plain PyTorch."""
    used = rows.row_on(x.device), rows.has_history
    factor = _per_row(*used, weight, 1.0, 1 + scale, x.dtype)
    offset = _per_row(*used, bias, 0.0, shift, x.dtype)
    return torch.addcmul(offset, F.layer_norm(x, x.shape[1:], eps=eps), factor).to(x.dtype)  # autocast makes LN float32


def gated_residual_modulate_ref(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: FrameRows,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`gated_residual_modulate` in plain PyTorch."""
    x_new = torch.addcmul(x, _per_row(rows.row_on(x.device), rows.has_history, None, 1.0, gate, x.dtype), branch)
    return x_new, modulate_ref(x_new, scale, shift, rows, weight=weight, bias=bias, eps=eps)
