"""paged_frame_attention in plain PyTorch: the cached keys of a sequence are gathered out of its pages, the new rows'
own part is `frame_attention`'s, and the two are added by their log-sum-exp.

A bias that a whole frame has in common adds to the log-sum-exp of that frame alone: with one, every frame is a part.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels.attention import reference
from mimo_kernels.attention.mask import FrameMask
from mimo_kernels.attention.paged_operator import register_paged
from mimo_kernels.core import page_tables

MAX_SCORES = 1 << 24  # of the backward, at a time


@functools.lru_cache(64)
def all_see_all(tokens: int) -> Tensor:
    """The table of a mask, always the same tensor: the kernels' schedules are kept with it."""
    return FrameMask.bidirectional([[tokens]]).pattern


class Part(NamedTuple):
    """Cached keys and values ``[tokens, heads, D]`` of a sequence, with the bias that they have in common."""

    sequence: int
    keys: Tensor
    values: Tensor
    bias: Tensor | None


def cached_parts(
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    dtype: torch.dtype,
) -> list[Part]:
    """What the pages hold, in dtype where they are scaled. Reads the tables on the host."""

    def gathered(pages: Tensor, index: tuple[Tensor, Tensor], which: int) -> Tensor:
        if scales is None:
            return pages[index]
        numbers = pages.view(torch.uint8)[index].view(pages.dtype).float()
        return (numbers * scales[which, index[0], :, None]).to(dtype)

    page_size, parts = k_pages.shape[1], []
    offsets = torch.arange(page_size, device="cpu")
    for sequence, (pages, used, frames) in enumerate(_tables_on_host(tables, lengths, page_size)):
        seen = offsets < used[:, None]  # [pages, page_size]
        numbers, rows = pages[:, None].expand_as(seen)[seen].long(), offsets.expand_as(seen)[seen]
        counts = [len(numbers)] if bias is None else _counts(frames, used)
        starts = numbers.split(counts), rows.split(counts)
        for place, (some, at) in enumerate(zip(*starts, strict=True)):
            if len(some):
                index = some.to(k_pages.device), at.to(k_pages.device)
                both = gathered(k_pages, index, 0), gathered(v_pages, index, 1)
                parts.append(Part(sequence, *both, None if bias is None else bias[sequence, place]))
    return parts


def _tables_on_host(tables: Tensor, lengths: Tensor | None, page_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per sequence: page numbers, rows in use, and which bias belongs to each page."""
    if lengths is None:
        parts = page_tables.parts_of(tables.cpu())
        counts = enumerate(parts.num_pages.tolist())
        return [(parts.pages[s, :n], parts.rows[s, :n], parts.frames[s, :n]) for s, n in counts]
    found = []
    places = torch.arange(tables.shape[1], device="cpu")
    for pages, length in zip(tables.cpu(), lengths.tolist(), strict=True):
        used = (length - places * page_size).clamp(0, page_size)
        found.append((pages[used > 0], used[used > 0], places[used > 0]))
    return found


def _counts(frames: Tensor, used: Tensor) -> list[int]:
    """Tokens of every frame; pages come frame after frame."""
    counts = torch.zeros(int(frames.max()) + 1 if len(frames) else 0, dtype=torch.int64, device="cpu")
    return counts.index_add_(0, frames.long(), used.long()).tolist()


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[N, H, D] -> [heads of the cache, N * group, D], fp32 on the CPU."""
    x = x.float() if x.device.type == "cpu" else x
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """[heads of the cache, N * group, ...] -> [N, H, ...]."""
    return x.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


def forward(q, k_self, v_self, k_pages, v_pages, tables, lengths, bias, mask, scale, splits=None, scales=None):
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = q.new_full((len(q), q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
    if not q.numel():
        return out.to(q.dtype), lse
    if k_self.shape[1]:
        single = [x.float() if x.device.type == "cpu" else x for x in (q, k_self, v_self)]
        table = all_see_all(q.shape[1]) if mask is None else mask
        out, lse = torch.ops.mimo_kernels.frame_attention_reference(*single, table, 1, scale)
        out = out.float()
    for part in cached_parts(k_pages, v_pages, tables, lengths, bias, scales, q.dtype):
        rows, kv_heads = q[part.sequence], part.keys.shape[1]
        q_rows, keys, values = (_by_head(x, kv_heads)[None] for x in (rows, part.keys, part.values))
        attended = reference._attend(q_rows, keys, values, None, scale)
        part_out, part_lse = (_by_token(x[0], len(rows)) for x in attended)  # [N, H, ...]
        part_lse = part_lse.T if part.bias is None else part_lse.T + part.bias
        s = part.sequence
        both = torch.logaddexp(lse[s], part_lse)  # [H, N]
        for weighed, its_lse in ((out[s], lse[s]), (part_out, part_lse)):
            weight = torch.where(its_lse == -torch.inf, 0.0, torch.exp(its_lse - both))
            weighed *= weight.T[..., None]
        out[s] += part_out
        lse[s] = both
    return out.to(q.dtype), lse


def backward(
    dout, dlse, q, k_self, v_self, out, lse, k_pages, v_pages, tables, lengths, bias, mask, scale, scales=None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (q, k_self, v_self))
    if q.numel():
        if k_self.shape[1]:
            table = all_see_all(q.shape[1]) if mask is None else mask
            own = torch.ops.mimo_kernels.frame_attention_reference_backward
            single = [x.float() if x.device.type == "cpu" else x for x in (dout, q, k_self, v_self, out)]
            dq, dk, dv = own(single[0], dlse, *single[1:], lse, table, 1, scale)
            dq = dq.float()
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)  # [S, H, N]
        delta = delta if dlse is None else delta - dlse
        for part in cached_parts(k_pages, v_pages, tables, lengths, bias, scales, q.dtype):
            s = part.sequence
            dq[s] += _dq(dout[s], q[s], lse[s], delta[s], part, scale)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _dq(dout: Tensor, q: Tensor, lse: Tensor, delta: Tensor, part: Part, scale: float) -> Tensor:
    """What a part adds to dq [N, H, D], fp32: some rows at a time, so that the scores stay small."""
    tokens, kv_heads = len(q), part.keys.shape[1]
    keys, values = (x.float().transpose(0, 1) for x in (part.keys, part.values))  # [kv_heads, keys, D]
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    if part.bias is not None:
        lse = lse - part.bias
    dout, q = (_by_head(x.float(), kv_heads) for x in (dout, q))  # [kv_heads, N * group, D]
    lse, delta = (_by_head(x.T[..., None], kv_heads) for x in (lse, delta))  # [kv_heads, N * group, 1]
    chunk = max(1, MAX_SCORES // (kv_heads * keys.shape[1]))
    dq = []
    for rows in zip(*(x.split(chunk, 1) for x in (dout, q, lse, delta)), strict=True):
        some_dout, some_q, some_lse, some_delta = rows
        p = torch.exp(scale * some_q @ keys.mT - some_lse)
        dq.append(scale * (p * (some_dout @ values.mT - some_delta)) @ keys)
    return _by_token(torch.cat(dq, 1), tokens)


operator = register_paged("paged_frame_attention_reference", forward, backward)
