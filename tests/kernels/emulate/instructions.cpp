// Hopper's instructions, one wrapper each, as the block emulator executes them.
#include <algorithm>
#include <cstring>

#include "async_state.h"

namespace mimo::sm90 {

using namespace emulated;
using namespace emulated::async;

int make_tensor_map(TensorMap* map, const void* base, const TensorShape& shape) {
    bool takes = reinterpret_cast<uintptr_t>(base) % 16 == 0;
    for (int i = 0; i < 4; i++) takes = takes && shape.size[i] > 0 && shape.box[i] > 0 && shape.box[i] <= 256;
    for (uint64_t stride : shape.stride) takes = takes && stride % 16 == 0 && stride < uint64_t{1} << 40;
    const uint32_t row = shape.box[0] * shape.element_bytes;
    takes = takes && row % 16 == 0 && (shape.swizzle == 0 || row <= static_cast<uint32_t>(shape.swizzle));
    if (!takes) return 1;
    *map = {static_cast<const char*>(base), shape};
    return 0;
}

float load_shared(uint32_t address) {
    require(address % 4 == 0, "a misaligned access: 4 bytes at " + at(address));
    require_none(touch_shared(address, 4, false));
    float value;
    std::memcpy(&value, shared_begin() + address, 4);
    return value;
}

void store_shared(uint32_t address, float value) {
    require(address % 4 == 0, "a misaligned access: 4 bytes at " + at(address));
    require_none(touch_shared(address, 4, true));
    std::memcpy(shared_begin() + address, &value, 4);
}

void barrier_init(uint32_t address, int arrivals, const char* name) {
    require(address % 8 == 0 && address + 8 <= state.shared_bytes, "a barrier at " + at(address));
    require(state.barriers.size() < kBarriers, "more barriers than the emulator knows");
    require(arrivals > 0, "barrier '" + std::string(name) + "' of no arrivals");
    Barrier barrier;
    barrier.name = name;
    barrier.copies = static_cast<Agent>(state.threads + kWarpgroups + state.barriers.size());
    barrier.arrivals = barrier.pending = arrivals;
    barrier.maker = me();
    barrier.made = mine().seen[me()];
    barrier.gathering.clear(state.agents);
    barrier.released.clear(state.agents);
    require(state.barriers.emplace(address, barrier).second, "a barrier is made twice at " + at(address));
    state.words[address / 4].barrier = state.words[address / 4 + 1].barrier = true;
}

void fence_barrier_init() {
    for (auto& [address, barrier] : state.barriers) barrier.fenced = barrier.fenced || barrier.maker == me();
}

void barrier_arrive(uint32_t address) { arrive(barrier_at(address)); }

void barrier_expect(uint32_t address, uint32_t bytes) {
    Barrier& barrier = barrier_at(address);
    barrier.bytes += bytes;
    arrive(barrier);
}

void barrier_wait(uint32_t address, uint32_t parity) {
    Barrier& barrier = barrier_at(address);
    require(parity < 2, "barrier '" + barrier.name + "' has no parity " + std::to_string(parity));
    state.thread[me()].waits_for = "barrier '" + barrier.name + "', parity " + std::to_string(parity);
    while ((barrier.phase & 1) == parity) wait();
    state.thread[me()].waits_for.clear();
    mine().learn(barrier.released);
}

void sync_warp(Place place) {
    const int warp = me() / kLanes;
    state.thread[me()].waits_for = "the other lanes of a warp at sync_warp";
    if (meet(state.warps[warp], kLanes, place)) async::join(warp * kLanes, kLanes);
    state.thread[me()].waits_for.clear();
}

static void arrive_named(int number, int threads, bool waits) {
    require(number > 0 && number < kNamedBarriers, "no named barrier " + std::to_string(number));
    NamedBarrier& barrier = state.named[number];
    require(threads % kLanes == 0 && threads > 0 && threads <= state.threads,
            "named barrier " + std::to_string(number) + " of " + std::to_string(threads) + " threads");
    require(barrier.arrived == 0 || barrier.expected == threads,
            "threads disagree about how many meet at named barrier " + std::to_string(number));
    barrier.expected = threads;
    barrier.gathering.learn(mine());
    release();
    progress();
    if (waits) barrier.waiting.push_back(me());
    const uint32_t round = barrier.round;
    if (++barrier.arrived == threads) {
        for (int t : barrier.waiting) state.thread[t].knows.learn(barrier.gathering);
        barrier.waiting.clear();
        barrier.gathering.clear(state.agents);
        barrier.arrived = 0;
        barrier.round++;
    }
    if (!waits) return;
    state.thread[me()].waits_for = "named barrier " + std::to_string(number);
    while (barrier.round == round) wait();
    state.thread[me()].waits_for.clear();
}
void named_sync(int barrier, int threads) { arrive_named(barrier, threads, true); }
void named_arrive(int barrier, int threads) { arrive_named(barrier, threads, false); }

void tensor_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    const TensorShape& shape = map.shape;
    const int alignment = shape.swizzle ? 8 * shape.swizzle : 128;
    require(to % alignment == 0,
            "a copied tile at " + at(to) + "; expected a multiple of " + std::to_string(alignment));
    const int64_t start[4] = {c0, c1, c2, c3};
    const uint32_t row_bytes = shape.box[0] * shape.element_bytes;
    Copy copy{barrier, 0, {}};
    for (uint32_t i = 0; i < shape.box[1] * shape.box[2] * shape.box[3]; i++) {
        const int64_t at[3] = {start[1] + i % shape.box[1], start[2] + i / shape.box[1] % shape.box[2],
                               start[3] + i / shape.box[1] / shape.box[2]};
        bool inside = true;
        const char* from = map.base;
        for (int d = 0; d < 3; d++) {
            inside = inside && at[d] >= 0 && at[d] < shape.size[d + 1];
            if (inside) from += at[d] * static_cast<int64_t>(shape.stride[d]);
        }
        std::string row(row_bytes, '\0');
        const int64_t first = std::max<int64_t>(start[0], 0);
        const int64_t last = std::min<int64_t>(start[0] + shape.box[0], shape.size[0]);
        if (inside && first < last) {
            const size_t bytes = (last - first) * shape.element_bytes;
            row.replace((first - start[0]) * shape.element_bytes, bytes,
                        read_operand(from + first * shape.element_bytes, bytes));
        }
        for (uint32_t piece = 0; piece < row_bytes; piece += 16) {
            const uint32_t place = to + i * row_bytes + piece;
            copy.pieces.emplace_back(shape.swizzle ? async::swizzle(place, shape.swizzle) : place,
                                     row.substr(piece, 16));
        }
        copy.bytes += row_bytes;
    }
    issue(std::move(copy));
}

void fence_async() { mine().fenced[me()] = mine().seen[me()]; }

void load_matrices(uint32_t (&x)[4], uint32_t row, Place place) {
    require(row % 16 == 0, "ldmatrix of a row at " + at(row));
    require_none(touch_shared(row, 16, false));
    // Lane i gets words of rows i / 4, which other lanes name.
    for (int i = 0; i < 4; i++) {
        const uint32_t from = shuffle_bits(0xffffffffu, row, 8 * i + me() % kLanes / 4, place);
        std::memcpy(&x[i], shared_begin() + from + me() % 4 * 4, 4);
    }
}

void product_fence(Place place) {
    if (meet(my_group().meeting, kWarpgroup, place)) my_group().fenced = true;
}

void product_commit(Place place) {
    Warpgroup& group = my_group();
    if (!meet(group.meeting, kWarpgroup, place)) return;
    for (Product& product : group.products) {
        if (product.group < 0) product.group = group.committed;
    }
    group.committed++;
    group.fenced = false;
}

}  // namespace mimo::sm90
