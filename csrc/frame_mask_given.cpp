// Frame tables that are given: cell by cell, or as ranges of queries and the ranges of keys that they see (see
// frame_mask.h).
#include <algorithm>

#include "frame_mask.h"

namespace mimo::frame_mask {
namespace {

int64_t to_cell(py::handle value, const char* name, size_t group) {
    const auto refuse = [&] { fail(at(name, group) + " holds " + text(value) + "; expected an int of 64 bits"); };
    if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) refuse();
    int overflow = 0;
    const int64_t cell = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow) refuse();
    return cell;
}

// Counts one after another, and where each begins: [0, n0, n0 + n1, ..].
std::vector<int64_t> read_ends(py::handle lens, const char* name) {
    const auto counts = listed(py::reinterpret_borrow<py::object>(lens));
    if (!counts) fail(std::string(name) + " is " + text(lens) + "; expected a list of token counts, one per clip");
    std::vector<int64_t> ends{0};
    int64_t total = 0;
    for (size_t c = 0; c < counts->size(); ++c) {
        read_count((*counts)[c], name, [&] { return at(name, c); }, total);
        ends.push_back(total);
    }
    return ends;
}

std::string range(int64_t start, int64_t end) { return std::to_string(start) + ".." + std::to_string(end); }

// The intervals in the cells of a group's keys, which lie in [first, last); `name` tells the group.
template <typename Name>
void read_keys(const int64_t* cells, size_t room, int64_t first, int64_t last, Name name, std::vector<Interval>& keys) {
    keys.clear();
    int64_t end = first - 1;
    bool legal = true, unused = false;
    for (size_t i = 0; i < room; ++i) {
        const Interval key{cells[2 * i], cells[2 * i + 1]};
        if (key.start == 0 && key.end == 0) {
            unused = true;
            continue;
        }
        legal = legal && !unused && end < key.start && key.start < key.end && key.end <= last;
        end = key.end;
        keys.push_back(key);
    }
    if (legal) return;
    std::string listing;
    for (size_t i = 0; i < room; ++i) listing += (i ? ", " : "") + range(cells[2 * i], cells[2 * i + 1]);
    fail(name() + " has key intervals " + listing +
         "; expected ascending ones with gaps between, then 0..0, inside its clip " + range(first, last));
}

// (start, end) pairs inside [0, count).
std::vector<Interval> read_ranges(py::handle value, const char* name, int64_t count, const char* count_name) {
    const auto ranges = listed(py::reinterpret_borrow<py::object>(value));
    if (!ranges) fail(std::string(name) + " is " + text(value) + "; expected a list of (start, end)");
    std::vector<Interval> read;
    for (size_t i = 0; i < ranges->size(); ++i) {
        const auto pair = listed((*ranges)[i]);
        const auto refuse = [&] {
            fail(at(name, i) + " is " + text((*ranges)[i]) + "; expected (start, end) with 0 <= start <= end <= " +
                 std::to_string(count) + ", which is " + count_name);
        };
        if (!pair || pair->size() != 2) refuse();
        const Interval interval{to_count((*pair)[0]), to_count((*pair)[1])};
        if (interval.start < 0 || interval.end < interval.start || interval.end > count) refuse();
        read.push_back(interval);
    }
    return read;
}

int64_t read_size(py::handle value, const char* name) {
    const int64_t count = to_count(value);
    if (count < 0 || count > kMaxTokens)
        fail(std::string(name) + " is " + text(value) + "; expected a token count, an int in 0..2147483647");
    return count;
}

}  // namespace

