// Tile schedules of the attention kernels, from the frame table of a FrameMask (see frame_mask.cpp for the table).
//
// A schedule is a list of tiles, and for each tile the blocks it has to visit. Blocks that every row of the tile sees
// whole form *bare* segments, which a kernel runs without any test; the rest forms *masked* segments. All numbers are
// int32 and their count is O(groups + tiles); schedule.h names them, docs/schedule.md draws them:
//
//     tiles     [T, kTileCells]
//     groups    [G, kGroupCells]  the frame table itself
//     segments  tile after tile: bare segments, header, masked segments, start and end of the tile once more (a kernel
//               that reads them again at its end need not keep them in registers)
//
// plan_rows: a tile is a range of query rows, its segments are ranges of keys (forward, dQ). Every row sees at most one
// interval of keys in a masked segment, so two bounds per row describe it. A masked step is a segment.
//
// plan_keys: a tile is a range of keys, its segments are ranges of query rows (dK, dV). A masked segment holds rows of
// up to kRowSegmentGroups groups, with the keys that each of them sees in the tile, and is a single block unless all
// its rows are of one group. A masked step is a block.
//
// No tile holds rows, or keys, of two clips, nor of two parts of a clip that see nothing of each other.
//
// Tiles come longest first inside bands of clips, each of about `band_rows` rows: within a band to keep the end of a
// launch short, in bands so that what runs at the same time shares its keys in the cache.
//
// Three steps make a schedule. choose_cuts decides where tiles end before they are full, walk goes through the tiles
// and writes the segments of each, result sorts the tiles. Where a tile ends matters because frames seldom fill tiles:
// a tile that reaches over a boundary visits what either side sees, one that ends there leaves rows of the matrix units
// idle. The search is a shortest path over the groups, from the last to the first: the blocks from a group on are those
// up to the next early end plus those from there on.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "frame_table.h"
#include "schedule.h"

namespace py = pybind11;

