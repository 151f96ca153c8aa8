"""Attention of new rows to the cached frames of their sequence and to themselves, the cached ones in pages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels.attention import paged_reference
from mimo_kernels.attention.frame import finite
from mimo_kernels.attention.mask import FrameMask
from mimo_kernels.attention.paged_operator import register_paged
from mimo_kernels.core import backends, checks, launch, torch_private

if TYPE_CHECKING:
    from mimo_kernels.cache.pages import CacheView, FrameCache, ViewHead

if backends.triton_available():
    import mimo_kernels.attention.triton.operator  # noqa: F401  (registers what _frame_operator gives)
    from mimo_kernels.attention.triton import paged as triton_paged
    from mimo_kernels.attention.triton import paged_backward as triton_backward


def _triton_forward(q, k_self, v_self, k_pages, v_pages, tables, lengths, bias, mask, scale, splits, scales=None):
    pages = triton_paged.Pages(k_pages, v_pages, tables, lengths, bias, scales)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # a launch goes to the current device
        own = None
        if mask is not None:
            # The kernel takes the maximum before it scales.
            positive, factor = (q, scale) if scale > 0 else (-q, -scale) if scale < 0 else (0 * q, 1.0)
            own = _frame_operator("")(positive, k_self, v_self, mask, 1, factor)
        return triton_paged.forward(q, k_self, v_self, pages, scale, own, splits)


def _triton_backward(
    dout, dlse, q, k_self, v_self, out, lse, k_pages, v_pages, tables, lengths, bias, mask, scale, scales=None
) -> tuple[Tensor, Tensor, Tensor]:
    pages = triton_paged.Pages(k_pages, v_pages, tables, lengths, bias, scales)
    if not _aligned(dout):
        dout = dout.clone(memory_format=torch.contiguous_format)
    dlse = None if dlse is None else dlse.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if k_self.shape[1]:
            table = paged_reference.all_see_all(q.shape[1]) if mask is None else mask
            dq, dk, dv = _frame_operator("_backward")(dout, dlse, q, k_self, v_self, out, lse, table, 1, scale)
        else:
            dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k_self, v_self))
        return triton_backward.backward_q(dout, dlse, q, out, lse, dq, pages, scale), dk, dv


def _frame_operator(suffix: str):
    """frame_attention's operator on Triton kernels, or its backward."""
    return getattr(torch.ops.mimo_kernels, f"frame_attention_triton{suffix}")


_triton_op = register_paged("paged_frame_attention_triton", _triton_forward, _triton_backward)


def serving(device: torch.device, dtype: torch.dtype, head_dim: int, aligned: bool = True) -> dict[str, list[str]]:
    """backend -> the reasons why it cannot serve such tensors, in order of preference."""
    triton = launch.triton_refusals(device)
    if device.type == "cpu" and dtype == torch.bfloat16:
        triton.append("Triton's interpreter computes bfloat16 products wrongly")
    if head_dim % 8 or head_dim > 256:
        triton.append(f"head_dim is {head_dim}, expected a multiple of 8 up to 256")
    if not aligned:
        triton.append("strides are not 1 for channels and multiples of 8 elsewhere")
    if device.type != "cuda":
        return {"reference": [], "triton": triton}
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return {
        "triton": triton,
        "reference": ["it takes lengths from the host, which a CUDA graph would freeze"] if capturing else [],
    }


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """backend -> the reasons why it cannot serve a typical call on `device`."""
    device = torch.device(device)
    return serving(device, torch.float32 if device.type == "cpu" else torch.bfloat16, 64)


