"""QK-norm and axial 3D RoPE, from the packed qkv projection to the queries and keys of attention in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels.core import backends, checks, torch_private
from mimo_kernels.core.device_copies import DeviceCopies
from mimo_kernels.core.launch import (
    DTYPES,
    aligned,
    device_refusals,
    kernels,
    place,
    pointer,
)
from mimo_kernels.core.register import refuse_torch_func, register

MAX_HEAD_DIM = 256
MAX_POSITIONS = 1 << 20  # 300 MB of table for heads of 72
# Blocks of the backward, each with its own sum of the weights' gradients: a constant fixes the order of addition.
GRAD_BLOCKS = 528


class _Table(NamedTuple):
    """Cosine and sine of every position and channel pair: [positions, head_dim / 2, 2], and per axis [positions,
    channels]."""

    whole: Tensor
    axes: list[Tensor]


class AxialRoPE:
    """Rotary embedding of integer (t, y, x) positions, a share of the channels for each axis.

    Channels (2i, 2i + 1) of an axis with c channels turn by position * theta ** (-2i / c).

    Args:
        head_dim: channels of a head, even.
        theta: base of the frequencies.
        split: channels for t, y and x, each even; their sum is head_dim. Default: a third each, rounded down to
            even. Of the channel pairs that are left, one goes to t, two go to y and x, so that space is even:
            72 -> 24, 24, 24, 128 -> 44, 42, 42 (as in Wan and DFoT), 64 -> 20, 22, 22.

    Raises ValueError for an odd head_dim or a split that does not fit.
    Source: Su et al., arXiv 2104.09864, Sec. 3.2, applied to each axis.
    """

    def __init__(self, head_dim: int, *, theta: float = 100.0, split: Sequence[int] | None = None):
        checks.expect_count("AxialRoPE", "head_dim", head_dim, low=2)
        if head_dim % 2:
            checks.refuse("AxialRoPE", "head_dim", f"is {head_dim}", "an even number")
        if split is None:
            pairs = head_dim // 2
            space = (pairs + 1) // 3
            split = (2 * (pairs - 2 * space), 2 * space, 2 * space)
        split = tuple(split)
        for channels in split:
            checks.expect_count("AxialRoPE", "a number of split", channels)
        if len(split) != 3 or sum(split) != head_dim or any(channels % 2 for channels in split):
            checks.refuse("AxialRoPE", "split", f"is {split}", f"three even numbers with the sum {head_dim}")
        checks.expect_number("AxialRoPE", "theta", theta, above=0)
        self.head_dim, self.theta, self.split = head_dim, theta, split
        self._positions = 0
        self._copies: DeviceCopies | None = None
        self._table("cpu")

    def frequencies(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
        """Radians per position of every channel pair: [head_dim / 2]"""
        steps = [torch.arange(0, c, 2, dtype=torch.float64, device=device) / c for c in self.split if c]
        return (self.theta ** -torch.cat(steps)).to(dtype)

    def axes(self, device: torch.device | str = "cpu") -> Tensor:
        """The axis that turns every channel pair, 0, 1 or 2: int64 [head_dim / 2]"""
        pairs = [torch.full((c // 2,), axis, dtype=torch.int64, device=device) for axis, c in enumerate(self.split)]
        return torch.cat(pairs)

    def tables_on(self, device: torch.device | str, max_position: int = 1023) -> tuple[Tensor, Tensor]:
        """(cos, sin) of every position and channel pair: float32 [positions, head_dim / 2], at least up to
        `max_position`.

        Made on the host, kept per device; a larger position makes a table of twice the size, once. Call it where
        positions from 1024 on are about to come in on a GPU: the kernel cannot make its table longer, and stops with a
        message. There are at most 1,048,576 positions.
        """
        checks.expect_count("tables_on", "max_position", max_position, high=MAX_POSITIONS - 1)
        table = self._table(torch.device(device), max_position).whole
        return table[..., 0], table[..., 1]

    def _table(self, device: torch.device | str, max_position: int = 1023) -> _Table:
        if self._copies is None or max_position >= self._positions:
            self._positions = 1 << max(10, max_position.bit_length())
            self._copies = self._make_tables(self._positions)
        whole, *axes = self._copies.on(device)
        return _Table(whole, axes)

    def _make_tables(self, positions: int) -> DeviceCopies:
        # Outside of inference mode: a table made in it could not serve training later.
        with torch.inference_mode(False), torch_private.without_dispatch_modes():
            angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * self.frequencies()
            whole = torch.stack([angle.cos(), angle.sin()], dim=-1).float()
            parts = whole.split([channels // 2 for channels in self.split], dim=1)
            axes = (part.flatten(1).contiguous() for part in parts)
            return DeviceCopies(f"AxialRoPE: the tables up to position {positions - 1} (see tables_on)", whole, *axes)


def _forward(qkv, q_weight, k_weight, coords, table, split, eps, k_cache, v_cache, cache_rows, with_v):
    qkv, q_weight, k_weight = aligned(qkv), aligned(q_weight), aligned(k_weight)
    rows, _, heads, dim = qkv.shape
    q, k = (qkv.new_empty(rows, heads, dim) for _ in range(2))
    v = qkv.new_empty((rows, heads, dim) if with_v else 0)
    coords = None if coords is None else coords.contiguous()
    kernels().qk_norm_rope_forward(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr() if with_v else 0,
        k_cache=pointer(k_cache),
        v_cache=pointer(v_cache),
        cache_rows=pointer(cache_rows),
        slots=0 if k_cache is None else k_cache.shape[0],
        qkv=qkv.data_ptr(),
        q_weight=q_weight.data_ptr(),
        k_weight=k_weight.data_ptr(),
        weight_float=q_weight.dtype == torch.float32,
        coords=pointer(coords),
        table=pointer(table),
        positions=0 if table is None else table.shape[0],
        t_end=split[0] // 2,
        y_end=(split[0] + split[1]) // 2,
        rows=rows,
        heads=heads,
        head_dim=dim,
        eps=eps,
        dtype=DTYPES[qkv.dtype],
        **place(qkv),
    )
    return q, k, v


def _qk_norm_rope(qkv, q_weight, k_weight, coords, table, split, eps, with_v):
    return _forward(qkv, q_weight, k_weight, coords, table, split, eps, None, None, None, with_v)


def _qk_norm_rope_cache(qkv, q_weight, k_weight, coords, table, split, eps, k_cache, v_cache, cache_rows):
    return _forward(qkv, q_weight, k_weight, coords, table, split, eps, k_cache, v_cache, cache_rows, False)[:2]


def _backward(dq, dk, dv, qkv, q_weight, k_weight, coords, table, split, eps):
    dq, dk, qkv, q_weight, k_weight = map(aligned, (dq, dk, qkv, q_weight, k_weight))
    dv = None if dv is None else aligned(dv)
    rows, _, heads, dim = qkv.shape
    dqkv, dq_weight, dk_weight = torch.empty_like(qkv), torch.empty_like(q_weight), torch.empty_like(k_weight)
    partial = torch.empty(GRAD_BLOCKS, 2, dim, dtype=torch.float32, device=qkv.device)
    coords = None if coords is None else coords.contiguous()
    kernels().qk_norm_rope_backward(
        dqkv=dqkv.data_ptr(),
        dq_weight=dq_weight.data_ptr(),
        dk_weight=dk_weight.data_ptr(),
        partial=partial.data_ptr(),
        blocks=GRAD_BLOCKS,
        dq=dq.data_ptr(),
        dk=dk.data_ptr(),
        dv=pointer(dv),
        qkv=qkv.data_ptr(),
        q_weight=q_weight.data_ptr(),
        k_weight=k_weight.data_ptr(),
        weight_float=q_weight.dtype == torch.float32,
        coords=pointer(coords),
        table=pointer(table),
        positions=0 if table is None else table.shape[0],
        t_end=split[0] // 2,
        y_end=(split[0] + split[1]) // 2,
        rows=rows,
        heads=heads,
        head_dim=dim,
        eps=eps,
        dtype=DTYPES[qkv.dtype],
        **place(qkv),
    )
    return dqkv, dq_weight, dk_weight


def _save(ctx, inputs, output):
    qkv, q_weight, k_weight, coords, table, ctx.split, ctx.eps, ctx.with_v = inputs
    ctx.save_for_backward(qkv, q_weight, k_weight, coords, table)


def _gradients(ctx, dq, dk, dv):
    dv = dv if ctx.with_v else None
    gradients = _backward_operator(dq, dk, dv, *ctx.saved_tensors, ctx.split, ctx.eps)
    return *gradients, None, None, None, None, None


_INPUTS = "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor? coords, Tensor? table, int[] split, float eps"


def _fake(qkv, q_weight, k_weight, coords, table, split, eps, with_v):
    shape = (qkv.shape[0], qkv.shape[2], qkv.shape[3])
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape if with_v else 0)


def _fake_cache(qkv, q_weight, k_weight, coords, table, split, eps, k_cache, v_cache, cache_rows):
    return tuple(qkv.new_empty(qkv.shape[0], qkv.shape[2], qkv.shape[3]) for _ in range(2))


def _fake_backward(dq, dk, dv, qkv, q_weight, k_weight, coords, table, split, eps):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (qkv, q_weight, k_weight))


def _sample(rows: int) -> tuple:
    rope, coords = AxialRoPE(16), torch.arange(3 * rows, dtype=torch.int32).view(rows, 3)
    return (
        torch.randn(rows, 3, 2, 16),
        torch.ones(16),
        torch.ones(16),
        coords,
        rope._table("cpu").whole,
        rope.split,
        1e-6,
    )


_operator = register(
    f"qk_norm_rope({_INPUTS}, bool with_v) -> (Tensor q, Tensor k, Tensor v)",
    _qk_norm_rope,
    fake=_fake,
    sample=lambda rows: (*_sample(rows), True),
    gradients=_gradients,
    save=_save,
)
_cache_operator = register(
    f"qk_norm_rope_cache({_INPUTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_rows) -> (Tensor q, Tensor k)",
    _qk_norm_rope_cache,
    fake=_fake_cache,
    sample=lambda rows: (*_sample(rows), *torch.zeros(2, rows, 2, 16).unbind(), torch.arange(rows)),
)
_backward_operator = register(
    f"qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor? dv, {_INPUTS})"
    " -> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight)",
    _backward,
    fake=_fake_backward,
    sample=lambda rows: (*torch.randn(3, rows, 2, 16).unbind(), *_sample(rows)),
)


def _refusals(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, list[str]]:
    reasons = device_refusals(device)
    if dtype not in DTYPES:
        reasons.append(f"qkv is {dtype}, expected {checks.FLOAT_NAMES}")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        reasons.append(f"head_dim is {head_dim}, expected a multiple of 8 up to {MAX_HEAD_DIM}")
    return {"cuda": reasons, "reference": []}


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """Backend -> why it cannot serve a bfloat16 projection with heads of 72 on this device."""
    return _refusals(torch.device(device), torch.bfloat16, 72)


def _check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, coords: Tensor | None, rope: AxialRoPE | None, eps: float
) -> None:
    op = "qk_norm_rope"
    checks.expect_shape(op, "qkv", qkv, "rows", 3, "heads", "head_dim")
    checks.expect_floating(op, "qkv", qkv)
    dim = qkv.shape[3]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.expect_shape(op, name, weight, dim)
        checks.expect_dtype(op, name, weight, qkv.dtype, torch.float32, why="as qkv, or single")
    checks.expect_dtype(op, "k_weight", k_weight, q_weight.dtype, why="as q_weight")
    checks.expect_number(op, "eps", eps)
    if (rope is None) != (coords is None):
        given, missing = ("coords", "rope") if rope is None else ("rope", "coords")
        checks.refuse(op, given, f"is given but {missing} is None", "both or none")
    if rope is not None and coords is not None:
        checks.expect_shape(op, "coords", coords, qkv.shape[0], 3)
        checks.expect_dtype(op, "coords", coords, torch.int32)
        _check_rope(op, rope, dim)
    checks.expect_device(op, qkv, q_weight=q_weight, k_weight=k_weight, coords=coords)


def _check_rope(op: str, rope: AxialRoPE, dim: int) -> None:
    if not isinstance(rope, AxialRoPE):
        checks.refuse(op, "rope", f"is a {type(rope).__name__}", f"AxialRoPE({dim})")
    if rope.head_dim != dim:
        checks.refuse(op, "rope", f"is for heads of {rope.head_dim} channels", str(dim))


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    coords: Tensor | None,
    rope: AxialRoPE | None,
    *,
    eps: float = 1e-6,
    return_v: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """q = RoPE(RMSNorm(qkv[:, 0]) * q_weight), k = RoPE(RMSNorm(qkv[:, 1]) * k_weight), per row and head.

    RMSNorm divides a head's channels by sqrt(mean of their squares + eps); everything between the load and the store is
    float32.

    Args:
        qkv: [rows, 3, heads, head_dim], a view of the projection's output; float32, float16 or bfloat16. The cuda
            backend wants head_dim a multiple of 8 up to 256.
        q_weight, k_weight: [head_dim], both of qkv's dtype or both float32.
        coords: int32 [rows, 3], the (t, y, x) position of every row, 0 or more; None together with rope for no
            rotation.
        rope: frequencies and channel split.
        return_v: also return v, as a tensor of its own. The values stay available as the view qkv[:, 2]; but where
            gradients flow, v from here costs one copy each way, and the view's backward several passes over qkv.
        backend: "auto", "cuda" or "reference".

    Returns (q, k) or (q, k, v), each [rows, heads, head_dim] in qkv's dtype. Differentiable in qkv and both weights.
    Raises ValueError for shapes, dtypes or devices that do not fit. On a GPU, a position beyond the tables of
    `AxialRoPE.tables_on` stops the kernel with a message.
    """
    _check(qkv, q_weight, k_weight, coords, rope, eps)
    if backends.choose("qk_norm_rope", backend, _refusals(qkv.device, qkv.dtype, qkv.shape[3])) == "reference":
        return qk_norm_rope_ref(qkv, q_weight, k_weight, coords, rope, eps=eps, return_v=return_v)
    table, split = (None, (0, 0, 0)) if rope is None else (rope._table(qkv.device).whole, rope.split)
    outputs = _operator(qkv, q_weight, k_weight, coords, table, split, eps, return_v)
    return outputs if return_v else outputs[:2]


def qk_norm_rope_cache(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    coords: Tensor | None,
    rope: AxialRoPE | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` that also stores k and v in cache pages: k_cache[cache_rows[i]] = k[i], v_cache[cache_rows[i]] =
    v[i].

    Args:
        k_cache, v_cache: [slots, heads, head_dim], contiguous, of qkv's dtype: the pages of a layer, one after the
            other; written in place. Pages that no row names stay as they are.
        cache_rows: int64 [rows], the slot of every row, no value twice.
        The others as in `qk_norm_rope`. Not differentiable.

    Returns (q, k). Raises ValueError as `qk_norm_rope`, and for a cache that does not fit.
    """
    op = "qk_norm_rope_cache"
    _check(qkv, q_weight, k_weight, coords, rope, eps)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_shape(op, name, cache, "slots", *qkv.shape[2:])
        checks.expect_dtype(op, name, cache, qkv.dtype, why="as qkv")
        checks.expect_contiguous(op, name, cache)
    checks.expect_shape(op, "cache_rows", cache_rows, qkv.shape[0])
    checks.expect_dtype(op, "cache_rows", cache_rows, torch.int64)
    checks.expect_no_gradient(op, qkv, q_weight, k_weight)
    checks.expect_device(op, qkv, k_cache=k_cache, v_cache=v_cache, cache_rows=cache_rows)
    refusals = _refusals(qkv.device, qkv.dtype, qkv.shape[3])
    if backends.choose("qk_norm_rope_cache", backend, refusals) == "reference":
        checks.expect_indices(op, "cache_rows", cache_rows, k_cache.shape[0])
        q, k, v = qk_norm_rope_ref(qkv, q_weight, k_weight, coords, rope, eps=eps, return_v=True)
        k_cache.index_copy_(0, cache_rows, k)
        v_cache.index_copy_(0, cache_rows, v)
        return q, k
    if not torch.compiler.is_compiling() and (k_cache.data_ptr() | v_cache.data_ptr()) % 16:
        checks.refuse(op, "k_cache or v_cache", "begins elsewhere", "a multiple of 16 bytes as address")
    refuse_torch_func("qk_norm_rope_cache")
    table, split = (None, (0, 0, 0)) if rope is None else (rope._table(qkv.device).whole, rope.split)
    return _cache_operator(
        qkv, q_weight, k_weight, coords, table, split, eps, k_cache, v_cache, cache_rows.contiguous()
    )


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    coords: Tensor | None,
    rope: AxialRoPE | None,
    *,
    eps: float = 1e-6,
    return_v: bool = False,
) -> tuple[Tensor, ...]:
    """`qk_norm_rope` in plain PyTorch."""
    qk, v = qkv.split([2, 1], dim=1)  # queries and keys go through together: [rows, 2, heads, head_dim]
    qk = _norm(qk, torch.stack([q_weight, k_weight])[:, None], eps)
    if rope is not None and coords is not None:
        qk = _rotate(qk, _turns(coords, rope, torch.promote_types(qkv.dtype, torch.float32)))
    q, k = qk.unbind(1)
    return (q, k, v.squeeze(1)) if return_v else (q, k)


