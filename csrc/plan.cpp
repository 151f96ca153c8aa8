// Tile schedules of the attention kernels, from the frame table of a FrameMask (see frame_mask.cpp for the table).
//
// A schedule is a list of tiles, and for each tile the blocks it has to visit. Blocks that every row of the tile sees whole form *bare*
// segments, which a kernel runs without any test; the rest forms *masked* segments. All numbers are int32 and their count is O(groups + tiles):
//
//     tiles     [T, 4]  start, end, place of its segments (counted from the first tile), bare blocks
//     groups    [G, 8]  the frame table itself
//     segments          tile after tile: bare segments (start, end); masked steps, first group, end group, 0; masked segments;
//                       start and end of the tile once more: a kernel that reads them again at its end need not keep them in registers
//
// plan_rows: a tile is a range of query rows, its segments are ranges of keys (forward, dQ). A masked segment is (start, end); every row sees at most
//            one interval of keys in it, so two bounds per row describe it. A masked step is a segment.
// plan_keys: a tile is a range of keys, its segments are ranges of query rows (dK, dV). A masked segment holds rows of up to four groups,
//            (start, end, three rows where the next group begins, 0, 0, 0, four times the first and the end of the keys the group sees in the tile),
//            and is a single block unless all its rows are of one group. A masked step is a block.
//
// Tiles come longest first inside bands of clips: within a band to keep the end of a launch short, in bands so that what runs at the same time
// shares its keys in the cache.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace {

constexpr int kTileColumns = 4;
constexpr int kSegmentCells = 16;  // of the larger kind
constexpr int kGroupsPerBlock = 4;
constexpr int kExactGroups = 64;  // with more groups the decision where to cut is made on the spot
constexpr int kLookAhead = 10;
constexpr int64_t kBandRows = 16384;  // keys and values of one head: a few MiB

struct Interval {
    int start, end;
};

// One row of the table, laid out as in memory.
struct Group {
    int row_start, row_end;
    Interval keys[3];

    int rows() const { return row_end - row_start; }
    int count() const { return (keys[0].end > 0) + (keys[1].end > 0) + (keys[2].end > 0); }
};
static_assert(sizeof(Group) == 8 * sizeof(int32_t));

using Intervals = std::vector<Interval>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t count_blocks(const Intervals& intervals, int block) {
    int64_t blocks = 0;
    for (const Interval& x : intervals) blocks += ceil_div(x.end - x.start, block);
    return blocks;
}

int64_t count_blocks(const Group& group, int block) {
    int64_t blocks = 0;
    for (int j = 0; j < group.count(); ++j) blocks += ceil_div(group.keys[j].end - group.keys[j].start, block);
    return blocks;
}

// `into` becomes the union of `a` and the keys of `group`, ascending, adjacent intervals merged.
void unite(const Intervals& a, const Group& group, Intervals& into) {
    into.clear();
    size_t i = 0;
    int j = 0;
    const int n = group.count();
    while (i < a.size() || j < n) {
        const Interval next = j == n || (i < a.size() && a[i].start <= group.keys[j].start) ? a[i++] : group.keys[j++];
        if (!into.empty() && next.start <= into.back().end) {
            into.back().end = std::max(into.back().end, next.end);
        } else {
            into.push_back(next);
        }
    }
}

void intersect(const Intervals& a, const Group& group, Intervals& into) {
    into.clear();
    for (const Interval& x : a) {
        for (int j = 0; j < group.count(); ++j) {
            const Interval both{std::max(x.start, group.keys[j].start), std::min(x.end, group.keys[j].end)};
            if (both.start < both.end) into.push_back(both);
        }
    }
}

// Steps blocks from `range.start` and calls bare(start, end) for runs of blocks inside one interval of `common`, masked(start, end) for the rest.
template <typename Bare, typename Masked>
void split_blocks(Interval range, const Intervals& common, int block, Bare bare, Masked masked) {
    int place = range.start;
    for (const Interval& x : common) {
        if (x.end <= range.start || x.start >= range.end) continue;
        const int skip = std::max(0, x.start - range.start);
        const int first = range.start + static_cast<int>(ceil_div(skip, block)) * block;
        const int last = range.start + (std::min(x.end, range.end) - range.start) / block * block;
        if (first >= last) continue;
        if (place < first) masked(place, first);
        bare(first, last);
        place = last;
    }
    if (place < range.end) masked(place, range.end);
}

