// The frame table of a FrameMask: for every group of rows that sees the same keys, its row range and up to three key
// intervals. O(frames) work and memory; batches are described anew for every training step, so this must cost
// microseconds.
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace {

constexpr int kIntervals = 3;
constexpr int kColumns = 2 + 2 * kIntervals;  // row_start, row_end, then (key_start, key_end) three times
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

struct Interval {
    int64_t start = 0, end = 0;
    int64_t size() const { return end - start; }
};

// One value per frame, clip after clip.
template <typename T>
struct Frames {
    std::vector<T> values;
    std::vector<size_t> first{0};  // frame of every clip, and the end

    size_t clips() const { return first.size() - 1; }
    size_t count(size_t clip) const { return first[clip + 1] - first[clip]; }
    const T* clip(size_t clip) const { return values.data() + first[clip]; }
    T* add_clip(size_t frames) {
        values.resize(values.size() + frames);
        first.push_back(values.size());
        return values.data() + first.end()[-2];
    }
};
using Lens = Frames<int32_t>;
using Drops = Frames<uint8_t>;

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

std::string text(py::handle value) { return py::cast<std::string>(py::repr(value)); }

std::string at(const char* name, size_t clip) { return std::string(name) + "[" + std::to_string(clip) + "]"; }

bool is_list(py::handle value) { return PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()); }

// A snapshot of a list, or of the lists that an array stands for; none for anything else. Reading an item may run
// Python code (__index__, __repr__, tolist) that changes the list: the snapshot keeps its items alive and its length.
std::optional<py::tuple> listed(const py::object& value) {
    const py::object list =
        !is_list(value) && py::hasattr(value, "tolist") ? py::object(value.attr("tolist")()) : value;
    if (!is_list(list)) return std::nullopt;
    auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr()));
    if (!items) throw py::error_already_set();
    return items;
}

// Reads a list of lists, or tuples, or what has a `tolist` that gives them: arrays and tensors. A clip may be empty.
// `read(item, clip, frame)` makes a value of a Python object, or refuses it.
template <typename T, typename Read>
Frames<T> read_frames(py::handle value, const char* name, const char* inner, Read read) {
    Frames<T> frames;
    const auto clips = listed(py::reinterpret_borrow<py::object>(value));
    if (!clips) fail(std::string(name) + " is " + text(value) + "; expected a list of clips, each a list of " + inner);
    for (size_t c = 0; c < clips->size(); ++c) {
        const auto clip = listed((*clips)[c]);
        if (!clip)
            fail(at(name, c) + " is " + text((*clips)[c]) + "; expected a list of " + inner +
                 ", one per frame of the clip");
        const size_t count = clip->size();
        T* values = frames.add_clip(count);
        for (size_t t = 0; t < count; ++t) values[t] = read(py::handle(PyTuple_GET_ITEM(clip->ptr(), t)), c, t);
    }
    return frames;
}

// -1 for what is not a count.
int64_t to_count(py::handle value) {
    if (PyLong_CheckExact(value.ptr())) {
        int overflow = 0;
        const int64_t count = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
        return overflow > 0 ? std::numeric_limits<int64_t>::max() : overflow < 0 ? -1 : count;
    }
    if (!PyIndex_Check(value.ptr()) || PyBool_Check(value.ptr())) return -1;
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!number) throw py::error_already_set();
    return to_count(number);
}

// The token count that `place` names, one of those called `name`; `total` grows by it.
template <typename Place>
int32_t read_count(py::handle item, const char* name, Place place, int64_t& total) {
    const int64_t count = to_count(item);
    if (count < 0) fail(place() + " is " + text(item) + "; expected a token count, an int >= 0");
    if (count > kMaxTokens - total) {
        fail(std::string(name) + " brings the mask to more than 2147483647 tokens at " + place() +
             "; rows are numbered in int32");
    }
    total += count;
    return static_cast<int32_t>(count);
}

// `total` grows by the tokens read.
Lens read_lens(py::handle value, const char* name, int64_t& total) {
    return read_frames<int32_t>(value, name, "token counts", [&](py::handle item, size_t clip, size_t frame) {
        return read_count(item, name, [&] { return at(name, clip) + "[" + std::to_string(frame) + "]"; }, total);
    });
}

