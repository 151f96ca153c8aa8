// The layout of a tile schedule (plan.cpp writes it, the attention kernels read it): every number that both sides need
// to agree on, once. Python reads them as mimo_kernels._C.schedule_layout. docs/schedule.md draws it.
#pragma once

#include <cstdint>
#include <limits>

namespace mimo::schedule {

// A group of a frame table: first and end row, then start and end of the key intervals it sees; unused ones are 0, 0.
// A table has cells for at least kIntervals of them in every group, and for more where a group has more.
constexpr int kIntervals = 3;
constexpr int kGroupKeys = 2;
constexpr int kGroupCells = kGroupKeys + 2 * kIntervals;

// A tile: start, end, cell of its first segment, number of bare blocks.
constexpr int kTileStart = 0, kTileEnd = 1, kTileSegments = 2, kTileBareBlocks = 3;
constexpr int kTileCells = 4;

// A bare segment: start, end. A masked one of plan_rows: start, end, number of bounds; then the bounds: from a row on,
// up to the row of the next ones, the keys of the segment that rows see.
constexpr int kSegmentCells = 2;
constexpr int kKeySegmentBounds = 2, kKeySegmentCells = 3;
constexpr int kBoundsRow = 0, kBoundsStart = 1, kBoundsEnd = 2, kBoundsCells = 3;

// Between the bare and the masked segments of a tile: masked steps.
constexpr int kHeaderSteps = 0;
constexpr int kHeaderCells = 1;

// A masked segment of plan_keys: start, end; where the groups after its first begin; nothing; keys that each group
// sees.
constexpr int kRowSegmentGroups = 4;
constexpr int kRowSegmentBegins = 2, kRowSegmentKeys = 8;
constexpr int kRowSegmentCells = kRowSegmentKeys + 2 * kRowSegmentGroups;

// Rows, keys and cells are counted in int32, and kernels count up to one tile or block past the last of them.
constexpr int kMaxTile = 1 << 16;
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() - int64_t{kMaxTile};

}  // namespace mimo::schedule
