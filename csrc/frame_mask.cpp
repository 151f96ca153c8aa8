// The frame table of a FrameMask: for every group of rows that sees the same keys, its row range and up to three key intervals.
// O(frames) work and memory; batches are described anew for every training step, so this must cost microseconds.
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace {

using Lens = std::vector<std::vector<int64_t>>;  // token counts [clips][frames]

constexpr int kIntervals = 3;
constexpr int kColumns = 2 + 2 * kIntervals;  // row_start, row_end, then (key_start, key_end) three times

struct Interval {
    int64_t start = 0, end = 0;
    int64_t size() const { return end - start; }
};

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

std::string text(py::handle value) { return py::cast<std::string>(py::repr(value)); }

std::string at(const char* name, size_t clip) { return std::string(name) + "[" + std::to_string(clip) + "]"; }

// Calls visit(clip, item) for every item of a list of lists (lists or tuples; a clip may be empty).
template <typename Visit>
void for_each_item(py::handle value, const char* name, const char* inner, Visit visit) {
    auto is_list = [](py::handle h) { return PyList_Check(h.ptr()) || PyTuple_Check(h.ptr()); };
    if (!is_list(value)) fail(std::string(name) + " is " + text(value) + "; expected a list of clips, each a list of " + inner);
    const Py_ssize_t clips = PySequence_Fast_GET_SIZE(value.ptr());
    for (Py_ssize_t c = 0; c < clips; ++c) {
        py::handle clip = PySequence_Fast_GET_ITEM(value.ptr(), c);
        if (!is_list(clip)) fail(at(name, c) + " is " + text(clip) + "; expected a list of " + inner + ", one per frame of the clip");
        const Py_ssize_t frames = PySequence_Fast_GET_SIZE(clip.ptr());
        visit.begin(c, frames);
        for (Py_ssize_t t = 0; t < frames; ++t) visit.item(c, t, py::handle(PySequence_Fast_GET_ITEM(clip.ptr(), t)));
    }
}

struct LensReader {
    const char* name;
    Lens& lens;
    int64_t& total;

    void begin(size_t, size_t frames) {
        lens.emplace_back();
        lens.back().reserve(frames);
    }
    void item(size_t clip, size_t frame, py::handle value) {
        int64_t count = -1;
        if (PyIndex_Check(value.ptr()) && !PyBool_Check(value.ptr())) {
            int overflow = 0;
            const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
            if (!number) throw py::error_already_set();
            count = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
            if (overflow > 0) count = std::numeric_limits<int64_t>::max();
        }
        if (count < 0) fail(at(name, clip) + "[" + std::to_string(frame) + "] is " + text(value) + "; expected a token count, an int >= 0");
        if (count > std::numeric_limits<int32_t>::max() - total) {
            fail(std::string(name) + " brings the mask to more than 2147483647 tokens at " + at(name, clip) + "; rows are numbered in int32");
        }
        total += count;
        lens.back().push_back(count);
    }
};

struct DropReader {
    const char* name;
    std::vector<std::vector<bool>>& drop;

    void begin(size_t, size_t frames) {
        drop.emplace_back();
        drop.back().reserve(frames);
    }
    void item(size_t clip, size_t frame, py::handle value) {
        if (!PyBool_Check(value.ptr())) fail(at(name, clip) + "[" + std::to_string(frame) + "] is " + text(value) + "; expected a bool");
        drop.back().push_back(value.ptr() == Py_True);
    }
};

class Table {
public:
    void begin_clip() { first_row_.push_back(rows_), first_group_.push_back(cells_.size() / kColumns); }

    // Appends the next rows of the sequence; `keys` ascend. Empty intervals vanish and touching ones become one.
    void add(int64_t rows, std::array<Interval, kIntervals> keys) {
        if (rows == 0) return;
        std::array<Interval, kIntervals> kept;
        int count = 0;
        for (const Interval& key : keys) {
            if (key.size() == 0) continue;
            if (count && kept[count - 1].end == key.start) {
                kept[count - 1].end = key.end;
            } else {
                kept[count++] = key;
            }
            pairs_ += rows * key.size();
        }
        cells_.push_back(rows_), cells_.push_back(rows_ + rows);
        for (const Interval& key : kept) cells_.push_back(key.start), cells_.push_back(key.end);
        rows_ += rows;
    }

    py::tuple result() const {
        py::list clip_lens;
        for (size_t c = 0; c < first_row_.size(); ++c) clip_lens.append(end_row(c) - first_row_[c]);
        py::bytearray bytes(reinterpret_cast<const char*>(cells_.data()), cells_.size() * sizeof(int32_t));
        return py::make_tuple(bytes, pairs_, clip_lens, uniform());
    }

private:
    int64_t end_row(size_t clip) const { return clip + 1 < first_row_.size() ? first_row_[clip + 1] : rows_; }
    size_t end_group(size_t clip) const { return clip + 1 < first_group_.size() ? first_group_[clip + 1] : cells_.size() / kColumns; }

    // Whether all clips have the same table, counted from their own first row.
    bool uniform() const {
        if (first_row_.empty()) return false;
        const size_t groups = end_group(0);
        for (size_t c = 1; c < first_row_.size(); ++c) {
            if (end_group(c) - first_group_[c] != groups) return false;
            const int32_t* cell = cells_.data() + first_group_[c] * kColumns;
            for (size_t i = 0; i < groups * kColumns; i += 2) {
                const bool empty = cells_[i] == cells_[i + 1];
                const int32_t offset = empty ? 0 : static_cast<int32_t>(first_row_[c]);
                if (cell[i] != cells_[i] + offset || cell[i + 1] != cells_[i + 1] + offset) return false;
            }
        }
        return true;
    }

    std::vector<int32_t> cells_;
    std::vector<int64_t> first_row_;
    std::vector<size_t> first_group_;
    int64_t rows_ = 0, pairs_ = 0;
};

std::vector<int64_t> frame_starts(int64_t row, const std::vector<int64_t>& lens) {
    std::vector<int64_t> starts{row};
    for (int64_t len : lens) starts.push_back(row += len);
    return starts;
}

// Frames [0, sink) and [visible - window, visible) among the first `visible` frames of a clip, as row intervals.
std::array<Interval, 2> past(const std::vector<int64_t>& starts, int64_t visible, int64_t window, int64_t sink) {
    const int64_t first = std::max<int64_t>(0, visible - window);
    const int64_t last_sink = std::min(sink, first);
    return {Interval{starts[0], starts[last_sink]}, Interval{starts[first], starts[visible]}};
}

// window <= 0 stands for "no window". Returns (table bytes, pairs, rows per clip, all clips alike).
py::tuple teacher_forcing(py::handle history, py::handle future, py::handle drop, int64_t window, int64_t sink) {
    Lens history_lens, future_lens;
    std::vector<std::vector<bool>> dropped;
    int64_t total = 0;
    for_each_item(history, "history_lens", "token counts", LensReader{"history_lens", history_lens, total});
    for_each_item(future, "future_lens", "token counts", LensReader{"future_lens", future_lens, total});
    if (history_lens.size() != future_lens.size()) {
        fail("history_lens has " + std::to_string(history_lens.size()) + " clips and future_lens has " + std::to_string(future_lens.size()) +
             "; expected the same number");
    }
    if (!drop.is_none()) {
        for_each_item(drop, "drop_history", "bools", DropReader{"drop_history", dropped});
        if (dropped.size() != future_lens.size()) {
            fail("drop_history has " + std::to_string(dropped.size()) + " clips and future_lens has " + std::to_string(future_lens.size()) +
                 "; expected bool [clips, frames]");
        }
    }
    if (window <= 0) window = std::numeric_limits<int32_t>::max();

    Table table;
    int64_t row = 0;
    for (size_t c = 0; c < history_lens.size(); ++c) {
        const int64_t frames = history_lens[c].size();
        const auto differs = [&](const char* name, size_t count) {
            fail(at("history_lens", c) + " has " + std::to_string(frames) + " frames and " + at(name, c) + " has " + std::to_string(count) +
                 "; expected the same number");
        };
        if (future_lens[c].size() != history_lens[c].size()) differs("future_lens", future_lens[c].size());
        if (!dropped.empty() && dropped[c].size() != history_lens[c].size()) differs("drop_history", dropped[c].size());
        const std::vector<int64_t> history_starts = frame_starts(row, history_lens[c]);
        const std::vector<int64_t> future_starts = frame_starts(history_starts.back(), future_lens[c]);
        table.begin_clip();
        for (int64_t t = 0; t < frames; ++t) {
            const auto [sinks, latest] = past(history_starts, t + 1, window, sink);
            table.add(history_lens[c][t], {sinks, latest, Interval{}});
        }
        for (int64_t t = 0; t < frames; ++t) {
            const Interval own{future_starts[t], future_starts[t + 1]};
            // The frame itself is one of the `window` frames it sees.
            const auto [sinks, latest] = past(history_starts, t, window - 1, sink);
            const bool alone = !dropped.empty() && dropped[c][t];
            table.add(own.size(), alone ? std::array<Interval, 3>{own} : std::array<Interval, 3>{sinks, latest, own});
        }
        row = future_starts.back();
    }
    return table.result();
}

// Every frame sees itself and earlier frames of its clip (causal), or the whole clip: then the clip is a single group of rows.
py::tuple one_copy(py::handle frames, bool causal, const char* name, int64_t window, int64_t sink) {
    Lens lens;
    int64_t total = 0;
    for_each_item(frames, name, "token counts", LensReader{name, lens, total});
    if (window <= 0) window = std::numeric_limits<int32_t>::max();

    Table table;
    int64_t row = 0;
    for (const auto& clip : lens) {
        const std::vector<int64_t> starts = frame_starts(row, clip);
        table.begin_clip();
        if (!causal) table.add(starts.back() - row, {Interval{row, starts.back()}, Interval{}, Interval{}});
        for (size_t t = 0; causal && t < clip.size(); ++t) {
            const auto [sinks, latest] = past(starts, t + 1, window, sink);
            table.add(clip[t], {sinks, latest, Interval{}});
        }
        row = starts.back();
    }
    return table.result();
}

// Any table: int64 cells [groups, 8] at an address, checked. clip_lens: rows per clip; none: one clip.
py::tuple from_cells(uintptr_t address, size_t groups, const std::optional<std::vector<int64_t>>& clip_lens) {
    const auto* cells = reinterpret_cast<const int64_t*>(address);
    const int64_t tokens = groups ? cells[(groups - 1) * kColumns + 1] : 0;
    const std::vector<int64_t> lens = clip_lens.value_or(std::vector<int64_t>{tokens});
    const std::vector<int64_t> ends = frame_starts(0, lens);
    if (ends.back() != tokens || std::any_of(lens.begin(), lens.end(), [](int64_t len) { return len < 0; })) {
        fail("clip_lens add up to " + std::to_string(ends.back()) + " and frames has " + std::to_string(tokens) + " rows; expected the same number");
    }
    if (tokens > std::numeric_limits<int32_t>::max()) fail("frames has " + std::to_string(tokens) + " rows; expected at most 2147483647");

    Table table;
    size_t clip = 0;
    int64_t row = 0;
    for (size_t g = 0; g < groups; ++g, cells += kColumns) {
        const auto range = [&](int i) { return std::to_string(cells[i]) + ".." + std::to_string(cells[i + 1]); };
        const std::string name = at("frames", g);
        if (cells[0] != row || cells[1] <= row) fail(name + " has rows " + range(0) + "; expected a range that starts at " + std::to_string(row) + " and is not empty");
        for (; clip < lens.size() && ends[clip] <= row; ++clip) table.begin_clip();
        if (cells[1] > ends[clip]) fail(name + " has rows " + range(0) + "; expected none beyond its clip, which ends at " + std::to_string(ends[clip]));
        std::array<Interval, kIntervals> keys;
        int64_t end = ends[clip - 1] - 1;  // keys are of the own clip, with gaps between intervals
        bool unused = false, legal = true;
        for (int i = 0; i < kIntervals; ++i) {
            keys[i] = {cells[2 + 2 * i], cells[3 + 2 * i]};
            if (keys[i].start == 0 && keys[i].end == 0) {
                unused = true;
                continue;
            }
            legal = legal && !unused && end < keys[i].start && keys[i].start < keys[i].end && keys[i].end <= ends[clip];
            end = keys[i].end;
        }
        if (!legal) {
            fail(name + " has key intervals " + range(2) + ", " + range(4) + ", " + range(6) + "; expected ascending ones with gaps between, then 0..0, inside its clip " +
                 std::to_string(ends[clip - 1]) + ".." + std::to_string(ends[clip]));
        }
        table.add(cells[1] - row, keys);
        row = cells[1];
    }
    for (; clip < lens.size(); ++clip) table.begin_clip();
    return table.result();
}

void bind(py::module_& m) {
    m.def("frame_table_from_cells", &from_cells);
    m.def("frame_table_teacher_forcing", &teacher_forcing);
    m.def("frame_table_block_causal",
          [](py::handle lens, int64_t window, int64_t sink) { return one_copy(lens, true, "frame_lens", window, sink); });
    m.def("frame_table_bidirectional", [](py::handle lens) { return one_copy(lens, false, "lens", 0, 0); });
}

const mimo::Binding binding(bind);

}  // namespace
