// Runs CUDA kernels on the CPU, for tests on machines without a GPU: what a kernel sees. csrc/launch.h includes it
// instead of the CUDA headers.
//
// A block's threads are fibres of one operating-system thread: a warp shuffle or a barrier switches to the next fibre
// until all have arrived (machine.cpp). Blocks run one after the other. Every access to memory is looked up in a shadow
// of it (shadow.h): the compiler puts a call before each load and store of the kernels, those that -fsanitize=thread
// means for its own library.
//
// What it finds beyond wrong results, each named with the kernel's source lines:
//   accesses outside of the operands and of the shared memory asked for, writes to operands that are inputs, misaligned
//   accesses; reads of an output, of scratch or of shared memory that nobody has written; data races: two threads that
//   touch the same bytes, one of them to write, with no barrier between them, or in two different blocks.
//     A shuffle orders nothing, as in CUDA;
//   threads that wait for each other forever; a barrier or shuffle that not all threads reach, or at different places.
// With the fibres run in another order (set_order), results that depend on who comes first show as well.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
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

// Where in the sources a function is called from, as the default of its last parameter.
struct Place {
    const char* file;
    int line;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator!=(const Place& other) const { return line != other.line || std::strcmp(file, other.file); }
};

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void sync_threads(Place place = Place::here());
int lane();
uint32_t shuffle_bits(unsigned mask, uint32_t value, int source, Place place);
[[noreturn]] void stop(const char* message);

// Runs call(arguments) for every thread; 0, or kFailed and `failure()`. The arguments are the kernel's: it may read
// them.
constexpr int kFailed = 700;
int run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*), const void* arguments,
        size_t argument_bytes, bool asynchronous = false);

template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
    static_assert(sizeof(T) == 4);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = shuffle_bits(mask, bits, source, place);
    std::memcpy(&value, &bits, 4);
    return value;
}

uint16_t to_half(float value);
float from_half(uint16_t half);
uint16_t to_bfloat(float value);

}  // namespace mimo::emulated

#define threadIdx (::mimo::emulated::thread_index())
#define blockIdx (::mimo::emulated::block_index())
#define blockDim (::mimo::emulated::block_size())
#define gridDim (::mimo::emulated::grid_size())
#define __syncthreads ::mimo::emulated::sync_threads

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, mimo::emulated::Place place = mimo::emulated::Place::here()) {
    return mimo::emulated::shuffle(mask, value, mimo::emulated::lane() ^ offset, place);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, mimo::emulated::Place place = mimo::emulated::Place::here()) {
    return mimo::emulated::shuffle(mask, value, lane & 31, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset, mimo::emulated::Place place = mimo::emulated::Place::here()) {
    const int lane = mimo::emulated::lane();
    return mimo::emulated::shuffle(mask, value, lane + offset < 32 ? lane + offset : lane, place);
}

#define MIMO_REQUIRE(condition, message) ((condition) ? void(0) : ::mimo::emulated::stop(message))

namespace mimo {

struct OnDevice {
    explicit OnDevice(int) {}
};

inline int multiprocessors(int) { return 2; }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    const auto body = [=] { kernel(static_cast<Parameters>(arguments)...); };
    using Body = decltype(body);
    return emulated::run(
        grid, block, shared_bytes, [](const void* data) { (*static_cast<Body*>(data))(); }, &body, sizeof(body));
}

int fill_bytes(void* data, int value, size_t bytes, void* stream);

float* shared_memory();

uint4 load16(const void* p);
inline uint4 load16_constant(const void* p) { return load16(p); }
void store16(void* p, uint4 value);
inline void store16_whole(void* p, uint4 value) { store16(p, value); }

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.f / x; }

inline float2 widen_half2(uint32_t word) {
    return {emulated::from_half(word & 0xffffu), emulated::from_half(word >> 16)};
}
inline uint32_t narrow_half2(float low, float high) {
    return emulated::to_half(low) | uint32_t{emulated::to_half(high)} << 16;
}
inline uint32_t narrow_bfloat2(float low, float high) {
    return emulated::to_bfloat(low) | uint32_t{emulated::to_bfloat(high)} << 16;
}

}  // namespace mimo
