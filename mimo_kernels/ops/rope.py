"""QK-norm and RoPE, from the projection to the queries and keys of attention (and to cache pages) in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    rows_of,
)
from mimo_kernels.core.register import refuse_torch_func, register
from mimo_kernels.ops.axial_rope import AxialRoPE
from mimo_kernels.ops.rope_reference import Projection, qk_norm_rope_ref, rotate, turns_of_rows

MAX_HEAD_DIM = 256
MAX_WIDTH = 12280  # channels that are normalised together: their sums have to fit into a block's shared memory
# Blocks of the backward, each with its own sum of the weights' gradients: a constant fixes the order of addition.
GRAD_BLOCKS = 528
# Of qk_rope.cu: how many sums of a row's table gradient there are, by whether all heads are normalised together.
TABLE_PARTS = {False: 2, True: 8}


def _aligned_heads(x: Tensor) -> Tensor:
    """[rows, heads, head_dim] whose rows may lie apart, as kernels read them: a copy only where they cannot."""
    rows, heads, dim = x.shape
    whole = x.stride(2) == 1 and (heads == 1 or x.stride(1) == dim) and x.stride(0) * x.element_size() % 16 == 0
    if whole and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _apart(q: Tensor, k: Tensor | None, v: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and values [rows, heads, head_dim]; without k, q is the packed projection of all three."""
    if k is None:
        q, k, v = aligned(q).unbind(1)
        return q, k, v
    return _aligned_heads(q), _aligned_heads(k), None if v is None else _aligned_heads(v)


def _is_packed_norm(k, q_weight, coords, interleaved, head_dim) -> bool:
    """Whether this is the variant of qk_norm_rope.cu, else it is one of qk_rope.cu."""
    per_head = k is None and q_weight is not None and q_weight.shape[0] == head_dim
    return per_head and interleaved and (coords is None or coords.ndim == 2)


def _turns(coords, table, split) -> dict:
    """What every launcher is told of the rotation."""
    return {
        "coords": pointer(coords),
        "table": pointer(table),
        "positions": 0 if table is None else table.shape[0],
        "t_end": split[0] // 2,
        "y_end": (split[0] + split[1]) // 2,
    }


def _variant(q_weight, coords, table, head_dim, interleaved) -> dict:
    """What the launchers of qk_rope.cu are told of the variant."""
    return {
        "weight_float": q_weight is not None and q_weight.dtype == torch.float32,
        "wide": q_weight is not None and q_weight.shape[0] != head_dim,
        "axes": 0 if coords is None or table is None else 3 if coords.ndim == 2 else 1,
        "interleaved": interleaved,
    }


def _forward(q, k, v, q_weight, k_weight, coords, table, split, eps, interleaved, k_cache, v_cache, cache_rows, with_v):
    coords = None if coords is None else coords.contiguous()
    table = None if table is None else aligned(table)
    q_weight, k_weight = (None if w is None else aligned(w) for w in (q_weight, k_weight))
    rows, heads, dim = q.shape[0], q.shape[-2], q.shape[-1]
    kv_heads = heads if k is None else k.shape[1]
    out_q, out_k = q.new_empty(rows, heads, dim), q.new_empty(rows, kv_heads, dim)
    out_v = q.new_empty((rows, heads, dim) if with_v else 0)
    outputs = {
        "q": out_q.data_ptr(),
        "k": out_k.data_ptr(),
        "v": out_v.data_ptr() if with_v else 0,
        "k_cache": pointer(k_cache),
        "v_cache": pointer(v_cache),
        "cache_rows": pointer(cache_rows),
        "slots": 0 if k_cache is None else k_cache.shape[0],
    }
    given = {"q_weight": pointer(q_weight), "k_weight": pointer(k_weight)} | _turns(coords, table, split)
    sizes = {"rows": rows, "heads": heads, "head_dim": dim, "eps": eps, "dtype": DTYPES[q.dtype]} | place(q)
    if _is_packed_norm(k, q_weight, coords, interleaved, dim):
        qkv, weight_float = aligned(q), q_weight.dtype == torch.float32
        kernels().qk_norm_rope_forward(**outputs, qkv=qkv.data_ptr(), weight_float=weight_float, **given, **sizes)
    else:
        q, k, v = _apart(q, k, v)
        kernels().qk_rope_forward(
            **outputs,
            q_in=rows_of(q),
            k_in=rows_of(k),
            v_in=rows_of(v),
            **given,
            **_variant(q_weight, coords, table, dim, interleaved),
            **sizes,
            kv_heads=kv_heads,
        )
    return out_q, out_k, out_v


