// The schedule of attention on Hopper, as plan_sm90.cpp writes it and attention_sm90.cuh reads it. All numbers are
// int32, all places count from the first tile:
//
//     tiles   [T, 8]  start and end of the rows of the first warpgroup; of the second (start == end: it has none);
//                     place of the first run; number of runs; group of the first row of either warpgroup
//     groups  [G, 8]  the frame table (schedule.h)
//     runs    [R, 4]  first row of the other side; blocks; states of a block, two bits per warpgroup; the first group
//                     that may have rows in the first block
//
// Every tile has at most kTileRows rows per warpgroup. In a bare block every row of the warpgroup sees every row of the
// other side, in a masked one some, in a skipped one none.
#pragma once

#include "schedule.h"

namespace mimo::sm90 {

constexpr int kTileRows = 64;
constexpr int kTileColumns = 8, kRunColumns = 4;
constexpr int kSkip = 0, kBare = 1, kMasked = 2;

}  // namespace mimo::sm90
