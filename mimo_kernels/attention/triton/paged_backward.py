"""Backward Triton kernels of `paged_frame_attention`: what the cached keys add to the gradient of q.

    P[i, j]  = exp(scale * q[i] . k[j] + bias[j] - lse[i])          j over the cached keys
    dS[i, j] = P[i, j] (dout[i] . v[j] - delta[i])                  delta[i] = dout[i] . out[i] - dlse[i]
    dq[i]    = own[i] + scale * sum_j dS[i, j] k[j]

lse and out are those over all keys, so that the new rows' own part, `own` and the gradients of their keys and values,
is the backward of `frame_attention` with the same lse and out. Pages are constants. Tiles, splits and their order are
those of paged.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimo_kernels.attention.triton.paged import (
    COMBINE_ROWS,
    LENGTHS,
    LOG2E,
    PAGE_STRIDES,
    SHORT,
    Config,
    Pages,
    add_bias,
    choose_splits,
    decode_parts,
    device_facts,
    find_keys,
    find_scale,
    find_table,
    find_tile,
    options,
    row_strides,
    strides,
)
from mimo_kernels.attention.triton.tiles import (
    add_parts,
    dot_parts,
    load_parts,
    scale_parts,
    split_head_dim,
    store_parts,
    zero_parts,
)


@triton.jit
def sum_of_products(b_x, b_y):
    """The scalar products of the rows of x and y [R, D]: [R], fp32."""
    b_sum = tl.sum(b_x[0].to(tl.float32) * b_y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(b_x)):
        b_sum += tl.sum(b_x[i].to(tl.float32) * b_y[i].to(tl.float32), 1)
    return b_sum


@triton.jit
def sum_parts(b_x, b_y):
    b_z = ()
    for i in tl.static_range(len(b_x)):
        b_z = b_z + (b_x[i] + b_y[i].to(tl.float32),)
    return b_z


@triton.jit(do_not_specialize=[*LENGTHS, *PAGE_STRIDES, *row_strides("q", "dout")])
def paged_dq_kernel(
    p_q,
    p_k_pages,
    p_v_pages,
    p_tables,  # these five as in paged_fwd_kernel
    p_lengths,
    p_bias,
    p_k_scales,
    p_v_scales,
    p_out,  # [S, N, H * GROUP, D]
    p_dout,
    p_lse,  # fp32 [S, H * GROUP, N]
    p_dlse,  # the same, with HAS_DLSE
    p_own,  # [S, N, H * GROUP, D]
    p_dq,  # the same; SPLITS > 1: fp32 [SPLITS, S, N, H * GROUP, D], without own
    scale,
    num_tokens,
    num_heads,
    num_tiles,
    num_rows,
    max_pages,
    stride_q_seq,
    stride_q_row,
    stride_q_head,
    stride_dout_seq,
    stride_dout_row,
    stride_dout_head,
    stride_page,
    stride_row,
    stride_head,
    stride_tables,
    stride_bias,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FP8: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(1)
    seq, head, o_m, o_head, m_m = find_tile(num_tokens, num_heads, num_tiles, BM, GROUP)
    scale_log2 = scale * LOG2E

    o_q = seq * stride_q_seq + o_m * stride_q_row + o_head * stride_q_head
    b_q = load_parts(p_q, o_q, 8, m_m, PARTS, HEAD_DIM)
    o_dout = seq * stride_dout_seq + o_m * stride_dout_row + o_head * stride_dout_head
    b_dout = load_parts(p_dout, o_dout, 8, m_m, PARTS, HEAD_DIM)
    o_out = (seq * num_tokens + o_m) * (num_heads * GROUP) + o_head
    b_delta = sum_of_products(load_parts(p_out, o_out, HEAD_DIM, m_m, PARTS, HEAD_DIM), b_dout)
    o_lse = (seq * (num_heads * GROUP) + o_head) * num_tokens + o_m
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + o_lse, mask=m_m, other=0.0)
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)  # a row that sees no key: all weights are 0
    b_dq = zero_parts(BM, PARTS)

    p_table, num_slots = find_table(p_tables, p_lengths, seq, max_pages, stride_tables, PAGE, PACKED)
    p_bias += seq * stride_bias
    cached = tl.cdiv(num_slots, BN)
    per = tl.cdiv(cached, SPLITS)
    for block in range(split * per, tl.minimum(split * per + per, cached)):
        o_key, m_key, place = find_keys(p_table, block, num_slots, max_pages, stride_page, stride_row, PAGE, BN, PACKED)
        b_k = load_parts(p_k_pages, o_key + head * stride_head, 8, m_key, PARTS, HEAD_DIM)
        b_v = load_parts(p_v_pages, o_key + head * stride_head, 8, m_key, PARTS, HEAD_DIM)
        if FP8:
            b_k = decode_parts(b_k, p_q.dtype.element_ty)
            b_v = decode_parts(b_v, p_q.dtype.element_ty)
        b_s = dot_parts(b_q, b_k, PRECISION) * scale_log2
        b_dp = dot_parts(b_dout, b_v, PRECISION)
        if FP8:
            b_k_scale = find_scale(p_k_scales, p_table, place, m_key, head, num_heads, PAGE, BN)
            b_s *= b_k_scale
            b_dp *= find_scale(p_v_scales, p_table, place, m_key, head, num_heads, PAGE, BN)
        if HAS_BIAS:
            b_s = add_bias(b_s, p_bias, p_table, place, m_key, max_pages, PAGE, BN, PACKED)
        b_p = tl.where(m_key[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if FP8:
            b_ds *= b_k_scale
        b_dq = add_parts(b_dq, b_ds.to(p_q.dtype.element_ty), b_k, PRECISION)

    b_dq = scale_parts(b_dq, scale)
    if SPLITS > 1:
        o_out += split.to(tl.int64) * num_rows
    else:
        b_dq = sum_parts(b_dq, load_parts(p_own, o_out, HEAD_DIM, m_m, PARTS, HEAD_DIM))
    store_parts(p_dq, o_out, HEAD_DIM, m_m, b_dq, 1.0, PARTS, HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows"])
def paged_dq_sum_kernel(
    p_partial,  # fp32 [SPLITS, rows, D]
    p_own,  # [rows, D]
    p_dq,  # [rows, D]
    num_rows,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, WIDTH)
    m_x = (o_m < num_rows)[:, None] & (o_d < HEAD_DIM)[None, :]
    o_x = o_m[:, None] * HEAD_DIM + o_d[None, :]
    b_dq = tl.load(p_own + o_x, mask=m_x, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLITS):  # always in this order
        b_dq += tl.load(p_partial + tl.cast(split, tl.int64) * num_rows * HEAD_DIM + o_x, mask=m_x, other=0.0)
    tl.store(p_dq + o_x, b_dq.to(p_dq.dtype.element_ty), mask=m_x)


# As in paged.py: architecture -> channels -> for long and for short frames. fp32 with more than 128 channels spills a
# few registers; nothing else does.
SM80 = {
    64: (Config(64, 64, 8, 2), Config(64, 32, 4, 2)),
    128: (Config(64, 32, 8, 2), Config(64, 32, 4, 2)),
    256: (Config(32, 32, 4, 1),) * 2,
}
SM90 = {128: (Config(128, 64, 8, 2), Config(64, 64, 4, 2)), 256: (Config(64, 32, 8, 2),) * 2}
HALF = {80: SM80, 90: SM90, 100: SM90, 120: SM80}
SINGLE = {64: (Config(32, 16, 4, 1),) * 2, 256: (Config(16, 16, 8, 1),) * 2}


def parts_for(head_dim: int) -> tuple[int, ...]:
    """Above 128 channels one part: q, dout and dq in several do not fit in registers beside the rest."""
    parts = split_head_dim(head_dim)
    return parts if sum(parts) <= 128 else (256,)


def config_for(head_dim: int, itemsize: int, num_rows: int, capability: int) -> Config:
    """As that of the forward."""
    width = sum(parts_for(head_dim))
    table = SINGLE if itemsize == 4 else HALF[max(known for known in HALF if known <= capability)]
    return next(pair for limit, pair in table.items() if width <= limit)[num_rows <= SHORT]


def backward_q(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    own: Tensor,
    pages: Pages,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """dq [S, N, heads, D]: that of the new rows' own keys, `own`, and what the pages add.

    q and dout strided as the q of `forward`; out, own, lse and dlse fp32 [S, heads, N] contiguous.
    """
    num_seqs, num_tokens, heads, head_dim = q.shape
    kv_heads = pages.k.shape[2]
    group = heads // kv_heads
    capability, num_sms = device_facts(q.device)
    config = config_for(head_dim, q.element_size(), num_tokens * group, capability)
    num_tiles = triton.cdiv(num_tokens * group, config.block_m)
    tiles = num_seqs * kv_heads * num_tiles
    dq = torch.empty_like(out)
    if not dq.numel():
        return dq
    if splits is None:
        splits = choose_splits(tiles, pages.max_keys, config.block_n, num_sms)
    rows = num_seqs * num_tokens * heads
    result = q.new_empty(splits, rows, head_dim, dtype=torch.float32) if splits > 1 else dq
    paged_dq_kernel[(tiles, splits)](
        *(q, *pages.tensors(), out, dout, lse, lse if dlse is None else dlse, own, result),
        *(scale, num_tokens, kv_heads, num_tiles, rows, pages.max_pages),
        *(*strides(q, dout), *pages.strides()),
        GROUP=group,
        HAS_DLSE=dlse is not None,
        SPLITS=splits,
        **pages.constants(),
        **options(config, head_dim) | {"PARTS": parts_for(head_dim)},
    )
    if splits > 1:
        paged_dq_sum_kernel[(triton.cdiv(rows, COMBINE_ROWS),)](
            *(result, own, dq, rows),
            HEAD_DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim),
            BM=COMBINE_ROWS,
            SPLITS=splits,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return dq