def _qk_norm_rope(q, k, q_weight, k_weight, coords, table, split, eps, interleaved, with_v):
    given = q, k, None, q_weight, k_weight, coords, table, split, eps, interleaved
    return _forward(*given, None, None, None, with_v)


def _qk_norm_rope_cache(
    q, k, v, q_weight, k_weight, coords, table, split, eps, interleaved, k_cache, v_cache, cache_rows
):
    given = q, k, v, q_weight, k_weight, coords, table, split, eps, interleaved
    return _forward(*given, k_cache, v_cache, cache_rows, False)[:2]


def _backward(dq, dk, dv, q, k, q_weight, k_weight, coords, table, split, eps, interleaved, with_table):
    dq, dk = aligned(dq), aligned(dk)
    dv = None if dv is None else aligned(dv)
    coords = None if coords is None else coords.contiguous()
    table = None if table is None else aligned(table)
    q_weight, k_weight = (None if w is None else aligned(w) for w in (q_weight, k_weight))
    rows, heads, dim = dq.shape
    results = _fake_backward(dq, dk, dv, q, k, q_weight, k_weight, coords, table, split, eps, interleaved, with_table)
    dq_in, dk_in, dq_weight, dk_weight, dtable = results
    weights = {
        "dq_weight": 0 if q_weight is None else dq_weight.data_ptr(),
        "dk_weight": 0 if k_weight is None else dk_weight.data_ptr(),
        "blocks": GRAD_BLOCKS,
        "q_weight": pointer(q_weight),
        "k_weight": pointer(k_weight),
    }
    given = {"dq": dq.data_ptr(), "dk": dk.data_ptr(), "dv": pointer(dv)} | _turns(coords, table, split)
    sizes = {"rows": rows, "heads": heads, "head_dim": dim, "eps": eps, "dtype": DTYPES[q.dtype]} | place(q)
    if _is_packed_norm(k, q_weight, coords, interleaved, dim):
        qkv, weight_float = aligned(q), q_weight.dtype == torch.float32
        partial = torch.empty(GRAD_BLOCKS, 2, dim, dtype=torch.float32, device=q.device)
        kernels().qk_norm_rope_backward(
            dqkv=dq_in.data_ptr(),
            partial=partial.data_ptr(),
            qkv=qkv.data_ptr(),
            weight_float=weight_float,
            **weights,
            **given,
            **sizes,
        )
        return results
    variant = _variant(q_weight, coords, table, dim, interleaved)
    partials = [
        None if w is None else torch.empty(GRAD_BLOCKS, w.shape[0], dtype=torch.float32, device=q.device)
        for w in (q_weight, k_weight)
    ]
    turns = None
    if with_table:
        turns = torch.empty(TABLE_PARTS[variant["wide"]], *table.shape, dtype=torch.float32, device=q.device)
    into = dq_in.unbind(1) if k is None else (dq_in, dk_in, None)
    (q, k, _), kv_heads = _apart(q, k), dk.shape[1]
    kernels().qk_rope_backward(
        dq_in=into[0].data_ptr(),
        dk_in=into[1].data_ptr(),
        dv_in=pointer(into[2]),
        q_stride=into[0].stride(0),
        k_stride=into[1].stride(0),
        q_partial=pointer(partials[0]),
        k_partial=pointer(partials[1]),
        turns=pointer(turns),
        q_in=rows_of(q),
        k_in=rows_of(k),
        **weights,
        **given,
        **variant,
        **sizes,
        kv_heads=kv_heads,
    )
    return (*results[:4], dtable if turns is None else turns.sum(0))


