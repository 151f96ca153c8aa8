"""Tiles whose channels are held in parts, for kernels of any head dimension.

Matrix units want powers of two, so the head dimension is split into them: PARTS = (64, 16) holds 72 channels, 8 of the
last part being zero, and 80 / 72 is cheaper than 128 / 72. A tile of rows is then a tuple of blocks [rows, width of the
part]; these are the few things that are done with one.
"""

import functools

import triton
import triton.language as tl


@functools.cache
def split_head_dim(head_dim: int) -> tuple[int, ...]:
    """At most three powers of two from 16 upwards, descending, that hold head_dim with the fewest channels, then in the
    fewest parts."""
    powers = (256, 128, 64, 32, 16)
    splits = [(a, b, c) for a in powers for b in (*powers, 0) for c in (*powers, 0) if a > b > c or (b == c == 0)]
    splits = [tuple(part for part in split if part) for split in splits]
    return min((split for split in splits if sum(split) >= head_dim), key=lambda split: (sum(split), len(split)))


@triton.constexpr_function
def _first(parts, i):
    return sum(parts[:i])


@triton.constexpr_function
def _width(parts, i):
    return parts[i]


@triton.jit
def load_parts(p_x, o_row, stride, m_row, PARTS: tl.constexpr, D: tl.constexpr):
    """Rows o_row [R] of p_x, 0 beyond D channels and outside m_row (None: all rows are there)."""
    b_x = ()
    for i in tl.static_range(len(PARTS)):
        o_d = _first(PARTS, i) + tl.arange(0, _width(PARTS, i))
        p = p_x + (o_row[:, None] * stride + o_d[None, :])
        if _first(PARTS, i) + _width(PARTS, i) > D:
            if m_row is None:
                b = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
            else:
                b = tl.load(p, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
        else:
            if m_row is None:
                b = tl.load(p)
            else:
                b = tl.load(p, mask=m_row[:, None], other=0.0)
        b_x = b_x + (b,)
    return b_x


@triton.jit
def zero_parts(ROWS: tl.constexpr, PARTS: tl.constexpr):
    b_x = ()
    for i in tl.static_range(len(PARTS)):
        b_x = b_x + (tl.zeros([ROWS, _width(PARTS, i)], tl.float32),)
    return b_x


@triton.jit
def store_parts(p_x, o_row, stride, m_row, b_x, factor, PARTS: tl.constexpr, D: tl.constexpr):
    """Rows o_row [R] of p_x = b_x * factor, as far as m_row and D go."""
    for i in tl.static_range(len(PARTS)):
        o_d = _first(PARTS, i) + tl.arange(0, _width(PARTS, i))
        p = p_x + (o_row[:, None] * stride + o_d[None, :])
        tl.store(p, (b_x[i] * factor).to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def dot_parts(b_x, b_y, PRECISION: tl.constexpr):
    """All rows of x times all rows of y: [R, D], [C, D] -> [R, C]."""
    b_s = tl.dot(b_x[0], b_y[0].T, input_precision=PRECISION)
    for i in tl.static_range(1, len(b_x)):
        b_s = tl.dot(b_x[i], b_y[i].T, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def add_parts(b_acc, b_w, b_x, PRECISION: tl.constexpr):
    """acc + w x: acc [R, D], w [R, C], x [C, D]."""
    b_sum = ()
    for i in tl.static_range(len(b_x)):
        b_sum = b_sum + (tl.dot(b_w, b_x[i], b_acc[i], input_precision=PRECISION),)
    return b_sum


@triton.jit
def scale_parts(b_x, factor):
    b_y = ()
    for i in tl.static_range(len(b_x)):
        b_y = b_y + (b_x[i] * factor,)
    return b_y
