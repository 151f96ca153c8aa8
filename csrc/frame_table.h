// The frame table of a FrameMask (frame_mask.cpp writes it) as planners are lent it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "arrays.h"
#include "schedule.h"

namespace mimo {

[[noreturn]] inline void fail(const std::string& message) { throw pybind11::value_error(message); }

struct Interval {
    int start, end;
};

// Rows that see the same keys: intervals that ascend with gaps between them.
struct Group {
    int row_start, row_end;
    const Interval *first_key, *end_key;  // in the table

    int rows() const { return row_end - row_start; }
    bool empty() const { return first_key == end_key; }
    const Interval* begin() const { return first_key; }
    const Interval* end() const { return end_key; }
    // From the first interval on that ends behind `key`.
    const Interval* from(int key) const {
        const Interval* at = first_key;
        if (end_key - at > 2 * schedule::kIntervals)
            return std::partition_point(at, end_key, [&](const Interval& x) { return x.end <= key; });
        while (at < end_key && at->end <= key) ++at;
        return at;
    }
};

// The groups that an object lends: a contiguous int32 [groups, cells], of which nothing more is believed. Whoever holds
// the memory can write to it, so that a planner, which writes where the table says, looks at every cell first.
struct LentTable {
    pybind11::buffer_info info;
    Array<Group> groups;
    int count, rows;  // of the groups; of all of them
    int keys;         // that there are
    int most = 0;     // intervals of a group
    int64_t all = 0;  // intervals

    // num_keys < 0: as many keys as rows.
    LentTable(const pybind11::buffer& frames, int64_t num_keys)
        : info(checked(frames.request())), groups(info.shape[0]), count(static_cast<int>(info.shape[0])) {
        using schedule::kMaxRows;
        const auto* cells = static_cast<const int32_t*>(info.ptr);
        rows = count ? cells[(count - 1) * info.shape[1] + 1] : 0;
        const auto refuse = [](const char* what, int64_t found) {
            fail("a mask of " + std::to_string(found) + what + "; the kernels number at most " +
                 std::to_string(kMaxRows));
        };
        if (rows > kMaxRows) refuse(" rows", rows);
        if (num_keys > kMaxRows) refuse(" keys", num_keys);
        keys = num_keys < 0 ? rows : static_cast<int>(num_keys);
        read(cells, static_cast<int>(info.shape[1] - schedule::kGroupKeys) / 2);
    }

private:
    static pybind11::buffer_info checked(pybind11::buffer_info info) {
        using namespace schedule;
        const auto cell = static_cast<pybind11::ssize_t>(sizeof(int32_t));
        const bool table = info.ndim == 2 && info.shape[1] >= kGroupCells && info.shape[1] % 2 == 0 &&
                           info.item_type_is_equivalent_to<int32_t>() && info.strides[1] == cell &&
                           (info.shape[0] < 2 || info.strides[0] == info.shape[1] * cell) &&
                           reinterpret_cast<uintptr_t>(info.ptr) % alignof(Interval) == 0;
        if (!table) {
            fail("the frame table is not a contiguous int32 [groups, " + std::to_string(kGroupCells) +
                 "], or with two cells more for every further interval");
        }
        if (info.shape[0] > kMaxRows / info.shape[1])
            fail("the frame table has " + std::to_string(info.shape[0]) + " groups");
        return info;
    }

    // What frame_mask.cpp writes: groups of at least one row one after another, intervals of keys that ascend with gaps
    // between them, inside the keys.
    void read(const int32_t* cells, int room) {
        int row = 0;
        for (int g = 0; g < count; ++g, cells += schedule::kGroupKeys + 2 * room) {
            const auto* const first = reinterpret_cast<const Interval*>(cells + schedule::kGroupKeys);
            const Interval *const last = first + room, *key = first;
            bool legal = cells[0] == row && cells[1] > row && cells[1] <= rows;
            for (int end = -1; key < last && (key->start || key->end); end = (key++)->end)
                legal = legal && key->start > end && key->start < key->end && key->end <= keys;
            const auto used = static_cast<int>(key - first);
            for (; key < last; ++key) legal = legal && !key->start && !key->end;
            if (!legal)
                fail("frames[" + std::to_string(g) + "] is not what a FrameMask holds: its table was written to");
            groups.push({row, cells[1], first, first + used});
            row = cells[1], most = std::max(most, used), all += used;
        }
    }
};

}  // namespace mimo