def _save(ctx, inputs, output):
    *tensors, ctx.split, ctx.eps, ctx.interleaved, ctx.with_v = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dq, dk, dv):
    q, k, q_weight, k_weight, coords, table = ctx.saved_tensors
    with_table = coords is None and ctx.needs_input_grad[5]  # of rows, not of positions: see _rotation
    dv = dv if ctx.with_v else None
    given = q, k, q_weight, k_weight, coords, table, ctx.split, ctx.eps, ctx.interleaved, with_table
    dq, dk, dq_weight, dk_weight, dtable = _backward_operator(dq, dk, dv, *given)
    dk = None if k is None else dk
    weights = (None, None) if q_weight is None else (dq_weight, dk_weight)
    return dq, dk, *weights, None, dtable if with_table else None, None, None, None, None


_ROTATION = "Tensor? coords, Tensor? table, int[] split, float eps, bool interleaved"
_INPUTS = f"Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, {_ROTATION}"


def _fake(q, k, q_weight, k_weight, coords, table, split, eps, interleaved, with_v):
    rows, (heads, dim) = q.shape[0], q.shape[-2:]
    kv_heads = heads if k is None else k.shape[1]
    v = q.new_empty((rows, heads, dim) if with_v else 0)
    return q.new_empty(rows, heads, dim), q.new_empty(rows, kv_heads, dim), v


def _fake_cache(q, k, v, q_weight, k_weight, coords, table, split, eps, interleaved, k_cache, v_cache, cache_rows):
    return _fake(q, k, q_weight, k_weight, coords, table, split, eps, interleaved, False)[:2]


def _fake_backward(dq, dk, dv, q, k, q_weight, k_weight, coords, table, split, eps, interleaved, with_table):
    """Empty results: the gradients of q, k, both weights and the table; of size 0 for what is not there."""
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, q_weight, k_weight, table if with_table else None)
    )


def _sample(rows: int) -> tuple:
    rope, coords = AxialRoPE(16), torch.arange(3 * rows, dtype=torch.int32).view(rows, 3)
    return (
        torch.randn(rows, 3, 2, 16),
        None,
        torch.ones(16),
        torch.ones(16),
        coords,
        rope.table("cpu").whole,
        rope.split,
        1e-6,
        True,
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
    f"qk_norm_rope_cache(Tensor q, Tensor? k, Tensor? v, Tensor? q_weight, Tensor? k_weight, {_ROTATION},"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_rows) -> (Tensor q, Tensor k)",
    _qk_norm_rope_cache,
    fake=_fake_cache,
    sample=lambda rows: (
        *_sample(rows)[:2],
        None,
        *_sample(rows)[2:],
        *torch.zeros(2, rows, 2, 16).unbind(),
        torch.arange(rows),
    ),
)
_backward_operator = register(
    f"qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor? dv, {_INPUTS}, bool with_table)"
    " -> (Tensor dq_in, Tensor dk_in, Tensor dq_weight, Tensor dk_weight, Tensor dtable)",
    _backward,
    fake=_fake_backward,
    sample=lambda rows: (*torch.randn(3, rows, 2, 16).unbind(), *_sample(rows), False),
)


def _refusals(device: torch.device, dtype: torch.dtype, head_dim: int, width: int = 0) -> dict[str, list[str]]:
    """`width`: of the channels that are normalised together, if a whole row's are."""
    reasons = device_refusals(device)
    if dtype not in DTYPES:
        reasons.append(f"qkv is {dtype}, expected {checks.FLOAT_NAMES}")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        reasons.append(f"head_dim is {head_dim}, expected a multiple of 8 up to {MAX_HEAD_DIM}")
    if width > MAX_WIDTH:
        reasons.append(f"{width} channels are normalised together, expected at most {MAX_WIDTH}")
    return {"cuda": reasons, "reference": []}


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """Backend -> why it cannot serve a bfloat16 projection with heads of 72 on this device."""
    return _refusals(torch.device(device), torch.bfloat16, 72)


