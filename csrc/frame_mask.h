// The frame table of a FrameMask: for every group of rows that sees the same keys, its row range and its key intervals.
// Here is how numbers of Python are read, and how a table grows; frame_mask.cpp makes tables of lists of frames,
// frame_mask_given.cpp takes given ones.
//
// O(frames) work and memory; batches are described anew for every training step, so this must cost microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "schedule.h"

namespace mimo::frame_mask {

namespace py = pybind11;
using schedule::kGroupKeys, schedule::kIntervals;

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

[[noreturn]] inline void fail(const std::string& message) { throw py::value_error(message); }

inline std::string text(py::handle value) { return py::cast<std::string>(py::repr(value)); }

inline std::string at(const char* name, size_t clip) { return std::string(name) + "[" + std::to_string(clip) + "]"; }

inline bool is_list(py::handle value) { return PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()); }

// A snapshot of a list, or of the lists that an array stands for; none for anything else. Reading an item may run
// Python code (__index__, __repr__, tolist) that changes the list: the snapshot keeps its items alive and its length.
inline std::optional<py::tuple> listed(const py::object& value) {
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
inline int64_t to_count(py::handle value) {
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
inline Lens read_lens(py::handle value, const char* name, int64_t& total) {
    return read_frames<int32_t>(value, name, "token counts", [&](py::handle item, size_t clip, size_t frame) {
        return read_count(item, name, [&] { return at(name, clip) + "[" + std::to_string(frame) + "]"; }, total);
    });
}

inline Drops read_drops(py::handle value, const char* name) {
    return read_frames<uint8_t>(value, name, "bools", [&](py::handle item, size_t clip, size_t frame) -> uint8_t {
        if (!PyBool_Check(item.ptr()))
            fail(at(name, clip) + "[" + std::to_string(frame) + "] is " + text(item) + "; expected a bool");
        return item.ptr() == Py_True;
    });
}

inline py::bytearray new_bytes(size_t size) {
    auto bytes = py::reinterpret_steal<py::bytearray>(PyByteArray_FromStringAndSize(nullptr, size));
    if (!bytes) throw py::error_already_set();
    return bytes;
}

// The table grows in a buffer that Python owns, kGroupKeys + 2 * `intervals` cells for every group.
class Table {
public:
    explicit Table(size_t most_groups, int intervals = kIntervals)
        : columns_(kGroupKeys + 2 * std::max(intervals, kIntervals)),
          bytes_(new_bytes(most_groups * columns_ * sizeof(int32_t))),
          cells_(reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(bytes_.ptr()))),
          end_(cells_) {}

    // A clip of so many keys, whose groups follow.
    void begin_clip(int64_t keys) {
        first_row_.push_back(rows_), first_key_.push_back(keys_), first_group_.push_back(groups());
        keys_ += keys;
    }

    // Appends the next rows of the sequence; the keys [key, last) ascend. Empty intervals vanish and touching ones
    // become one.
    void add(int64_t rows, const Interval* key, const Interval* last) {
        if (rows == 0) return;
        end_[0] = static_cast<int32_t>(rows_), end_[1] = static_cast<int32_t>(rows_ + rows);
        int32_t *const first = end_ + kGroupKeys, *next = first;
        end_ += columns_;
        int64_t seen = 0;
        for (; key < last; ++key) {
            if (key->size() == 0) continue;
            seen += key->size();
            const bool touches = next > first && next[-1] == key->start;
            if (!touches) *next = static_cast<int32_t>(key->start), next += 2;
            next[-1] = static_cast<int32_t>(key->end);
        }
        for (; next < end_; ++next) *next = 0;
        rows_ += rows, pairs_ += rows * seen;
    }
    void add(int64_t rows, std::initializer_list<Interval> keys) { add(rows, keys.begin(), keys.end()); }

    // (table bytes, cells of a group, pairs, rows per clip, keys per clip or None: as the rows, all clips alike, frames
    // per clip, token counts of both copies as int32 bytes, the future's or None)
    py::tuple result(const Lens& history, const Lens* future = nullptr) {
        const size_t clips = first_row_.size();
        py::list rows(clips), frames(clips);
        bool square = true;
        for (size_t c = 0; c < clips; ++c) {
            PyList_SET_ITEM(rows.ptr(), c, PyLong_FromLongLong(end_row(c) - first_row_[c]));
            PyList_SET_ITEM(frames.ptr(), c, PyLong_FromSize_t(history.count(c)));
            square = square && end_row(c) - first_row_[c] == end_key(c) - first_key_[c];
        }
        py::object keys = py::none();
        if (!square) {
            keys = py::list(clips);
            for (size_t c = 0; c < clips; ++c)
                PyList_SET_ITEM(keys.ptr(), c, PyLong_FromLongLong(end_key(c) - first_key_[c]));
        }
        const bool alike = uniform();
        if (PyByteArray_Resize(bytes_.ptr(), groups() * columns_ * sizeof(int32_t))) throw py::error_already_set();
        return py::make_tuple(std::move(bytes_), columns_, pairs_, rows, keys, alike, frames, counts(history),
                              future ? counts(*future) : py::none());
    }

private:
    static py::object counts(const Lens& lens) {
        return py::bytearray(reinterpret_cast<const char*>(lens.values.data()), lens.values.size() * sizeof(int32_t));
    }

    size_t groups() const { return (end_ - cells_) / columns_; }
    int64_t end_row(size_t clip) const { return clip + 1 < first_row_.size() ? first_row_[clip + 1] : rows_; }
    int64_t end_key(size_t clip) const { return clip + 1 < first_key_.size() ? first_key_[clip + 1] : keys_; }
    size_t end_group(size_t clip) const { return clip + 1 < first_group_.size() ? first_group_[clip + 1] : groups(); }

    // Whether all clips have as many keys and the same table, counted from their own first row and key.
    bool uniform() const {
        if (first_row_.empty()) return false;
        const size_t cells = end_group(0) * columns_;
        // All bits of the cells that count rows, or keys; none of those of an empty interval.
        std::vector<uint32_t> row_cells(cells, 0), key_cells(cells, 0);
        for (size_t i = 0; i < cells; i += 2) {
            auto& moves = i % columns_ ? key_cells : row_cells;
            moves[i] = moves[i + 1] = cells_[i] == cells_[i + 1] ? 0 : ~uint32_t{0};
        }
        for (size_t c = 1; c < first_row_.size(); ++c) {
            if ((end_group(c) - first_group_[c]) * columns_ != cells) return false;
            if (end_key(c) - first_key_[c] != end_key(0)) return false;
            const int32_t* cell = cells_ + first_group_[c] * columns_;
            // Unsigned: a longer clip 0 may wrap around.
            const auto row = static_cast<uint32_t>(first_row_[c]), key = static_cast<uint32_t>(first_key_[c]);
            uint32_t differs = 0;
            for (size_t i = 0; i < cells; ++i) {
                const uint32_t moved = (row_cells[i] & row) + (key_cells[i] & key);
                differs |= static_cast<uint32_t>(cell[i]) ^ (static_cast<uint32_t>(cells_[i]) + moved);
            }
            if (differs) return false;
        }
        return true;
    }

    const size_t columns_;
    py::bytearray bytes_;
    int32_t *const cells_, *end_;
    std::vector<int64_t> first_row_, first_key_;
    std::vector<size_t> first_group_;
    int64_t rows_ = 0, keys_ = 0, pairs_ = 0;
};

py::tuple from_cells(py::handle groups_of_cells, py::handle clip_lens, py::handle key_lens);
py::tuple from_slices(py::handle q_ranges, py::handle k_ranges, py::handle num_queries, py::handle num_keys);

}  // namespace mimo::frame_mask
