"""The layout of frame tables and schedules: the numbers of csrc/schedule.h under the same names (docs/schedule.md)."""

# A group of a frame table: first and end row, then start and end of the key intervals it sees; unused ones are 0, 0.
# A table has cells for at least INTERVALS of them in every group, and for more where a group has more.
INTERVALS = 3
GROUP_KEYS = 2
GROUP_CELLS = GROUP_KEYS + 2 * INTERVALS

TILE_START, TILE_END, TILE_SEGMENTS, TILE_BARE_BLOCKS, TILE_CELLS = range(5)

# A bare segment: start, end. A masked one of plan_rows has the number of its bounds behind them, then the bounds.
SEGMENT_CELLS = 2
KEY_SEGMENT_BOUNDS, KEY_SEGMENT_CELLS = 2, 3
BOUNDS_ROW, BOUNDS_START, BOUNDS_END, BOUNDS_CELLS = range(4)

# Between the bare and the masked segments of a tile.
HEADER_STEPS, HEADER_CELLS = range(2)

# A masked segment of plan_keys: start, end; where the groups after its first begin; nothing; keys of each group.
ROW_SEGMENT_GROUPS = 4
ROW_SEGMENT_BEGINS, ROW_SEGMENT_KEYS = 2, 8
ROW_SEGMENT_CELLS = ROW_SEGMENT_KEYS + 2 * ROW_SEGMENT_GROUPS

MAX_TILE = 2**16
# Rows, keys and cells are counted in int32, and kernels count up to one tile or block past the last of them.
MAX_ROWS = 2**31 - 1 - MAX_TILE

schedule_layout = {name: number for name, number in globals().items() if name.isupper() and name != "MAX_TILE"}
