// Tile schedules of the attention kernels, from the frame table of a FrameMask (see frame_mask.cpp for the table).
//
// A schedule is a list of tiles, and for each tile the blocks it has to visit. Blocks that every row of the tile sees
// whole form *bare* segments, which a kernel runs without any test; the rest forms *masked* segments. All numbers are
// int32; schedule.h names them, docs/schedule.md draws them:
//
//     tiles     [T, kTileCells]
//     segments  tile after tile: bare segments, header, masked segments, start and end of the tile once more (a kernel
//               that reads them again at its end need not keep them in registers)
//
// plan_rows: a tile is a range of query rows, its segments are ranges of keys (forward, dQ). Every row sees at most one
// interval of keys in a masked segment, so two bounds per row describe it: they stand behind the segment, for each run
// of rows with the same ones. A masked step is a segment.
//
// plan_keys: a tile is a range of keys, its segments are ranges of query rows (dK, dV). A masked segment holds rows of
// up to kRowSegmentGroups groups, with the keys that each of them sees in the tile, and is a single block unless all
// its rows are of one group. A masked step is a block.
//
// So a kernel meets what a tile has and no more: a row may have any number of intervals of keys.
//
// No tile holds rows, or keys, of two clips, nor of two parts of a clip that see nothing of each other.
//
// Tiles come longest first inside bands of clips, each of about `band_rows` rows: within a band to keep the end of a
// launch short, in bands so that what runs at the same time shares its keys in the cache.
//
// Three steps make a schedule. choose_cuts decides where tiles end before they are full, walk goes through the tiles
// and writes the segments of each, result sorts the tiles. Where a tile ends matters because frames seldom fill tiles:
// a tile that reaches over a boundary visits what either side sees, one that ends there leaves rows of the matrix units
// idle. The search is a shortest path over the spans, from the last to the first: the blocks from a span on are those
// up to the next early end plus those from there on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "arrays.h"
#include "frame_table.h"
#include "schedule.h"

namespace mimo {

using Intervals = Array<Interval>;  // ascending

constexpr int kLookAhead = 64;  // spans from one early end of a tile to the next

// How many blocks of a power of two.
struct Blocks {
    int size, shift;

    explicit Blocks(int size) : size(size), shift(__builtin_ctz(size)) {}
    int64_t covering(int64_t length) const { return (length + size - 1) >> shift; }
    int inside(int length) const { return length >> shift; }
    int64_t covering(const Intervals& intervals) const {
        int64_t blocks = 0;
        for (const Interval& x : intervals) blocks += covering(x.end - x.start);
        return blocks;
    }
};

// Steps blocks from `range.start` and calls bare(start, end) for runs of blocks inside one interval of `common`,
// masked(start, end) for the rest. `at` walks along the intervals while ranges ascend: 0 to begin with.
template <typename Bare, typename Masked>
void split_blocks(Interval range, const Intervals& common, size_t& at, Blocks blocks, Bare bare, Masked masked) {
    int place = range.start;
    while (at < common.size() && common[at].end <= range.start) ++at;
    for (size_t i = at; i < common.size() && common[i].start < range.end; ++i) {
        const Interval& x = common[i];
        const int skip = std::max(0, x.start - range.start);
        const int first = range.start + static_cast<int>(blocks.covering(skip)) * blocks.size;
        const int last = range.start + blocks.inside(std::min(x.end, range.end) - range.start) * blocks.size;
        if (first >= last) continue;
        if (place < first) masked(place, first);
        bare(first, last);
        place = last;
    }
    if (place < range.end) masked(place, range.end);
}

// What tiles are cut from: spans one after another, of rows or of keys, and where a part of the mask begins that sees
// nothing of what was before. Tiles do not reach over it. A matrix product multiplies hidden values by 0, and 0 times
// NaN is NaN: a tile that held rows of two clips would carry a NaN from one to the other.
struct Axis {
    Intervals spans;
    std::vector<char> starts_part;  // per span, and one more

    explicit Axis(size_t count) : spans(count), starts_part(count + 1, 0) {}
};
Axis row_axis(const LentTable& table);
Axis key_axis(const LentTable& table);

class Schedule {
public:
    Schedule(Axis axis, int tile, int block, int band_rows);

    // (bytes of tiles and segments; number of tiles; executed pairs; rows, or keys, that the tiles cover)
    pybind11::tuple result();

protected:
    struct Tile {
        int start, end, span, end_span;
        size_t place;  // of its segments, from the first one of all
        int band;
        int64_t bare_blocks = 0, masked_steps = 0, blocks = 0;
    };

