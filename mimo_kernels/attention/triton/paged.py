"""Triton kernels of `paged_frame_attention`: cached pages and the frame itself in one pass, split over keys if need be.

The number of pages of a sequence is read on the device and the grid does not depend on it, so one captured CUDA graph
serves every frame. Keys are numbered in blocks: first those of the pages, then those of the frame itself,

    | page 0 | page 1 | ... | page n - 1 | self 0 | ... |      split s takes blocks [s * per, (s + 1) * per)

and the partial results of the splits are added in a fixed order by a second kernel: no atomics, so the result is the
same every time. Tiles hold the head dimension in parts (tiles.py).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimo_kernels.attention.triton.tiles import (
    add_parts,
    dot_parts,
    load_parts,
    scale_parts,
    split_head_dim,
    store_parts,
    zero_parts,
)

LOG2E = 1.4426950408889634


@triton.jit
def masked_softmax_step(b_s, m_key, b_v, b_acc, b_max, b_sum, scale_log2, PRECISION: tl.constexpr):
    """One step of the running softmax with the products b_s [BM, BN] and the values b_v of the keys m_key [BN]."""
    b_s = tl.where(m_key[None, :], b_s * scale_log2, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A block may have no key at all (the empty rest of a page): keep -inf - -inf out of the exponent.
    b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_ref[:, None])
    b_decay = tl.exp2(b_max - b_ref)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc = add_parts(scale_parts(b_acc, b_decay[:, None]), b_p.to(b_v[0].dtype), b_v, PRECISION)
    return b_acc, b_new, b_sum


# Every length and stride is an ordinary argument: a new one never compiles the kernel anew.
_LENGTHS = [
    "num_tokens",
    "num_heads",
    "num_tiles",
    "num_rows",
    "stride_table",
    "stride_page",
    "stride_row",
    "stride_head",
]
_LENGTHS += [f"stride_{x}_{axis}" for x in "qkv" for axis in ("seq", "row", "head")]


@triton.jit(do_not_specialize=_LENGTHS)
def paged_fwd_kernel(
    p_q,
    p_k_self,
    p_v_self,
    p_k_pages,
    p_v_pages,
    p_page_table,
    p_page_rows,
    p_num_pages,
    p_out,  # SPLITS == 1: [S, N, H, D]; else fp32 [SPLITS, S, N, H, D]
    p_lse,  # SPLITS > 1: fp32 [SPLITS, S, N, H], base 2
    scale_log2,
    num_tokens,
    num_heads,
    num_tiles,
    num_rows,  # S * N * H
    # In units of 8 elements, so that the compiler sees aligned 16-byte loads also where a head has 72 channels.
    stride_q_seq,
    stride_q_row,
    stride_q_head,
    stride_k_seq,
    stride_k_row,
    stride_k_head,
    stride_v_seq,
    stride_v_row,
    stride_v_head,
    stride_page,
    stride_row,
    stride_head,
    stride_table,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    head = (tile // num_tiles) % num_heads
    seq = (tile // num_tiles // num_heads).to(tl.int64)
    o_m = (tile % num_tiles) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_m = o_m < num_tokens

    # Rows are told in 8 elements: the compiler sees that their loads are aligned.
    b_q = load_parts(p_q, seq * stride_q_seq + o_m * stride_q_row + head * stride_q_head, 8, m_m, PARTS, HEAD_DIM)
    b_acc = zero_parts(BM, PARTS)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)

    num_pages = tl.load(p_num_pages + seq * stride_table)
    cached = tl.cdiv(num_pages * PAGE, BN)
    total = cached + tl.cdiv(num_tokens, BN)
    per = tl.cdiv(total, SPLITS)
    begin = split * per
    end = tl.minimum(begin + per, total)
    p_table = p_page_table + seq * stride_table
    p_rows = p_page_rows + seq * stride_table

    for block in range(begin, tl.minimum(end, cached)):
        if PAGE % BN == 0:  # a block lies in one page
            place = block // (PAGE // BN)
            page = tl.load(p_table + place).to(tl.int64)
            o_row = (block % (PAGE // BN)) * BN + o_n
            m_key = o_row < tl.load(p_rows + place)
            o_key = page * stride_page + o_row * stride_row
        else:  # a block spans pages
            o_key = block * BN + o_n
            m_page = o_key < num_pages * PAGE
            page = tl.load(p_table + o_key // PAGE, mask=m_page, other=0).to(tl.int64)
            m_key = o_key % PAGE < tl.load(p_rows + o_key // PAGE, mask=m_page, other=0)
            o_key = page * stride_page + (o_key % PAGE) * stride_row
        b_k = load_parts(p_k_pages, o_key + head * stride_head, 8, m_key, PARTS, HEAD_DIM)
        b_s = dot_parts(b_q, b_k, PRECISION)
        b_v = load_parts(p_v_pages, o_key + head * stride_head, 8, m_key, PARTS, HEAD_DIM)
        b_acc, b_max, b_sum = masked_softmax_step(b_s, m_key, b_v, b_acc, b_max, b_sum, scale_log2, PRECISION)

    p_k_self += (seq * stride_k_seq + head * stride_k_head) * 8
    p_v_self += (seq * stride_v_seq + head * stride_v_head) * 8
    for block in range(tl.maximum(begin, cached) - cached, end - cached):
        o_row = block * BN + o_n
        m_key = o_row < num_tokens
        b_k = load_parts(p_k_self, o_row.to(tl.int64) * stride_k_row, 8, m_key, PARTS, HEAD_DIM)
        b_s = dot_parts(b_q, b_k, PRECISION)
        b_v = load_parts(p_v_self, o_row.to(tl.int64) * stride_v_row, 8, m_key, PARTS, HEAD_DIM)
        b_acc, b_max, b_sum = masked_softmax_step(b_s, m_key, b_v, b_acc, b_max, b_sum, scale_log2, PRECISION)

    # A split without keys leaves 0 and a log-sum-exp of -inf (its b_max).
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_norm = 1.0 / b_sum
    o_out = (seq * num_tokens + o_m) * num_heads + head
    if SPLITS > 1:
        o_out += split.to(tl.int64) * num_rows
        tl.store(p_lse + o_out, b_max + tl.log2(b_sum), mask=m_m)
    store_parts(p_out, o_out, HEAD_DIM, m_m, b_acc, b_norm[:, None], PARTS, HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows"])
def paged_combine_kernel(
    p_partial,  # fp32 [SPLITS, rows, D]
    p_lse,  # fp32 [SPLITS, rows], base 2
    p_out,  # [rows, D]
    num_rows,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, WIDTH)
    m_m = o_m < num_rows
    m_x = m_m[:, None] & (o_d < HEAD_DIM)[None, :]
    o_x = o_m[:, None] * HEAD_DIM + o_d[None, :]
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        b_max = tl.maximum(b_max, tl.load(p_lse + split * num_rows + o_m, mask=m_m, other=0.0))
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_acc = tl.zeros([BM, WIDTH], dtype=tl.float32)
    # Always in this order. The frame itself is never empty, so b_max is finite.
    for split in tl.static_range(SPLITS):
        b_w = tl.exp2(tl.load(p_lse + split * num_rows + o_m, mask=m_m, other=0.0) - b_max)
        b_sum += b_w
        p_split = p_partial + tl.cast(split, tl.int64) * num_rows * HEAD_DIM
        b_acc += b_w[:, None] * tl.load(p_split + o_x, mask=m_x, other=0.0)
    tl.store(p_out + o_x, (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_x)


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (bytes per element, sm_80 family) -> by channels computed (the sum of the parts), for long and for short frames.
# The first row that is wide enough serves. All of them are compiled ahead of time by a test: no spills, and on sm_90
# warpgroup products. fp32 products run on the plain units.
SHORT = 64
CONFIGS = {
    (2, False): {128: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)), 256: (Config(64, 32, 8, 3),) * 2},
    (2, True): {
        96: (Config(128, 32, 8, 3), Config(64, 32, 4, 3)),
        128: (Config(64, 64, 8, 3), Config(64, 32, 4, 3)),
        176: (Config(64, 16, 8, 2),) * 2,
        224: (Config(32, 16, 8, 2),) * 2,
        256: (Config(64, 32, 8, 2),) * 2,
    },
    (4, False): {128: (Config(32, 16, 8, 2),) * 2, 256: (Config(16, 16, 8, 2),) * 2},
}
CONFIGS[4, True] = CONFIGS[4, False]
COMBINE_ROWS = 16
PRECISION = "ieee"  # of fp32 products: not tf32


def config_for(head_dim: int, itemsize: int, num_tokens: int, capability: int) -> Config:
    """Tile sizes for a head dimension, an element size, the tokens of a frame and a compute capability (90: 9.0)."""
    width = sum(split_head_dim(head_dim))
    table = CONFIGS[itemsize, capability < 90]
    return next(pair for limit, pair in table.items() if width <= limit)[num_tokens <= SHORT]


def choose_splits(tiles: int, max_keys: int, block_n: int, num_sms: int) -> int:
    """Splits so that the tiles fill the device once, each with at least four key blocks when the view is full."""
    return max(1, min(num_sms // tiles, max_keys // (4 * block_n), 16))


@functools.cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    """Compute capability and multiprocessors; for the interpreter those of a small device, so that keys are split."""
    if device.type != "cuda":
        return 90, 8
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def launch(
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
    """q, k_self, v_self [S, N, H, D], k_pages, v_pages [pages, page_size, H, D] -> as q.

    The last dimension is contiguous, the other strides are multiples of 8.

    `splits`: partial results per tile; default by the number of tiles and multiprocessors.
    """
    num_seqs, num_tokens, num_heads, head_dim = q.shape
    capability, num_sms = _device_facts(q.device)
    config = config_for(head_dim, q.element_size(), num_tokens, capability)
    page_size = k_pages.shape[1]
    num_tiles = triton.cdiv(num_tokens, config.block_m)
    tiles = num_seqs * num_heads * num_tiles
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tiles:
        return out
    if splits is None:
        splits = choose_splits(tiles, page_table.shape[1] * page_size + num_tokens, config.block_n, num_sms)
    rows = num_seqs * num_tokens * num_heads
    partial = q.new_empty(splits, *q.shape, dtype=torch.float32) if splits > 1 else out
    lse = q.new_empty(splits, rows, dtype=torch.float32) if splits > 1 else partial
    paged_fwd_kernel[(tiles, splits)](
        q,
        k_self,
        v_self,
        k_pages,
        v_pages,
        page_table,
        page_rows,
        num_pages,
        partial,
        lse,
        scale * LOG2E,
        num_tokens,
        num_heads,
        num_tiles,
        rows,
        *(stride // 8 for x in (q, k_self, v_self, k_pages) for stride in x.stride()[:3]),
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PARTS=split_head_dim(head_dim),
        PAGE=page_size,
        BM=config.block_m,
        BN=config.block_n,
        SPLITS=splits,
        PRECISION=PRECISION,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # see forward.options
    )
    if splits > 1:
        paged_combine_kernel[(triton.cdiv(rows, COMBINE_ROWS),)](
            partial,
            lse,
            out,
            rows,
            HEAD_DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim),
            BM=COMBINE_ROWS,
            SPLITS=splits,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