class _Checked(NamedTuple):
    """A call whose arguments fit together. `k` is None where `q` is the packed projection."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    rotation: tuple[Tensor | None, Tensor | None, tuple[int, int, int]]  # coords, table, split
    refusals: dict[str, list[str]]

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_heads(self) -> int:
        return self.heads if self.k is None else self.k.shape[1]


def _check(
    op: str,
    qkv: Projection,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    coords: Tensor | None,
    rope: AxialRoPE | Tensor | None,
    eps: float,
) -> _Checked:
    if isinstance(qkv, (tuple, list)):
        q, k, v = _check_apart(op, qkv)
    else:
        q, k, v = qkv, None, None
        checks.expect_shape(op, "qkv", q, "rows", 3, "heads", "head_dim")
        checks.expect_floating(op, "qkv", q)
    heads, dim = q.shape[-2:]
    checks.expect_number(op, "eps", eps)
    width = _check_weights(op, q, heads if k is None else k.shape[1], q_weight, k_weight)
    rotation = _check_rotation(op, q.shape[0], dim, q.device, coords, rope)
    turns = rope if isinstance(rope, Tensor) else None
    others = {"k": k, "v": v, "q_weight": q_weight, "k_weight": k_weight, "coords": coords, "rope": turns}
    checks.expect_device(op, q, **others)
    return _Checked(q, k, v, rotation, _refusals(q.device, q.dtype, dim, width))


def _check_apart(op: str, qkv: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    if len(qkv) not in (2, 3):
        checks.refuse(op, "qkv", f"has length {len(qkv)}", "(q, k) or (q, k, v), or one packed tensor")
    q, k, v = qkv[0], qkv[1], qkv[2] if len(qkv) == 3 else None
    checks.expect_shape(op, "q", q, "rows", "heads", "head_dim")
    checks.expect_floating(op, "q", q)
    checks.expect_shape(op, "k", k, q.shape[0], "kv_heads", q.shape[2])
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            checks.expect_shape(op, name, x, *k.shape)
            checks.expect_dtype(op, name, x, q.dtype, why="as q")
    return q, k, v


def _check_weights(op: str, q: Tensor, kv_heads: int, q_weight: Tensor | None, k_weight: Tensor | None) -> int:
    """The number of channels that are normalised together where that is a row's, else 0."""
    heads, dim = q.shape[-2:]
    if (q_weight is None) != (k_weight is None):
        given, missing = ("k_weight", "q_weight") if q_weight is None else ("q_weight", "k_weight")
        checks.refuse(op, given, f"is given but {missing} is None", "both or none")
    if q_weight is None or k_weight is None:
        return 0
    checks.expect_tensor(op, "q_weight", q_weight)
    wide = list(q_weight.shape) != [dim] and list(q_weight.shape) == [heads * dim]
    for name, weight, its_heads in (("q_weight", q_weight, heads), ("k_weight", k_weight, kv_heads)):
        checks.expect_shape(op, name, weight, its_heads * dim if wide else dim)
        checks.expect_dtype(op, name, weight, q.dtype, torch.float32, why="as qkv, or single")
    checks.expect_dtype(op, "k_weight", k_weight, q_weight.dtype, why="as q_weight")
    return max(heads, kv_heads) * dim if wide else 0


