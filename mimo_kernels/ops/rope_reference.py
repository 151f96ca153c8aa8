"""QK-norm and RoPE in plain PyTorch, differentiable by autograd: what the kernels are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimo_kernels.core import checks
from mimo_kernels.ops.axial_rope import MAX_POSITIONS, AxialRoPE

Projection = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def qk_norm_rope_ref(
    qkv: Projection,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    coords: Tensor | None,
    rope: AxialRoPE | Tensor | None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    return_v: bool = False,
) -> tuple[Tensor, ...]:
    """`qk_norm_rope` in plain PyTorch."""
    if isinstance(qkv, Tensor) and (q_weight is None or q_weight.shape[0] == qkv.shape[3]):
        qk, v = qkv.split([2, 1], dim=1)  # queries and keys go through together: [rows, 2, heads, head_dim]
        v = v.squeeze(1)
        weight = None if q_weight is None or k_weight is None else torch.stack([q_weight, k_weight])[:, None]
        q, k = _norm_and_rotate(qk, weight, coords, rope, eps, interleaved).unbind(1)
    else:
        apart: tuple[Any, ...] = qkv.unbind(1) if isinstance(qkv, Tensor) else qkv
        q, k, v = (*apart, None)[:3]
        q, k = (
            _norm_and_rotate(x[:, None], weight, coords, rope, eps, interleaved).squeeze(1)
            for x, weight in ((q, q_weight), (k, k_weight))
        )
    return (q, k, v) if return_v else (q, k)


def _norm_and_rotate(x: Tensor, weight: Tensor | None, coords, rope, eps: float, interleaved: bool) -> Tensor:
    """x [rows, 1 or 2, heads, head_dim], weight of the last dimension, or of the last two."""
    if weight is not None:
        wide = weight.ndim == 1 and weight.shape[0] != x.shape[3]
        x = _norm(x.flatten(2), weight, eps).view(x.shape) if wide else _norm(x, weight, eps)
    if rope is None:
        return x
    return rotate(x, turns_of_rows(coords, rope, torch.promote_types(x.dtype, torch.float32)), interleaved)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return (precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def _largest_position(coords: Tensor) -> int:
    """ValueError for one that no table holds, where the positions can be looked at."""
    checks.expect_indices("qk_norm_rope", "coords", coords, MAX_POSITIONS)
    return int(coords.max()) if checks.on_host(coords) and coords.numel() else 0


def turns_of_rows(coords: Tensor | None, rope: AxialRoPE | Tensor, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of every row's channel pairs: [rows, 1, 1, head_dim / 2, 2]"""
    if isinstance(rope, Tensor):
        if coords is not None:
            checks.expect_indices("qk_norm_rope", "coords", coords, rope.shape[0])
            rope = rope.index_select(0, coords)
        return rope.to(dtype)[:, None, None]
    assert coords is not None
    if dtype == torch.float64:
        _largest_position(coords)
        angle = coords.long()[:, rope.axes(coords.device)] * rope.frequencies(coords.device)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None, None]
    axes = list(zip(rope.table(coords.device).axes, coords.unbind(1), strict=True))
    if 0 in rope.split:  # nobody looks at the positions of that axis
        _largest_position(coords)
        axes = [(table, position) for table, position in axes if table.shape[1]]
    try:  # looks at every position, so that nobody has to read them back
        turns = torch.cat([table.index_select(0, position) for table, position in axes], dim=1)
    except IndexError:  # on a GPU the device stops instead
        rope.table(coords.device, _largest_position(coords))
        return turns_of_rows(coords, rope, dtype)
    return turns.view(-1, 1, 1, rope.head_dim // 2, 2)


def rotate(x: Tensor, turn: Tensor, interleaved: bool = True) -> Tensor:
    x, dtype = x.to(turn.dtype), x.dtype
    if not interleaved:
        (first, second), (cos, sin) = x.chunk(2, -1), turn.unbind(-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(dtype)
    pairs = (x if x.stride(-1) == 1 else x.contiguous()).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # generates no code for complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return rotated.flatten(-2).to(dtype)
