"""Triton kernels of `paged_frame_attention`: cached pages and the new rows themselves in one pass, split over keys if
need be.

The number of pages of a sequence is read on the device and the grid does not depend on it, so one captured CUDA graph
serves every frame. Keys are numbered in blocks: first those of the pages, then the new rows' own,

    | page 0 | page 1 | ... | page n - 1 | self 0 | ... |      split s takes blocks [s * per, (s + 1) * per)

and the partial results of the splits are added in a fixed order by a second kernel: no atomics, so the result is the
same every time. Where a mask says which of the new rows see each other, `frame_attention` computes that part, and its
result is one more to add.

A tile is the rows of one head of the cache: where GROUP heads of q share it, the rows of a token stand one after
another, so that keys and values are read once for all of them. Tiles hold the head dimension in parts (tiles.py).
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
from mimo_kernels.core import page_tables

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Every length and stride is an ordinary argument: a new one never compiles the kernel anew. Strides of rows are in
# steps of 8 elements, so that the compiler sees aligned 16-byte loads also where a head has 72 channels.
LENGTHS = ("num_tokens", "num_own", "num_heads", "num_tiles", "num_rows", "max_pages", "stride_tables", "stride_bias")
PAGE_STRIDES = ("stride_page", "stride_row", "stride_head")


def row_strides(*names: str) -> list[str]:
    return [f"stride_{name}_{axis}" for name in names for axis in ("seq", "row", "head")]


@triton.jit
def find_tile(num_tokens, num_heads, num_tiles, BM: tl.constexpr, GROUP: tl.constexpr):
    """The sequence and the head of the cache of this program, and of its rows [BM]: token, head, whether there is
    one."""
    tile = tl.program_id(0)
    head = (tile // num_tiles) % num_heads
    seq = (tile // num_tiles // num_heads).to(tl.int64)
    o_m = (tile % num_tiles) * BM + tl.arange(0, BM)
    o_head = head
    if GROUP > 1:
        o_head = head * GROUP + o_m % GROUP
        o_m = o_m // GROUP
    return seq, head, o_m, o_head, o_m < num_tokens


@triton.jit
def find_table(p_tables, p_lengths, seq, max_pages, stride_tables, PAGE: tl.constexpr, PACKED: tl.constexpr):
    """The page numbers of a sequence, and how many rows its pages have: all of them, or those that hold tokens."""
    p_tables += seq * stride_tables
    if PACKED:  # core/page_tables.py
        num_slots = tl.load(p_tables) * PAGE
        p_tables += 1
    else:
        num_slots = tl.minimum(tl.load(p_lengths + seq), max_pages * PAGE)
    return p_tables, num_slots


@triton.jit
def find_keys(
    p_table,
    block,
    num_slots,
    max_pages,
    stride_page,
    stride_row,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Of block number `block` of a sequence's pages: where its rows lie, which of them hold keys, and the place of the
    page in the table (a number, or one for each row where a block spans pages)."""
    o_n = tl.arange(0, BN)
    if PAGE % BN == 0:  # a block lies in one page
        place = block // (PAGE // BN)
        page = tl.load(p_table + place).to(tl.int64)
        o_row = (block % (PAGE // BN)) * BN + o_n
        if PACKED:
            m_key = o_row < tl.load(p_table + max_pages + place)
        else:
            m_key = block * BN + o_n < num_slots
        o_key = page * stride_page + o_row * stride_row
    else:
        o_slot = block * BN + o_n
        m_key = o_slot < num_slots
        place = o_slot // PAGE
        page = tl.load(p_table + place, mask=m_key, other=0).to(tl.int64)
        o_row = o_slot % PAGE
        if PACKED:
            m_key = o_row < tl.load(p_table + max_pages + place, mask=m_key, other=0)
        o_key = page * stride_page + o_row * stride_row
    return o_key, m_key, place


@triton.jit
def add_bias(b_s, p_bias, p_table, place, m_key, max_pages, PAGE: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    """b_s [BM, BN], scores in base 2, plus what belongs to the frame (without PACKED: the page) of each key."""
    if PAGE % BN == 0:
        if PACKED:
            place = tl.load(p_table + 2 * max_pages + place)
        b_s += tl.load(p_bias + place) * LOG2E
    else:
        if PACKED:
            place = tl.load(p_table + 2 * max_pages + place, mask=m_key, other=0)
        b_s += (tl.load(p_bias + place, mask=m_key, other=0.0) * LOG2E)[None, :]
    return b_s


@triton.jit
def decode_parts(b_x, DTYPE: tl.constexpr):
    """Bytes of float8_e4m3fn -> their values times 2^-8, exactly: the bits are those of a float16 whose exponent counts
    from 8 further up. On every architecture, also those that convert no float8."""
    b_y = ()
    for i in tl.static_range(len(b_x)):
        b_bits = b_x[i].to(tl.uint16)
        b_bits = ((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)
        b_y = b_y + (b_bits.to(tl.float16, bitcast=True).to(DTYPE),)
    return b_y


@triton.jit
def find_scale(p_scales, p_table, place, m_key, head, num_heads, PAGE: tl.constexpr, BN: tl.constexpr):
    """By what products with decoded keys or values are multiplied: [1, 1], or [1, BN] where a block spans pages."""
    if PAGE % BN == 0:
        page = tl.load(p_table + place).to(tl.int64)
        b_scale = tl.full([1, 1], 256.0, tl.float32) * tl.load(p_scales + page * num_heads + head)
    else:
        page = tl.load(p_table + place, mask=m_key, other=0).to(tl.int64)
        b_scale = 256.0 * tl.load(p_scales + page * num_heads + head, mask=m_key, other=0.0)[None, :]
    return b_scale


@triton.jit
def masked_softmax_step(b_s, m_key, b_v, b_v_scale, b_acc, b_max, b_sum, PRECISION: tl.constexpr, SCALED: tl.constexpr):
    """One step of the running softmax with the scores b_s [BM, BN] in base 2 and the values b_v of the keys m_key
    [BN], SCALED: times b_v_scale [1, 1 or BN]."""
    b_s = tl.where(m_key[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A block may have no key at all (the empty rest of a page): keep -inf - -inf out of the exponent.
    b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_ref[:, None])
    b_decay = tl.exp2(b_max - b_ref)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    if SCALED:
        b_p = b_p * b_v_scale
    b_acc = add_parts(scale_parts(b_acc, b_decay[:, None]), b_p.to(b_v[0].dtype), b_v, PRECISION)
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=[*LENGTHS, *PAGE_STRIDES, *row_strides("q", "k", "v")])
def paged_fwd_kernel(
    p_q,
    p_k_self,
    p_v_self,
    p_k_pages,
    p_v_pages,
    p_tables,  # int32 [S, ...]: PACKED as core/page_tables.py says, else page numbers alone
    p_lengths,  # int32 [S], tokens in the pages, without PACKED
    p_bias,  # fp32 [S, frames], without PACKED [S, max_pages]; with HAS_BIAS
    p_k_scales,  # fp32 [pages, H], with FP8: the pages are bytes of e4m3
    p_v_scales,
    p_out,  # [S, N, H * GROUP, D]; PARTIAL: fp32 [SPLITS, S, N, H * GROUP, D]
    p_lse,  # fp32 [S, H * GROUP, N]; PARTIAL: [SPLITS, S, N, H * GROUP], base 2
    scale_log2,
    num_tokens,
    num_own,  # num_tokens, or 0: the new rows are none of the keys here
    num_heads,  # of the cache
    num_tiles,
    num_rows,  # S * N * H * GROUP
    max_pages,
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
    stride_tables,
    stride_bias,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FP8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(1)
    seq, head, o_m, o_head, m_m = find_tile(num_tokens, num_heads, num_tiles, BM, GROUP)
    o_n = tl.arange(0, BN)

    o_q = seq * stride_q_seq + o_m * stride_q_row + o_head * stride_q_head
    b_q = load_parts(p_q, o_q, 8, m_m, PARTS, HEAD_DIM)
    b_acc = zero_parts(BM, PARTS)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)

    p_table, num_slots = find_table(p_tables, p_lengths, seq, max_pages, stride_tables, PAGE, PACKED)
    p_bias += seq * stride_bias
    cached = tl.cdiv(num_slots, BN)
    total = cached + tl.cdiv(num_own, BN)
    per = tl.cdiv(total, SPLITS)
    begin = split * per
    end = tl.minimum(begin + per, total)

    for block in range(begin, tl.minimum(end, cached)):
        o_key, m_key, place = find_keys(p_table, block, num_slots, max_pages, stride_page, stride_row, PAGE, BN, PACKED)
        b_k = load_parts(p_k_pages, o_key + head * stride_head, 8, m_key, PARTS, HEAD_DIM)
        b_v_scale = scale_log2  # of nothing, without FP8
        if FP8:
            b_k = decode_parts(b_k, p_q.dtype.element_ty)
        b_s = dot_parts(b_q, b_k, PRECISION) * scale_log2
        if FP8:
            b_s *= find_scale(p_k_scales, p_table, place, m_key, head, num_heads, PAGE, BN)
            b_v_scale = find_scale(p_v_scales, p_table, place, m_key, head, num_heads, PAGE, BN)
        if HAS_BIAS:
            b_s = add_bias(b_s, p_bias, p_table, place, m_key, max_pages, PAGE, BN, PACKED)
        b_v = load_parts(p_v_pages, o_key + head * stride_head, 8, m_key, PARTS, HEAD_DIM)
        if FP8:
            b_v = decode_parts(b_v, p_q.dtype.element_ty)
        b_acc, b_max, b_sum = masked_softmax_step(b_s, m_key, b_v, b_v_scale, b_acc, b_max, b_sum, PRECISION, FP8)

    p_k_self += (seq * stride_k_seq + head * stride_k_head) * 8
    p_v_self += (seq * stride_v_seq + head * stride_v_head) * 8
    for block in range(tl.maximum(begin, cached) - cached, end - cached):
        o_row = block * BN + o_n
        m_key = o_row < num_own
        b_k = load_parts(p_k_self, o_row.to(tl.int64) * stride_k_row, 8, m_key, PARTS, HEAD_DIM)
        b_s = dot_parts(b_q, b_k, PRECISION) * scale_log2
        b_v = load_parts(p_v_self, o_row.to(tl.int64) * stride_v_row, 8, m_key, PARTS, HEAD_DIM)
        b_acc, b_max, b_sum = masked_softmax_step(b_s, m_key, b_v, 1.0, b_acc, b_max, b_sum, PRECISION, False)

    # Rows and splits without keys leave 0 and a log-sum-exp of -inf (their b_max).
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_norm = 1.0 / b_sum
    b_lse = b_max + tl.log2(b_sum)
    o_out = (seq * num_tokens + o_m) * (num_heads * GROUP) + o_head
    if PARTIAL:
        o_out += split.to(tl.int64) * num_rows
        tl.store(p_lse + o_out, b_lse, mask=m_m)
    else:
        tl.store(p_lse + (seq * (num_heads * GROUP) + o_head) * num_tokens + o_m, b_lse * LN2, mask=m_m)
    store_parts(p_out, o_out, HEAD_DIM, m_m, b_acc, b_norm[:, None], PARTS, HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_heads"])
def paged_combine_kernel(
    p_partial,  # fp32 [SPLITS, rows, D]
    p_partial_lse,  # fp32 [SPLITS, rows], base 2
    p_own,  # [rows, D], with HAS_OWN: the part of the new rows' own keys
    p_own_lse,  # fp32 [S, H, N], natural
    p_out,  # [rows, D]
    p_lse,  # fp32 [S, H, N], natural
    num_rows,  # S * N * H
    num_tokens,
    num_heads,  # of q
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, WIDTH)
    m_m = o_m < num_rows
    m_x = m_m[:, None] & (o_d < HEAD_DIM)[None, :]
    o_x = o_m[:, None] * HEAD_DIM + o_d[None, :]
    o_lse = (o_m // (num_tokens * num_heads) * num_heads + o_m % num_heads) * num_tokens + o_m // num_heads % num_tokens
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        b_max = tl.maximum(b_max, tl.load(p_partial_lse + split * num_rows + o_m, mask=m_m, other=0.0))
    if HAS_OWN:
        b_own = tl.load(p_own_lse + o_lse, mask=m_m, other=0.0) * LOG2E
        b_max = tl.maximum(b_max, b_own)
    b_ref = tl.where(b_max == float("-inf"), 0.0, b_max)  # a row that sees no key
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_acc = tl.zeros([BM, WIDTH], dtype=tl.float32)
    # Always in this order.
    for split in tl.static_range(SPLITS):
        b_w = tl.exp2(tl.load(p_partial_lse + split * num_rows + o_m, mask=m_m, other=0.0) - b_ref)
        b_sum += b_w
        p_split = p_partial + tl.cast(split, tl.int64) * num_rows * HEAD_DIM
        b_acc += b_w[:, None] * tl.load(p_split + o_x, mask=m_x, other=0.0)
    if HAS_OWN:
        b_w = tl.exp2(b_own - b_ref)
        b_sum += b_w
        b_acc += b_w[:, None] * tl.load(p_own + o_x, mask=m_x, other=0.0)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(p_out + o_x, (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_x)
    tl.store(p_lse + o_lse, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Architecture -> by channels computed (the sum of the parts), for long and for short frames. The first row that is wide
# enough serves. All of them are compiled ahead of time by a test: no spills, no more shared memory than there is, and
# on sm_90 warpgroup products. fp32 products run on the plain units.
SHORT = 64
SM80 = {
    96: (Config(128, 32, 8, 3), Config(64, 32, 4, 3)),
    128: (Config(64, 64, 8, 3), Config(64, 32, 4, 3)),
    176: (Config(64, 16, 8, 2),) * 2,
    224: (Config(32, 16, 8, 2),) * 2,
    256: (Config(64, 32, 8, 2),) * 2,
}
SM86 = {**SM80, 128: (Config(64, 32, 4, 3),) * 2}  # 99 KiB of shared memory instead of 163
SM90 = {128: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)), 256: (Config(64, 32, 8, 3),) * 2}
SM100 = {128: SM90[128], 224: (Config(64, 32, 8, 2),) * 2, 256: SM90[256]}
HALF = {80: SM80, 86: SM86, 90: SM90, 100: SM100, 120: SM86}
# Pages of float8 take registers to decode: eight warps where four would spill.
SM80_FLOAT8 = {**SM80, 128: (Config(64, 64, 8, 3), Config(64, 32, 8, 3))}
SM86_FLOAT8 = {**SM86, 128: (Config(64, 32, 8, 3),) * 2}
HALF_FLOAT8 = {80: SM80_FLOAT8, 86: SM86_FLOAT8, 90: SM90, 100: SM100, 120: SM86_FLOAT8}
SINGLE = {128: (Config(32, 16, 8, 2),) * 2, 256: (Config(16, 16, 8, 2),) * 2}
COMBINE_ROWS = 16
PRECISION = "ieee"  # of fp32 products: not tf32


def config_for(head_dim: int, itemsize: int, num_rows: int, capability: int, float8: bool = False) -> Config:
    """Tile sizes for a head dimension, an element size of q, the rows of a sequence (tokens times the heads of q that
    share one of the cache), a compute capability (90: 9.0), and whether the pages are float8."""
    width = sum(split_head_dim(head_dim))
    known = max(known for known in HALF if known <= capability)
    table = SINGLE if itemsize == 4 else (HALF_FLOAT8 if float8 else HALF)[known]
    return next(pair for limit, pair in table.items() if width <= limit)[num_rows <= SHORT]


def choose_splits(tiles: int, max_keys: int, block_n: int, num_sms: int) -> int:
    """Splits so that the tiles fill the device once, each with at least four key blocks when the view is full."""
    return max(1, min(num_sms // tiles, max_keys // (4 * block_n), 16))


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """Compute capability and multiprocessors; for the interpreter those of a small device, so that keys are split."""
    if device.type != "cuda":
        return 90, 8
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


@dataclass
class Pages:
    """The cached keys and values of some sequences, as a kernel takes them.

    k, v ``[pages, page_size, heads, D]`` of equal strides; tables int32 ``[S, 1 + 3 * max_pages]`` as
    core/page_tables.py says or, with lengths int32 ``[S]``, page numbers ``[S, max_pages]``; bias fp32, per frame or,
    with lengths, per page; scales fp32 ``[2, pages, heads]`` where the pages are float8_e4m3fn.
    """

    k: Tensor
    v: Tensor
    tables: Tensor
    lengths: Tensor | None
    bias: Tensor | None
    scales: Tensor | None = None

    @property
    def max_pages(self) -> int:
        columns = self.tables.shape[1]
        return columns if self.lengths is not None else (columns - 1) // page_tables.PARTS

    @property
    def max_keys(self) -> int:
        return self.max_pages * self.k.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        unused = self.tables
        k, v = (self.k, self.v) if self.scales is None else (x.view(torch.uint8) for x in (self.k, self.v))
        own = self.lengths, self.bias, *((None, None) if self.scales is None else self.scales.unbind())
        return k, v, unused, *(unused if x is None else x for x in own)

    def strides(self) -> tuple[int, ...]:
        return *strides(self.k), self.tables.stride(0), 0 if self.bias is None else self.bias.stride(0)

    def constants(self) -> dict:
        present = {"PACKED": self.lengths is None, "HAS_BIAS": self.bias is not None, "FP8": self.scales is not None}
        return {"PAGE": self.k.shape[1], **present}


def strides(*tensors: Tensor) -> list[int]:
    """Of the first three of four dimensions, in steps of 8 elements."""
    return [stride // 8 for x in tensors for stride in x.stride()[:3]]


def options(config: Config, head_dim: int) -> dict:
    return {
        "HEAD_DIM": head_dim,
        "PARTS": split_head_dim(head_dim),
        "BM": config.block_m,
        "BN": config.block_n,
        "PRECISION": PRECISION,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # see forward.options
    }


def forward(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    pages: Pages,
    scale: float,
    own: tuple[Tensor, Tensor] | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q [S, N, heads, D], k_self, v_self [S, N or 0, heads of the cache, D] -> out as q, lse fp32 [S, heads, N].

    The last dimension is contiguous, the other strides are multiples of 8.

    own: out and lse over the new rows' own keys, which then are none of the keys here.
    splits: partial results per tile; default by the number of tiles and multiprocessors.
    """
    num_seqs, num_tokens, heads, head_dim = q.shape
    group = heads // k_self.shape[2]
    capability, num_sms = device_facts(q.device)
    config = config_for(head_dim, q.element_size(), num_tokens * group, capability, pages.scales is not None)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(num_seqs, heads, num_tokens, dtype=torch.float32)
    if not out.numel():
        return out, lse
    num_own = k_self.shape[1] if own is None else 0
    num_tiles = triton.cdiv(num_tokens * group, config.block_m)
    tiles = num_seqs * k_self.shape[2] * num_tiles
    if splits is None:
        splits = choose_splits(tiles, pages.max_keys + num_own, config.block_n, num_sms)
    partial = splits > 1 or own is not None
    rows = num_seqs * num_tokens * heads
    results = (q.new_empty(n, dtype=torch.float32) for n in (splits * out.numel(), splits * rows))
    results = tuple(results) if partial else (out, lse)
    paged_fwd_kernel[(tiles, splits)](
        *(q, k_self, v_self, *pages.tensors(), *results),
        *(scale * LOG2E.value, num_tokens, num_own, k_self.shape[2], num_tiles, rows, pages.max_pages),
        *(*strides(q, k_self, v_self), *pages.strides()),
        GROUP=group,
        SPLITS=splits,
        PARTIAL=partial,
        **pages.constants(),
        **options(config, head_dim),
    )
    if partial:
        combine(*results, own, out, lse, splits)
    return out, lse


def combine(
    partial: Tensor, partial_lse: Tensor, own: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor, splits: int
) -> None:
    """Writes out [S, N, heads, D] and lse [S, heads, N]: partial results, and the part of the own keys, weighed."""
    _, num_tokens, heads, head_dim = out.shape
    rows = lse.numel()
    paged_combine_kernel[(triton.cdiv(rows, COMBINE_ROWS),)](
        *(partial, partial_lse, *((partial, partial_lse) if own is None else own), out, lse),
        *(rows, num_tokens, heads),
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        BM=COMBINE_ROWS,
        SPLITS=splits,
        HAS_OWN=own is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
