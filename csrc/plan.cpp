// What tile schedules have in common (see plan.h), and their functions in mimo_kernels._C.
#include "plan.h"

#include "bindings.h"

namespace py = pybind11;

namespace mimo {

using namespace schedule;

// The first key that a group and those after it see, for every group; of none: the number of keys.
static std::vector<int> first_keys(const LentTable& table) {
    std::vector<int> first(table.count + 1, table.keys);
    for (int g = table.count - 1; g >= 0; --g) {
        const Group& group = table.groups[g];
        first[g] = group.empty() ? first[g + 1] : std::min(first[g + 1], group.first_key->start);
    }
    return first;
}

// The end of the keys that the groups up to `group` see, given that of those before it.
static int last_key_with(const Group& group, int before) {
    return group.empty() ? before : std::max(before, group.end_key[-1].end);
}

// A part of rows begins where the keys of all groups before it end in front of the keys of all others.
Axis row_axis(const LentTable& table) {
    Axis axis(table.count);
    const std::vector<int> first_key = first_keys(table);
    int last_key = 0;
    for (int g = 0; g < table.count; ++g) {
        const Group& group = table.groups[g];
        axis.spans.push({group.row_start, group.row_end});
        axis.starts_part[g] = last_key <= first_key[g];
        last_key = last_key_with(group, last_key);
    }
    return axis;
}

// Where rows and keys are the same tokens, the spans of keys are those of the rows: as far as the parts tell, rows and
// keys of each have the same numbers. Else they are keys that the same rows see, and keys between two parts that nobody
// sees are a part of their own: nothing tells which clip they are of.
Axis key_axis(const LentTable& table) {
    std::vector<int> places{0, table.keys}, parts;
    const std::vector<int> first_key = first_keys(table);
    int last_key = 0;
    bool same = table.keys == table.rows;
    for (int g = 0; g < table.count; ++g) {
        const Group& group = table.groups[g];
        if (last_key <= first_key[g]) {
            same = same && last_key <= group.row_start && group.row_start <= first_key[g];
            parts.push_back(last_key), parts.push_back(first_key[g]);
        }
        last_key = last_key_with(group, last_key);
    }
    if (same) return row_axis(table);
    parts.push_back(last_key);  // ascending
    places.reserve(2 * table.all + 2);
    for (const Group& group : table.groups) {
        for (const Interval& key : group) places.push_back(key.start), places.push_back(key.end);
    }
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());
    Axis axis(places.size() - 1);
    for (size_t i = 0, part = 0; i + 1 < places.size(); ++i) {
        axis.spans.push({places[i], places[i + 1]});
        while (part < parts.size() && parts[part] < places[i]) ++part;
        axis.starts_part[i] = part < parts.size() && parts[part] == places[i];
    }
    return axis;
}

Schedule::Schedule(Axis axis, int tile, int block, int band_rows)
    : spans_(std::move(axis.spans)),
      starts_part_(std::move(axis.starts_part)),
      count_(static_cast<int>(spans_.size())),
      rows_(count_ ? spans_.end()[-1].end : 0),
      tile_(tile),
      blocks_(block),
      tiles_(most_tiles()),
      segments_(most_tiles() * kRowSegmentCells),
      masked_(kRowSegmentCells) {
    find_bands(band_rows);
}

py::tuple Schedule::result() {
    const Array<int> order = sorted();
    std::fill_n(segments_.extend(kRowSegmentCells), kRowSegmentCells, 0);  // kernels look one segment ahead
    const size_t first_segment = tiles_.size() * kTileCells;
    const size_t cells = first_segment + segments_.size();
    if (cells > static_cast<size_t>(kMaxRows))
        throw py::value_error("a schedule of " + std::to_string(cells) + " numbers for " + std::to_string(rows_) +
                              " rows; expected at most " + std::to_string(kMaxRows));
    py::bytearray bytes(nullptr, 0);
    if (PyByteArray_Resize(bytes.ptr(), cells * sizeof(int32_t))) throw py::error_already_set();
    int32_t* out = reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(bytes.ptr()));
    int64_t blocks = 0;
    for (const int t : order) {
        const Tile& tile = tiles_[t];
        int32_t row[kTileCells];
        row[kTileStart] = tile.start, row[kTileEnd] = tile.end;
        row[kTileSegments] = static_cast<int32_t>(first_segment + tile.place),
        row[kTileBareBlocks] = static_cast<int32_t>(tile.bare_blocks);
        out = std::copy_n(row, kTileCells, out);
        blocks += tile.blocks;
    }
    std::copy(segments_.begin(), segments_.end(), out);
    return py::make_tuple(std::move(bytes), tiles_.size(), blocks * tile_ * blocks_.size, rows_);
}