Drops read_drops(py::handle value, const char* name) {
    return read_frames<uint8_t>(value, name, "bools", [&](py::handle item, size_t clip, size_t frame) -> uint8_t {
        if (!PyBool_Check(item.ptr()))
            fail(at(name, clip) + "[" + std::to_string(frame) + "] is " + text(item) + "; expected a bool");
        return item.ptr() == Py_True;
    });
}

py::bytearray new_bytes(size_t size) {
    auto bytes = py::reinterpret_steal<py::bytearray>(PyByteArray_FromStringAndSize(nullptr, size));
    if (!bytes) throw py::error_already_set();
    return bytes;
}

// The table grows in a buffer that Python owns.
class Table {
public:
    explicit Table(size_t most_groups)
        : bytes_(new_bytes(most_groups * kColumns * sizeof(int32_t))),
          cells_(reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(bytes_.ptr()))),
          end_(cells_) {}

    void begin_clip() { first_row_.push_back(rows_), first_group_.push_back(groups()); }

    // Appends the next rows of the sequence; `keys` ascend. Empty intervals vanish and touching ones become one.
    void add(int64_t rows, const std::array<Interval, kIntervals>& keys) {
        if (rows == 0) return;
        end_[0] = static_cast<int32_t>(rows_), end_[1] = static_cast<int32_t>(rows_ + rows);
        int32_t* next = end_ + 2;
        end_ += kColumns;
        int64_t seen = 0;
        for (const Interval& key : keys) {
            if (key.size() == 0) continue;
            seen += key.size();
            const bool touches = next > end_ - kColumns + 2 && next[-1] == key.start;
            if (!touches) *next = static_cast<int32_t>(key.start), next += 2;
            next[-1] = static_cast<int32_t>(key.end);
        }
        for (; next < end_; ++next) *next = 0;
        rows_ += rows, pairs_ += rows * seen;
    }

    // (table bytes, pairs, rows per clip, all clips alike, frames per clip, token counts of both copies as int32 bytes,
    // the future's or None)
    py::tuple result(const Lens& history, const Lens* future = nullptr) {
        const size_t clips = first_row_.size();
        py::list clip_lens(clips), frames(clips);
        for (size_t c = 0; c < clips; ++c) {
            PyList_SET_ITEM(clip_lens.ptr(), c, PyLong_FromLongLong(end_row(c) - first_row_[c]));
            PyList_SET_ITEM(frames.ptr(), c, PyLong_FromSize_t(history.count(c)));
        }
        const bool alike = uniform();
        if (PyByteArray_Resize(bytes_.ptr(), groups() * kColumns * sizeof(int32_t))) throw py::error_already_set();
        return py::make_tuple(std::move(bytes_), pairs_, clip_lens, alike, frames, counts(history),
                              future ? counts(*future) : py::none());
    }

private:
    static py::object counts(const Lens& lens) {
        return py::bytearray(reinterpret_cast<const char*>(lens.values.data()), lens.values.size() * sizeof(int32_t));
    }

    size_t groups() const { return (end_ - cells_) / kColumns; }
    int64_t end_row(size_t clip) const { return clip + 1 < first_row_.size() ? first_row_[clip + 1] : rows_; }
    size_t end_group(size_t clip) const { return clip + 1 < first_group_.size() ? first_group_[clip + 1] : groups(); }

    // Whether all clips have the same table, counted from their own first row.
    bool uniform() const {
        if (first_row_.empty()) return false;
        const size_t cells = end_group(0) * kColumns;
        std::vector<uint32_t> moves(
            cells);  // all bits of the cells that count rows, none of those of an empty interval
        for (size_t i = 0; i < cells; i += 2) moves[i] = moves[i + 1] = cells_[i] == cells_[i + 1] ? 0 : ~uint32_t{0};
        for (size_t c = 1; c < first_row_.size(); ++c) {
            if ((end_group(c) - first_group_[c]) * kColumns != cells) return false;
            const int32_t* cell = cells_ + first_group_[c] * kColumns;
            const auto offset = static_cast<uint32_t>(first_row_[c]);  // unsigned: a longer clip 0 may wrap around
            uint32_t differs = 0;
            for (size_t i = 0; i < cells; ++i)
                differs |= static_cast<uint32_t>(cell[i]) ^ (static_cast<uint32_t>(cells_[i]) + (moves[i] & offset));
            if (differs) return false;
        }
        return true;
    }

    py::bytearray bytes_;
    int32_t *const cells_, *end_;
    std::vector<int64_t> first_row_;
    std::vector<size_t> first_group_;
    int64_t rows_ = 0, pairs_ = 0;
};