namespace {

using namespace mimo::schedule;

constexpr int kLookAhead = 64;  // groups from one early end of a tile to the next
constexpr int kRowGroupsPerTile =
    32;  // with more (frames of a few tokens) no tile of rows ends early: the choice is not worth its time
constexpr int kKeyGroupsPerTile =
    8;  // with more the rows that see a tile do not tell its blocks: where a tile of keys ends is decided on the spot

using mimo::Array;
using mimo::fail;
using mimo::Group;
using mimo::Interval;
using mimo::LentTable;
using mimo::radix_sort;
using Intervals = Array<Interval>;  // ascending

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

void assign_keys(const Group& group, Intervals& into) {
    into.resize(0);
    for (const Interval& key : group) into.push(key);
}

// Adds the keys of `group` to a union: ascending, adjacent intervals merged.
inline void unite(Intervals& all, const Group& group) {
    size_t at = 0;
    for (const Interval& key : group) {
        while (at < all.size() && all[at].end < key.start) ++at;
        if (at == all.size() || key.end < all[at].start) {
            all.insert(at, key);
            continue;
        }
        all[at] = {std::min(all[at].start, key.start), std::max(all[at].end, key.end)};
        while (at + 1 < all.size() && all[at + 1].start <= all[at].end) {
            all[at].end = std::max(all[at].end, all[at + 1].end);
            all.erase(at + 1);
        }
    }
}

void intersect(const Intervals& a, const Group& group, Intervals& into) {
    into.resize(0);
    for (const Interval& x : a) {
        for (const Interval& key : group) {
            const Interval both{std::max(x.start, key.start), std::min(x.end, key.end)};
            if (both.start < both.end) into.push(both);
        }
    }
}

// Steps blocks from `range.start` and calls bare(start, end) for runs of blocks inside one interval of `common`,
// masked(start, end) for the rest.
template <typename Bare, typename Masked>
void split_blocks(Interval range, const Intervals& common, Blocks blocks, Bare bare, Masked masked) {
    int place = range.start;
    for (const Interval& x : common) {
        if (x.end <= range.start || x.start >= range.end) continue;
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

class Schedule {
public:
    Schedule(const Group* groups, int count, int tile, int block, int band_rows)
        : groups_(groups),
          count_(count),
          rows_(count ? groups[count - 1].row_end : 0),
          tile_(tile),
          blocks_(block),
          tiles_(most_tiles()),
          segments_(most_tiles() * kRowSegmentCells),
          masked_(kRowSegmentCells) {
        find_parts();
        find_bands(band_rows);
    }

    // (bytes of tiles, groups and segments; number of tiles; executed pairs; rows)
    py::tuple result() {
        const Array<int> order = sorted();
        std::fill_n(segments_.extend(kRowSegmentCells), kRowSegmentCells, 0);  // kernels look one segment ahead
        const size_t first_segment = tiles_.size() * kTileCells + size_t{kGroupCells} * count_;
        const size_t cells = first_segment + segments_.size();
        if (cells > static_cast<size_t>(kMaxRows))
            throw py::value_error("a schedule of " + std::to_string(cells) + " numbers for " + std::to_string(rows_) +
                                  " rows; expected at most " + std::to_string(kMaxRows));
        py::bytearray bytes(nullptr, 0);
        if (PyByteArray_Resize(bytes.ptr(), cells * sizeof(int32_t))) throw py::error_already_set();
        int32_t* out = reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(bytes.ptr()));
        int64_t blocks = 0;
        for (const int t : order) {
            const Tile& tile = tiles_[t];
            int32_t row[kTileCells];
            row[kTileStart] = tile.start, row[kTileEnd] = tile.end;
            row[kTileSegments] = static_cast<int32_t>(first_segment + tile.place),
            row[kTileBareBlocks] = static_cast<int32_t>(tile.bare_blocks);
            out = std::copy_n(row, kTileCells, out);
            blocks += tile.blocks;
        }
        out = std::copy_n(reinterpret_cast<const int32_t*>(groups_), size_t{kGroupCells} * count_, out);
        std::copy(segments_.begin(), segments_.end(), out);
        return py::make_tuple(std::move(bytes), tiles_.size(), blocks * tile_ * blocks_.size, rows_);
    }

protected:
    struct Tile {
        int start, end, group, end_group;
        size_t place;  // of its segments, from the first one of all
        int band;
        int64_t bare_blocks = 0, masked_steps = 0, blocks = 0;
    };

    // Cuts the rows into tiles. A tile begins at begin(row, group), ends at the first further group that starts a part
    // or for which joins(group) is false, or when it is full, and goes to emit(tile).
    template <typename Begin, typename Joins, typename Emit>
    void walk(Begin begin, Joins joins, Emit emit) {
        for (int start = 0, group = 0; start < rows_;) {
            int end = std::min(rows_ - start, tile_) + start, next = group + 1;
            begin(start, group);
            const auto reaches = [&] { return next < count_ && groups_[next].row_start < end && !starts_part_[next]; };
            for (; reaches() && joins(next); ++next) {
            }
            if (next < count_) end = std::min(end, groups_[next].row_start);
            tiles_.push({start, end, group, next, segments_.size(), bands_[group]});
            emit(tiles_.back());
            group = groups_[next - 1].row_end > end ? next - 1 : next;
            start = end;
        }
    }

    void add_bare(Tile& tile, int start, int end) {
        segments_.append({start, end});
        const int blocks = blocks_.inside(end - start);
        tile.bare_blocks += blocks, tile.blocks += blocks;
    }

    // Decides at which groups tiles end early: the fewest blocks over all choices. Where the short tile of a clip
    // stands makes the difference: it should be where tiles visit few blocks. `cost` gives the blocks of a tile:
    // begin(group), extend(group), blocks().
    template <typename Cost>
    void choose_cuts(Cost cost) {
        const Group* const groups = groups_;  // in registers, whatever is written
        const char* const starts_part = starts_part_.data();
        const int count = count_, rows = rows_, tile = tile_;
        std::vector<int64_t> best(count + 1, 0);  // blocks of all rows from a group on
        std::vector<int> next_cut(count + 1, count);
        for (int first = count - 1; first >= 0; --first) {
            int64_t least = std::numeric_limits<int64_t>::max(), blocks = 0;
            int cut = count;
            const auto consider = [&](int next, int64_t until_next) {
                if (until_next + best[next] < least) least = until_next + best[next], cut = next;
            };
            int row = groups[first].row_start, group = first;
            while (row < rows && (group - first < kLookAhead || cut == count)) {
                cost.begin(group);
                if (const int left = groups[group].row_end - row; left >= tile) {
                    const int inside = left / tile;  // tiles in this group alone
                    blocks += inside * cost.blocks();
                    row += inside * tile;
                    if (row == groups[group].row_end) {
                        consider(group + 1, blocks);
                        break;  // what follows does not depend on where this began
                    }
                }
                const auto more = [&] { return group + 1 < count && !starts_part[group + 1]; };
                for (; more() && groups[group + 1].row_start - row < tile; ++group) {
                    consider(group + 1, blocks + cost.blocks());
                    cost.extend(group + 1);
                }
                blocks += cost.blocks();
                row += std::min((more() ? rows : groups[group].row_end) - row, tile);
                if (row == groups[group].row_end) {
                    consider(group + 1, blocks);
                    break;
                }
                if (blocks + best[group + 1] >= least)
                    break;  // the rows left over need at least as much as those of the groups to come
            }
            best[first] = least, next_cut[first] = cut;
        }
        ends_early_.assign(count + 1, false);
        for (int group = 0; group < count; group = next_cut[group]) ends_early_[group] = true;
    }

    // Whether tiles hold at most so many groups, on average.
    bool holds_at_most(int groups) const {
        return static_cast<int64_t>(count_) * tile_ <= static_cast<int64_t>(rows_) * groups;
    }

    void close(const Tile& tile) {
        if (std::max(tile.bare_blocks, tile.masked_steps) > kMaxRows)
            throw py::value_error("a tile of " + std::to_string(tile.blocks) + " blocks; kernels count them in int32");
        segments_.append({static_cast<int32_t>(tile.masked_steps), tile.group, tile.end_group, 0});
        std::copy(masked_.begin(), masked_.end(), segments_.extend(masked_.size()));
        segments_.append({tile.start, tile.end});
        masked_.resize(0);
    }

    const Group* groups_;
    std::vector<char> starts_part_;  // per group
    const int count_, rows_, tile_;
    const Blocks blocks_;
    Array<Tile> tiles_;
    Array<int32_t> segments_, masked_;  // of all tiles; of the open tile
    std::vector<char> ends_early_;      // per group: the tile before it is not filled with its rows

private:
    // Every tile but the last ends at the end of a group or is full.
    size_t most_tiles() const { return static_cast<size_t>(rows_ / tile_) + count_ + 1; }

    // A part starts where no earlier group sees later rows and no later group sees earlier ones: at every clip. Tiles
    // do not reach over it. A matrix product multiplies hidden values by 0, and 0 times NaN is NaN: a tile that held
    // rows of two clips would carry a NaN from one to the other.
    void find_parts() {
        starts_part_.assign(count_ + 1, 0);
        std::vector<int> first_key(count_ + 1, rows_);  // of a group and those after it
        for (int g = count_ - 1; g >= 0; --g)
            first_key[g] = std::min(first_key[g + 1], groups_[g].empty() ? rows_ : groups_[g].keys[0].start);
        int last_key = 0;
        for (int g = 0; g < count_; ++g) {
            const int row = groups_[g].row_start;
            starts_part_[g] = last_key <= row && first_key[g] >= row;
            for (const Interval& key : groups_[g]) last_key = std::max(last_key, key.end);
        }
    }

    // Whole parts form a band.
    void find_bands(int band_rows) {
        bands_.assign(count_, 0);
        int band = 0, band_start = 0;
        for (int g = 0; g < count_; ++g) {
            const int row = groups_[g].row_start;
            if (row - band_start >= band_rows && starts_part_[g]) ++band, band_start = row;
            bands_[g] = band;
        }
    }

    // Longest first inside every band.
    Array<int> sorted() const {
        int64_t longest = 0;
        for (const Tile& tile : tiles_) longest = std::max(longest, tile.blocks);
        int bits = 0;
        while (longest >> bits) ++bits;
        Array<int> order(tiles_.size()), spare(tiles_.size());
        for (size_t t = 0; t < tiles_.size(); ++t) order.push(static_cast<int>(t));
        radix_sort(order, spare, [&](int t) {
            return static_cast<uint64_t>(tiles_[t].band) << bits | static_cast<uint64_t>(longest - tiles_[t].blocks);
        });
        return order;
    }

    std::vector<int> bands_;
};

class RowSchedule : public Schedule {
public:
    RowSchedule(const Group* groups, int count, int tile, int block, int band_rows)
        : Schedule(groups, count, tile, block, band_rows), seen_(most()), common_(most()), scratch_(most()) {
        const bool chooses = holds_at_most(kRowGroupsPerTile);
        if (chooses) choose_cuts(UnionCost{*this});
        const auto begin = [&](int, int group) {
            assign_keys(groups_[group], seen_), assign_keys(groups_[group], common_);
        };
        const auto joins = [&](int group) {
            if (chooses && ends_early_[group]) return false;
            unite(seen_, groups_[group]);
            intersect(common_, groups_[group], scratch_);
            common_.swap(scratch_);
            return true;
        };
        walk(begin, joins, [&](Tile& tile) { emit(tile); });
    }

private:
    struct UnionCost {
        RowSchedule& own;
        void begin(int group) { assign_keys(own.groups_[group], own.seen_); }
        void extend(int group) { unite(own.seen_, own.groups_[group]); }
        int64_t blocks() const { return own.blocks_.covering(own.seen_); }
    };

    // Intervals of all groups a tile can hold, and of one more.
    size_t most() const { return kIntervals * (static_cast<size_t>(std::min(count_, tile_)) + 2); }

    void emit(Tile& tile) {
        find_gaps(tile);
        const auto bare = [&](int start, int end) { add_bare(tile, start, end); };
        const auto masked = [&](int start, int end) {
            masked_.append({start, end});
            ++tile.masked_steps;
            tile.blocks += blocks_.covering(end - start);
        };
        for (const Interval& range : seen_) {
            int start = range.start;
            for (const int cut : cuts_) {
                if (cut <= start || cut >= range.end) continue;
                split_blocks({start, cut}, common_, blocks_, bare, masked);
                start = cut;
            }
            split_blocks({start, range.end}, common_, blocks_, bare, masked);
        }
        close(tile);
    }

    // Fewest positions so that every gap between two intervals of one group holds one: cut there, and no masked segment
    // holds two intervals of a row.
    void find_gaps(const Tile& tile) {
        cuts_.clear();
        if (tile.end_group - tile.group == 1) return;  // what a single group does not see is not in its union either
        gaps_.clear();
        for (int g = tile.group; g < tile.end_group; ++g) {
            for (const Interval* key = groups_[g].keys + 1; key < groups_[g].end(); ++key)
                gaps_.push_back({key[-1].end, key[0].start});
        }
        std::sort(gaps_.begin(), gaps_.end(), [](const Interval& a, const Interval& b) { return a.end < b.end; });
        for (const Interval& gap : gaps_) {
            if (cuts_.empty() || cuts_.back() < gap.start) cuts_.push_back(gap.end);
        }
    }

    Intervals seen_, common_, scratch_;
    std::vector<Interval> gaps_;
    std::vector<int> cuts_;
};

class KeySchedule : public Schedule {
public:
    KeySchedule(const Group* groups, int count, int tile, int block, int band_rows)
        : Schedule(groups, count, tile, block, band_rows), events_(most_events()), common_(static_cast<size_t>(count)) {
        sort_events();
        const bool chooses = holds_at_most(kKeyGroupsPerTile);
        if (chooses) count_viewers();
        words_.assign((count + 63) / 64, Word{});
        int first_key = 0;
        int64_t viewers = 0;
        const auto begin = [&](int start, int) {
            for (; events_[event_].place <= start; ++event_) apply(events_[event_]);
            begin_tile();
            first_key = start, viewers = viewers_;
        };
        const auto joins = [&](int group) {
            if (chooses) return !ends_early_[group];
            viewers += enter_until(groups_[group].row_start - 1);
            return !cut_here(first_key, groups_[group], viewers);
        };
        walk(begin, joins, [&](Tile& tile) {
            enter_until(tile.end - 1);
            emit(tile);
        });
    }

private:
    // A group begins or ceases to see keys at a place.
    struct Event {
        int place;
        uint32_t group : 31, begins : 1;
    };

    // Of 64 groups, a bit for each that sees the current key, some key of the tile, the whole tile, several intervals
    // in the tile.
    struct Word {
        uint64_t active, some, whole, several;
    };

    size_t most_events() const { return 2 * kIntervals * static_cast<size_t>(count_) + 1; }

    void sort_events() {
        for (int g = 0; g < count_; ++g) {
            for (const Interval& key : groups_[g]) {
                events_.push({key.start, static_cast<uint32_t>(g), 1});
                events_.push({key.end, static_cast<uint32_t>(g), 0});
            }
        }
        Array<Event> spare(most_events());
        radix_sort(events_, spare, [](const Event& event) { return static_cast<uint64_t>(event.place); });
        events_.push({std::numeric_limits<int>::max(), 0, 0});  // behind all places
    }

    struct ViewerCost {
        const std::vector<int64_t>&at_start,
            &joining;  // rows that see the first key of a group; that begin to see keys in it
        Blocks sizes;
        int64_t viewers = 0;
        void begin(int group) { viewers = at_start[group]; }
        void extend(int group) { viewers += joining[group]; }
        int64_t blocks() const { return sizes.covering(viewers); }
    };

    void count_viewers() {
        std::vector<int64_t> at_start(count_, 0), joining(count_, 0);
        size_t e = 0;
        int64_t viewers = 0;
        for (int g = 0; g < count_; ++g) {
            for (; events_[e].place < groups_[g].row_end; ++e) {
                const int64_t rows = groups_[events_[e].group].rows();
                viewers += events_[e].begins ? rows : -rows;
                if (events_[e].begins) joining[g] += rows;
                if (events_[e].place <= groups_[g].row_start) at_start[g] = viewers;
            }
            if (at_start[g] == 0) at_start[g] = viewers;
        }
        choose_cuts(ViewerCost{at_start, joining, blocks_});
    }

    void apply(const Event& event) {
        const int word = event.group / 64;
        words_[word].active ^= uint64_t{1} << (event.group % 64);
        viewers_ += event.begins ? groups_[event.group].rows() : -groups_[event.group].rows();
        first_word_ = std::min(first_word_, word), end_word_ = std::max(end_word_, word + 1);
    }

    // Outside [first_word_, end_word_) all words are 0: what a tile costs does not grow with the number of clips.
    void begin_tile() {
        for (int w = first_word_; w < end_word_; ++w)
            words_[w] = {words_[w].active, words_[w].active, words_[w].active, 0};
        while (first_word_ < end_word_ && words_[first_word_].active == 0) ++first_word_;
        while (first_word_ < end_word_ && words_[end_word_ - 1].active == 0) --end_word_;
    }

    // Moves inside a tile up to and including `place`; returns the rows that begin to see keys on the way.
    int64_t enter_until(int place) {
        int64_t rows = 0;
        for (; events_[event_].place <= place; ++event_) {
            const Event& event = events_[event_];
            apply(event);
            Word& word = words_[event.group / 64];
            const uint64_t bit = uint64_t{1} << (event.group % 64);
            if (event.begins) {
                word.several |= word.some & bit;
                word.some |= bit;
                rows += groups_[event.group].rows();
            }
            word.whole &= ~bit;
        }
        return rows;
    }

    // Whether a tile from `start` that `before` rows see should end at the group `ahead` rather than reach over the
    // boundary, which saves a part of a tile of that group.
    bool cut_here(int start, const Group& ahead, int64_t before) const {
        int64_t joining = 0, leaving = 0;
        for (size_t e = event_; events_[e].place == ahead.row_start; ++e) {
            (events_[e].begins ? joining : leaving) += groups_[events_[e].group].rows();
        }
        const int64_t after = blocks_.covering(viewers_ + joining - leaving), both = blocks_.covering(before + joining);
        const int taken = ahead.row_start - start;
        return (both - blocks_.covering(before)) * tile_ > std::min(tile_ - taken, ahead.rows()) * after;
    }

    // The first group in [group, end) whose bit is set in word(index of the word); `end` when there is none.
    template <typename WordAt>
    static int find(int group, int end, WordAt word) {
        if (group >= end) return end;
        int w = group / 64;
        uint64_t bits = word(w) & ~uint64_t{0} << (group % 64);
        while (!bits) {
            if (++w * 64 >= end) return end;
            bits = word(w);
        }
        return std::min(end, w * 64 + __builtin_ctzll(bits));
    }

    // Runs of neighbouring groups that see keys of the tile become segments. A group with several intervals in the tile
    // is a run of its own per interval, each with its window of keys.
    void emit(Tile& tile) {
        const auto seeing = [&](int w) { return words_[w].some; };
        const auto ends_run = [&](int w) { return ~words_[w].some | words_[w].several; };
        const int last = std::min(count_, end_word_ * 64);
        for (int group = find(first_word_ * 64, last, seeing); group < last; group = find(group, last, seeing)) {
            if (words_[group / 64].several >> (group % 64) & 1) {
                for (const Interval& key : groups_[group]) {
                    const Interval both{std::max(key.start, tile.start), std::min(key.end, tile.end)};
                    if (both.start < both.end) add_run(tile, group, group + 1, both);
                }
                ++group;
            } else {
                const int end = find(group + 1, last, ends_run);
                add_run(tile, group, end, {tile.start, tile.end});
                group = end;
            }
        }
        close(tile);
    }

    // Groups [first, end).
    void add_run(Tile& tile, int first, int end, Interval window) {
        const auto whole = [&](int w) { return words_[w].whole; };
        const auto not_whole = [&](int w) { return ~words_[w].whole; };
        common_.resize(0);
        for (int group = find(first, end, whole); group < end; group = find(group, end, whole)) {
            const int stop = find(group, end, not_whole);
            common_.push({groups_[group].row_start, groups_[stop - 1].row_end});
            group = stop;
        }
        int group = first;  // split_blocks walks upwards
        split_blocks(
            {groups_[first].row_start, groups_[end - 1].row_end}, common_, blocks_,
            [&](int start, int stop) { add_bare(tile, start, stop); },
            [&](int start, int stop) {
                const auto ends_before = [](const Group& x, int row) { return x.row_end <= row; };
                group =
                    static_cast<int>(std::lower_bound(groups_ + group, groups_ + end, start, ends_before) - groups_);
                add_masked_rows(tile, start, stop, group, window);
            });
    }

    void add_masked_rows(Tile& tile, int start, int end, int& group, Interval window) {
        while (start < end) {
            while (groups_[group].row_end <= start) ++group;
            int32_t* const cells = masked_.extend(kRowSegmentCells);
            std::fill_n(cells, kRowSegmentCells, 0);
            int stop = start, used = 0;
            for (; used < kRowSegmentGroups && stop < end && stop - start < blocks_.size; ++used) {
                const Group& next = groups_[group + used];
                stop = std::min(next.row_end, end);
                if (used) cells[kRowSegmentBegins + used - 1] = next.row_start;
                for (const Interval& key : next) {
                    const Interval both{std::max(key.start, window.start), std::min(key.end, window.end)};
                    if (both.start >= both.end) continue;
                    cells[kRowSegmentKeys + 2 * used] = both.start, cells[kRowSegmentKeys + 2 * used + 1] = both.end;
                }
            }
            const int full = start + blocks_.inside(stop - start) * blocks_.size;
            if (used > 1 && full > start) {
                stop = start + blocks_.size;
            } else if (full > start && stop < end) {
                stop = full;  // the rest shares a block with the next group
            }
            for (; used < kRowSegmentGroups; ++used) {
                if (used) cells[kRowSegmentBegins + used - 1] = stop;
            }
            cells[0] = start, cells[1] = stop;
            const auto steps = static_cast<int>(blocks_.covering(stop - start));
            tile.masked_steps += steps, tile.blocks += steps;
            start = stop;
        }
    }

    Array<Event> events_;
    std::vector<Word> words_;
    Intervals common_;
    size_t event_ = 0;
    int first_word_ = 0, end_word_ = 0;
    int64_t viewers_ = 0;  // rows that see the current key
};

template <typename Kind>
py::tuple plan(const py::buffer& frames, int tile, int block, int band_rows) {
    if (tile <= 0 || tile > kMaxTile || block <= 0 || block > kMaxTile || (block & (block - 1)) || band_rows <= 0) {
        fail("a schedule with tiles of " + std::to_string(tile) + ", blocks of " + std::to_string(block) +
             " and bands of " + std::to_string(band_rows) + " rows; expected 1 to " + std::to_string(kMaxTile) +
             ", a power of two for the blocks, and a positive number");
    }
    const LentTable lent(frames);
    return Kind(lent.groups, lent.count, tile, block, band_rows).result();
}

py::dict layout() {
    py::dict cells;
    cells["INTERVALS"] = kIntervals, cells["GROUP_KEYS"] = kGroupKeys, cells["GROUP_CELLS"] = kGroupCells;
    cells["TILE_START"] = kTileStart, cells["TILE_END"] = kTileEnd, cells["TILE_SEGMENTS"] = kTileSegments;
    cells["TILE_BARE_BLOCKS"] = kTileBareBlocks, cells["TILE_CELLS"] = kTileCells;
    cells["SEGMENT_CELLS"] = kSegmentCells;
    cells["HEADER_STEPS"] = kHeaderSteps, cells["HEADER_FIRST_GROUP"] = kHeaderFirstGroup;
    cells["HEADER_END_GROUP"] = kHeaderEndGroup, cells["HEADER_CELLS"] = kHeaderCells;
    cells["ROW_SEGMENT_GROUPS"] = kRowSegmentGroups, cells["ROW_SEGMENT_BEGINS"] = kRowSegmentBegins;
    cells["ROW_SEGMENT_KEYS"] = kRowSegmentKeys, cells["ROW_SEGMENT_CELLS"] = kRowSegmentCells;
    cells["MAX_ROWS"] = kMaxRows;
    return cells;
}

void bind(py::module_& m) {
    m.def("plan_rows", &plan<RowSchedule>, py::arg("frames"), py::arg("tile"), py::arg("block"), py::arg("band_rows"));
    m.def("plan_keys", &plan<KeySchedule>, py::arg("frames"), py::arg("tile"), py::arg("block"), py::arg("band_rows"));
    m.attr("schedule_layout") = layout();
}

const mimo::Binding binding(bind);

}  // namespace
