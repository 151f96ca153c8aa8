// What the compiler of the host sees of a file of kernels; see launch.h.
//
// A kernel's body is checked and no code is made of it (gnu_inline). Where a launcher names a kernel, its object is
// left with an undefined symbol, whose mangled name is the kernel's name in device code too; embed.py defines each of
// them, as a `Kernel` that knows its name and the device code. So the address of a kernel is that of its `Kernel`.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "driver.h"

#define __global__ inline __attribute__((gnu_inline))
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- what kernels use, declared ----

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
extern const dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset);
template <class T>
T __shfl_sync(unsigned mask, T value, int lane);
template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset);
using std::fmaf;
float rsqrtf(float x);
float __uint_as_float(uint32_t bits);
uint32_t __float_as_uint(float value);

void mimo_require(bool condition, const char* message);
#define MIMO_REQUIRE(condition, message) mimo_require(condition, message)

namespace mimo {

float* shared_memory();
uint4 load16(const void* p);
uint4 load16_constant(const void* p);
void store16(void* p, uint4 value);
void store16_whole(void* p, uint4 value);
float fast_exp2(float x);
float fast_reciprocal(float x);
float2 widen_half2(uint32_t word);
uint32_t narrow_half2(float low, float high);
uint32_t narrow_bfloat2(float low, float high);

// ---- what launchers use ----

// A block may have more than 48 KiB of shared memory.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "an argument for every parameter of the kernel");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    const driver::Size sizes[] = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
    std::tuple<std::remove_const_t<Parameters>...> values{static_cast<Parameters>(arguments)...};
    return std::apply(
        [&](auto&... value) {
            void* addresses[] = {&value...};
            return driver::start(reinterpret_cast<driver::Kernel*>(kernel), sizes[0], sizes[1], shared_bytes, stream,
                                 addresses);
        },
        values);
}

using driver::fill_bytes;
using driver::multiprocessors;
using driver::OnDevice;

}  // namespace mimo