def apply_rope(x: Tensor, coords: Tensor, rope: AxialRoPE) -> Tensor:
    """RoPE alone, in plain PyTorch: for networks without QK-norm.

    Args:
        x: [rows, ..., head_dim], floating.
        coords: int32 [rows, 3], the (t, y, x) position of every row, 0 or more.
        rope: frequencies and channel split.

    Returns x rotated, of its shape and dtype; angles and products are float32 (float64 for float64). Differentiable in
    x.
    """
    op = "apply_rope"
    checks.expect_tensor(op, "x", x)
    if x.ndim < 2:
        checks.refuse(op, "x", f"has shape {list(x.shape)}", "[rows, ..., head_dim]")
    checks.expect_floating(op, "x", x)
    _check_rope(op, rope, x.shape[-1])
    checks.expect_shape(op, "coords", coords, x.shape[0], 3)
    checks.expect_dtype(op, "coords", coords, torch.int32)
    checks.expect_device(op, x, coords=coords)
    turns = _turns(coords, rope, torch.promote_types(x.dtype, torch.float32))
    return _rotate(x, turns.view(len(x), *(1,) * (x.dim() - 2), -1, 2))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return (precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def _largest_position(coords: Tensor) -> int:
    """ValueError for one that no table holds, where the positions can be looked at."""
    checks.expect_indices("qk_norm_rope", "coords", coords, MAX_POSITIONS)
    return int(coords.max()) if checks.on_host(coords) and coords.numel() else 0


def _turns(coords: Tensor, rope: AxialRoPE, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of every row's channel pairs: [rows, 1, 1, head_dim / 2, 2]"""
    if dtype == torch.float64:
        _largest_position(coords)
        angle = coords.long()[:, rope.axes(coords.device)] * rope.frequencies(coords.device)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None, None]
    axes = list(zip(rope._table(coords.device).axes, coords.unbind(1), strict=True))
    if 0 in rope.split:  # nobody looks at the positions of that axis
        _largest_position(coords)
        axes = [(table, position) for table, position in axes if table.shape[1]]
    try:  # looks at every position, so that nobody has to read them back
        turns = torch.cat([table.index_select(0, position) for table, position in axes], dim=1)
    except IndexError:  # on a GPU the device stops instead
        rope._table(coords.device, _largest_position(coords))
        return _turns(coords, rope, dtype)
    return turns.view(-1, 1, 1, rope.head_dim // 2, 2)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    x, dtype = x.to(turn.dtype), x.dtype
    pairs = (x if x.stride(-1) == 1 else x.contiguous()).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # generates no code for complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return rotated.flatten(-2).to(dtype)