def paged_frame_attention(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    cache: FrameCache,
    *,
    layer: int,
    view: CacheView | ViewHead,
    self_mask: FrameMask | None = None,
    frame_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new rows, one frame or several, to the cached frames of their sequence and to each other.

        out[s] = softmax(scale * q[s] [K_cached[s]; k_self[s]]^T + b) [V_cached[s]; v_self[s]]
        lse[s] = log sum exp of the same scores

    A sequence without cached frames attends to its new rows alone (the null branch of history guidance: ``None`` in
    the view; MiMo, Eq. 27).

    Args:
        q: ``[S, N, heads, head_dim]`` in the dtype (float32, float16 or bfloat16 where that is float8) and on the
            device of the cache, after QK-norm and RoPE. Any strides as long as channels are contiguous: slices of a
            projection need no copy.
        k_self, v_self: ``[S, N, kv_heads, head_dim]``, likewise, with the heads of the cache. ``heads`` is a multiple
            of ``kv_heads``, and the heads of q that follow one another share one (grouped queries).
        cache: the `FrameCache` that holds the pages of `layer`.
        view: what is seen of it, ``cache.view(seqs)``, one row per sequence of q. Its `first` rows are a view as well.
        self_mask: a FrameMask of one clip of N tokens, for all sequences: which new rows see each other. The cached
            frames are seen by all of them. None: all new rows see all. A row that sees no key at all gives 0, lse -inf.
        frame_bias: fp32 ``[S, frames]``, b: what is added to the scaled scores of the i-th frame that the view shows of
            a sequence, oldest first; the new rows have 0. Columns past the frames shown are not read; -inf hides a
            frame. For sinks and decaying memory. A constant.
        scale: default ``head_dim ** -0.5``.
        backend: "auto", "triton" or "reference". The Triton kernel reads lengths on the device: captured in a CUDA
            graph, it follows the view. The reference takes them from the host, and gathers the pages; calls that need
            neither a gradient nor a mask, bias or lse share one copy per refresh.
        return_lse: also return lse, fp32 ``[S, heads, N]``, in natural log.

    Returns: ``[S, N, heads, head_dim]``, contiguous; with return_lse a pair. Deterministic, and differentiable in q,
    k_self and v_self. Pages are constants: what the cached frames were made of gets no gradient through them. What is
    saved for the backward does not grow with the history; until it has run, or its graph is freed, the pages shown are
    given to nobody else, and the cache and the view may go on: append, evict, free, refresh. Where activations are
    checkpointed the view has to be pinned, ``cache.view(seqs, pinned=True)``.

    Raises ValueError for shapes, dtypes or a view that do not match the cache, for a view that is older than it, and
    for a backend that cannot serve.
    """
    op = "paged_frame_attention"
    if not hasattr(view, "seqs"):
        checks.refuse(op, "view", f"is a {type(view).__name__}", "what cache.view(seqs) returns")
    cache.check_view(view)
    checks.expect_shape(op, "q", q, len(view.seqs), "N", "heads", cache.head_dim)
    checks.expect_dtype(op, "q", q, *cache.row_dtypes, why="as the cache")
    checks.expect_device(op, cache.pool, q=q)
    checks.expect_count(op, "layer", layer, high=cache.num_layers - 1)
    _check_own(op, q, k_self, v_self, cache.num_kv_heads)
    if frame_bias is not None:
        _check_bias(op, "frame_bias", frame_bias, q, view.most_frames)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_self, v_self))
    scale, mask = _scale(op, scale, q), _table(op, self_mask, q)
    chosen = _choose(op, backend, q, k_self, v_self)
    plain = not wants_gradient and not return_lse and mask is None and frame_bias is None
    if chosen == "reference" and plain and cache.scales is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for some, keys, values in view.joined(layer, q.shape[1]):
            out[some] = paged_frame_attention_ref(q[some], k_self[some], v_self[some], keys, values, scale)
        return out
    if wants_gradient and view.pinned is None and _packed():
        found = "may show something else when activations are computed again"
        checks.refuse(op, "view", found, "a pinned one where they are checkpointed: cache.view(seqs, pinned=True)")
    run = _triton_op if chosen == "triton" else paged_reference.operator
    pages = *cache.keys_and_values(layer), view.tables, None, frame_bias
    out, lse, _ = run(
        q, k_self, v_self, *pages, mask, scale, view.number if wants_gradient else -1, None, cache.scales_of(layer)
    )
    return (out, lse) if return_lse else out


def paged_attention(
    q: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    page_bias: Tensor | None = None,
    self_mask: FrameMask | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`paged_frame_attention` for pages that somebody else owns: a serving framework with a cache of its own.

    Args:
        q, self_mask, scale, backend, return_lse: as there.
        k_self, v_self: ``[S, N, kv_heads, head_dim]``, or None where the pages hold the new rows' keys already.
        k_pages, v_pages: ``[pages, page_size, kv_heads, head_dim]``, of equal strides; views of a layout with heads
            before rows serve as well.
        page_table: int32 ``[S, max_pages]``, the pages of a sequence in the order of its tokens; entries past its
            length are not read.
        lengths: int32 ``[S]``, tokens in its pages; all but the last page are full. Read on the device: a captured CUDA
            graph follows both tables.
        page_bias: fp32 ``[S, max_pages]``, what is added to the scores of a page.

    Returns: as there, differentiable in q, k_self and v_self. The tables are copied for the backward; whose the pages
    are until it has run is for their owner to see to.

    Raises ValueError for shapes, dtypes, strides or devices that do not fit, and on the CPU for lengths that the table
    does not hold and pages that there are not.
    """
    op = "paged_attention"
    checks.expect_shape(op, "k_pages", k_pages, "pages", "page_size", "kv_heads", "head_dim")
    checks.expect_like(op, "k_pages", k_pages, v_pages=v_pages)
    if k_pages.stride() != v_pages.stride():
        checks.refuse(op, "v_pages", f"has strides {list(v_pages.stride())}", f"{list(k_pages.stride())} (as k_pages)")
    checks.expect_dtype(op, "k_pages", k_pages, *checks.FLOATS)
    checks.expect_shape(op, "q", q, "S", "N", "heads", k_pages.shape[3])
    checks.expect_dtype(op, "q", q, k_pages.dtype, why="as k_pages")
    checks.expect_device(op, k_pages, q=q, page_table=page_table, lengths=lengths)
    if k_self is None or v_self is None:
        for name, x in (("k_self", k_self), ("v_self", v_self)):
            if x is not None:
                checks.refuse(op, name, "is there alone", "k_self and v_self, or neither of them")
        if self_mask is not None:
            checks.refuse(op, "self_mask", "is there without k_self and v_self", "None")
        k_self, v_self = q.new_empty(2, len(q), 0, *k_pages.shape[2:]).unbind()
        _check_group(op, q, k_pages.shape[2])
    else:
        _check_own(op, q, k_self, v_self, k_pages.shape[2])
    _check_tables(op, q, k_pages, page_table, lengths)
    if page_bias is not None:
        _check_bias(op, "page_bias", page_bias, q, page_table.shape[1])
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        checks.expect_constant(op, name, x)
    scale, mask = _scale(op, scale, q), _table(op, self_mask, q)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_self, v_self)):
        page_table, lengths = page_table.clone(), lengths.clone()
        k_pages, v_pages = k_pages.data, v_pages.data  # their owner writes to others
    run = _triton_op if _choose(op, backend, q, k_self, v_self, k_pages) == "triton" else paged_reference.operator
    out, lse, _ = run(q, k_self, v_self, k_pages, v_pages, page_table, lengths, page_bias, mask, scale)
    return (out, lse) if return_lse else out


