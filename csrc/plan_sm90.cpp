// Schedules of attention on Hopper (attention_sm90.h) from the frame table of a FrameMask.
//
// A chunk is up to 64 rows of one warpgroup, a tile two chunks that follow one another and share what is streamed past
// them. For a chunk two lists of intervals of the other side say everything: what *some* of its rows see and what *all*
// of them see. A block inside the second is bare, one that meets the first is masked, any other is skipped.
//
// Three steps: where chunks end (choose_cuts: the fewest blocks, a shortest path over the groups), which blocks a tile
// has (cover), and the order of the tiles, longest first inside bands of about `band_rows` rows. The blocks of one
// warpgroup alone come first, then those of both, then those of the other alone, so that either has one run without a
// skip. Chunks do not reach over the end of a clip.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <unordered_map>
#include <vector>

#include "attention_sm90.h"
#include "bindings.h"
#include "frame_table.h"

namespace py = pybind11;

namespace {

using namespace mimo::sm90;
using mimo::schedule::kGroupCells;

constexpr int kWarpgroups = 2;
constexpr int kLookAhead = 8;  // early ends of chunks that are tried from one place

using mimo::Group;
using mimo::Interval;
using Intervals = std::vector<Interval>;  // ascending, apart

// Sorts and joins what touches.
void unite(Intervals& all) {
    std::sort(all.begin(), all.end(), [](const Interval& a, const Interval& b) { return a.start < b.start; });
    size_t size = 0;
    for (const Interval& x : all) {
        if (x.start >= x.end) continue;
        if (size && x.start <= all[size - 1].end)
            all[size - 1].end = std::max(all[size - 1].end, x.end);
        else
            all[size++] = x;
    }
    all.resize(size);
}

Intervals intersect(const Intervals& a, const Intervals& b) {
    Intervals both;
    for (size_t i = 0, j = 0; i < a.size() && j < b.size(); a[i].end < b[j].end ? ++i : ++j) {
        const Interval x{std::max(a[i].start, b[j].start), std::min(a[i].end, b[j].end)};
        if (x.start < x.end) both.push_back(x);
    }
    return both;
}

struct Chunk {
    int start = 0, end = 0, group = 0;
    Intervals some, all;
    int64_t work = 0;

    // Of the block [begin, stop).
    int state(int begin, int stop) const {
        const auto meets = [&](const Interval& x) { return x.start < stop && x.end > begin; };
        const auto holds = [&](const Interval& x) { return x.start <= begin && x.end >= stop; };
        if (std::none_of(some.begin(), some.end(), meets)) return kSkip;
        return std::any_of(all.begin(), all.end(), holds) ? kBare : kMasked;
    }
};

struct Run {
    int start, blocks, states, group;
};

struct Tile {
    Chunk chunks[kWarpgroups];
    std::vector<Run> runs;
    int64_t work = 0;  // rows of the other side, both warpgroups
    int band = 0;
};

class Planner {
public:
    Planner(const mimo::LentTable& table, int block, int band_rows, bool keys)
        : table_(static_cast<const int32_t*>(table.info.ptr)),
          groups_(table.groups.begin()),
          count_(table.count),
          rows_(table.rows),
          block_(block),
          keys_(keys) {
        find_clips();
        int band = 0, band_start = 0;
        for (size_t c = 0; c + 1 < clips_.size(); ++c) {
            const int first = clips_[c], last = clips_[c + 1];
            if (groups_[first].row_start - band_start >= band_rows) ++band, band_start = groups_[first].row_start;
            plan_clip(first, last, band);
        }
        std::stable_sort(tiles_.begin(), tiles_.end(), [](const Tile& a, const Tile& b) {
            return a.band != b.band ? a.band < b.band : a.work > b.work;
        });
    }

