"""frame_attention in plain PyTorch: every frame is one call of a fused attention of torch on the keys it sees, never a
dense mask.

One interval of keys is a view, several are concatenated. Clips that are alike run as one batch. Query heads that share
a key head are more rows of a frame: all of them see the same keys. On the CPU frames of a few tokens (one each, in the
temporal layers of a factorized network) would be a call per row: there neighbouring ones share a call, whose small mask
tells their keys apart. Forward and backward are two operators,
`mimo_kernels::frame_attention_reference` and its `_backward`; between them only q, k, v, out and the log-sum-exp are
kept.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels.attention.mask import FrameMask
from mimo_kernels.attention.operator import register_attention
from mimo_kernels.core import torch_private

DEVICES = ("cpu", "cuda", "meta")
FEW_ROWS = 4  # frames of so many rows at most share a call
CALL_ROWS = 64  # rows that share one at most
WASTE = 4  # pairs that are computed and masked out: up to so many times those that are allowed


class _Call(NamedTuple):
    """Rows that attend together: to all of `keys`, or to those that `allowed`, bool [rows, keys], says."""

    rows: slice
    keys: list[slice]
    allowed: Tensor | None = None


def refusals(device: torch.device) -> list[str]:
    return [] if device.type in DEVICES else [f"the tensors are on {device.type}, expected {', '.join(DEVICES)}"]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, L, h, d], k, v [B, M, h_kv, d] -> out [B, L, h, d], lse fp32 [B, h, L]; both differentiable. B is 1 unless
    the mask has one clip."""
    return _operator(q, k, v, mask.pattern_for(q), mask.repeats, scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, repeats: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = q.new_zeros(q.shape)
    lse = q.new_full((batch, heads, tokens), -torch.inf, dtype=torch.float32)
    if not out.numel():  # torch's fused attention divides by the number of heads
        return out, lse
    q, k, v = (_split_clips(_computable(x), repeats) for x in (q, k, v))
    out_clips, lse_clips = _split_clips(out, repeats), _split_clips_lse(lse, repeats)
    kv_heads = k.shape[1]
    for rows, keys, allowed in _calls(frames, share=q.device.type == "cpu"):
        q_rows = _fold(q[:, :, rows], kv_heads)
        bias = _bias(allowed, q, heads // kv_heads)
        out_rows, lse_rows = _attend(q_rows, _take(k, keys), _take(v, keys), bias, scale)
        out_clips[:, :, rows], lse_clips[:, :, rows] = _unfold(out_rows, heads), _unfold(lse_rows, heads)
    return out, lse


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    frames: Tensor,
    repeats: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, heads, head_dim, kv_heads = q.dtype, q.shape[2], q.shape[-1], k.shape[2]
    if not q.numel():
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        return dq, dk, dv
    # Keys are shared by many frames: their gradients add up in fp32, in the order of the frames.
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    dq_clips, dk_clips, dv_clips = (_split_clips(x, repeats) for x in (dq, dk, dv))
    lse = _split_clips_lse(lse, repeats)
    dout, q, k, v, out = (_split_clips(_computable(x), repeats) for x in (dout, q, k, v, out))
    if dlse is not None:
        # d lse enters as dP = dO V^T + dlse: one more channel that is dlse in dO and 1 in V. It is 0 in out, so that
        # sum(dO * out) stays as it is.
        dlse = _split_clips_lse(dlse, repeats).to(dout.dtype).unsqueeze(-1)
        q, k, out = (F.pad(x, (0, 8)) for x in (q, k, out))
        v = F.pad(F.pad(v, (0, 1), value=1.0), (0, 7))
        dout = F.pad(torch.cat([dout, dlse], -1), (0, 7))

    for rows, keys, allowed in _calls(frames, share=q.device.type == "cpu"):
        dout_rows, q_rows, out_rows, lse_rows = (_fold(x[:, :, rows], kv_heads) for x in (dout, q, out, lse))
        there = dout_rows, q_rows, _take(k, keys), _take(v, keys), out_rows, lse_rows
        dq_rows, dk_rows, dv_rows = _attend_backward(*there, _bias(allowed, q, heads // kv_heads), scale)
        dq_clips[:, :, rows] = _unfold(dq_rows, heads)[..., :head_dim]
        start = 0
        for interval in keys:
            part = slice(start, start + interval.stop - interval.start)
            dk_clips[:, :, interval] += dk_rows[:, :, part, :head_dim]
            dv_clips[:, :, interval] += dv_rows[:, :, part, :head_dim]
            start = part.stop
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _calls(frames: Tensor, *, share: bool) -> list[_Call]:
    """What is computed together: every group of rows that sees any key, small neighbours in one call if they `share`
    it."""
    calls: list[list[_Call]] = []
    for row_start, row_end, *bounds in frames.tolist():
        keys = [slice(start, end) for start, end in zip(bounds[::2], bounds[1::2]) if end > start]
        if not keys:
            continue
        group = _Call(slice(row_start, row_end), keys)
        if share and calls and _together(calls[-1], group):
            calls[-1].append(group)
        else:
            calls.append([group])
    return [_merged(groups) if len(groups) > 1 else groups[0] for groups in calls]


def _together(groups: list[_Call], group: _Call) -> bool:
    """Whether a group joins those of a call: small ones, adjacent, that see much the same keys. Those of another clip
    see none of the same: hidden keys are multiplied by 0, and 0 times NaN is NaN, which has to stay in its clip."""
    few = all(_count([rows]) <= FEW_ROWS for rows in (groups[-1].rows, group.rows))
    rows = slice(groups[0].rows.start, group.rows.stop)
    if not few or groups[-1].rows.stop != group.rows.start or _count([rows]) > CALL_ROWS:
        return False
    seen = _union(groups)
    if not any(part.start < key.stop and key.start < part.stop for part in seen for key in group.keys):
        return False
    allowed = sum(_count([some.rows]) * _count(some.keys) for some in (*groups, group))
    computed = _count([rows]) * _count(_union([*groups, group]))
    return computed <= max(CALL_ROWS**2, (1 + WASTE) * allowed)


def _merged(groups: list[_Call]) -> _Call:
    """One call of several groups: the keys that any of them sees, and who sees which."""
    first, keys = groups[0].rows.start, _union(groups)
    column = torch.cat([torch.arange(part.start, part.stop, device="cpu") for part in keys])
    allowed = torch.zeros(groups[-1].rows.stop - first, len(column), dtype=torch.bool, device="cpu")
    for rows, seen, _ in groups:
        for part in seen:
            allowed[rows.start - first : rows.stop - first] |= (column >= part.start) & (column < part.stop)
    return _Call(slice(first, groups[-1].rows.stop), keys, allowed)


def _union(groups: list[_Call]) -> list[slice]:
    """The keys that any of the groups sees, as disjoint intervals in their order."""
    union: list[slice] = []
    for part in sorted((part for group in groups for part in group.keys), key=lambda part: part.start):
        if union and part.start <= union[-1].stop:
            union[-1] = slice(union[-1].start, max(union[-1].stop, part.stop))
        else:
            union.append(part)
    return union


def _count(parts: list[slice]) -> int:
    return sum(part.stop - part.start for part in parts)


def _bias(allowed: Tensor | None, q: Tensor, heads_per_kv: int) -> Tensor | None:
    """What is added to the scores of `_fold`ed rows: 0 where a pair is allowed, else -inf."""
    if allowed is None:
        return None
    allowed = allowed.repeat(heads_per_kv, 1)
    return torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, -torch.inf)


def _computable(x: Tensor) -> Tensor:
    """The fused kernels want unit stride in the last dimension. On the CPU half types run in fp32: it is more exact,
    and faster in the backward."""
    x = x.float() if x.device.type == "cpu" else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _split_clips(x: Tensor, repeats: int) -> Tensor:
    """A view [clips, h, rows per clip, d] of [B, L, h, d]; either B or `repeats` is 1."""
    batch, tokens, heads, dim = x.shape
    return x.view(batch * repeats, tokens // repeats, heads, dim).transpose(1, 2)


def _split_clips_lse(lse: Tensor, repeats: int) -> Tensor:
    """A view [clips, h, rows per clip] of [B, h, L]."""
    batch, heads, tokens = lse.shape
    return lse.view(batch, heads, repeats, tokens // repeats).transpose(1, 2).flatten(0, 1)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[clips, h, rows, ..] -> [clips, h_kv, h / h_kv * rows, ..]: the rows of all heads that share keys."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _unfold(x: Tensor, heads: int) -> Tensor:
    """What `_fold` did, undone."""
    return x if x.shape[1] == heads else x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)


def _take(x: Tensor, keys: list[slice]) -> Tensor:
    parts = [x[:, :, interval] for interval in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one call, all [clips, h, rows or keys, d], with its log-sum-exp [clips, h, rows]. bias: [rows,
    keys], on the CPU alone."""
    if q.device.type == "cpu":
        return torch_private.cpu_attention(q, k, v, attn_mask=bias, scale=scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch_private.cuda_attention(q, k, v, None, None, None, None, None, 0.0, 0, True, scale=scale)
    return out.transpose(1, 2), lse[:, :, : q.shape[1]]


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        given = dout, q, k, v, out, lse, 0.0, False
        return torch_private.cpu_attention_backward(*given, attn_mask=bias, scale=scale)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    rows, keys = q.shape[1], k.shape[1]
    # The kernel reads the log-sum-exp in 32s. One split of the keys keeps it deterministic.
    lse = F.pad(lse, (0, -rows % 32), value=torch.inf).contiguous()
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # seed and offset of the dropout that is not there
    gradients = torch_private.cuda_attention_backward(
        dout,
        q,
        k,
        v,
        None,
        out,
        None,
        None,
        rows,
        keys,
        lse,
        0.0,
        unused,
        unused,
        0,
        False,
        scale=scale,
        num_splits_key=1,
    )
    return tuple(gradient.transpose(1, 2) for gradient in gradients[:3])


_operator = register_attention("frame_attention_reference", _forward, _backward)