// Where the frames of a clip begin, and its end. `starts` is used again for every clip.
void find_starts(int64_t row, const Lens& lens, size_t clip, std::vector<int64_t>& starts) {
    starts.assign(1, row);
    for (size_t t = 0; t < lens.count(clip); ++t) starts.push_back(row += lens.clip(clip)[t]);
}

// Frames [0, sink) and [visible - window, visible) among the first `visible` frames of a clip, as row intervals.
std::array<Interval, 2> past(const std::vector<int64_t>& starts, int64_t visible, int64_t window, int64_t sink) {
    const int64_t first = std::max<int64_t>(0, visible - window);
    const int64_t last_sink = std::min(sink, first);
    return {Interval{starts[0], starts[last_sink]}, Interval{starts[first], starts[visible]}};
}

// window <= 0 stands for "no window". Returns Table::result.
py::tuple teacher_forcing(py::handle history, py::handle future, py::handle drop, int64_t window, int64_t sink) {
    int64_t total = 0;
    const Lens history_lens = read_lens(history, "history_lens", total);
    const Lens future_lens = read_lens(future, "future_lens", total);
    const size_t clips = history_lens.clips();
    if (clips != future_lens.clips()) {
        fail("history_lens has " + std::to_string(clips) + " clips and future_lens has " +
             std::to_string(future_lens.clips()) + "; expected the same number");
    }
    Drops dropped;
    if (!drop.is_none()) {
        dropped = read_drops(drop, "drop_history");
        if (dropped.clips() != clips) {
            fail("drop_history has " + std::to_string(dropped.clips()) + " clips and future_lens has " +
                 std::to_string(clips) + "; expected bool [clips, frames]");
        }
    }
    if (sink < 0) fail("sink is " + std::to_string(sink) + "; expected a number of frames >= 0");
    if (window <= 0) window = kMaxTokens;

    Table table(history_lens.values.size() + future_lens.values.size());
    std::vector<int64_t> history_starts, future_starts{0};
    for (size_t c = 0; c < clips; ++c) {
        const int64_t frames = history_lens.count(c);
        const auto differs = [&](const char* name, size_t count) {
            fail(at("history_lens", c) + " has " + std::to_string(frames) + " frames and " + at(name, c) + " has " +
                 std::to_string(count) + "; expected the same number");
        };
        if (future_lens.count(c) != history_lens.count(c)) differs("future_lens", future_lens.count(c));
        if (dropped.clips() && dropped.count(c) != history_lens.count(c)) differs("drop_history", dropped.count(c));
        find_starts(future_starts.back(), history_lens, c, history_starts);
        find_starts(history_starts.back(), future_lens, c, future_starts);
        table.begin_clip();
        for (int64_t t = 0; t < frames; ++t) {
            const auto [sinks, latest] = past(history_starts, t + 1, window, sink);
            table.add(history_lens.clip(c)[t], {sinks, latest, Interval{}});
        }
        for (int64_t t = 0; t < frames; ++t) {
            const Interval own{future_starts[t], future_starts[t + 1]};
            // The frame itself is one of the `window` frames it sees.
            const auto [sinks, latest] = past(history_starts, t, window - 1, sink);
            const bool alone = dropped.clips() && dropped.clip(c)[t];
            table.add(own.size(), alone ? std::array<Interval, 3>{own} : std::array<Interval, 3>{sinks, latest, own});
        }
    }
    return table.result(history_lens, &future_lens);
}

// Every frame sees itself and earlier frames of its clip (causal), or the whole clip: then the clip is a single group
// of rows.
py::tuple one_copy(py::handle frames, bool causal, const char* name, int64_t window, int64_t sink) {
    int64_t total = 0;
    const Lens lens = read_lens(frames, name, total);
    if (sink < 0) fail("sink is " + std::to_string(sink) + "; expected a number of frames >= 0");
    if (window <= 0) window = kMaxTokens;

    Table table(causal ? lens.values.size() : lens.clips());
    std::vector<int64_t> starts{0};
    for (size_t c = 0; c < lens.clips(); ++c) {
        find_starts(starts.back(), lens, c, starts);
        table.begin_clip();
        if (!causal) table.add(starts.back() - starts[0], {Interval{starts[0], starts.back()}, Interval{}, Interval{}});
        for (size_t t = 0; causal && t < lens.count(c); ++t) {
            const auto [sinks, latest] = past(starts, t + 1, window, sink);
            table.add(lens.clip(c)[t], {sinks, latest, Interval{}});
        }
    }
    return table.result(lens);
}

