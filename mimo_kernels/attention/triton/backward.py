"""Backward Triton kernels of frame_attention: no atomics, so gradients are the same bits every time.

    P[i, j]  = exp(scale * q[i] . k[j] - lse[i])
    dS[i, j] = P[i, j] (dout[i] . v[j] - delta[i])          delta[i] = dout[i] . out[i] - dlse[i]
    dq[i] = scale * sum_j dS[i, j] k[j]      dk[j] = scale * sum_i dS[i, j] q[i]      dv[j] = sum_i P[i, j] dout[i]

dQ runs over tiles of rows like the forward; dK and dV run over tiles of keys, with S transposed so that P and dS stay
in registers. The price is that S and dP are computed twice. What the schedule holds is told in forward.py, how the head
dimension is split in tiles.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimo_kernels.attention.triton.forward import (
    LOG2E,
    STRIDES,
    VARYING,
    find_tile,
    next_block,
    options,
    row_bounds,
    strides,
)
from mimo_kernels.attention.triton.layout import (
    HEADER_CELLS,
    ROW_SEGMENT_BEGINS,
    ROW_SEGMENT_CELLS,
    ROW_SEGMENT_GROUPS,
    ROW_SEGMENT_KEYS,
    SEGMENT_CELLS,
    TILE_BARE_BLOCKS,
    TILE_END,
    TILE_SEGMENTS,
)
from mimo_kernels.attention.triton.schedule import Plan
from mimo_kernels.attention.triton.tiles import (
    add_parts,
    dot_parts,
    load_parts,
    split_head_dim,
    store_parts,
    zero_parts,
)

DELTA_ROWS = 64
NO_ROW = tl.constexpr(0x7F800000)  # lse +inf, delta 0: all weights come out as 0


@triton.jit
def pack_row(b_lse, b_delta):
    """What the other kernels read of a row, both numbers in one word: they load it for few rows with many threads."""
    low = b_lse.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return low | b_delta.to(tl.int32, bitcast=True).to(tl.int64) << 32


@triton.jit
def unpack_row(b_row):
    return b_row.to(tl.int32).to(tl.float32, bitcast=True), (b_row >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "stride_b_dout", "stride_m_dout", "stride_h_dout"])
def frame_attention_rows_kernel(
    p_out,  # [B, L, H, D]
    p_dout,
    p_lse,  # fp32 [B, H, L]
    p_dlse,  # fp32 [B, H, L], or not used
    p_rows,  # int64 [B, H, L]: lse in base 2, +inf for rows that see no key; and delta
    num_queries,
    num_heads,
    stride_b_dout: tl.int64,
    stride_m_dout,
    stride_h_dout,
    D: tl.constexpr,
    BM: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    pid = tl.program_id(0)
    head = pid % num_heads  # fastest: a row's heads lie side by side
    batch = tl.program_id(1).to(tl.int64)
    row = (pid // num_heads).to(tl.int64) * BM
    o_m = tl.arange(0, BM)
    m_m = row + o_m < num_queries
    stride_m_dout *= 8
    stride_out = num_heads * D
    o_d = tl.arange(0, triton.next_power_of_2(D))
    m_x = m_m[:, None] & (o_d < D)[None, :]
    p_out += (batch * num_queries + row) * stride_out + head * D
    b_out = tl.load(p_out + (o_m[:, None] * stride_out + o_d[None, :]), mask=m_x, other=0.0)
    p_dout += (batch * stride_b_dout + head * stride_h_dout) * 8 + row * stride_m_dout
    b_dout = tl.load(p_dout + (o_m[:, None] * stride_m_dout + o_d[None, :]), mask=m_x, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    o_lse = (batch * num_heads + head) * num_queries + row + o_m
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + o_lse, mask=m_m, other=0.0)
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    tl.store(p_rows + o_lse, pack_row(b_lse, b_delta), mask=m_m)


@triton.jit(do_not_specialize=[*VARYING, *(f"{name}_{x}" for name in STRIDES for x in ("q", "k", "v", "dout"))])
def frame_attention_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_rows,  # int64 [B, H, L]
    p_dq,  # [B, L, H, D]
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
    HEADS_PER_KV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
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
    stride_m_dout *= 8
    p_q += (batch * stride_b_q + head * stride_h_q) * 8 + (clip_row + row_start) * stride_m_q
    p_k += (batch * stride_b_k + kv_head * stride_h_k) * 8 + clip_key * stride_m_k
    p_v += (batch * stride_b_v + kv_head * stride_h_v) * 8 + clip_key * stride_m_v
    p_dout += (batch * stride_b_dout + head * stride_h_dout) * 8 + (clip_row + row_start) * stride_m_dout
    p_rows += (batch * num_heads + head) * num_queries + clip_row + row_start

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_m = row_start + o_m < row_end
    scale_log2 = scale * LOG2E
    b_lse, b_delta = unpack_row(tl.load(p_rows + o_m, mask=m_m, other=NO_ROW))
    b_q = load_parts(p_q, o_m, stride_m_q, m_m, PARTS, D)
    b_do = load_parts(p_dout, o_m, stride_m_dout, m_m, PARTS, D)
    b_dq = zero_parts(BM, PARTS)

    p_segment = p_plan + tl.load(p_tile + TILE_SEGMENTS)
    start = tl.load(p_segment)
    end = tl.load(p_segment + 1)
    for _ in range(tl.load(p_tile + TILE_BARE_BLOCKS)):
        b_k = load_parts(p_k + start.to(tl.int64) * stride_m_k, o_n, stride_m_k, None, PARTS, D)
        b_v = load_parts(p_v + start.to(tl.int64) * stride_m_v, o_n, stride_m_v, None, PARTS, D)
        b_s = dot_parts(b_q, b_k, PRECISION)
        b_dp = dot_parts(b_do, b_v, PRECISION)
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(p_k.dtype.element_ty)
        b_dq = add_parts(b_dq, b_ds, b_k, PRECISION)
        p_segment, start, end = next_block(p_segment, start, end, BN, SEGMENT_CELLS)

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
            b_dp = dot_parts(b_do, b_v, PRECISION)
            b_seen = (o_key[None, :] >= b_lo[:, None]) & (o_key[None, :] < b_hi[:, None])
            b_p = tl.where(b_seen, tl.exp2(b_s * scale_log2 - b_lse[:, None]), 0.0)
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(p_k.dtype.element_ty)
            b_dq = add_parts(b_dq, b_ds, b_k, PRECISION)

    row_start = tl.load(p_segment)
    m_m = row_start + o_m < tl.load(p_segment + 1)
    stride_dq = num_heads * D
    p_dq += (batch * num_queries + clip_row + row_start) * stride_dq + head * D
    store_parts(p_dq, o_m, stride_dq, m_m, b_dq, scale, PARTS, D)


@triton.jit
def segment_bounds(p_segment, o_row, key_start):
    """Which keys of the tile rows see, from a masked segment of plan_keys: rows of up to four groups. Both in one word,
    the first of them and, above it, their number: registers are short."""
    b_both = tl.zeros_like(o_row)
    for group in tl.static_range(ROW_SEGMENT_GROUPS):
        start = tl.load(p_segment + ROW_SEGMENT_KEYS + 2 * group)
        end = tl.load(p_segment + ROW_SEGMENT_KEYS + 2 * group + 1)
        both = (start - key_start) & 0xFFFF | (end - start) << 16
        if group:
            b_both = tl.where(o_row >= tl.load(p_segment + ROW_SEGMENT_BEGINS + group - 1), both, b_both)
        else:
            b_both += both
    return b_both


@triton.jit(do_not_specialize=[*VARYING, *(f"{name}_{x}" for name in STRIDES for x in ("q", "k", "v", "dout"))])
def frame_attention_dkv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_rows,  # int64 [B, H, L]
    p_dk,  # [B, M, H / HEADS_PER_KV, D]
    p_dv,
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
    HEADS_PER_KV: tl.constexpr,
    BN: tl.constexpr,  # keys
    BM: tl.constexpr,  # rows
    PRECISION: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):
    num_kv_heads = num_heads // HEADS_PER_KV
    kv_head, p_tile, clip = find_tile(p_plan, num_kv_heads, num_tiles, repeats, band)
    head = kv_head * HEADS_PER_KV  # the first of those that share it
    batch = tl.program_id(1).to(tl.int64)
    clip_row = clip.to(tl.int64) * (num_queries // repeats)
    clip_key = clip.to(tl.int64) * (num_keys // repeats)
    key_start = tl.load(p_tile)
    key_end = tl.load(p_tile + TILE_END)

    stride_m_q *= 8
    stride_m_k *= 8
    stride_m_v *= 8
    stride_m_dout *= 8
    p_q += (batch * stride_b_q + head * stride_h_q) * 8 + clip_row * stride_m_q
    p_k += (batch * stride_b_k + kv_head * stride_h_k) * 8 + (clip_key + key_start) * stride_m_k
    p_v += (batch * stride_b_v + kv_head * stride_h_v) * 8 + (clip_key + key_start) * stride_m_v
    p_dout += (batch * stride_b_dout + head * stride_h_dout) * 8 + clip_row * stride_m_dout
    p_rows += (batch * num_heads + head) * num_queries + clip_row

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_n = key_start + o_n < key_end
    scale_log2 = scale * LOG2E
    b_k = load_parts(p_k, o_n, stride_m_k, m_n, PARTS, D)
    b_v = load_parts(p_v, o_n, stride_m_v, m_n, PARTS, D)
    b_dk = zero_parts(BN, PARTS)
    b_dv = zero_parts(BN, PARTS)

    p_first = p_plan + tl.load(p_tile + TILE_SEGMENTS)
    p_segment = p_first
    for _ in range(HEADS_PER_KV):  # one after the other: the sums have one order
        p_segment = p_first
        # A block is bare when all its rows see all keys of the tile; keys past the end of the tile are zeros and are
        # not stored.
        start = tl.load(p_segment)
        end = tl.load(p_segment + 1)
        for _ in range(tl.load(p_tile + TILE_BARE_BLOCKS)):
            b_lse, b_delta = unpack_row(tl.load(p_rows + start + o_m))
            b_q = load_parts(p_q + start.to(tl.int64) * stride_m_q, o_m, stride_m_q, None, PARTS, D)
            b_do = load_parts(p_dout + start.to(tl.int64) * stride_m_dout, o_m, stride_m_dout, None, PARTS, D)
            b_st = dot_parts(b_k, b_q, PRECISION)  # [BN, BM]
            b_pt = tl.exp2(b_st * scale_log2 - b_lse[None, :])
            b_dpt = dot_parts(b_v, b_do, PRECISION)
            b_dst = b_pt * (b_dpt - b_delta[None, :])
            b_dv = add_parts(b_dv, b_pt.to(p_q.dtype.element_ty), b_do, PRECISION)
            b_dk = add_parts(b_dk, b_dst.to(p_q.dtype.element_ty), b_q, PRECISION)
            p_segment, start, end = next_block(p_segment, start, end, BM, SEGMENT_CELLS)

        # Masked blocks, whose segments follow the bare ones, in the same way.
        num_blocks = tl.load(p_segment)
        p_segment += HEADER_CELLS
        start = tl.load(p_segment)
        end = tl.load(p_segment + 1)
        for _ in tl.range(num_blocks, num_stages=MASKED_STAGES):
            o_row = start + o_m
            m_m = o_row < end
            b_lse, b_delta = unpack_row(tl.load(p_rows + o_row, mask=m_m, other=NO_ROW))
            b_q = load_parts(p_q + start.to(tl.int64) * stride_m_q, o_m, stride_m_q, m_m, PARTS, D)
            b_do = load_parts(p_dout + start.to(tl.int64) * stride_m_dout, o_m, stride_m_dout, m_m, PARTS, D)
            b_st = dot_parts(b_k, b_q, PRECISION)
            b_both = segment_bounds(p_segment, o_row, key_start)
            b_seen = (o_n[:, None] - (b_both & 0xFFFF)[None, :]).to(tl.uint32) < (b_both >> 16).to(tl.uint32)[None, :]
            b_pt = tl.where(b_seen, tl.exp2(b_st * scale_log2 - b_lse[None, :]), 0.0)
            b_dpt = dot_parts(b_v, b_do, PRECISION)
            b_dst = b_pt * (b_dpt - b_delta[None, :])
            b_dv = add_parts(b_dv, b_pt.to(p_q.dtype.element_ty), b_do, PRECISION)
            b_dk = add_parts(b_dk, b_dst.to(p_q.dtype.element_ty), b_q, PRECISION)
            p_segment, start, end = next_block(p_segment, start, end, BM, ROW_SEGMENT_CELLS)
        p_q += stride_h_q.to(tl.int64) * 8
        p_dout += stride_h_dout.to(tl.int64) * 8
        p_rows += num_queries

    key_start = tl.load(p_segment)
    m_n = key_start + o_n < tl.load(p_segment + 1)
    stride_dk = num_kv_heads * D
    row = (batch * num_keys + clip_key + key_start) * stride_dk + kv_head * D
    store_parts(p_dk + row, o_n, stride_dk, m_n, b_dk, scale, PARTS, D)
    store_parts(p_dv + row, o_n, stride_dk, m_n, b_dv, 1.0, PARTS, D)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    row_plan: Plan,
    key_plan: Plan,
    scale: float,
) -> None:
    """Inputs as for `forward`, dout strided like them, dlse fp32 [B, H, L] contiguous; writes dq, dk, dv like q, k, v,
    contiguous."""
    batch, queries, heads, dim = q.shape
    rows = lse.new_empty((batch, heads, queries), dtype=torch.int64)
    frame_attention_rows_kernel[(triton.cdiv(queries, DELTA_ROWS) * heads, batch)](
        out,
        dout,
        lse,
        lse if dlse is None else dlse,
        rows,
        queries,
        heads,
        *strides(dout),
        D=dim,
        BM=DELTA_ROWS,
        HAS_DLSE=dlse is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    for kernel, plan, gradients, tile, block, more in (
        (frame_attention_dkv_kernel, key_plan, (dk, dv), "BN", "BM", {"MASKED_STAGES": key_plan.config.masked_stages}),
        (frame_attention_dq_kernel, row_plan, (dq,), "BM", "BN", {}),
    ):
        if not plan.num_tiles:  # no keys at all
            continue
        kernel[(plan.num_tiles * plan.repeats * gradients[0].shape[2], batch)](
            q,
            k,
            v,
            dout,
            rows,
            *gradients,
            plan.data,
            scale,
            queries,
            k.shape[1],
            heads,
            plan.num_tiles,
            plan.repeats,
            plan.band,
            *strides(q, k, v, dout),
            D=dim,
            PARTS=split_head_dim(dim),
            HEADS_PER_KV=heads // k.shape[2],
            **{tile: plan.config.tile, block: plan.config.block},
            **more,
            **options(plan, q),
        )
