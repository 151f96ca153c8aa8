"""The layout of a schedule for kernels: the numbers of csrc/schedule.h under their names there (docs/schedule.md)."""

import triton.language as tl

from mimo_kernels.core.host import schedule_layout

_cells = schedule_layout()

TILE_END = tl.constexpr(_cells["TILE_END"])
TILE_SEGMENTS = tl.constexpr(_cells["TILE_SEGMENTS"])
TILE_BARE_BLOCKS = tl.constexpr(_cells["TILE_BARE_BLOCKS"])
TILE_CELLS = tl.constexpr(_cells["TILE_CELLS"])
SEGMENT_CELLS = tl.constexpr(_cells["SEGMENT_CELLS"])
KEY_SEGMENT_BOUNDS = tl.constexpr(_cells["KEY_SEGMENT_BOUNDS"])
KEY_SEGMENT_CELLS = tl.constexpr(_cells["KEY_SEGMENT_CELLS"])
BOUNDS_START = tl.constexpr(_cells["BOUNDS_START"])
BOUNDS_END = tl.constexpr(_cells["BOUNDS_END"])
BOUNDS_CELLS = tl.constexpr(_cells["BOUNDS_CELLS"])
HEADER_CELLS = tl.constexpr(_cells["HEADER_CELLS"])
ROW_SEGMENT_GROUPS = tl.constexpr(_cells["ROW_SEGMENT_GROUPS"])
ROW_SEGMENT_BEGINS = tl.constexpr(_cells["ROW_SEGMENT_BEGINS"])
ROW_SEGMENT_KEYS = tl.constexpr(_cells["ROW_SEGMENT_KEYS"])
ROW_SEGMENT_CELLS = tl.constexpr(_cells["ROW_SEGMENT_CELLS"])
