"""A backward of frame_attention as most libraries have it, to say what a deterministic one costs: one kernel over tiles
of keys, which has S and dP once and adds to dQ with atomic operations in fp32.

The schedule, the tiles and the statistics per row are those of the deterministic backward (triton/backward.py); of its
two kernels this one spares the first, and pays with the sums in memory, whose order changes from run to run.
"""

import torch
import triton
import triton.language as tl
from attn_peers import Implementation, Unavailable
from torch import Tensor

from mimo_kernels.attention.triton import backward as triton_bwd
from mimo_kernels.attention.triton import operator as triton_op
from mimo_kernels.attention.triton.backward import DELTA_ROWS, NO_ROW, segment_bounds, unpack_row
from mimo_kernels.attention.triton.forward import LOG2E, STRIDES, VARYING, find_tile, next_block, precision, strides
from mimo_kernels.attention.triton.layout import (
    HEADER_CELLS,
    ROW_SEGMENT_CELLS,
    SEGMENT_CELLS,
    TILE_BARE_BLOCKS,
    TILE_END,
    TILE_SEGMENTS,
)
from mimo_kernels.attention.triton.schedule import Config, Plan, make_plan
from mimo_kernels.attention.triton.tiles import (
    add_parts,
    dot_parts,
    load_parts,
    split_head_dim,
    store_parts,
    zero_parts,
)

# Up to so many channels: the largest tiles that compile for sm_90 without local memory; 14 values at 72 channels, where
# smaller tiles need more.
CONFIGS = {80: Config(128, 64, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)}
INTERPRETED = Config(32, 32, 1, 1)


@triton.jit
def add_dq(p_dq, o_m, stride, m_m, b_dst, b_k, factor, PRECISION: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr):
    """dq[rows] += factor dst' k, in memory. m_m None: all rows are there."""
    first = 0
    for i in tl.static_range(len(PARTS)):
        b = tl.dot(b_dst.T, b_k[i], input_precision=PRECISION) * factor
        o_d = first + tl.arange(0, PARTS[i])
        m_x = (o_d < D)[None, :]
        if m_m is not None:
            m_x = m_m[:, None] & m_x
        tl.atomic_add(p_dq + (o_m[:, None] * stride + o_d[None, :]), b, mask=m_x, sem="relaxed")
        first += PARTS[i]