int64_t to_cell(py::handle value, const char* name, size_t group) {
    const auto refuse = [&] { fail(at(name, group) + " holds " + text(value) + "; expected an int of 64 bits"); };
    if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) refuse();
    int overflow = 0;
    const int64_t cell = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow) refuse();
    return cell;
}

// Any table: groups of 8 cells, checked. clip_lens: rows per clip; none: one clip.
py::tuple from_cells(py::handle groups_of_cells, py::handle clip_lens) {
    const auto rows = read_frames<int64_t>(groups_of_cells, "frames", "cells", [](py::handle item, size_t g, size_t) {
        return to_cell(item, "frames", g);
    });
    const size_t groups = rows.clips();
    for (size_t g = 0; g < groups; ++g) {
        if (rows.count(g) != kColumns)
            fail(at("frames", g) + " has " + std::to_string(rows.count(g)) + " cells; expected " +
                 std::to_string(kColumns));
    }
    const int64_t* cells = rows.values.data();
    const int64_t tokens = groups ? cells[(groups - 1) * kColumns + 1] : 0;
    if (tokens > kMaxTokens) fail("frames has " + std::to_string(tokens) + " rows; expected at most 2147483647");
    std::vector<int64_t> lens{tokens};
    if (!clip_lens.is_none()) {
        const auto counts = listed(py::reinterpret_borrow<py::object>(clip_lens));
        if (!counts) fail("clip_lens is " + text(clip_lens) + "; expected a list of token counts, one per clip");
        lens.clear();
        int64_t total = 0;
        for (size_t c = 0; c < counts->size(); ++c)
            lens.push_back(read_count((*counts)[c], "clip_lens", [&] { return at("clip_lens", c); }, total));
    }
    std::vector<int64_t> ends{0};
    for (int64_t len : lens) ends.push_back(ends.back() + len);
    if (ends.back() != tokens) {
        fail("clip_lens add up to " + std::to_string(ends.back()) + " and frames has " + std::to_string(tokens) +
             " rows; expected the same number");
    }

    Table table(groups);
    Lens frames;
    size_t clip = 0;
    const auto begin_clip = [&] {
        ++clip;
        table.begin_clip();
        frames.add_clip(0);
    };
    int64_t row = 0;
    for (size_t g = 0; g < groups; ++g, cells += kColumns) {
        const auto range = [&](int i) { return std::to_string(cells[i]) + ".." + std::to_string(cells[i + 1]); };
        const auto name = [&] { return at("frames", g); };
        if (cells[0] != row || cells[1] <= row)
            fail(name() + " has rows " + range(0) + "; expected a range that starts at " + std::to_string(row) +
                 " and is not empty");
        while (clip < lens.size() && ends[clip] <= row) begin_clip();
        if (cells[1] > ends[clip])
            fail(name() + " has rows " + range(0) + "; expected none beyond its clip, which ends at " +
                 std::to_string(ends[clip]));
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
            fail(name() + " has key intervals " + range(2) + ", " + range(4) + ", " + range(6) +
                 "; expected ascending ones with gaps between, then 0..0, inside its clip " +
                 std::to_string(ends[clip - 1]) + ".." + std::to_string(ends[clip]));
        }
        table.add(cells[1] - row, keys);
        frames.values.push_back(static_cast<int32_t>(cells[1] - row));
        ++frames.first.back();
        row = cells[1];
    }
    while (clip < lens.size()) begin_clip();
    return table.result(frames);
}

void bind(py::module_& m) {
    m.def("frame_table_from_table", &from_cells);
    m.def("frame_table_teacher_forcing", &teacher_forcing);
    m.def("frame_table_block_causal", [](py::handle lens, int64_t window, int64_t sink) {
        return one_copy(lens, true, "frame_lens", window, sink);
    });
    m.def("frame_table_bidirectional", [](py::handle lens) { return one_copy(lens, false, "lens", 0, 0); });
}

const mimo::Binding binding(bind);

}  // namespace