void Schedule::close(const Tile& tile) {
    if (std::max(tile.bare_blocks, tile.masked_steps) > kMaxRows)
        throw py::value_error("a tile of " + std::to_string(tile.blocks) + " blocks; kernels count them in int32");
    segments_.append({static_cast<int32_t>(tile.masked_steps)});
    std::copy(masked_.begin(), masked_.end(), segments_.extend(masked_.size()));
    segments_.append({tile.start, tile.end});
    masked_.resize(0);
}

// Whole parts form a band.
void Schedule::find_bands(int band_rows) {
    bands_.assign(count_, 0);
    int band = 0, band_start = 0;
    for (int i = 0; i < count_; ++i) {
        const int row = spans_[i].start;
        if (row - band_start >= band_rows && starts_part_[i]) ++band, band_start = row;
        bands_[i] = band;
    }
}

// Longest first inside every band.
Array<int> Schedule::sorted() const {
    int64_t longest = 0;
    for (const Tile& tile : tiles_) longest = std::max(longest, tile.blocks);
    int bits = 0;
    while (longest >> bits) ++bits;
    Array<int> order(tiles_.size()), spare(tiles_.size());
    for (size_t t = 0; t < tiles_.size(); ++t) order.push(static_cast<int>(t));
    radix_sort(order, spare, [&](int t) {
        return static_cast<uint64_t>(tiles_[t].band) << bits | static_cast<uint64_t>(longest - tiles_[t].blocks);
    });
    return order;
}

}  // namespace mimo

namespace {

using namespace mimo::schedule;

// num_keys < 0: as many as the table has rows.
template <py::tuple make(const mimo::LentTable&, int, int, int)>
py::tuple plan(const py::buffer& frames, int tile, int block, int band_rows, int64_t num_keys) {
    if (tile <= 0 || tile > kMaxTile || block <= 0 || block > kMaxTile || (block & (block - 1)) || band_rows <= 0) {
        mimo::fail("a schedule with tiles of " + std::to_string(tile) + ", blocks of " + std::to_string(block) +
                   " and bands of " + std::to_string(band_rows) + " rows; expected 1 to " + std::to_string(kMaxTile) +
                   ", a power of two for the blocks, and a positive number");
    }
    return make(mimo::LentTable(frames, num_keys), tile, block, band_rows);
}

py::dict layout() {
    py::dict cells;
    cells["INTERVALS"] = kIntervals, cells["GROUP_KEYS"] = kGroupKeys, cells["GROUP_CELLS"] = kGroupCells;
    cells["TILE_START"] = kTileStart, cells["TILE_END"] = kTileEnd, cells["TILE_SEGMENTS"] = kTileSegments;
    cells["TILE_BARE_BLOCKS"] = kTileBareBlocks, cells["TILE_CELLS"] = kTileCells;
    cells["SEGMENT_CELLS"] = kSegmentCells;
    cells["KEY_SEGMENT_BOUNDS"] = kKeySegmentBounds, cells["KEY_SEGMENT_CELLS"] = kKeySegmentCells;
    cells["BOUNDS_ROW"] = kBoundsRow, cells["BOUNDS_START"] = kBoundsStart, cells["BOUNDS_END"] = kBoundsEnd;
    cells["BOUNDS_CELLS"] = kBoundsCells;
    cells["HEADER_STEPS"] = kHeaderSteps, cells["HEADER_CELLS"] = kHeaderCells;
    cells["ROW_SEGMENT_GROUPS"] = kRowSegmentGroups, cells["ROW_SEGMENT_BEGINS"] = kRowSegmentBegins;
    cells["ROW_SEGMENT_KEYS"] = kRowSegmentKeys, cells["ROW_SEGMENT_CELLS"] = kRowSegmentCells;
    cells["MAX_ROWS"] = kMaxRows;
    return cells;
}

template <py::tuple make(const mimo::LentTable&, int, int, int)>
void define(py::module_& m, const char* name) {
    m.def(name, &plan<make>, py::arg("frames"), py::arg("tile"), py::arg("block"), py::arg("band_rows"),
          py::arg("num_keys") = -1);
}

void bind(py::module_& m) {
    define<mimo::plan_rows>(m, "plan_rows");
    define<mimo::plan_keys>(m, "plan_keys");
    m.attr("schedule_layout") = layout();
}

const mimo::Binding binding(bind);

}  // namespace
