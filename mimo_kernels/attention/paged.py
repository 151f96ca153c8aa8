"""Attention of one frame to the cached frames of its sequence and to itself, the cached ones in pages."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels import _dispatch

if TYPE_CHECKING:
    from mimo_kernels.cache import CacheView, FrameCache

if _dispatch.triton_available():
    from mimo_kernels.attention import triton_paged


@torch.library.custom_op("mimo_kernels::paged_frame_attention_triton", mutates_args=())
def _triton_op(
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


@torch.library.custom_op("mimo_kernels::paged_frame_attention_reference", mutates_args=())
def _reference_op(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: Tensor,
    lengths: list[int],
    scale: float,
) -> Tensor:
    return paged_frame_attention_ref(q, k_self, v_self, k_pages, v_pages, rows, lengths, scale)


@_triton_op.register_fake
def _(q, k_self, v_self, k_pages, v_pages, page_table, page_rows, num_pages, scale, splits=None):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@_reference_op.register_fake
def _(q, k_self, v_self, k_pages, v_pages, rows, lengths, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def backends(device: torch.device, dtype: torch.dtype, head_dim: int, aligned: bool = True) -> dict[str, list[str]]:
    """backend -> the reasons why it cannot serve such tensors, in order of preference."""
    triton = _dispatch.triton_refusals(device)
    if device.type == "cpu" and dtype == torch.bfloat16:
        triton.append("Triton's interpreter computes bfloat16 products wrongly")
    if head_dim % 8 or head_dim > 256:
        triton.append(f"head_dim {head_dim} is not a multiple of 8 up to 256")
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
    return backends(device, torch.float32 if device.type == "cpu" else torch.bfloat16, 64)


def paged_frame_attention(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    cache: FrameCache,
    *,
    layer: int,
    view: CacheView,
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
        view: the page tables, ``cache.view(seqs)``, one row per sequence of q.
        scale: default ``head_dim ** -0.5``.
        backend: "auto", "triton" or "reference". The Triton kernel reads lengths on the device: captured in a CUDA
            graph, it follows the view. The reference takes them from the host and gathers the pages.

    Returns: ``[S, N, heads, head_dim]``, contiguous.

    Raises ValueError for shapes, dtypes or a view that do not match the cache, and for a backend that cannot serve.
    """
    expected = (len(view.seqs), q.shape[1] if q.ndim == 4 else "N", cache.num_heads, cache.head_dim)
    for name, x in (("q", q), ("k_self", k_self), ("v_self", v_self)):
        if x.shape != expected or x.dtype != cache.dtype or x.device.type != cache.device.type:
            raise ValueError(
                f"{name} must be [{', '.join(map(str, expected))}] {cache.dtype} on {cache.device}, "
                f"got {list(x.shape)} {x.dtype} on {x.device}"
            )
    if view.cache is not cache:
        raise ValueError("the view belongs to another cache")
    if not 0 <= layer < cache.num_layers:
        raise ValueError(f"layer must be in 0..{cache.num_layers - 1}, got {layer}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    aligned = all(x.stride(-1) == 1 and not any(s % 8 for s in x.stride()[:3]) for x in (q, k_self, v_self))
    refusals = backends(q.device, q.dtype, q.shape[-1], aligned)
    chosen = _dispatch.choose("paged_frame_attention", backend, refusals)
    k_pages, v_pages = cache.pool[layer]
    if chosen == "triton":
        return _triton_op(q, k_self, v_self, k_pages, v_pages, view.page_table, view.page_rows, view.num_pages, scale)
    return _reference_op(q, k_self, v_self, k_pages, v_pages, view.rows(), view.lengths, scale)


def paged_frame_attention_ref(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: Tensor,
    lengths: list[int],
    scale: float,
) -> Tensor:
    """Gathers the cached rows of every sequence and runs `scaled_dot_product_attention`.

    k_pages, v_pages ``[pages, page_size, heads, head_dim]``; rows int64 ``[sum(lengths)]``: the rows of the pool that
    each sequence sees, sequence after sequence; lengths: how many each has. Neighbours of equal length are one batch.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seq = row = 0
    for length, group in groupby(lengths):
        size = len(list(group))
        these, cached = slice(seq, seq + size), rows[row : row + size * length].view(size, length)
        k, v = (
            _joined(pages.flatten(0, 1), cached, own[these]).transpose(1, 2)
            for pages, own in ((k_pages, k_self), (v_pages, v_self))
        )
        out[these] = F.scaled_dot_product_attention(q[these].transpose(1, 2), k, v, scale=scale).transpose(1, 2)
        seq, row = seq + size, row + size * length
    return out


def _joined(pool: Tensor, rows: Tensor, own: Tensor) -> Tensor:
    """``[S, length + N, h, d]``: the pool's rows ``[S, length]`` and then the frame's own, each copied once."""
    length = rows.shape[1]
    joined = own.new_empty(len(rows), length + own.shape[1], *own.shape[2:])
    joined[:, length:] = own
    for target, index in zip(joined, rows, strict=True):
        torch.index_select(pool, 0, index, out=target[:length])
    return joined