def _check_rotation(
    op: str, rows: int, dim: int, device: torch.device, coords: Tensor | None, rope: AxialRoPE | Tensor | None
) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int]]:
    """Positions, table and split of the kernels."""
    if isinstance(rope, Tensor):
        checks.expect_shape(op, "rope", rope, "positions" if coords is not None else rows, dim // 2, 2)
        checks.expect_dtype(op, "rope", rope, torch.float32)
        if coords is not None:
            checks.expect_shape(op, "coords", coords, rows)
            checks.expect_dtype(op, "coords", coords, torch.int32)
            if rope.requires_grad and torch.is_grad_enabled():
                found, expected = "requires a gradient beside coords", "the turns of every row, rope[coords]"
                checks.refuse(op, "rope", found, expected)
        return coords, rope, (dim, 0, 0)
    if (rope is None) != (coords is None):
        given, missing = ("coords", "rope") if rope is None else ("rope", "coords")
        checks.refuse(op, given, f"is given but {missing} is None", "both or none")
    if rope is None or coords is None:
        return None, None, (0, 0, 0)
    checks.expect_shape(op, "coords", coords, rows, 3)
    checks.expect_dtype(op, "coords", coords, torch.int32)
    if not isinstance(rope, AxialRoPE):
        checks.refuse(op, "rope", f"is a {type(rope).__name__}", f"AxialRoPE({dim})")
    if rope.head_dim != dim:
        checks.refuse(op, "rope", f"is for heads of {rope.head_dim} channels", str(dim))
    return coords, None, rope.split


def _with_table(rotation: tuple, rope: AxialRoPE | Tensor | None, device: torch.device) -> tuple:
    coords, table, split = rotation
    return coords, rope.table(device).whole if isinstance(rope, AxialRoPE) else table, split


def qk_norm_rope(
    qkv: Projection,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    coords: Tensor | None,
    rope: AxialRoPE | Tensor | None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    return_v: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """q = RoPE(RMSNorm(q) * q_weight), k = RoPE(RMSNorm(k) * k_weight), row by row.

    RMSNorm divides by sqrt(mean of squares + eps), the mean over a head's channels, or over those of all heads of the
    row; everything between the load and the store is float32. RoPE turns a pair of channels (a, b) by its angle:
    (a cos - b sin, a sin + b cos).

    Args:
        qkv: [rows, 3, heads, head_dim], a view of the projection's output; or (q, k) or (q, k, v), q [rows, heads,
            head_dim], k and v [rows, kv_heads, head_dim], whose rows may lie apart: slices of a projection need no
            copy. float32, float16 or bfloat16. The cuda backend wants head_dim a multiple of 8 up to 256.
        q_weight, k_weight: [head_dim] for a norm of every head; [heads * head_dim] and [kv_heads * head_dim] for one of
            all heads together (Wan), on the cuda backend of at most 12280 channels; None for no norm. Both of qkv's
            dtype or both float32.
        coords: int32 [rows, 3], the (t, y, x) position of every row, 0 or more. With a table as rope int32 [rows], or
            None: row i turns by entry i.
        rope: `AxialRoPE`, frequencies and channel split; or float32 [positions, head_dim / 2, 2], cosine and sine of
            every pair, as torch.stack([cos, sin], -1) or torch.view_as_real of complex turns; or None, together with
            coords, for no rotation.
        interleaved: pairs are neighbours, (2i, 2i + 1); False: of both halves, (i, i + head_dim / 2), as in GPT-NeoX.
        return_v: also return v; of the packed projection as a tensor of its own. The values stay available as the view
            qkv[:, 2]; but where gradients flow, v from here costs one copy each way, and the view's backward several
            passes over qkv.
        backend: "auto", "cuda" or "reference".

    Returns (q, k) or (q, k, v), [rows, heads or kv_heads, head_dim] in qkv's dtype; with neither norm nor rotation
    those are the inputs themselves. Differentiable in qkv, both weights, and in rope where it is a table without
    coords.
    Raises ValueError for shapes, dtypes or devices that do not fit. On a GPU, a position beyond the table (see
    `AxialRoPE.tables_on`) stops the kernel with a message.
    """
    op = "qk_norm_rope"
    call = _check(op, qkv, q_weight, k_weight, coords, rope, eps)
    if return_v and call.k is not None and call.v is None:
        checks.refuse(op, "return_v", "is set but qkv is (q, k)", "(q, k, v)")
    chosen = backends.choose(op, backend, call.refusals)
    if q_weight is None and rope is None:
        apart: tuple[Any, ...] = call.q.unbind(1) if call.k is None else (call.q, call.k, call.v)
        return apart if return_v else apart[:2]
    if chosen == "reference":
        given = qkv, q_weight, k_weight, coords, rope
        return qk_norm_rope_ref(*given, eps=eps, interleaved=interleaved, return_v=return_v)
    rest = q_weight, k_weight, *_with_table(call.rotation, rope, call.q.device), eps, interleaved
    q, k, v = _operator(call.q, call.k, *rest, return_v and call.k is None)
    if not return_v:
        return q, k
    return q, k, v if call.v is None else call.v


def qk_norm_rope_cache(
    qkv: Projection,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    coords: Tensor | None,
    rope: AxialRoPE | Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` that also stores k and v in cache pages: k_cache[cache_rows[i]] = k[i], v_cache[cache_rows[i]] =
    v[i].

    Args:
        k_cache, v_cache: [slots, kv_heads, head_dim], contiguous, of qkv's dtype: the pages of a layer, one after the
            other; written in place. Pages that no row names stay as they are.
        cache_rows: int64 [rows], the slot of every row, no value twice.
        The others as in `qk_norm_rope`, qkv packed or (q, k, v). Not differentiable.

    Returns (q, k). Raises ValueError as `qk_norm_rope`, and for a cache that does not fit.
    """
    op = "qk_norm_rope_cache"
    call = _check(op, qkv, q_weight, k_weight, coords, rope, eps)
    q, k, v = call.q, call.k, call.v
    if k is not None and v is None:
        checks.refuse(op, "qkv", "is (q, k)", "(q, k, v): the values go to the cache as well")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_shape(op, name, cache, "slots", call.kv_heads, q.shape[-1])
        checks.expect_dtype(op, name, cache, q.dtype, why="as qkv")
        checks.expect_contiguous(op, name, cache)
    checks.expect_shape(op, "cache_rows", cache_rows, q.shape[0])
    checks.expect_dtype(op, "cache_rows", cache_rows, torch.int64)
    tensors = (q, k, v, q_weight, k_weight, call.rotation[1])
    checks.expect_no_gradient(op, *(x for x in tensors if x is not None))
    checks.expect_device(op, q, k_cache=k_cache, v_cache=v_cache, cache_rows=cache_rows)
    if backends.choose(op, backend, call.refusals) == "reference":
        checks.expect_indices(op, "cache_rows", cache_rows, k_cache.shape[0])
        inputs = qkv, q_weight, k_weight, coords, rope
        q, k, v = qk_norm_rope_ref(*inputs, eps=eps, interleaved=interleaved, return_v=True)
        k_cache.index_copy_(0, cache_rows, k)
        v_cache.index_copy_(0, cache_rows, v)
        return q, k
    if not torch.compiler.is_compiling() and (k_cache.data_ptr() | v_cache.data_ptr()) % 16:
        checks.refuse(op, "k_cache or v_cache", "begins elsewhere", "a multiple of 16 bytes as address")
    refuse_torch_func(op)
    given = q_weight, k_weight, *_with_table(call.rotation, rope, q.device), eps, interleaved
    return _cache_operator(q, k, v, *given, k_cache, v_cache, cache_rows.contiguous())


def apply_rope(
    x: Tensor,
    coords: Tensor | None,
    rope: AxialRoPE | Tensor,
    *,
    interleaved: bool = True,
    backend: str = "auto",
) -> Tensor:
    """RoPE alone, of one tensor: keys that get other positions.

    Args:
        x: [rows, ..., head_dim], floating.
        coords, rope, interleaved, backend: as in `qk_norm_rope`.

    Returns x rotated, of its shape and dtype; angles and products are float32 (float64 for float64). Differentiable in
    x, and in rope where it is a table without coords. Raises ValueError as `qk_norm_rope`.
    """
    op = "apply_rope"
    checks.expect_tensor(op, "x", x)
    if x.ndim < 2:
        checks.refuse(op, "x", f"has shape {list(x.shape)}", "[rows, ..., head_dim]")
    checks.expect_floating(op, "x", x)
    if rope is None:
        checks.refuse(op, "rope", "is None", f"AxialRoPE({x.shape[-1]}) or a table")
    rotation = _check_rotation(op, x.shape[0], x.shape[-1], x.device, coords, rope)
    checks.expect_device(op, x, coords=coords, rope=rotation[1])
    if backends.choose(op, backend, _refusals(x.device, x.dtype, x.shape[-1])) == "reference":
        turns = turns_of_rows(coords, rope, torch.promote_types(x.dtype, torch.float32))
        return rotate(x, turns.view(len(x), *(1,) * (x.dim() - 2), -1, 2), interleaved)
    heads = x.reshape(x.shape[0], -1, x.shape[-1])
    given = None, None, *_with_table(rotation, rope, x.device), 0.0, interleaved
    return _operator(heads, heads[:, :0], *given, False)[0].view(x.shape)