    // (bytes, number of tiles, executed pairs, rows)
    py::tuple result() const {
        std::vector<int32_t> cells;
        int place = static_cast<int>(tiles_.size()) * kTileColumns + count_ * kGroupCells;
        int64_t pairs = 0;
        for (const Tile& tile : tiles_) {
            const Chunk &a = tile.chunks[0], &b = tile.chunks[1];
            const int runs = static_cast<int>(tile.runs.size());
            cells.insert(cells.end(), {a.start, a.end, b.start, b.end, place, runs, a.group, b.group});
            place += runs * kRunColumns;
            pairs += tile.work * kTileRows;
        }
        cells.insert(cells.end(), table_, table_ + size_t{kGroupCells} * count_);
        for (const Tile& tile : tiles_) {
            for (const Run& run : tile.runs) cells.insert(cells.end(), {run.start, run.blocks, run.states, run.group});
        }
        py::bytearray bytes(reinterpret_cast<const char*>(cells.data()), cells.size() * sizeof(int32_t));
        return py::make_tuple(std::move(bytes), tiles_.size(), pairs, rows_);
    }

private:
    // A clip ends where no earlier group sees later rows and no later group sees earlier ones.
    void find_clips() {
        std::vector<int> first_key(count_ + 1, rows_);
        for (int g = count_ - 1; g >= 0; --g) {
            first_key[g] = std::min(first_key[g + 1], groups_[g].empty() ? rows_ : groups_[g].first_key->start);
        }
        int last_key = 0;
        for (int g = 0; g < count_; ++g) {
            const int row = groups_[g].row_start;
            if (last_key <= row && first_key[g] >= row) clips_.push_back(g);
            for (const Interval& key : groups_[g]) last_key = std::max(last_key, key.end);
        }
        clips_.push_back(count_);
    }

    // The rows that see the keys of a clip: between two neighbouring places all keys have the same ones.
    void find_viewers(int first, int last) {
        places_.clear();
        viewers_.clear();
        places_.push_back(groups_[first].row_start), places_.push_back(groups_[last - 1].row_end);
        for (int g = first; g < last; ++g) {
            for (const Interval& key : groups_[g]) places_.insert(places_.end(), {key.start, key.end});
        }
        std::sort(places_.begin(), places_.end());
        places_.erase(std::unique(places_.begin(), places_.end()), places_.end());
        for (size_t i = 0; i + 1 < places_.size(); ++i) {
            Intervals rows;
            for (int g = first; g < last; ++g) {
                const auto sees = [&](const Interval& key) { return key.start <= places_[i] && places_[i] < key.end; };
                if (std::none_of(groups_[g].begin(), groups_[g].end(), sees)) continue;
                if (!rows.empty() && rows.back().end == groups_[g].row_start)
                    rows.back().end = groups_[g].row_end;
                else
                    rows.push_back({groups_[g].row_start, groups_[g].row_end});
            }
            viewers_.push_back(std::move(rows));
        }
    }

    // What a chunk of rows sees, or what sees a chunk of keys.
    Chunk look(int start, int end, int group, int last) const {
        Chunk chunk;
        chunk.start = start, chunk.end = end, chunk.group = group;
        const auto add = [&](const Intervals& seen, bool first) {
            chunk.all = first ? seen : intersect(chunk.all, seen);
            chunk.some.insert(chunk.some.end(), seen.begin(), seen.end());
        };
        if (!keys_) {
            for (int g = group; g < last && groups_[g].row_start < end; ++g)
                add(Intervals(groups_[g].begin(), groups_[g].end()), g == group);
        } else {
            const size_t from = std::upper_bound(places_.begin(), places_.end(), start) - places_.begin() - 1;
            for (size_t i = from; places_[i] < end; ++i) add(viewers_[i], i == from);
        }
        unite(chunk.some);
        for (const Interval& x : chunk.some) chunk.work += (x.end - x.start + block_ - 1) / block_;
        return chunk;
    }

    // Chunks of a clip's groups [first, last): full ones, but for those that end early with a group where that saves
    // blocks. best[g]: the blocks from a group on; the way from a group to the next early end is full chunks.
    std::vector<Chunk> choose_cuts(int first, int last) const {
        const int count = last - first, end = groups_[last - 1].row_end;
        constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();
        std::vector<int64_t> best(count + 1, 0);
        std::vector<int> next(count + 1, count);
        for (int g = count - 1; g >= 0; --g) {
            best[g] = kUnknown;
            const auto consider = [&](int to, int64_t total) {
                if (total < best[g]) best[g] = total, next[g] = to;
            };
            int row = groups_[first + g].row_start, group = first + g;
            int64_t spent = 0;
            for (int tried = 0; row < end && (tried < kLookAhead || best[g] == kUnknown);) {
                const int full = std::min(row + kTileRows, end);
                for (int h = group; h < last && groups_[h].row_end < full; ++h, ++tried)
                    consider(h + 1 - first,
                             spent + look(row, groups_[h].row_end, group, last).work + best[h + 1 - first]);
                spent += look(row, full, group, last).work;
                row = full;
                while (group < last && groups_[group].row_end <= row) ++group;
                if (group == last || groups_[group].row_start == row) {
                    consider(group - first, spent + best[group - first]);
                    break;  // what follows does not depend on where this began
                }
            }
        }
        std::vector<Chunk> chunks;
        for (int g = 0; g < count; g = next[g]) {
            const int stop = groups_[first + next[g] - 1].row_end;
            for (int row = groups_[first + g].row_start, group = first + g; row < stop; row = chunks.back().end) {
                while (groups_[group].row_end <= row) ++group;
                chunks.push_back(look(row, std::min(row + kTileRows, stop), group, last));
            }
        }
        return chunks;
    }