// Whether a tile that began `taken` lines before a boundary should end there rather than reach over it. `before`, `after` and `both` are the blocks
// that the tile, the group of `ahead` lines behind the boundary and the two together visit. Reaching over saves a part of a tile of that group.
bool cut_here(int tile, int taken, int ahead, int64_t before, int64_t after, int64_t both) {
    return (both - before) * tile > std::min(tile - taken, ahead) * after;
}

class Schedule {
public:
    Schedule(const Group* groups, int count, int tile, int block) : groups_(groups), count_(count), tile_(tile), block_(block) { find_bands(); }

    // (bytes of tiles, groups and segments; number of tiles; executed pairs)
    py::tuple result() {
        order();
        segments_.resize(segments_.size() + kSegmentCells, 0);  // kernels look one segment ahead
        const int first_segment = static_cast<int>(tiles_.size()) * kTileColumns + count_ * 8;
        py::bytearray bytes(nullptr, 0);
        if (PyByteArray_Resize(bytes.ptr(), (first_segment + segments_.size()) * sizeof(int32_t))) throw py::error_already_set();
        int32_t* out = reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(bytes.ptr()));
        int64_t blocks = 0;
        for (const Tile& tile : tiles_) {
            const int32_t row[kTileColumns] = {tile.start, tile.end, first_segment + tile.place, tile.bare_blocks};
            std::memcpy(out, row, sizeof row);
            out += kTileColumns;
            blocks += tile.blocks;
        }
        std::memcpy(out, groups_, count_ * sizeof(Group));
        std::memcpy(out + static_cast<size_t>(count_) * 8, segments_.data(), segments_.size() * sizeof(int32_t));
        return py::make_tuple(bytes, tiles_.size(), blocks * tile_ * block_);
    }

protected:
    struct Tile {
        int start, end, group, end_group, place, band;
        int bare_blocks = 0, masked_steps = 0;
        int64_t blocks = 0;
    };

    Tile& open(int start, int end, int group, int end_group) {
        tiles_.push_back({start, end, group, end_group, static_cast<int>(segments_.size()), bands_[group]});
        return tiles_.back();
    }

    void add_bare(Tile& tile, int start, int end) {
        segments_.push_back(start), segments_.push_back(end);
        tile.bare_blocks += (end - start) / block_;
        tile.blocks += (end - start) / block_;
    }

    // Decides at which groups tiles end early, exactly: the fewest blocks over all choices, looking kLookAhead groups ahead. Putting the short tile
    // of a clip where the tiles visit few blocks is what it gains over cut_here. `cost` gives the blocks of a tile: begin(group), extend(group), blocks().
    template <typename Cost>
    void choose_cuts(Cost cost) {
        cuts_before_.assign(count_ + 1, false);
        if (count_ == 0 || count_ > kExactGroups) return;
        std::vector<int64_t> best(count_ + 1, std::numeric_limits<int64_t>::max());
        std::vector<int> next_cut(count_ + 1, count_);
        best[count_] = 0;
        const int end = groups_[count_ - 1].row_end;
        for (int first = count_ - 1; first >= 0; --first) {
            const auto consider = [&](int cut, int64_t blocks) {
                if (blocks + best[cut] < best[first]) best[first] = blocks + best[cut], next_cut[first] = cut;
            };
            int row = groups_[first].row_start, group = first;
            int64_t blocks = 0;
            while (row < end && (group - first < kLookAhead || next_cut[first] == count_)) {
                cost.begin(group);
                const int inside = (groups_[group].row_end - row) / tile_;  // tiles in this group alone
                blocks += inside * cost.blocks();
                row += inside * tile_;
                if (row == groups_[group].row_end) {
                    consider(group + 1, blocks);
                    break;  // what follows does not depend on where this began
                }
                for (; group + 1 < count_ && groups_[group + 1].row_start < row + tile_; ++group) {
                    consider(group + 1, blocks + cost.blocks());
                    cost.extend(group + 1);
                }
                blocks += cost.blocks();
                row += tile_;
                if (row >= groups_[group].row_end) {
                    consider(group + 1, blocks);
                    break;
                }
            }
        }
        for (int group = next_cut[0]; group < count_; group = next_cut[group]) cuts_before_[group] = true;
    }

    bool exact() const { return count_ <= kExactGroups; }
    bool chosen(int group) const { return cuts_before_[group]; }

    void close(const Tile& tile) {
        segments_.insert(segments_.end(), {tile.masked_steps, tile.group, tile.end_group, 0});
        segments_.insert(segments_.end(), masked_.begin(), masked_.end());
        segments_.push_back(tile.start), segments_.push_back(tile.end);
        masked_.clear();
    }

    const Group* groups_;
    const int count_, tile_, block_;
    std::vector<Tile> tiles_;
    std::vector<int32_t> segments_, masked_;  // of all tiles; of the open tile

