"""Attention of one frame to the cached frames of its sequence and to itself, the cached ones in pages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels.attention.frame import finite
from mimo_kernels.core import backends, checks, launch
from mimo_kernels.core.register import register

if TYPE_CHECKING:
    from mimo_kernels.cache.pages import CacheView, FrameCache, ViewHead

if backends.triton_available():
    from mimo_kernels.attention.triton import paged as triton_paged


def _paged_triton(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_rows: Tensor,
    num_pages: Tensor,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # a launch goes to the current device
        return triton_paged.launch(
            q, k_self, v_self, k_pages, v_pages, page_table, page_rows, num_pages, scale, splits=splits
        )


def _paged_fake(q, k_self, v_self, k_pages, v_pages, page_table, page_rows, num_pages, scale, splits=None):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _paged_sample(tokens: int) -> tuple:
    k_pages, v_pages = torch.randn(2, 3, 16, 2, 8).unbind()
    page_table, page_rows = torch.tensor([[2, 0]]), torch.tensor([[16, 5]])
    tables = (table.to(torch.int32) for table in (page_table, page_rows, torch.tensor([2])))
    return *torch.randn(3, 1, tokens, 2, 8).unbind(), k_pages, v_pages, *tables, 0.35


_triton_op = register(
    "paged_frame_attention_triton(Tensor q, Tensor k_self, Tensor v_self, Tensor k_pages, Tensor v_pages,"
    " Tensor page_table, Tensor page_rows, Tensor num_pages, float scale, SymInt? splits=None) -> Tensor",
    _paged_triton,
    fake=_paged_fake,
    sample=_paged_sample,
)


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
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one frame per sequence to the cached frames of the sequence and to itself; forward only.

        out[s] = softmax(scale * q[s] [K_cached[s]; k_self[s]]^T) [V_cached[s]; v_self[s]]

    Nothing in the frame is hidden from the rest of it, and a sequence without cached frames attends to itself alone
    (the null branch of history guidance: ``None`` in the view; MiMo, Eq. 27).

    Args:
        q, k_self, v_self: ``[S, N, heads, head_dim]`` in the dtype and on the device of the cache, after QK-norm and
            RoPE. Any strides as long as channels are contiguous: slices of a projection need no copy.
        cache: the `FrameCache` that holds the pages of `layer`.
        view: the page tables, ``cache.view(seqs)``, one row per sequence of q. Its `first` rows are a view as well.
        scale: default ``head_dim ** -0.5``.
        backend: "auto", "triton" or "reference". The Triton kernel reads lengths on the device: captured in a CUDA
            graph, it follows the view. The reference takes them from the host, and gathers the pages once per refresh.

    Returns: ``[S, N, heads, head_dim]``, contiguous.

    Raises ValueError for shapes, dtypes or a view that do not match the cache, for a view that is older than it, for a
    backend that cannot serve, and where a gradient would be lost.
    """
    op = "paged_frame_attention"
    if not hasattr(view, "seqs"):
        checks.refuse(op, "view", f"is a {type(view).__name__}", "what cache.view(seqs) returns")
    cache.check_view(view)
    checks.expect_shape(op, "q", q, len(view.seqs), "N", cache.num_heads, cache.head_dim)
    checks.expect_dtype(op, "q", q, cache.dtype, why="as the cache")
    checks.expect_device(op, cache.pool, q=q)
    checks.expect_like(op, "q", q, k_self=k_self, v_self=v_self)
    checks.expect_count(op, "layer", layer, high=cache.num_layers - 1)
    checks.expect_no_gradient(op, q, k_self, v_self)
    scale = q.shape[-1] ** -0.5 if scale is None else finite(op, scale)
    aligned = all(x.stride(-1) == 1 and not any(s % 8 for s in x.stride()[:3]) for x in (q, k_self, v_self))
    refusals = serving(q.device, q.dtype, q.shape[-1], aligned)
    chosen = backends.choose(op, backend, refusals)
    if chosen == "triton":
        k_pages, v_pages = cache.pool[layer]
        return _triton_op(q, k_self, v_self, k_pages, v_pages, view.page_table, view.page_rows, view.num_pages, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for some, keys, values in view.joined(layer, q.shape[1]):
        out[some] = paged_frame_attention_ref(q[some], k_self[some], v_self[some], keys, values, scale)
    return out


def paged_frame_attention_ref(
    q: Tensor, k_self: Tensor, v_self: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` over histories of equal length.

    keys, values ``[S, length + N, heads, head_dim]``: the history; the last N rows are free, the frame's own go there.
    """
    for joined, own in ((keys, k_self), (values, v_self)):
        joined[:, -own.shape[1] :] = own
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)
