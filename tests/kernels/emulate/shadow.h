// What is known of the memory that kernels work on: who may touch it, who has, and when. The part of the block emulator
// that finds what NVIDIA's compute-sanitizer finds on a GPU with memcheck, initcheck and racecheck.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mimo::emulated {

// Some equal bytes of memory. Times count barriers, blocks and launches as they pass; 0: never, 1: before the first
// launch.
struct Cell {
    uint32_t written = 0, read = 0;
    uint32_t read_elsewhere = 0;  // the last read before `read` that was in another block
    uint16_t writer = 0;
    uint16_t reader = 0;  // kSeveral: more than one thread at the time `read`
    bool lent = false, writable = false;
    static constexpr uint16_t kSeveral = 0xffff;
};

// A piece of memory and its cells, which begin at 16 bytes and are halved when an access is narrower: the bytes of a
// cell share their past, and nothing is lost or made up by looking at them together.
struct Region {
    uintptr_t begin, end;    // begin: a multiple of 16
    bool per_block = false;  // shared memory: other blocks have their own, and it holds nothing when a block begins
    unsigned granule = 16;
    std::vector<Cell> cells;

    Region(uintptr_t begin, uintptr_t end);
    Cell* at(uintptr_t address, size_t bytes);  // halves the cells until some of them are exactly these bytes
};

// Memory that the caller of an operator hands over: `rows` pieces of row_bytes, `stride` bytes apart.
struct Operand {
    std::string name;
    uintptr_t address;
    int64_t rows, row_bytes, stride;
    bool writable;
};

class Shadow {
public:
    // Lends an operand to the kernels until `clear`. The storage it lies in is told as well: operands may share one.
    // What is only read holds values; the rest holds nothing until a kernel has written it.
    void lend(const Operand& operand, uintptr_t storage, size_t storage_bytes);
    std::vector<std::string> unwritten();  // names of writable operands with bytes that no kernel has written
    void clear();

    void begin_launch(uintptr_t shared, size_t shared_bytes);
    void begin_block() { block_began_ = ++now_; }
    void barrier() { ++now_; }

    // "" or what is wrong with it.
    std::string access(uintptr_t address, size_t bytes, bool write, unsigned thread);
    std::string fill(uintptr_t address, size_t bytes);  // by the stream, between launches
    std::string name(uintptr_t address) const;

private:
    Region* find(uintptr_t address);
    std::string outside(uintptr_t address, size_t bytes, bool write) const;

    std::vector<Region> regions_;  // the first one is the shared memory
    std::vector<Operand> operands_;
    size_t recent_ = 0;
    uint32_t now_ = 1, launch_began_ = 0, block_began_ = 0;
};

}  // namespace mimo::emulated
