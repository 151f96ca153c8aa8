// Schedules of tiles of query rows, for the forward and dQ (see plan.h).
#include "plan.h"

namespace py = pybind11;

namespace mimo {
namespace {

using namespace schedule;

// With more (frames of a few tokens, or many intervals of keys) no tile of rows ends early: the choice is not worth its
// time.
constexpr int kRowGroupsPerTile = 32, kIntervalsPerGroup = 8;

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
    const Interval *x = a.begin(), *key = group.begin();
    while (x < a.end() && key < group.end()) {
        const Interval both{std::max(x->start, key->start), std::min(x->end, key->end)};
        if (both.start < both.end) into.push(both);
        x->end < key->end ? ++x : ++key;
    }
}

class RowSchedule : public Schedule {
public:
    RowSchedule(const LentTable& table, int tile, int block, int band_rows)
        : Schedule(row_axis(table), tile, block, band_rows),
          groups_(table.groups.begin()),
          seen_(most(table)),
          common_(most(table)),
          scratch_(most(table)),
          next_keys_(std::min(count_, tile_) + size_t{1}) {
        const bool chooses = holds_at_most(kRowGroupsPerTile) && table.all <= int64_t{kIntervalsPerGroup} * table.count;
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
    size_t most(const LentTable& table) const {
        return std::min<int64_t>(table.all, table.most * (int64_t{std::min(count_, tile_)} + 2)) + 1;
    }

    void emit(Tile& tile) {
        if (tile.end_span - tile.span == 1) {
            emit_group(tile, groups_[tile.span]);
            return close(tile);
        }
        find_gaps(tile);
        next_keys_.resize(0);
        for (int g = tile.span; g < tile.end_span; ++g) next_keys_.push(groups_[g].begin());
        const auto bare = [&](int start, int end) { add_bare(tile, start, end); };
        const auto masked = [&](int start, int end) { add_masked(tile, start, end); };
        size_t cut = 0, common = 0;
        for (const Interval& range : seen_) {
            int start = range.start;
            for (; cut < cuts_.size() && cuts_[cut] < range.end; ++cut) {
                if (cuts_[cut] <= start) continue;
                split_blocks({start, cuts_[cut]}, common_, common, blocks_, bare, masked);
                start = cuts_[cut];
            }
            split_blocks({start, range.end}, common_, common, blocks_, bare, masked);
        }
        close(tile);
    }

    // Rows that all see the same: only what is left over behind the blocks of an interval is masked.
    void emit_group(Tile& tile, const Group& group) {
        for (const Interval& key : group) {
            const int rest = key.start + blocks_.inside(key.end - key.start) * blocks_.size;
            if (rest > key.start) add_bare(tile, key.start, rest);
            if (rest == key.end) continue;
            masked_.append({rest, key.end, 1, group.row_start, rest, key.end});
            ++tile.masked_steps, ++tile.blocks;
        }
    }

    // A masked segment, and what its rows see of it: runs of groups that see the same. Segments ascend in a tile.
    void add_masked(Tile& tile, int start, int end) {
        const int groups = tile.end_span - tile.span;
        const size_t place = masked_.size();
        int32_t* const cells = masked_.extend(kKeySegmentCells + size_t{kBoundsCells} * groups);
        int32_t* bounds = cells + kKeySegmentCells;
        for (int g = 0; g < groups; ++g) {
            const Group& group = groups_[tile.span + g];
            const Interval*& key = next_keys_[g];
            while (key < group.end() && key->end <= start) ++key;
            Interval seen{0, 0};
            if (key < group.end() && key->start < end) seen = {std::max(key->start, start), std::min(key->end, end)};
            if (g && bounds[kBoundsStart - kBoundsCells] == seen.start && bounds[kBoundsEnd - kBoundsCells] == seen.end)
                continue;
            bounds[kBoundsRow] = group.row_start, bounds[kBoundsStart] = seen.start, bounds[kBoundsEnd] = seen.end;
            bounds += kBoundsCells;
        }
        cells[0] = start, cells[1] = end;
        cells[kKeySegmentBounds] = static_cast<int32_t>((bounds - cells - kKeySegmentCells) / kBoundsCells);
        masked_.resize(place + (bounds - cells));
        ++tile.masked_steps;
        tile.blocks += blocks_.covering(end - start);
    }

    // Fewest positions so that every gap between two intervals of one group holds one: cut there, and no masked segment
    // holds two intervals of a row.
    void find_gaps(const Tile& tile) {
        cuts_.clear(), gaps_.clear();
        for (int g = tile.span; g < tile.end_span; ++g) {
            for (const Interval* key = groups_[g].begin() + 1; key < groups_[g].end(); ++key)
                gaps_.push_back({key[-1].end, key[0].start});
        }
        std::sort(gaps_.begin(), gaps_.end(), [](const Interval& a, const Interval& b) { return a.end < b.end; });
        for (const Interval& gap : gaps_) {
            if (cuts_.empty() || cuts_.back() < gap.start) cuts_.push_back(gap.end);
        }
    }

    const Group* const groups_;
    Intervals seen_, common_, scratch_;
    std::vector<Interval> gaps_;
    std::vector<int> cuts_;
    Array<const Interval*> next_keys_;  // per group of the tile: the first that ends behind the segments so far
};

}  // namespace

py::tuple plan_rows(const LentTable& table, int tile, int block, int band_rows) {
    return RowSchedule(table, tile, block, band_rows).result();
}

}  // namespace mimo