    void plan_clip(int first, int last, int band) {
        if (keys_) find_viewers(first, last);
        const std::vector<Chunk> chunks = choose_cuts(first, last);
        for (size_t i = 0; i < chunks.size(); i += kWarpgroups) {
            Tile tile;
            tile.band = band;
            tile.chunks[0] = chunks[i];
            if (i + 1 < chunks.size())
                tile.chunks[1] = chunks[i + 1];
            else
                tile.chunks[1].start = tile.chunks[1].end = chunks[i].end, tile.chunks[1].group = chunks[i].group;
            cover(tile, first, last);
            tiles_.push_back(std::move(tile));
        }
    }

    int states(const Tile& tile, int start) const {
        return tile.chunks[0].state(start, start + block_) | tile.chunks[1].state(start, start + block_) << 2;
    }

    // Blocks that hold whatever either chunk sees: one begins where the one before ended, or at the next row that is
    // seen.
    void cover(Tile& tile, int first, int last) const {
        Intervals seen = tile.chunks[0].some;
        seen.insert(seen.end(), tile.chunks[1].some.begin(), tile.chunks[1].some.end());
        unite(seen);
        std::vector<int> changes;  // of what is seen: between two of them one block is like the next
        for (const Chunk& chunk : tile.chunks) {
            for (const Intervals* list : {&chunk.some, &chunk.all}) {
                for (const Interval& x : *list) changes.insert(changes.end(), {x.start, x.end});
            }
        }
        std::sort(changes.begin(), changes.end());
        std::vector<Run> runs;
        int place = 0;
        for (const Interval& x : seen) {
            for (place = std::max(place, x.start); place < x.end;) {
                const int change = *std::upper_bound(changes.begin(), changes.end(), place);
                const Run run{place, std::max(1, (change - place) / block_), states(tile, place), 0};
                runs.push_back(run);
                place += run.blocks * block_;
            }
        }
        // One warpgroup's own, both, the other's own.
        const auto order = [](const Run& run) {
            return (run.states & 3) == kSkip ? 2 : run.states >> 2 == kSkip ? 0 : 1;
        };
        std::stable_sort(runs.begin(), runs.end(), [&](const Run& a, const Run& b) { return order(a) < order(b); });
        for (Run& run : runs) {
            for (int w = 0; w < kWarpgroups; ++w) {
                if ((run.states >> 2 * w & 3) != kSkip) tile.work += int64_t{block_} * run.blocks;
            }
            const auto begins_behind = [](int row, const Group& group) { return row < group.row_end; };
            const Group* const group = std::upper_bound(groups_ + first, groups_ + last - 1, run.start, begins_behind);
            run.group = static_cast<int>(group - groups_);
            Run* const before = tile.runs.empty() ? nullptr : &tile.runs.back();
            if (before && before->states == run.states && before->start + before->blocks * block_ == run.start)
                before->blocks += run.blocks;
            else
                tile.runs.push_back(run);
        }
    }

    const int32_t* const table_;
    const Group* const groups_;
    const int count_, rows_, block_;
    const bool keys_;
    std::vector<int> clips_;
    std::vector<int> places_;         // of the clip at hand, as its keys are looked at
    std::vector<Intervals> viewers_;  // from one place to the next
    std::vector<Tile> tiles_;
};

py::tuple plan(const py::buffer& frames, int block, int band_rows, bool keys) {
    if ((block != 64 && block != 128) || band_rows <= 0) {
        mimo::fail("a schedule with blocks of " + std::to_string(block) + " and bands of " + std::to_string(band_rows) +
                   " rows; expected blocks of 64 or 128 and a positive number");
    }
    const mimo::LentTable table(frames, -1);
    if (table.info.shape[1] != kGroupCells)
        mimo::fail("a row sees " + std::to_string(table.most) + " intervals of keys; the Hopper kernels read at most " +
                   std::to_string(mimo::schedule::kIntervals));
    return Planner(table, block, band_rows, keys).result();
}

void bind(py::module_& m) {
    m.def("plan_sm90", &plan, py::arg("frames"), py::arg("block"), py::arg("band_rows"), py::arg("keys"));
}

const mimo::Binding binding(bind);

}  // namespace
