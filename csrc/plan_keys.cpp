// Schedules of tiles of keys, for dK and dV (see plan.h).
#include "plan.h"

namespace py = pybind11;

namespace mimo {
namespace {

using namespace schedule;

// With more the rows that see a tile do not tell its blocks: where a tile of keys ends is decided on the spot.
constexpr int kKeySpansPerTile = 8;

class KeySchedule : public Schedule {
public:
    KeySchedule(const LentTable& table, int tile, int block, int band_rows)
        : Schedule(key_axis(table), tile, block, band_rows),
          groups_(table.groups.begin()),
          group_count_(table.count),
          events_(2 * table.all + 1),
          common_(static_cast<size_t>(table.count)) {
        sort_events(2 * table.all + 1);
        const bool chooses = holds_at_most(kKeySpansPerTile);
        if (chooses) count_viewers();
        words_.assign((group_count_ + 63) / 64, Word{});
        int first_key = 0;
        int64_t viewers = 0;
        const auto begin = [&](int start, int) {
            for (; events_[event_].place <= start; ++event_) apply(events_[event_]);
            begin_tile();
            first_key = start, viewers = viewers_;
        };
        const auto joins = [&](int span) {
            if (chooses) return !ends_early_[span];
            viewers += enter_until(spans_[span].start - 1);
            return !cut_here(first_key, spans_[span], viewers);
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

    void sort_events(size_t most) {
        for (int g = 0; g < group_count_; ++g) {
            for (const Interval& key : groups_[g]) {
                events_.push({key.start, static_cast<uint32_t>(g), 1});
                events_.push({key.end, static_cast<uint32_t>(g), 0});
            }
        }
        Array<Event> spare(most);
        radix_sort(events_, spare, [](const Event& event) { return static_cast<uint64_t>(event.place); });
        events_.push({std::numeric_limits<int>::max(), 0, 0});  // behind all places
    }

    struct ViewerCost {
        const std::vector<int64_t>&at_start,
            &joining;  // rows that see the first key of a span; that begin to see keys in it
        Blocks sizes;
        int64_t viewers = 0;
        void begin(int span) { viewers = at_start[span]; }
        void extend(int span) { viewers += joining[span]; }
        int64_t blocks() const { return sizes.covering(viewers); }
    };

    void count_viewers() {
        std::vector<int64_t> at_start(count_, 0), joining(count_, 0);
        size_t e = 0;
        int64_t viewers = 0;
        for (int s = 0; s < count_; ++s) {
            for (; events_[e].place < spans_[s].end; ++e) {
                const int64_t rows = groups_[events_[e].group].rows();
                viewers += events_[e].begins ? rows : -rows;
                if (events_[e].begins) joining[s] += rows;
                if (events_[e].place <= spans_[s].start) at_start[s] = viewers;
            }
            if (at_start[s] == 0) at_start[s] = viewers;
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

    // Whether a tile from `start` that `before` rows see should end at the span `ahead` rather than reach over the
    // boundary, which saves a part of a tile of that span.
    bool cut_here(int start, const Interval& ahead, int64_t before) const {
        int64_t joining = 0, leaving = 0;
        for (size_t e = event_; events_[e].place == ahead.start; ++e) {
            (events_[e].begins ? joining : leaving) += groups_[events_[e].group].rows();
        }
        const int64_t after = blocks_.covering(viewers_ + joining - leaving), both = blocks_.covering(before + joining);
        const int taken = ahead.start - start;
        return (both - blocks_.covering(before)) * tile_ > std::min(tile_ - taken, ahead.end - ahead.start) * after;
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
        const int last = std::min(group_count_, end_word_ * 64);
        for (int group = find(first_word_ * 64, last, seeing); group < last; group = find(group, last, seeing)) {
            if (words_[group / 64].several >> (group % 64) & 1) {
                const Interval* key = groups_[group].from(tile.start);
                for (; key < groups_[group].end() && key->start < tile.end; ++key)
                    add_run(tile, group, group + 1, {std::max(key->start, tile.start), std::min(key->end, tile.end)});
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
        size_t at = 0;
        split_blocks(
            {groups_[first].row_start, groups_[end - 1].row_end}, common_, at, blocks_,
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
                if (const Interval* key = next.from(window.start); key < next.end() && key->start < window.end) {
                    cells[kRowSegmentKeys + 2 * used] = std::max(key->start, window.start);
                    cells[kRowSegmentKeys + 2 * used + 1] = std::min(key->end, window.end);
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

    const Group* const groups_;
    const int group_count_;
    Array<Event> events_;
    std::vector<Word> words_;
    Intervals common_;
    size_t event_ = 0;
    int first_word_ = 0, end_word_ = 0;
    int64_t viewers_ = 0;  // rows that see the current key
};

}  // namespace

py::tuple plan_keys(const LentTable& table, int tile, int block, int band_rows) {
    return KeySchedule(table, tile, block, band_rows).result();
}

}  // namespace mimo