    // Cuts the spans into tiles. A tile begins at begin(row, span), ends at the first further span that starts a part
    // or for which joins(span) is false, or when it is full, and goes to emit(tile).
    template <typename Begin, typename Joins, typename Emit>
    void walk(Begin begin, Joins joins, Emit emit) {
        for (int start = 0, span = 0; start < rows_;) {
            int end = std::min(rows_ - start, tile_) + start, next = span + 1;
            begin(start, span);
            const auto reaches = [&] { return next < count_ && spans_[next].start < end && !starts_part_[next]; };
            for (; reaches() && joins(next); ++next) {
            }
            if (next < count_) end = std::min(end, spans_[next].start);
            tiles_.push({start, end, span, next, segments_.size(), bands_[span]});
            emit(tiles_.back());
            span = spans_[next - 1].end > end ? next - 1 : next;
            start = end;
        }
    }

    void add_bare(Tile& tile, int start, int end) {
        segments_.append({start, end});
        const int blocks = blocks_.inside(end - start);
        tile.bare_blocks += blocks, tile.blocks += blocks;
    }

    // Decides at which spans tiles end early: the fewest blocks over all choices. Where the short tile of a clip
    // stands makes the difference: it should be where tiles visit few blocks. `cost` gives the blocks of a tile:
    // begin(span), extend(span), blocks().
    template <typename Cost>
    void choose_cuts(Cost cost) {
        const Interval* const spans = spans_.begin();  // in registers, whatever is written
        const char* const starts_part = starts_part_.data();
        const int count = count_, rows = rows_, tile = tile_;
        std::vector<int64_t> best(count + 1, 0);  // blocks of all rows from a span on
        std::vector<int> next_cut(count + 1, count);
        for (int first = count - 1; first >= 0; --first) {
            int64_t least = std::numeric_limits<int64_t>::max(), blocks = 0;
            int cut = count;
            const auto consider = [&](int next, int64_t until_next) {
                if (until_next + best[next] < least) least = until_next + best[next], cut = next;
            };
            int row = spans[first].start, span = first;
            while (row < rows && (span - first < kLookAhead || cut == count)) {
                cost.begin(span);
                if (const int left = spans[span].end - row; left >= tile) {
                    const int inside = left / tile;  // tiles in this span alone
                    blocks += inside * cost.blocks();
                    row += inside * tile;
                    if (row == spans[span].end) {
                        consider(span + 1, blocks);
                        break;  // what follows does not depend on where this began
                    }
                }
                const auto more = [&] { return span + 1 < count && !starts_part[span + 1]; };
                for (; more() && spans[span + 1].start - row < tile; ++span) {
                    consider(span + 1, blocks + cost.blocks());
                    cost.extend(span + 1);
                }
                blocks += cost.blocks();
                row += std::min((more() ? rows : spans[span].end) - row, tile);
                if (row == spans[span].end) {
                    consider(span + 1, blocks);
                    break;
                }
                if (blocks + best[span + 1] >= least)
                    break;  // the rows left over need at least as much as those of the spans to come
            }
            best[first] = least, next_cut[first] = cut;
        }
        ends_early_.assign(count + 1, false);
        for (int span = 0; span < count; span = next_cut[span]) ends_early_[span] = true;
    }

    // Whether tiles hold at most so many spans, on average.
    bool holds_at_most(int spans) const {
        return static_cast<int64_t>(count_) * tile_ <= static_cast<int64_t>(rows_) * spans;
    }

    void close(const Tile& tile);

    const Intervals spans_;
    const std::vector<char> starts_part_;
    const int count_, rows_, tile_;  // spans; rows of all of them, or keys
    const Blocks blocks_;
    Array<Tile> tiles_;
    Array<int32_t> segments_, masked_;  // of all tiles; of the open tile
    std::vector<char> ends_early_;      // per span: the tile before it is not filled with its rows

private:
    // Every tile but the last ends at the end of a span or is full.
    size_t most_tiles() const { return static_cast<size_t>(rows_ / tile_) + count_ + 1; }
    void find_bands(int band_rows);
    Array<int> sorted() const;

    std::vector<int> bands_;
};

pybind11::tuple plan_rows(const LentTable& table, int tile, int block, int band_rows);
pybind11::tuple plan_keys(const LentTable& table, int tile, int block, int band_rows);

}  // namespace mimo