private:
    // A clip ends where no earlier group sees later rows and no later group sees earlier ones; whole clips form a band.
    void find_bands() {
        std::vector<int> first_key(count_ + 1, std::numeric_limits<int>::max());
        for (int g = count_ - 1; g >= 0; --g) {
            const int own = groups_[g].count() ? groups_[g].keys[0].start : std::numeric_limits<int>::max();
            first_key[g] = std::min(first_key[g + 1], own);
        }
        bands_.resize(count_);
        int last_key = 0, band = 0, band_start = 0;
        for (int g = 0; g < count_; ++g) {
            const int row = groups_[g].row_start;
            if (row - band_start >= kBandRows && last_key <= row && first_key[g] >= row) ++band, band_start = row;
            bands_[g] = band;
            if (const int n = groups_[g].count()) last_key = std::max(last_key, groups_[g].keys[n - 1].end);
        }
    }

    // Longest first inside every band. Tiles were made in row order, so bands are already together.
    void order() {
        std::stable_sort(tiles_.begin(), tiles_.end(),
                         [](const Tile& a, const Tile& b) { return a.band != b.band ? a.band < b.band : a.blocks > b.blocks; });
    }

    std::vector<int> bands_;
    std::vector<bool> cuts_before_;
};

class RowSchedule : public Schedule {
public:
    RowSchedule(const Group* groups, int count, int tile, int block) : Schedule(groups, count, tile, block) {
        const int rows = count ? groups[count - 1].row_end : 0;
        choose_cuts(UnionCost{*this});
        for (int start = 0, group = 0; start < rows;) {
            int end = std::min(start + tile, rows), next = group + 1;
            seen_.assign(groups[group].keys, groups[group].keys + groups[group].count());
            common_ = seen_;
            for (; next < count && groups[next].row_start < end; ++next) {
                const Group& ahead = groups[next];
                unite(seen_, ahead, scratch_);
                if (exact() ? chosen(next)
                            : cut_here(tile, ahead.row_start - start, ahead.rows(), count_blocks(seen_, block), count_blocks(ahead, block),
                                       count_blocks(scratch_, block))) {
                    end = ahead.row_start;
                    break;
                }
                seen_.swap(scratch_);
                intersect(common_, ahead, scratch_);
                common_.swap(scratch_);
            }
            emit(open(start, end, group, next));
            group = groups[next - 1].row_end > end ? next - 1 : next;
            start = end;
        }
    }

private:
    struct UnionCost {
        RowSchedule& own;
        void begin(int group) { own.seen_.assign(own.groups_[group].keys, own.groups_[group].keys + own.groups_[group].count()); }
        void extend(int group) {
            unite(own.seen_, own.groups_[group], own.scratch_);
            own.seen_.swap(own.scratch_);
        }
        int64_t blocks() const { return count_blocks(own.seen_, own.block_); }
    };

    void emit(Tile& tile) {
        find_gaps(tile);
        const auto bare = [&](int start, int end) { add_bare(tile, start, end); };
        const auto masked = [&](int start, int end) {
            masked_.push_back(start), masked_.push_back(end);
            ++tile.masked_steps;
            tile.blocks += ceil_div(end - start, block_);
        };
        for (const Interval& range : seen_) {
            int start = range.start;
            for (const int cut : cuts_) {
                if (cut <= start || cut >= range.end) continue;
                split_blocks({start, cut}, common_, block_, bare, masked);
                start = cut;
            }
            split_blocks({start, range.end}, common_, block_, bare, masked);
        }
        close(tile);
    }

    // Fewest positions so that every gap between two intervals of one group holds one: cut there, and no masked segment holds two intervals of a row.
    void find_gaps(const Tile& tile) {
        cuts_.clear();
        if (tile.end_group - tile.group == 1) return;  // what a single group does not see is not in its union either
        gaps_.clear();
        for (int g = tile.group; g < tile.end_group; ++g) {
            for (int j = 1; j < groups_[g].count(); ++j) gaps_.push_back({groups_[g].keys[j - 1].end, groups_[g].keys[j].start});
        }
        std::sort(gaps_.begin(), gaps_.end(), [](const Interval& a, const Interval& b) { return a.end < b.end; });
        for (const Interval& gap : gaps_) {
            if (cuts_.empty() || cuts_.back() < gap.start) cuts_.push_back(gap.end);
        }
    }

