// What csrc/sm90.cuh says to a GPU, said to the block emulator: barriers that count bytes, tensor copies, products of
// warpgroups, and the rules of what is ordered behind what (async.cpp).
//
// Shared memory of such a kernel is watched with one clock per thread, per barrier's copies and per warpgroup's
// products: two accesses race unless what lies between them (a barrier, an arrival and a wait, the wait for a group of
// products) tells the second one's thread of the first. So a missing wait shows whichever of them came first here.
// Copies and products are done at once, as late as any thread can go on without them, or now or later by chance
// (set_asynchrony): what a kernel must not rely on, it does not get.
//
// What it finds, beside what emulate.h lists: shared memory that copies or products read although no fence_async told
// them of the store; registers of a product under way that are read or written before its wait, and products without a
// product_fence before them; tiles, boxes and addresses that the hardware cannot take; more arrivals than a barrier
// counts, barriers used before they are made; registers that a multiprocessor has not; copies and products still under
// way at the end. Threads that wait for each other forever are told by the names of what they wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "emulate.h"
#include "sm90.cuh"

#define __grid_constant__
#define MIMO_SM90 1

namespace mimo::emulated::async {

// For machine.cpp.
void begin_launch(int threads, size_t shared_bytes);
void begin_block();
void end_block();
void between_rounds(bool stuck);  // copies and products make progress; stuck: nothing else can
void join(int first, int count);  // these threads are at one barrier
std::string touch_shared(uint32_t address, size_t bytes, bool write);
void touch_registers(uintptr_t address, size_t bytes, bool write);

constexpr int kEarly = 0, kLate = 1, kByChance = 2;
void set_asynchrony(int mode, int seed);

void issue_product(float* x, int columns, const uint32_t* a, uint64_t a_tile, uint64_t tile, bool transposed, bool half,
                   bool add, Place place);
void wait_for_products(int groups, Place place);
void change_registers(int count, bool grow, Place place);

}  // namespace mimo::emulated::async

namespace mimo::sm90 {

using emulated::Place;

struct TensorMap {
    const char* base;
    TensorShape shape;
};
int make_tensor_map(TensorMap* map, const void* base, const TensorShape& shape);

template <class... Parameters, class... Arguments>
int launch_wide(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    const auto body = [=] { kernel(static_cast<Parameters>(arguments)...); };
    using Body = decltype(body);
    return emulated::run(
        grid, block, shared_bytes, [](const void* data) { (*static_cast<Body*>(data))(); }, &body, sizeof(body), true);
}

inline uint32_t shared_address() { return 0; }
float load_shared(uint32_t address);
void store_shared(uint32_t address, float value);

void barrier_init(uint32_t barrier, int arrivals, const char* name);
void fence_barrier_init();
void barrier_arrive(uint32_t barrier);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void sync_warp(Place place = Place::here());
void named_sync(int barrier, int threads);
void named_arrive(int barrier, int threads);

void tensor_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3);
void fence_async();

void load_matrices(uint32_t (&x)[4], uint32_t row, Place place = Place::here());
void product_fence(Place place = Place::here());
void product_commit(Place place = Place::here());

template <int COUNT>
void shrink_registers(Place place = Place::here()) {
    emulated::async::change_registers(COUNT, false, place);
}
template <int COUNT>
void grow_registers(Place place = Place::here()) {
    emulated::async::change_registers(COUNT, true, place);
}
template <int COUNT>
void product_wait(Place place = Place::here()) {
    emulated::async::wait_for_products(COUNT, place);
}
template <int N>
void pin(float (&)[N]) {}

template <class T, int N, int TRANSPOSED>
void product(float (&x)[N / 2], const uint32_t* a, uint64_t tile, bool add, Place place = Place::here()) {
    emulated::async::issue_product(x, N, a, 0, tile, TRANSPOSED, std::is_same_v<T, half_t>, add, place);
}
template <class T, int N, int TRANSPOSED>
void product(float (&x)[N / 2], uint64_t a, uint64_t tile, bool add, Place place = Place::here()) {
    emulated::async::issue_product(x, N, nullptr, a, tile, TRANSPOSED, std::is_same_v<T, half_t>, add, place);
}

inline float fast_log2(float x) { return std::log2(x); }

}  // namespace mimo::sm90
