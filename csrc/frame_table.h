// The frame table of a FrameMask (frame_mask.cpp writes it) as planners are lent it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "schedule.h"

namespace mimo {

[[noreturn]] inline void fail(const std::string& message) { throw pybind11::value_error(message); }

struct Interval {
    int start, end;
};

// One row of the table, laid out as in memory.
struct Group {
    int row_start, row_end;
    Interval keys[schedule::kIntervals];

    int rows() const { return row_end - row_start; }
    bool empty() const { return keys[0].end == 0; }
    const Interval* begin() const { return keys; }
    const Interval* end() const {
        return keys[0].end == 0 ? keys : keys[1].end == 0 ? keys + 1 : keys[2].end == 0 ? keys + 2 : keys + 3;
    }
};
static_assert(sizeof(Group) == schedule::kGroupCells * sizeof(int32_t));

// The groups that an object lends: a contiguous int32 [groups, kGroupCells], of which nothing more is believed. Whoever
// holds the memory can write to it, so that a planner, which writes where the table says, looks at every cell first.
struct LentTable {
    pybind11::buffer_info info;
    const Group* groups;
    int count;

    explicit LentTable(const pybind11::buffer& frames) : info(frames.request()) {
        using namespace schedule;
        const bool table = info.ndim == 2 && info.shape[1] == kGroupCells &&
                           info.item_type_is_equivalent_to<int32_t>() && info.strides[1] == info.itemsize &&
                           (info.shape[0] < 2 || info.strides[0] == sizeof(Group)) &&
                           reinterpret_cast<uintptr_t>(info.ptr) % alignof(Group) == 0;
        if (!table) fail("the frame table is not a contiguous int32 [groups, " + std::to_string(kGroupCells) + "]");
        if (info.shape[0] > kMaxRows) fail("the frame table has " + std::to_string(info.shape[0]) + " groups");
        groups = static_cast<const Group*>(info.ptr);
        count = static_cast<int>(info.shape[0]);
        check();
    }

private:
    // What frame_mask.cpp writes: groups of at least one row one after another, intervals of keys that ascend with gaps
    // between them, inside the rows.
    void check() const {
        if (count == 0) return;
        const int rows = groups[count - 1].row_end;
        if (rows > schedule::kMaxRows)
            fail("a mask of " + std::to_string(rows) + " rows; the kernels number at most " +
                 std::to_string(schedule::kMaxRows));
        int row = 0;
        for (int g = 0; g < count; ++g) {
            const Group& group = groups[g];
            bool legal = group.row_start == row && group.row_end > row && group.row_end <= rows, unused = false;
            int end = -1;
            for (const Interval& key : group.keys) {
                if (key.start == 0 && key.end == 0) {
                    unused = true;
                    continue;
                }
                legal = legal && !unused && key.start > end && key.start < key.end && key.end <= rows;
                end = key.end;
            }
            if (!legal)
                fail("frames[" + std::to_string(g) + "] is not what a FrameMask holds: its table was written to");
            row = group.row_end;
        }
    }
};

}  // namespace mimo
