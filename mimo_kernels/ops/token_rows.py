"""Masked-token gather and scatter over packed rows, each the other's backward, and tube masks.

gather:   y[i] = x[index[i]]                                  keep the visible tokens
scatter:  y[index[i]] = x[i],  y[r] = fill for all other r    put them back, with a learned query in the holes
"""

import torch
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

FILL_GRAD_ROWS = 64  # rows per block of the first pass of fill's gradient


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    x, index = x.contiguous(), index.contiguous()
    y = x.new_empty(index.shape[0], x.shape[1])
    row_bytes = x.shape[1] * x.element_size()
    kernels().gather_rows(
        y=y.data_ptr(),
        x=x.data_ptr(),
        index=index.data_ptr(),
        wide_index=index.dtype == torch.int64,
        kept=index.shape[0],
        rows=x.shape[0],
        row_bytes=row_bytes,
        **place(x),
    )
    return y


def _scatter_rows(x: Tensor, index: Tensor, num_rows: int, fill: Tensor | None) -> tuple[Tensor, Tensor]:
    x, index = x.contiguous(), index.contiguous()
    fill = None if fill is None else aligned(fill)
    y = x.new_empty(num_rows, x.shape[1])
    inverse = torch.empty(
        num_rows, dtype=torch.int32, device=x.device
    )  # row of x that fills a row of y, -1 in the holes
    row_bytes = x.shape[1] * x.element_size()
    kernels().scatter_rows(
        y=y.data_ptr(),
        inverse=inverse.data_ptr(),
        x=x.data_ptr(),
        index=index.data_ptr(),
        wide_index=index.dtype == torch.int64,
        fill=pointer(fill),
        kept=index.shape[0],
        rows=num_rows,
        row_bytes=row_bytes,
        **place(x),
    )
    return y, inverse


def _hole_sum(dy: Tensor, inverse: Tensor) -> Tensor:
    """sum of dy over the rows that nothing was scattered to, in a fixed order: [D]"""
    dy = aligned(dy)
    rows, dim = dy.shape
    total = dy.new_empty(dim)
    partial = torch.empty((rows + FILL_GRAD_ROWS - 1) // FILL_GRAD_ROWS, dim, dtype=torch.float32, device=dy.device)
    kernels().hole_sum(
        total=total.data_ptr(),
        partial=partial.data_ptr(),
        dy=dy.data_ptr(),
        inverse=inverse.data_ptr(),
        rows=rows,
        dim=dim,
        rows_per_block=FILL_GRAD_ROWS,
        dtype=DTYPES[dy.dtype],
        **place(dy),
    )
    return total


def _gather_gradients(ctx, dy):
    (index,) = ctx.saved_tensors
    return _scatter_operator(dy, index, ctx.num_rows, None)[0], None


def _save_gather(ctx, inputs, output):
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.num_rows = x.shape[0]


def _scatter_gradients(ctx, dy, _):
    index, inverse = ctx.saved_tensors
    dx = _gather_operator(dy, index) if ctx.needs_input_grad[0] else None
    dfill = _hole_sum_operator(dy, inverse) if ctx.needs_input_grad[3] else None
    return dx, None, None, dfill


def _save_scatter(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], output[1])


