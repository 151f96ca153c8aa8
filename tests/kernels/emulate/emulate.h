// Runs CUDA kernels on the CPU, for tests on machines without a GPU. A block's threads are fibres of one operating-system thread: a warp
// shuffle or a barrier switches to the next fibre until all have arrived. Blocks run one after the other.
//
// What it finds beyond wrong results: threads that wait for each other forever, a barrier or shuffle that not all threads reach, misaligned
// 16-byte accesses, writes past the shared memory asked for, shared memory read before it was written (it is NaN at first), and, with the
// fibres run in another order (set_order), results that depend on who comes first.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
    float x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
using std::fmaf;
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

namespace mimo::emulated {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr int kFailed = 700;  // any status that is not 0

struct Fibre {
    jmp_buf point;
    ucontext_t start;
    void* stack = nullptr;
    bool started = false, done = true;
    dim3 thread{0, 0, 0};
    int warp = 0, lane = 0;
};

struct Warp {
    uint32_t slot[2][kLanes];
    int arrived = 0, lanes = 0;
    unsigned round = 0;
};

struct Machine {
    std::vector<Fibre> fibres;  // grows; a fibre keeps its stack
    std::vector<Warp> warps;
    std::vector<int> order;
    jmp_buf scheduler;
    int current = 0, threads = 0, alive = 0, arrived = 0;
    unsigned barrier_round = 0;
    uint64_t progress = 0;
    std::function<void()> kernel;
    std::vector<float> shared;
    std::string failure;
    int order_seed = 0;  // 0: ascending, 1: descending, else shuffled
    dim3 block_index{0, 0, 0}, block_size{0, 0, 0}, grid_size{0, 0, 0};
};
inline Machine machine;

inline Fibre& self() { return machine.fibres[machine.current]; }

inline void leave() { _longjmp(machine.scheduler, 1); }

inline void wait() {
    if (!_setjmp(self().point)) leave();
}

[[noreturn]] inline void fail(const std::string& message) {
    machine.failure = message;
    leave();
    std::abort();
}

inline void fibre_main() {
    for (;;) {
        machine.kernel();
        Fibre& fibre = self();
        fibre.done = true;
        machine.alive--;
        machine.progress++;
        wait();
    }
}

inline void resume(int index) {
    machine.current = index;
    if (_setjmp(machine.scheduler)) return;
    Fibre& fibre = self();
    if (fibre.started) _longjmp(fibre.point, 1);
    if (fibre.stack == nullptr) {
        fibre.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fibre.stack == MAP_FAILED) std::abort();
    }
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack;
    fibre.start.uc_stack.ss_size = kStackBytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, fibre_main, 0);
    fibre.started = true;
    setcontext(&fibre.start);
}

inline void sync_threads() {
    const unsigned round = machine.barrier_round;
    machine.progress++;
    if (++machine.arrived == machine.alive) {
        machine.arrived = 0;
        machine.barrier_round++;
        return;
    }
    while (machine.barrier_round == round) wait();
}