    Intervals seen_, common_, scratch_, gaps_;
    std::vector<int> cuts_;
};

class KeySchedule : public Schedule {
public:
    KeySchedule(const Group* groups, int count, int tile, int block) : Schedule(groups, count, tile, block) {
        sort_events();
        count_viewers();
        active_.assign((count + 63) / 64, 0);
        const int keys = count ? groups[count - 1].row_end : 0;
        for (int start = 0, group = 0; start < keys;) {
            int end = std::min(start + tile, keys), next = group + 1;
            for (; at() <= start; ++event_) apply(events_[event_]);
            some_ = whole_ = active_;
            int64_t viewers = viewers_;
            for (; next < count && groups[next].row_start < end; ++next) {
                const Group& ahead = groups[next];
                viewers += enter_until(ahead.row_start - 1);
                const auto [joining, leaving] = changes_at(ahead.row_start);
                const int64_t before = ceil_div(viewers, block), both = ceil_div(viewers + joining, block);
                const int64_t after = ceil_div(viewers_ + joining - leaving, block);
                if (exact() ? chosen(next) : cut_here(tile, ahead.row_start - start, ahead.rows(), before, after, both)) {
                    end = ahead.row_start;
                    break;
                }
            }
            enter_until(end - 1);
            emit(open(start, end, group, next));
            group = groups[next - 1].row_end > end ? next - 1 : next;
            start = end;
        }
    }

private:
    // A group begins or ceases to see keys at a place.
    struct Event {
        int place, group;
        bool begins;
    };

    void sort_events() {
        events_.reserve(static_cast<size_t>(count_) * 4);
        for (int g = 0; g < count_; ++g) {
            for (int j = 0; j < groups_[g].count(); ++j) {
                events_.push_back({groups_[g].keys[j].start, g, true});
                events_.push_back({groups_[g].keys[j].end, g, false});
            }
        }
        std::sort(events_.begin(), events_.end(), [](const Event& a, const Event& b) { return a.place < b.place; });
    }

    struct ViewerCost {
        const std::vector<int64_t>&at_start, &joining;  // rows that see the first key of a group; that begin to see keys in it
        int block;
        int64_t viewers = 0;
        void begin(int group) { viewers = at_start[group]; }
        void extend(int group) { viewers += joining[group]; }
        int64_t blocks() const { return ceil_div(viewers, block); }
    };

    void count_viewers() {
        if (!exact()) return;
        std::vector<int64_t> at_start(count_, 0), joining(count_, 0);
        size_t e = 0;
        int64_t viewers = 0;
        for (int g = 0; g < count_; ++g) {
            for (; e < events_.size() && events_[e].place < groups_[g].row_end; ++e) {
                const int64_t rows = groups_[events_[e].group].rows();
                viewers += events_[e].begins ? rows : -rows;
                if (events_[e].begins) joining[g] += rows;
                if (events_[e].place <= groups_[g].row_start) at_start[g] = viewers;
            }
            if (at_start[g] == 0) at_start[g] = viewers;
        }
        choose_cuts(ViewerCost{at_start, joining, block_});
    }

    int at() const { return event_ < events_.size() ? events_[event_].place : std::numeric_limits<int>::max(); }

    void apply(const Event& event) {
        active_[event.group / 64] ^= uint64_t{1} << (event.group % 64);
        viewers_ += event.begins ? groups_[event.group].rows() : -groups_[event.group].rows();
    }

    // Moves inside a tile up to and including `place`; returns the rows that begin to see keys on the way.
    int64_t enter_until(int place) {
        int64_t rows = 0;
        for (; at() <= place; ++event_) {
            const Event& event = events_[event_];
            apply(event);
            const uint64_t bit = uint64_t{1} << (event.group % 64);
            if (event.begins) {
                some_[event.group / 64] |= bit;
                rows += groups_[event.group].rows();
            } else {
                whole_[event.group / 64] &= ~bit;
            }
        }
        return rows;
    }

    std::pair<int64_t, int64_t> changes_at(int place) const {
        int64_t joining = 0, leaving = 0;
        for (size_t e = event_; e < events_.size() && events_[e].place == place; ++e) {
            (events_[e].begins ? joining : leaving) += groups_[events_[e].group].rows();
        }
        return {joining, leaving};
    }

