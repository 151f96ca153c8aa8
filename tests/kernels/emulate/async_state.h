// What the block emulator keeps of a block with asynchronous copies and products, shared by its rules (async.cpp) and
// the instructions (instructions.cpp).
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "async.h"
#include "fibres.h"
#include "machine.h"
#include "sm90.cuh"

namespace mimo::emulated::async {

constexpr int kBarriers = 64, kWarpgroups = 8;
constexpr int kNamedBarriers = 16;
constexpr uint32_t kPoison = 0x7fbadbad;  // a signalling NaN that no product makes

// Whose doings have an order among themselves: threads, the products of a warpgroup, the copies that a barrier counts.
using Agent = uint16_t;
constexpr Agent kNobody = 0xffff;

// Per agent how far its doings are known; `fenced`: those stores of threads that copies and products may read.
struct Knowledge {
    std::vector<uint32_t> seen, fenced;

    void clear(size_t agents) { seen.assign(agents, 0), fenced.assign(agents, 0); }
    void learn(const Knowledge& other) {
        for (size_t i = 0; i < seen.size(); i++) {
            seen[i] = std::max(seen[i], other.seen[i]);
            fenced[i] = std::max(fenced[i], other.fenced[i]);
        }
    }
};

struct Moment {
    Agent agent;
    uint32_t time;
};

struct Word {  // 4 bytes of shared memory
    Moment writer{kNobody, 0};
    bool barrier = false;
    std::vector<Moment> readers;  // since it was written
};

struct Barrier {
    std::string name;
    Agent copies;
    int arrivals = 0, pending = 0, maker = 0;
    int64_t bytes = 0;
    uint32_t phase = 0, made = 0, issued = 0;
    bool fenced = false;
    Knowledge gathering, released;
};

struct NamedBarrier {
    int expected = 0, arrived = 0;
    uint32_t round = 0;
    Knowledge gathering;
    std::vector<int> waiting;
};

struct Copy {
    uint32_t barrier, bytes;
    std::vector<std::pair<uint32_t, std::string>> pieces;  // shared address, bytes
};

struct Product {
    std::vector<float*> x;           // per thread
    std::vector<const uint32_t*> a;  // per thread; nullptr: a_tile
    uint64_t a_tile, tile;
    int columns;
    bool transposed, half, add, done = false;
    int group = -1;
};

struct Range {
    uintptr_t begin, end;
    bool readable;  // a fragment; else a sum
    int product;
};

struct Warpgroup {
    Meeting meeting;
    std::vector<Product> products;              // under way, oldest first
    std::map<float*, std::vector<float>> sums;  // of products under way, by the first thread's registers
    int committed = 0, retired = 0;             // groups
    uint32_t time = 0;                          // of the newest product
    std::deque<uint32_t> group_time;            // of groups under way
    int registers = 0, changing = 0;
    bool fenced = false;
};

struct Thread {
    Knowledge knows;
    std::vector<Range> registers;  // of products under way
    std::string waits_for;
};

struct State {
    int threads = 0, mode = kEarly, agents = 0;
    size_t shared_bytes = 0;
    std::mt19937 chance;
    std::vector<Word> words;
    std::vector<Thread> thread;
    std::map<uint32_t, Barrier> barriers;
    NamedBarrier named[kNamedBarriers];
    Warpgroup group[kWarpgroups];
    std::vector<Meeting> warps;
    std::deque<Copy> copies;
    int free_registers = 0;
    // What the threads of a warpgroup bring to a product, by thread.
    struct Offer {
        float* x;
        const uint32_t* a;
        uint64_t a_tile, tile;
        int columns;
        bool transposed, half, add;
    };
    std::vector<Offer> offers;
};

extern State state;

inline int me() { return current_thread(); }
inline Knowledge& mine() { return state.thread[me()].knows; }
inline Warpgroup& my_group() { return state.group[me() / sm90::kWarpgroup]; }
// What comes now is later than what others have been told of.
inline void release() { mine().seen[me()]++; }

std::string at(uint32_t address);
void require(bool condition, const std::string& message);
void require_none(const std::string& wrong);  // what is wrong, or nothing
Barrier& barrier_at(uint32_t address);
void arrive(Barrier& barrier);
void issue(Copy copy);
std::string read_operand(const char* from, size_t bytes);
uint32_t swizzle(uint32_t address, int width);

}  // namespace mimo::emulated::async
