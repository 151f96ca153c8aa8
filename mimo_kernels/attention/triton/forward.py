"""Forward Triton kernel of frame_attention, and what it shares with the backward kernels.

    out[i] = sum_j exp(scale * q[i] . k[j] - lse[i]) v[j]        lse[i] = log sum_j exp(scale * q[i] . k[j])

    j over the keys that row i sees

One program computes one tile of rows of one head. The schedule (csrc/plan.h) gives it two lists: *bare* segments,
whole blocks of keys that all its rows see, run in one loop without any test; and *masked* segments, where every row has
two bounds. Softmax does not care about the order.

Tiles hold the head dimension in parts (tiles.py). Rows, keys and bounds count from the first of the clip, strides in
steps of 8 elements (so that the compiler sees that loads are aligned), and addresses are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimo_kernels.attention.triton.layout import (
    BOUNDS_CELLS,
    BOUNDS_END,
    BOUNDS_START,
    HEADER_CELLS,
    KEY_SEGMENT_BOUNDS,
    KEY_SEGMENT_CELLS,
    SEGMENT_CELLS,
    TILE_BARE_BLOCKS,
    TILE_CELLS,
    TILE_END,
    TILE_SEGMENTS,
)
from mimo_kernels.attention.triton.schedule import Plan
from mimo_kernels.attention.triton.tiles import (
    add_parts,
    dot_parts,
    load_parts,
    scale_parts,
    split_head_dim,
    store_parts,
    zero_parts,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The running maximum of a row that has seen no key: finite, so that differences with -inf are no NaN.
NEVER = tl.constexpr(-1.0e38)

# What changes from call to call: no value of these may compile the kernel anew.
VARYING = ("num_queries", "num_keys", "num_heads", "num_tiles", "repeats", "band")
STRIDES = ("stride_b", "stride_m", "stride_h")


@triton.jit
def find_tile(p_plan, num_heads, num_tiles, repeats, band):
    """This program's head, the pointer to its tile and the clip that is in. Heads change fastest: a row's heads lie
    side by side, so programs that run at the same time share the memory they read. The schedule of one clip serves
    `repeats` clips, in bands of `band` clips at a time."""
    pid = tl.program_id(0)
    item = pid // num_heads
    band_tiles = num_tiles * band
    first = item // band_tiles * band
    inside = item % band_tiles
    clips = tl.minimum(band, repeats - first)
    return pid % num_heads, p_plan + inside // clips * TILE_CELLS, first + inside % clips


@triton.jit
def next_block(p_segment, start, end, BLOCK: tl.constexpr, SEGMENT: tl.constexpr):
    """Steps to the next block of keys or rows, and to the next segment behind the last one. No branch: it would stop
    the pipelining."""
    done = start + BLOCK >= end
    p_segment += tl.where(done, SEGMENT, 0)
    start = tl.where(done, tl.load(p_segment), start + BLOCK)
    return p_segment, start, tl.load(p_segment + 1)


@triton.jit
def row_bounds(p_segment, rows):
    """Bounds of the keys that rows see in a masked segment of plan_rows, from those behind it, each for the rows from
    its first one on; and the pointer to what follows. Rows past the end of the tile get the last ones."""
    lo = tl.zeros_like(rows)
    hi = tl.zeros_like(rows)
    num_bounds = tl.load(p_segment + KEY_SEGMENT_BOUNDS)
    p_segment += KEY_SEGMENT_CELLS
    for _ in range(num_bounds):
        reached = rows >= tl.load(p_segment)
        lo = tl.where(reached, tl.load(p_segment + BOUNDS_START), lo)
        hi = tl.where(reached, tl.load(p_segment + BOUNDS_END), hi)
        p_segment += BOUNDS_CELLS
    return lo, hi, p_segment


@triton.jit
def softmax_step(b_s, b_top, b_v, b_acc, b_max, b_sum, scale_log2, PRECISION: tl.constexpr):
    """One step of the running softmax with the products b_s [BM, BN], their largest in every row b_top and the values
    b_v."""
    b_new = tl.maximum(b_max, b_top * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_decay = tl.exp2(b_max - b_new)
    b_acc = add_parts(scale_parts(b_acc, b_decay[:, None]), b_p.to(b_v[0].dtype), b_v, PRECISION)
    return b_acc, b_new, b_sum * b_decay + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=[*VARYING, *(f"{name}_{x}" for name in STRIDES for x in "qkv")])
def frame_attention_fwd_kernel(
    p_q,
    p_k,  # of fewer heads where HEADS_PER_KV of q share one
    p_v,
    p_out,  # [B, L, H, D]
    p_lse,  # fp32 [B, H, L]
    p_plan,
    scale_log2,
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
    D: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    head, p_tile, clip = find_tile(p_plan, num_heads, num_tiles, repeats, band)
    kv_head = head // HEADS_PER_KV
    batch = tl.program_id(1).to(tl.int64)
    clip_row = clip.to(tl.int64) * (num_queries // repeats)
    clip_key = clip.to(tl.int64) * (num_keys // repeats)
    row_start = tl.load(p_tile)
    row_end = tl.load(p_tile + TILE_END)

    stride_m_q *= 8
    stride_m_k *= 8
    stride_m_v *= 8
    p_q += (batch * stride_b_q + head * stride_h_q) * 8 + (clip_row + row_start) * stride_m_q
    p_k += (batch * stride_b_k + kv_head * stride_h_k) * 8 + clip_key * stride_m_k
    p_v += (batch * stride_b_v + kv_head * stride_h_v) * 8 + clip_key * stride_m_v

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_m = row_start + o_m < row_end
    b_q = load_parts(p_q, o_m, stride_m_q, m_m, PARTS, D)
    b_acc = zero_parts(BM, PARTS)
    b_max = tl.full([BM], NEVER, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    # Bare blocks: one loop over all of them.
    p_segment = p_plan + tl.load(p_tile + TILE_SEGMENTS)
    start = tl.load(p_segment)
    end = tl.load(p_segment + 1)
    num_bare = tl.load(p_tile + TILE_BARE_BLOCKS)
    if not AHEAD:
        for _ in range(num_bare):
            b_k = load_parts(p_k + start.to(tl.int64) * stride_m_k, o_n, stride_m_k, None, PARTS, D)
            b_v = load_parts(p_v + start.to(tl.int64) * stride_m_v, o_n, stride_m_v, None, PARTS, D)
            b_s = dot_parts(b_q, b_k, PRECISION)
            b_acc, b_max, b_sum = softmax_step(b_s, tl.max(b_s, 1), b_v, b_acc, b_max, b_sum, scale_log2, PRECISION)
            p_segment, start, end = next_block(p_segment, start, end, BN, SEGMENT_CELLS)
    elif num_bare > 0:
        # The products of the next block are under way during the softmax of this one, for programs that have the
        # multiprocessor to themselves. The values walk through the segments on their own: carried over from the keys,
        # their loads would not be pipelined.
        b_k = load_parts(p_k + start.to(tl.int64) * stride_m_k, o_n, stride_m_k, None, PARTS, D)
        b_s = dot_parts(b_q, b_k, PRECISION)
        b_top = tl.max(b_s, 1)
        p_values, value_start, value_end = p_segment, start, end
        p_segment, start, end = next_block(p_segment, start, end, BN, SEGMENT_CELLS)
        for _ in range(num_bare - 1):
            b_k = load_parts(p_k + start.to(tl.int64) * stride_m_k, o_n, stride_m_k, None, PARTS, D)
            b_v = load_parts(p_v + value_start.to(tl.int64) * stride_m_v, o_n, stride_m_v, None, PARTS, D)
            b_next = dot_parts(b_q, b_k, PRECISION)
            b_acc, b_max, b_sum = softmax_step(b_s, b_top, b_v, b_acc, b_max, b_sum, scale_log2, PRECISION)
            b_s = b_next
            b_top = tl.max(b_next, 1)
            p_values, value_start, value_end = next_block(p_values, value_start, value_end, BN, SEGMENT_CELLS)
            p_segment, start, end = next_block(p_segment, start, end, BN, SEGMENT_CELLS)
        b_v = load_parts(p_v + value_start.to(tl.int64) * stride_m_v, o_n, stride_m_v, None, PARTS, D)
        b_acc, b_max, b_sum = softmax_step(b_s, b_top, b_v, b_acc, b_max, b_sum, scale_log2, PRECISION)

    # The masked segments follow the bare ones.
    num_segments = tl.load(p_segment)
    p_segment += HEADER_CELLS
    for _ in range(num_segments):
        segment_start = tl.load(p_segment)
        segment_end = tl.load(p_segment + 1)
        b_lo, b_hi, p_segment = row_bounds(p_segment, row_start + o_m)
        for block in tl.range(segment_start, segment_end, BN, num_stages=2):
            o_key = block + o_n
            m_n = o_key < segment_end
            b_k = load_parts(p_k + tl.cast(block, tl.int64) * stride_m_k, o_n, stride_m_k, m_n, PARTS, D)
            b_v = load_parts(p_v + tl.cast(block, tl.int64) * stride_m_v, o_n, stride_m_v, m_n, PARTS, D)
            b_s = dot_parts(b_q, b_k, PRECISION)
            b_seen = (o_key[None, :] >= b_lo[:, None]) & (o_key[None, :] < b_hi[:, None])
            b_s = tl.where(b_seen, b_s, float("-inf"))
            b_acc, b_max, b_sum = softmax_step(b_s, tl.max(b_s, 1), b_v, b_acc, b_max, b_sum, scale_log2, PRECISION)

    # Read again, not kept: registers are short.
    row_start = tl.load(p_segment)
    m_m = row_start + o_m < tl.load(p_segment + 1)
    b_any = b_sum > 0.0
    b_sum = tl.where(b_any, b_sum, 1.0)
    row = batch * num_queries + clip_row + row_start
    stride_out = num_heads * D
    store_parts(p_out + row * stride_out + head * D, o_m, stride_out, m_m, b_acc, (1.0 / b_sum)[:, None], PARTS, D)
    p_lse += (batch * num_heads + head) * num_queries + clip_row + row_start
    tl.store(p_lse + o_m, tl.where(b_any, (b_max + tl.log2(b_sum)) * LN2, float("-inf")), mask=m_m)


def strides(*tensors: Tensor) -> list[int]:
    """Batch, row and head strides of [B, L, H, D] tensors, in steps of 8 elements."""
    return [stride // 8 for x in tensors for stride in x.stride()[:3]]


def precision(single: bool) -> str:
    """Single precision is computed as such, not as tf32; half types do not care."""
    return "ieee" if single else "tf32"


def options(plan: Plan, q: Tensor) -> dict:
    config = plan.config
    return {
        "PRECISION": precision(q.dtype == torch.float32),
        "enable_fp_fusion": True,  # Triton stops fusing products and sums in 3.10 unless asked
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float) -> None:
    """q [B, L, H, D], k, v [B, M, H_kv, D] with strides in whole steps of 8 elements; writes out [B, L, H, D] and lse
    fp32 [B, H, L], both contiguous."""
    batch, queries, heads, dim = q.shape
    frame_attention_fwd_kernel[(plan.num_tiles * plan.repeats * heads, batch)](
        q,
        k,
        v,
        out,
        lse,
        plan.data,
        scale * LOG2E.value,
        queries,
        k.shape[1],
        heads,
        plan.num_tiles,
        plan.repeats,
        plan.band,
        *strides(q, k, v),
        D=dim,
        PARTS=split_head_dim(dim),
        HEADS_PER_KV=heads // k.shape[2],
        BM=plan.config.tile,
        BN=plan.config.block,
        AHEAD=plan.config.ahead,
        **options(plan, q),
    )