// Any table: groups of kGroupKeys cells and two for each interval, checked. clip_lens: rows per clip; None: one clip.
// key_lens: keys per clip; None: as many as rows.
py::tuple from_cells(py::handle groups_of_cells, py::handle clip_lens, py::handle key_lens) {
    const auto rows = read_frames<int64_t>(groups_of_cells, "frames", "cells", [](py::handle item, size_t g, size_t) {
        return to_cell(item, "frames", g);
    });
    const size_t groups = rows.clips(), columns = groups ? rows.count(0) : kGroupKeys;
    for (size_t g = 0; g < groups; ++g) {
        if (rows.count(g) != columns || columns < kGroupKeys || columns % 2)
            fail(at("frames", g) + " has " + std::to_string(rows.count(g)) +
                 " cells; expected two and two for each interval, as many in all groups");
    }
    const int64_t* cells = rows.values.data();
    const int64_t tokens = groups ? cells[(groups - 1) * columns + 1] : 0;
    if (tokens > kMaxTokens) fail("frames has " + std::to_string(tokens) + " rows; expected at most 2147483647");
    const std::vector<int64_t> ends =
        clip_lens.is_none() ? std::vector<int64_t>{0, tokens} : read_ends(clip_lens, "clip_lens");
    if (ends.back() != tokens) {
        fail("clip_lens add up to " + std::to_string(ends.back()) + " and frames has " + std::to_string(tokens) +
             " rows; expected the same number");
    }
    const std::vector<int64_t> key_ends = key_lens.is_none() ? ends : read_ends(key_lens, "key_lens");
    if (key_ends.size() != ends.size()) {
        fail("key_lens has " + std::to_string(key_ends.size() - 1) + " clips and clip_lens has " +
             std::to_string(ends.size() - 1) + "; expected the same number");
    }

    const size_t room = (columns - kGroupKeys) / 2;
    auto used = static_cast<int>(room);  // cells that no group uses go
    for (bool empty = true; used > kIntervals && empty; used -= empty) {
        for (size_t g = 0; g < groups && empty; ++g)
            empty = !cells[g * columns + kGroupKeys + 2 * used - 2] && !cells[g * columns + kGroupKeys + 2 * used - 1];
    }
    Table table(groups, used);
    Lens frames;
    size_t clip = 0;
    const auto begin_clip = [&] {
        table.begin_clip(key_ends[clip + 1] - key_ends[clip]);
        ++clip;
        frames.add_clip(0);
    };
    std::vector<Interval> keys;
    int64_t row = 0;
    for (size_t g = 0; g < groups; ++g, cells += columns) {
        const auto name = [&] { return at("frames", g); };
        if (cells[0] != row || cells[1] <= row)
            fail(name() + " has rows " + range(cells[0], cells[1]) + "; expected a range that starts at " +
                 std::to_string(row) + " and is not empty");
        while (clip + 1 < ends.size() && ends[clip] <= row) begin_clip();
        if (cells[1] > ends[clip])
            fail(name() + " has rows " + range(cells[0], cells[1]) + "; expected none beyond its clip, which ends at " +
                 std::to_string(ends[clip]));
        read_keys(cells + kGroupKeys, room, key_ends[clip - 1], key_ends[clip], name, keys);
        table.add(cells[1] - row, keys.data(), keys.data() + keys.size());
        frames.values.push_back(static_cast<int32_t>(cells[1] - row));
        ++frames.first.back();
        row = cells[1];
    }
    while (clip + 1 < ends.size()) begin_clip();
    return table.result(frames);
}

// Queries of slice i see keys of slice i; a query in several slices sees the keys of all of them. One clip, in which
// neighbouring rows that see the same are a group.
py::tuple from_slices(py::handle q_ranges, py::handle k_ranges, py::handle num_queries, py::handle num_keys) {
    const int64_t rows = read_size(num_queries, "num_queries");
    const char* const keys_name = num_keys.is_none() ? "num_queries" : "num_keys";
    const int64_t keys = num_keys.is_none() ? rows : read_size(num_keys, keys_name);
    const std::vector<Interval> queries = read_ranges(q_ranges, "q_ranges", rows, "num_queries");
    const std::vector<Interval> seen = read_ranges(k_ranges, "k_ranges", keys, keys_name);
    if (queries.size() != seen.size()) {
        fail("q_ranges has " + std::to_string(queries.size()) + " ranges and k_ranges has " +
             std::to_string(seen.size()) + "; expected the same number");
    }
    std::vector<size_t> order;  // slices by their first query
    std::vector<int64_t> places{0, rows};
    for (size_t i = 0; i < queries.size(); ++i) {
        if (queries[i].size() == 0 || seen[i].size() == 0) continue;
        order.push_back(i);
        places.insert(places.end(), {queries[i].start, queries[i].end});
    }
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return queries[a].start < queries[b].start; });
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());

    struct Rows {
        int64_t count;
        size_t first, last;  // intervals
    };
    std::vector<Rows> groups;
    std::vector<Interval> intervals;
    std::vector<size_t> active;  // slices of the rows at hand, by their first key
    size_t next = 0, most = 0;
    for (size_t p = 0; p + 1 < places.size(); ++p) {
        const int64_t row = places[p];
        active.erase(std::remove_if(active.begin(), active.end(), [&](size_t i) { return queries[i].end <= row; }),
                     active.end());
        for (; next < order.size() && queries[order[next]].start == row; ++next) {
            const auto before = [&](size_t a, size_t b) { return seen[a].start < seen[b].start; };
            active.insert(std::upper_bound(active.begin(), active.end(), order[next], before), order[next]);
        }
        const size_t first = intervals.size();
        for (const size_t i : active) {
            if (intervals.size() > first && seen[i].start <= intervals.back().end)
                intervals.back().end = std::max(intervals.back().end, seen[i].end);
            else
                intervals.push_back(seen[i]);
        }
        const int64_t count = places[p + 1] - row;
        const auto equal = [](const Interval& a, const Interval& b) { return a.start == b.start && a.end == b.end; };
        const auto sees_the_same = [&](const Rows& group) {
            return std::equal(intervals.begin() + group.first, intervals.begin() + group.last,
                              intervals.begin() + first, intervals.end(), equal);
        };
        if (!groups.empty() && sees_the_same(groups.back())) {
            groups.back().count += count;
            intervals.resize(first);
        } else {
            groups.push_back({count, first, intervals.size()});
            most = std::max(most, intervals.size() - first);
        }
    }
    Table table(groups.size(), static_cast<int>(most));
    table.begin_clip(keys);
    Lens lens;
    lens.add_clip(0);
    for (const Rows& group : groups) {
        table.add(group.count, intervals.data() + group.first, intervals.data() + group.last);
        lens.values.push_back(static_cast<int32_t>(group.count));
        ++lens.first.back();
    }
    return table.result(lens);
}

}  // namespace mimo::frame_mask