// Every lane puts in a value; all 32 have to come.
inline const uint32_t* exchange(unsigned mask, uint32_t value) {
    if (mask != 0xffffffffu) fail("a warp shuffle names only some of the lanes");
    Warp& warp = machine.warps[self().warp];
    if (warp.lanes != kLanes) fail("a warp shuffle in a block that is not made of whole warps");
    const unsigned round = warp.round;
    uint32_t* slot = warp.slot[round % 2];  // two in turn: nobody can be two rounds ahead
    slot[self().lane] = value;
    machine.progress++;
    if (++warp.arrived == kLanes) {
        warp.arrived = 0;
        warp.round++;
    } else {
        while (warp.round == round) wait();
    }
    return slot;
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = exchange(mask, bits)[source];
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void run_block() {
    machine.arrived = 0;
    machine.alive = machine.threads;
    for (Warp& warp : machine.warps) warp.arrived = 0;
    for (int i = 0; i < machine.threads; i++) machine.fibres[i].done = false;
    while (machine.alive > 0) {
        const uint64_t before = machine.progress;
        for (int i : machine.order) {
            if (machine.fibres[i].done) continue;
            resume(i);
            if (!machine.failure.empty()) return;
        }
        if (machine.progress == before) {
            machine.failure = "threads wait for a barrier or a shuffle that the others never reach";
            return;
        }
        if (machine.alive > 0 && machine.arrived == machine.alive) {  // those that were missing have ended
            machine.arrived = 0;
            machine.barrier_round++;
        }
    }
}

inline int run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    constexpr size_t kGuard = 64;
    const uint32_t poison = 0xffffffffu;
    machine.failure.clear();
    machine.kernel = std::move(kernel);
    machine.grid_size = grid;
    machine.block_size = block;
    machine.threads = block.x * block.y * block.z;
    if (machine.threads < 1 || machine.threads > 1024) machine.failure = "a block of " + std::to_string(machine.threads) + " threads";
    if (shared_bytes > (48 << 10)) machine.failure = std::to_string(shared_bytes) + " bytes of shared memory";
    if (static_cast<int>(machine.fibres.size()) < machine.threads) machine.fibres.resize(machine.threads);
    machine.warps.assign((machine.threads + kLanes - 1) / kLanes, Warp{});
    for (int i = 0; i < machine.threads; i++) {
        Fibre& fibre = machine.fibres[i];
        fibre.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
        fibre.warp = i / kLanes;
        fibre.lane = i % kLanes;
        machine.warps[fibre.warp].lanes++;
    }
    machine.order.resize(machine.threads);
    std::iota(machine.order.begin(), machine.order.end(), 0);
    if (machine.order_seed == 1) std::reverse(machine.order.begin(), machine.order.end());
    if (machine.order_seed > 1) std::shuffle(machine.order.begin(), machine.order.end(), std::mt19937(machine.order_seed));
    machine.shared.resize((shared_bytes + 3) / 4 + kGuard);
    for (uint64_t b = 0; b < uint64_t{grid.x} * grid.y * grid.z && machine.failure.empty(); b++) {
        machine.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (uint64_t{grid.x} * grid.y));
        std::memset(machine.shared.data(), 0xff, machine.shared.size() * 4);
        run_block();
        for (size_t i = machine.shared.size() - kGuard; i < machine.shared.size() && machine.failure.empty(); i++) {
            if (std::memcmp(&machine.shared[i], &poison, 4)) machine.failure = "a write past the end of the shared memory";
        }
    }
    if (machine.failure.empty()) return 0;
    for (Fibre& fibre : machine.fibres) fibre.started = false;  // the others stopped half-way: begin them anew
    return kFailed;
}

inline uint16_t to_half(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7fffu;
    if (magnitude >= 65520.f) return sign | 0x7c00u;
    if (magnitude < 6.103515625e-05f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.f));  // steps of 2^-24
    const uint32_t rest = bits & 0x7fffffffu;
    return sign | static_cast<uint16_t>((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}
inline float from_half(uint16_t half) {
    const float sign = half & 0x8000u ? -1.f : 1.f;
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
    return sign * std::ldexp(1.f + mantissa / 1024.f, exponent - 15);
}
inline uint16_t to_bfloat(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (std::isnan(value)) return 0x7fffu;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace mimo::emulated

#define threadIdx (::mimo::emulated::self().thread)
#define blockIdx (::mimo::emulated::machine.block_index)
#define blockDim (::mimo::emulated::machine.block_size)
#define gridDim (::mimo::emulated::machine.grid_size)
#define __syncthreads ::mimo::emulated::sync_threads

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
    return mimo::emulated::shuffle(mask, value, mimo::emulated::self().lane ^ offset);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return mimo::emulated::shuffle(mask, value, lane & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
    const int lane = mimo::emulated::self().lane;
    return mimo::emulated::shuffle(mask, value, lane + offset < 32 ? lane + offset : lane);
}

#define MIMO_REQUIRE(condition, message) ((condition) ? void(0) : ::mimo::emulated::fail(message))

namespace mimo {

struct OnDevice {
    explicit OnDevice(int) {}
};

inline int multiprocessors(int) { return 2; }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    return emulated::run(grid, block, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline int fill_bytes(void* data, int value, size_t bytes, void*) {
    std::memset(data, value, bytes);
    return 0;
}

inline float* shared_memory() { return emulated::machine.shared.data(); }

inline void check_alignment(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) emulated::fail("a 16-byte access to a misaligned address");
}
inline uint4 load16(const void* p) {
    check_alignment(p);
    uint4 value;
    std::memcpy(&value, p, 16);
    return value;
}
inline void store16(void* p, uint4 value) {
    check_alignment(p);
    std::memcpy(p, &value, 16);
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.f / x; }

inline float2 widen_half2(uint32_t word) { return {emulated::from_half(word & 0xffffu), emulated::from_half(word >> 16)}; }
inline uint32_t narrow_half2(float low, float high) { return emulated::to_half(low) | uint32_t{emulated::to_half(high)} << 16; }
inline uint32_t narrow_bfloat2(float low, float high) { return emulated::to_bfloat(low) | uint32_t{emulated::to_bfloat(high)} << 16; }

}  // namespace mimo