@triton.jit(do_not_specialize=[*VARYING, *(f"{name}_{x}" for name in STRIDES for x in ("q", "k", "v", "dout"))])
def attention_atomic_bwd_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_rows,  # int64 [B, H, L]
    p_dk,  # [B, L, H, D]
    p_dv,
    p_dq,  # fp32 [B, L, H, D], zeros before
    p_plan,
    scale,
    num_queries,
    num_keys,
    num_heads,
    num_tiles,
    repeats,
    band,
    stride_b_q: tl.int64,
    stride_m_q,
    stride_h_q,
    stride_b_k: tl.int64,
    stride_m_k,
    stride_h_k,
    stride_b_v: tl.int64,
    stride_m_v,
    stride_h_v,
    stride_b_dout: tl.int64,
    stride_m_dout,
    stride_h_dout,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,  # keys
    BM: tl.constexpr,  # rows
    PRECISION: tl.constexpr,
):
    head, p_tile, clip = find_tile(p_plan, num_heads, num_tiles, repeats, band)
    batch = tl.program_id(1).to(tl.int64)
    clip_row = clip.to(tl.int64) * (num_queries // repeats)
    clip_key = clip.to(tl.int64) * (num_keys // repeats)
    key_start = tl.load(p_tile)
    key_end = tl.load(p_tile + TILE_END)
    stride_m_q *= 8
    stride_m_k *= 8
    stride_m_v *= 8
    stride_m_dout *= 8
    stride_dq = num_heads * D
    p_q += (batch * stride_b_q + head * stride_h_q) * 8 + clip_row * stride_m_q
    p_k += (batch * stride_b_k + head * stride_h_k) * 8 + (clip_key + key_start) * stride_m_k
    p_v += (batch * stride_b_v + head * stride_h_v) * 8 + (clip_key + key_start) * stride_m_v
    p_dout += (batch * stride_b_dout + head * stride_h_dout) * 8 + clip_row * stride_m_dout
    p_dq += (batch * num_queries + clip_row) * stride_dq + head * D
    p_rows += (batch * num_heads + head) * num_queries + clip_row
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_n = key_start + o_n < key_end
    scale_log2 = scale * LOG2E
    b_k = load_parts(p_k, o_n, stride_m_k, m_n, PARTS, D)
    b_v = load_parts(p_v, o_n, stride_m_v, m_n, PARTS, D)
    b_dk = zero_parts(BN, PARTS)
    b_dv = zero_parts(BN, PARTS)

    p_segment = p_plan + tl.load(p_tile + TILE_SEGMENTS)
    start = tl.load(p_segment)
    end = tl.load(p_segment + 1)
    for _ in range(tl.load(p_tile + TILE_BARE_BLOCKS)):
        b_lse, b_delta = unpack_row(tl.load(p_rows + start + o_m))
        b_q = load_parts(p_q + start.to(tl.int64) * stride_m_q, o_m, stride_m_q, None, PARTS, D)
        b_do = load_parts(p_dout + start.to(tl.int64) * stride_m_dout, o_m, stride_m_dout, None, PARTS, D)
        b_pt = tl.exp2(dot_parts(b_k, b_q, PRECISION) * scale_log2 - b_lse[None, :])  # [BN, BM]
        b_dst = (b_pt * (dot_parts(b_v, b_do, PRECISION) - b_delta[None, :])).to(p_q.dtype.element_ty)
        b_dv = add_parts(b_dv, b_pt.to(p_q.dtype.element_ty), b_do, PRECISION)
        b_dk = add_parts(b_dk, b_dst, b_q, PRECISION)
        add_dq(p_dq + start.to(tl.int64) * stride_dq, o_m, stride_dq, None, b_dst, b_k, scale, PRECISION, PARTS, D)
        p_segment, start, end = next_block(p_segment, start, end, BM, SEGMENT_CELLS)

    num_blocks = tl.load(p_segment)
    p_segment += HEADER_CELLS
    start = tl.load(p_segment)
    end = tl.load(p_segment + 1)
    for _ in tl.range(num_blocks, num_stages=1):
        o_row = start + o_m
        m_m = o_row < end
        b_lse, b_delta = unpack_row(tl.load(p_rows + o_row, mask=m_m, other=NO_ROW))
        b_q = load_parts(p_q + start.to(tl.int64) * stride_m_q, o_m, stride_m_q, m_m, PARTS, D)
        b_do = load_parts(p_dout + start.to(tl.int64) * stride_m_dout, o_m, stride_m_dout, m_m, PARTS, D)
        b_both = segment_bounds(p_segment, o_row, key_start)
        b_seen = (o_n[:, None] - (b_both & 0xFFFF)[None, :]).to(tl.uint32) < (b_both >> 16).to(tl.uint32)[None, :]
        b_pt = tl.exp2(dot_parts(b_k, b_q, PRECISION) * scale_log2 - b_lse[None, :])
        b_pt = tl.where(b_seen, b_pt, 0.0)
        b_dst = (b_pt * (dot_parts(b_v, b_do, PRECISION) - b_delta[None, :])).to(p_q.dtype.element_ty)
        b_dv = add_parts(b_dv, b_pt.to(p_q.dtype.element_ty), b_do, PRECISION)
        b_dk = add_parts(b_dk, b_dst, b_q, PRECISION)
        add_dq(p_dq + start.to(tl.int64) * stride_dq, o_m, stride_dq, m_m, b_dst, b_k, scale, PRECISION, PARTS, D)
        p_segment, start, end = next_block(p_segment, start, end, BM, ROW_SEGMENT_CELLS)

    row = (batch * num_keys + clip_key + key_start) * stride_dq + head * D
    store_parts(p_dk + row, o_n, stride_dq, m_n, b_dk, scale, PARTS, D)
    store_parts(p_dv + row, o_n, stride_dq, m_n, b_dv, 1.0, PARTS, D)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """dq, dk, dv of contiguous [1, L, H, D] tensors with the default scale."""
    batch, queries, heads, dim = q.shape
    rows = lse.new_empty((batch, heads, queries), dtype=torch.int64)
    triton_bwd.frame_attention_rows_kernel[(triton.cdiv(queries, DELTA_ROWS) * heads, batch)](
        out, dout, lse, lse, rows, queries, heads, *strides(dout), D=dim, BM=DELTA_ROWS, HAS_DLSE=False, num_warps=4
    )  # fmt: skip
    dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
    attention_atomic_bwd_kernel[(plan.num_tiles * plan.repeats * heads, batch)](
        q,
        k,
        v,
        dout,
        rows,
        dk,
        dv,
        dq,
        plan.data,
        dim**-0.5,
        queries,
        k.shape[1],
        heads,
        plan.num_tiles,
        plan.repeats,
        plan.band,
        *strides(q, k, v, dout),
        D=dim,
        PARTS=split_head_dim(dim),
        BN=plan.config.tile,
        BM=plan.config.block,
        PRECISION=precision(q.dtype == torch.float32),
        num_warps=plan.config.num_warps,
        num_stages=plan.config.num_stages,
    )
    return dq.to(q.dtype), dk, dv


class AtomicBackward(Implementation):
    """Forward as frame_attention's Triton kernels; the backward adds to dq with atomic operations."""

    name = "frame_attention, atomic backward"

    def __init__(self, mask, device, heads, head_dim, kv_heads=None):
        super().__init__(mask, device, heads, head_dim, kv_heads)
        q = torch.empty(0, heads, head_dim, device=device)
        if reasons := triton_op.refusals(q, q, q, mask):
            raise Unavailable("; ".join(reasons))
        if self.kv_heads != heads:
            raise Unavailable("heads that share keys are not written")
        channels = sum(split_head_dim(head_dim))
        config = INTERPRETED if device.type != "cuda" else next(c for limit, c in CONFIGS.items() if channels <= limit)
        self.plan, _ = make_plan({}, "dkv", mask.pattern, mask.repeats, device, heads, (config,), mask.num_keys)

    def executed(self, direction, dtype):
        if direction == "forward":
            return super().executed(direction, dtype)
        return 10 * self.plan.executed_pairs * self.heads * sum(split_head_dim(self.head_dim))

    def __call__(self, q, k, v):
        return _Atomic.apply(q, k, v, self)


class _Atomic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, peer: AtomicBackward):
        mask = peer.mask
        q, k, v = (x.contiguous().unsqueeze(0) for x in (q, k, v))
        out, lse = triton_op.attention(q, k, v, mask, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = peer.plan
        return out.squeeze(0)

    @staticmethod
    def backward(ctx, dout):
        gradients = backward(dout.contiguous().unsqueeze(0), *ctx.saved_tensors, ctx.plan)
        return *(x.squeeze(0) for x in gradients), None