_gather_operator = register(
    "gather_rows(Tensor x, Tensor index) -> Tensor",
    _gather_rows,
    fake=lambda x, index: x.new_empty(index.shape[0], x.shape[1]),
    sample=lambda rows: (torch.randn(rows, 8), torch.arange(rows).flip(0)[: rows // 2]),
    gradients=_gather_gradients,
    save=_save_gather,
)
_scatter_operator = register(
    "scatter_rows(Tensor x, Tensor index, SymInt num_rows, Tensor? fill) -> (Tensor, Tensor)",
    _scatter_rows,
    fake=lambda x, index, num_rows, fill: (
        x.new_empty(num_rows, x.shape[1]),
        x.new_empty(num_rows, dtype=torch.int32),
    ),
    sample=lambda rows: (torch.randn(rows, 8), 2 * torch.arange(rows), 2 * rows, torch.randn(8)),
    gradients=_scatter_gradients,
    save=_save_scatter,
)
_hole_sum_operator = register(
    "hole_sum(Tensor dy, Tensor inverse) -> Tensor",
    _hole_sum,
    fake=lambda dy, inverse: dy.new_empty(dy.shape[1]),
    sample=lambda rows: (torch.randn(rows, 8), torch.arange(rows, dtype=torch.int32) - rows // 2),
)


def _refusals(device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
    reasons = device_refusals(device)
    if dtype not in DTYPES:
        reasons.append(f"x is {dtype}, expected {checks.FLOAT_NAMES}")
    return {"cuda": reasons, "reference": []}


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """Backend -> why it cannot serve bfloat16 rows on this device."""
    return _refusals(torch.device(device), torch.bfloat16)


def _check(op: str, x: Tensor, index: Tensor, num_rows: int) -> None:
    checks.expect_shape(op, "index", index, "kept")
    checks.expect_dtype(op, "index", index, torch.int32, torch.int64)
    checks.expect_device(op, x, index=index)
    checks.expect_indices(op, "index", index, num_rows)


def gather_tokens(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """y[i] = x[index[i]]: keep some rows, in the order of `index`.

    Args:
        x: [rows, D]. float32, float16 or bfloat16 for the cuda backend, any dtype for the reference.
        index: [kept], int32 or int64, no value twice (the backward writes each row once).
        backend: "auto", "cuda" or "reference".

    Returns [kept, D]. Differentiable in x: rows not kept get a zero gradient.
    Raises ValueError for wrong shapes, dtypes or devices, and for an index out of range where it lies on the CPU; on
    a GPU an index out of range stops the kernel with a message.
    """
    checks.expect_shape("gather_tokens", "x", x, "rows", "D")
    _check("gather_tokens", x, index, x.shape[0])
    chosen = backends.choose("gather_tokens", backend, _refusals(x.device, x.dtype))
    if chosen == "reference":
        return gather_tokens_ref(x, index)
    return _gather_operator(x, index)


def scatter_tokens(
    x: Tensor, index: Tensor, num_rows: int, fill: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """y[index[i]] = x[i]; every other row of y is `fill`, or zero: put kept tokens back, with a learned query in the
    holes.

    Args:
        x: [kept, D]. float32, float16 or bfloat16 for the cuda backend, any dtype for the reference.
        index: [kept], int32 or int64, no value twice.
        num_rows: rows of the result.
        fill: [D] or None; used in x's dtype.
        backend: "auto", "cuda" or "reference".

    Returns [num_rows, D]. Differentiable in x and fill; fill's gradient sums in a fixed order.
    Raises ValueError as `gather_tokens`, and when fill is not [D] or len(index) is not the rows of x.
    """
    checks.expect_shape("scatter_tokens", "x", x, "kept", "D")
    checks.expect_count("scatter_tokens", "num_rows", num_rows)
    _check("scatter_tokens", x, index, num_rows)
    checks.expect_shape("scatter_tokens", "index", index, x.shape[0])
    checks.expect_count("scatter_tokens", "num_rows", num_rows, low=x.shape[0])
    if fill is not None:
        checks.expect_shape("scatter_tokens", "fill", fill, x.shape[1])
        checks.expect_device("scatter_tokens", x, fill=fill)
        fill = fill.to(x.dtype)
    chosen = backends.choose("scatter_tokens", backend, _refusals(x.device, x.dtype))
    if chosen == "reference":
        return scatter_tokens_ref(x, index, num_rows, fill)
    return _scatter_operator(x, index, num_rows, fill)[0]


def sample_tube_mask(
    batch: int,
    num_tokens: int,
    num_kept: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Positions that a tube mask keeps: int64 [batch, num_kept], ascending, one pattern per clip for all its frames.

    Every subset of `num_kept` of the `num_tokens` positions is equally likely (VideoMAE, arXiv 2203.12602, Sec. 3.3).
    Runs on `device` without waiting for it; the generator must belong to that device.
    Raises ValueError unless 0 <= batch and 0 <= num_kept <= num_tokens.
    """
    checks.expect_count("sample_tube_mask", "batch", batch)
    checks.expect_count("sample_tube_mask", "num_tokens", num_tokens)
    checks.expect_count("sample_tube_mask", "num_kept", num_kept, high=num_tokens)
    noise = torch.rand(batch, num_tokens, generator=generator, device=device)
    return noise.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def gather_tokens_ref(x: Tensor, index: Tensor) -> Tensor:
    """`gather_tokens` in plain PyTorch."""
    return x.index_select(0, index)


def scatter_tokens_ref(x: Tensor, index: Tensor, num_rows: int, fill: Tensor | None = None) -> Tensor:
    """`scatter_tokens` in plain PyTorch."""
    # repeat, not expand: torch.compile on a CPU (2.13) writes into the expanded bfloat16 vector as if it had rows.
    holes = x.new_zeros(num_rows, x.shape[1]) if fill is None else fill.repeat(num_rows, 1)
    return holes.index_copy(0, index.long(), x)