    // Runs of neighbouring groups that see keys of the tile become segments. A group with several intervals in the tile is a run of its own per
    // interval, each with its window of keys.
    void emit(Tile& tile) {
        int first = -1, last = -1;
        const auto flush = [&] {
            if (first >= 0) add_run(tile, first, last, {tile.start, tile.end});
            first = -1;
        };
        for (size_t word = 0; word < some_.size(); ++word) {
            for (uint64_t bits = some_[word]; bits; bits &= bits - 1) {
                const int group = static_cast<int>(word) * 64 + __builtin_ctzll(bits);
                Interval inside[3];
                int count = 0;
                for (int j = 0; j < groups_[group].count(); ++j) {
                    const Interval& keys = groups_[group].keys[j];
                    const Interval both{std::max(keys.start, tile.start), std::min(keys.end, tile.end)};
                    if (both.start < both.end) inside[count++] = both;
                }
                if (first >= 0 && (group != last + 1 || count > 1)) flush();
                if (count > 1) {
                    for (int j = 0; j < count; ++j) add_run(tile, group, group, inside[j]);
                } else {
                    if (first < 0) first = group;
                    last = group;
                }
            }
        }
        flush();
        close(tile);
    }

    void add_run(Tile& tile, int first, int last, Interval window) {
        common_.clear();
        for (int g = first; g <= last; ++g) {
            if (!(whole_[g / 64] >> (g % 64) & 1)) continue;
            if (!common_.empty() && common_.back().end == groups_[g].row_start) {
                common_.back().end = groups_[g].row_end;
            } else {
                common_.push_back({groups_[g].row_start, groups_[g].row_end});
            }
        }
        int group = first;  // split_blocks walks upwards
        split_blocks(
            {groups_[first].row_start, groups_[last].row_end}, common_, block_, [&](int start, int end) { add_bare(tile, start, end); },
            [&](int start, int end) { add_masked_rows(tile, start, end, group, window); });
    }

    void add_masked_rows(Tile& tile, int start, int end, int& group, Interval window) {
        while (start < end) {
            while (groups_[group].row_end <= start) ++group;
            int32_t cells[kSegmentCells] = {};
            int stop = start, used = 0;
            for (; used < kGroupsPerBlock && stop < end && stop - start < block_; ++used) {
                const Group& next = groups_[group + used];
                stop = std::min(next.row_end, end);
                if (used) cells[1 + used] = next.row_start;
                for (int j = 0; j < next.count(); ++j) {
                    const Interval both{std::max(next.keys[j].start, window.start), std::min(next.keys[j].end, window.end)};
                    if (both.start < both.end) cells[8 + 2 * used] = both.start, cells[9 + 2 * used] = both.end;
                }
            }
            const int full = start + (stop - start) / block_ * block_;
            if (used > 1 && full > start) {
                stop = start + block_;
            } else if (full > start && stop < end) {
                stop = full;  // the rest shares a block with the next group
            }
            for (; used < kGroupsPerBlock; ++used) {
                if (used) cells[1 + used] = stop;
            }
            cells[0] = start, cells[1] = stop;
            masked_.insert(masked_.end(), cells, cells + kSegmentCells);
            tile.masked_steps += static_cast<int>(ceil_div(stop - start, block_));
            tile.blocks += ceil_div(stop - start, block_);
            start = stop;
        }
    }

    std::vector<Event> events_;
    std::vector<uint64_t> active_, some_, whole_;  // one bit per group: sees the current key, some key of the tile, the whole tile
    Intervals common_;
    size_t event_ = 0;
    int64_t viewers_ = 0;  // rows that see the current key
};

template <typename Kind>
py::tuple plan(uintptr_t table, int groups, int tile, int block) {
    if (groups < 0 || tile <= 0 || block <= 0) {
        throw py::value_error("plan of " + std::to_string(groups) + " groups with tiles of " + std::to_string(tile) + " and blocks of " +
                              std::to_string(block) + "; expected positive sizes");
    }
    return Kind(reinterpret_cast<const Group*>(table), groups, tile, block).result();
}

void bind(py::module_& m) {
    m.def("plan_rows", &plan<RowSchedule>);
    m.def("plan_keys", &plan<KeySchedule>);
}

const mimo::Binding binding(bind);

}  // namespace