def _check_group(op: str, q: Tensor, kv_heads: int) -> None:
    if q.shape[2] % kv_heads:
        checks.refuse(op, "q", f"has {q.shape[2]} heads", f"a multiple of {kv_heads}, the heads of the pages")


def _check_own(op: str, q: Tensor, k_self: Tensor, v_self: Tensor, kv_heads: int) -> None:
    _check_group(op, q, kv_heads)
    shape = (*q.shape[:2], kv_heads, q.shape[3])
    for name, x in (("k_self", k_self), ("v_self", v_self)):
        checks.expect_shape(op, name, x, *shape)
        checks.expect_dtype(op, name, x, q.dtype, why="as q")
    checks.expect_device(op, q, k_self=k_self, v_self=v_self)


def _check_bias(op: str, name: str, bias: Tensor, q: Tensor, columns: int) -> None:
    """Of at least so many columns."""
    checks.expect_shape(op, name, bias, len(q), "frames" if name == "frame_bias" else columns)
    if bias.shape[1] < columns:
        checks.refuse(op, name, f"has {bias.shape[1]} columns", f"{columns} or more, a column per frame that is shown")
    checks.expect_dtype(op, name, bias, torch.float32)
    checks.expect_device(op, q, **{name: bias})
    checks.expect_constant(op, name, bias)


def _check_tables(op: str, q: Tensor, k_pages: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    checks.expect_shape(op, "page_table", page_table, len(q), "max_pages")
    checks.expect_shape(op, "lengths", lengths, len(q))
    for name, x in (("page_table", page_table), ("lengths", lengths)):
        checks.expect_dtype(op, name, x, torch.int32)
    num_pages, page_size, max_pages = *k_pages.shape[:2], page_table.shape[1]
    checks.expect_indices(op, "lengths", lengths, max_pages * page_size + 1)
    if checks.on_host(page_table):
        used = torch.arange(max_pages) * page_size < lengths[:, None]
        checks.expect_indices(op, "page_table", page_table[used], num_pages)


def _table(op: str, mask: FrameMask | None, q: Tensor) -> Tensor | None:
    """The host table of self_mask."""
    if mask is None:
        return None
    if not isinstance(mask, FrameMask):
        checks.refuse(op, "self_mask", f"is a {type(mask).__name__}", "a FrameMask")
    if not torch.compiler.is_compiling():
        mask.check_unchanged()
    tokens = q.shape[1]
    if (mask.num_clips, mask.num_queries, mask.num_keys) != (1, tokens, tokens):
        found = f"has {mask.num_clips} clips, {mask.num_queries} queries and {mask.num_keys} keys"
        checks.refuse(op, "self_mask", found, f"one clip of {tokens} tokens, the new rows of a sequence")
    return mask.pattern_for(q)


def _scale(op: str, scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else finite(op, scale)


def _aligned(*tensors: Tensor) -> bool:
    return all(x.stride(-1) == 1 and not any(s % 8 for s in x.stride()[:3]) for x in tensors)


def _choose(op: str, backend: str, q: Tensor, *others: Tensor) -> str:
    return backends.choose(op, backend, serving(q.device, q.dtype, q.shape[-1], _aligned(q, *others)))


@torch.compiler.assume_constant_result
def _packed() -> bool:
    return torch_private.saved_tensors_are_packed()


def paged_frame_attention_ref(
    q: Tensor, k_self: Tensor, v_self: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` over histories of equal length.

    keys, values ``[S, length + N, kv_heads, head_dim]``: the history; the last N rows are free, the new rows' own go
    there.
    """
    for joined, own in ((keys, k_self), (values, v_self)):
        joined[:, -own.shape[1] :] = own
    tokens, group = q.shape[1], q.shape[2] // keys.shape[2]
    if group > 1:  # the heads that share one of the cache are rows to it
        q = q.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=scale)
    out = out.transpose(1, 2)
    return out if group == 1 else out.unflatten(1, (tokens, group)).transpose(2, 3).flatten(2, 3)
