#include "shadow.h"

#include <algorithm>

namespace mimo::emulated {

Region::Region(uintptr_t begin, uintptr_t end)
    : begin(begin / 16 * 16), end(end), cells((end - this->begin + 15) / 16) {}

Cell* Region::at(uintptr_t address, size_t bytes) {
    while ((address | bytes) % granule) {
        std::vector<Cell> halves;
        halves.reserve(2 * cells.size());
        for (const Cell& cell : cells) halves.insert(halves.end(), 2, cell);
        cells = std::move(halves);
        granule /= 2;
    }
    return &cells[(address - begin) / granule];
}

void Shadow::lend(const Operand& operand, uintptr_t storage, size_t storage_bytes) {
    if (regions_.empty()) regions_.emplace_back(0, 0);
    const uintptr_t end = storage + storage_bytes;
    const auto known =
        std::find_if(regions_.begin() + 1, regions_.end(), [&](const Region& region) { return region.end == end; });
    Region& region = known == regions_.end() ? regions_.emplace_back(storage, end) : *known;
    for (int64_t row = 0; row < operand.rows; row++) {
        Cell* cell = region.at(operand.address + row * operand.stride, operand.row_bytes);
        for (int64_t i = 0; i < operand.row_bytes / region.granule; i++, cell++) {
            cell->lent = true;
            if (operand.writable)
                cell->writable = true;
            else
                cell->written = 1;
        }
    }
    operands_.push_back(operand);
}

std::vector<std::string> Shadow::unwritten() {
    std::vector<std::string> names;
    for (const Operand& operand : operands_) {
        bool whole = true;
        for (int64_t row = 0; row < operand.rows && whole; row++) {
            const uintptr_t address = operand.address + row * operand.stride;
            const Region& region = *find(address);
            const Cell* cell = &region.cells[(address - region.begin) / region.granule];
            whole = std::all_of(cell, cell + operand.row_bytes / region.granule,
                                [](const Cell& c) { return c.written > 0; });
        }
        if (!whole) names.push_back(operand.name);
    }
    return names;
}

void Shadow::clear() {
    regions_.clear();
    operands_.clear();
    recent_ = 0;
    now_ = 1;
}

void Shadow::begin_launch(uintptr_t shared, size_t shared_bytes) {
    if (regions_.empty()) regions_.emplace_back(0, 0);
    Region region(shared, shared + shared_bytes);
    region.per_block = true;
    for (Cell& cell : region.cells) cell.lent = cell.writable = true;
    regions_[0] = std::move(region);
    launch_began_ = ++now_;
}

std::string Shadow::access(uintptr_t address, size_t bytes, bool write, unsigned thread) {
    Region* const region = find(address);
    if (region == nullptr || address + bytes > region->end) return outside(address, bytes, write);
    // Of the accesses so far only those since `began` can race with this one: in the launch, in shared memory those in
    // the block.
    const uint32_t began = region->per_block ? block_began_ : launch_began_;
    const auto unordered = [&](uint32_t time, uint16_t other) {
        return time >= began && (time < block_began_ || (time == now_ && other != thread));
    };
    const auto race = [&](uint32_t time, const char* what) {
        return std::string("a data race: ") + (write ? "a write" : "a read") + " of " + name(address) +
               ", which another " + (time < block_began_ ? "block" : "thread of the block") + what +
               (time < block_began_ ? "" : " since the last barrier");
    };
    Cell* cell = region->at(address, bytes);
    for (size_t i = 0; i < bytes / region->granule; i++, cell++) {
        if (!cell->lent) return outside(address, bytes, write);
        if (unordered(cell->written, cell->writer)) return race(cell->written, " wrote");
        if (write) {
            if (!cell->writable) return "a write to " + name(address) + ", an input";
            if (unordered(cell->read, cell->reader)) return race(cell->read, " read");
            if (cell->read_elsewhere >= began) return race(cell->read_elsewhere, " read");
            cell->written = now_;
            cell->writer = thread;
        } else {
            if (cell->written == 0 || (region->per_block && cell->written < began)) {
                return "a read of " + name(address) + ", which nobody has written";
            }
            if (cell->read < block_began_) cell->read_elsewhere = cell->read;
            cell->reader = cell->read == now_ && cell->reader != thread ? Cell::kSeveral : thread;
            cell->read = now_;
        }
    }
    return "";
}

std::string Shadow::fill(uintptr_t address, size_t bytes) {
    if (bytes == 0) return "";
    launch_began_ = block_began_ = ++now_;
    Region* const region = find(address);
    if (region == nullptr || address + bytes > region->end) return outside(address, bytes, true);
    Cell* cell = region->at(address, bytes);
    for (size_t i = 0; i < bytes / region->granule; i++, cell++) {
        if (!cell->lent || !cell->writable) return outside(address, bytes, true);
        cell->written = now_;
    }
    return "";
}

Region* Shadow::find(uintptr_t address) {
    const auto holds = [&](size_t i) {
        return i < regions_.size() && address >= regions_[i].begin && address < regions_[i].end;
    };
    if (holds(recent_)) return &regions_[recent_];
    for (size_t i = 0; i < regions_.size(); i++) {
        if (holds(i)) return &regions_[recent_ = i];
    }
    return nullptr;
}

std::string Shadow::outside(uintptr_t address, size_t bytes, bool write) const {
    return std::string(write ? "a write" : "a read") +
           " outside of the operands and the shared memory: " + std::to_string(bytes) + " bytes at " + name(address);
}

// Relative to the operand that the address is in, or the one that ends or begins closest to it.
std::string Shadow::name(uintptr_t address) const {
    std::vector<Operand> all = operands_;
    if (!regions_.empty()) {
        const Region& shared = regions_[0];
        all.push_back({"the shared memory", shared.begin, 1, static_cast<int64_t>(shared.end - shared.begin), 0, true});
    }
    std::string text = "an unknown address";
    int64_t nearest = 1 << 20;
    for (const Operand& operand : all) {
        const int64_t size = (operand.rows - 1) * operand.stride + operand.row_bytes, at = address - operand.address;
        const int64_t distance = at < 0 ? -at : at >= size ? at - size + 1 : 0;
        if (distance >= nearest) continue;
        nearest = distance;
        text = operand.name + (at < 0 ? " - " : " + ") + std::to_string(at < 0 ? -at : at) + " bytes (of " +
               std::to_string(size) + ")";
    }
    return text;
}

}  // namespace mimo::emulated
