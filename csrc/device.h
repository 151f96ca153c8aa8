// What the compiler of device code sees, nvcc or NVRTC; see launch.h. Of the host's functions only that they exist.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>  // declares __assert_fail for the device
#include <cmath>
#include <cstddef>
#include <cstdint>

// Stops the kernel; the message goes to stderr and every later CUDA call of the process fails.
#define MIMO_REQUIRE(condition, message) ((condition) ? void(0) : __assert_fail(message, __FILE__, __LINE__, __func__))

namespace mimo {

struct OnDevice {
    explicit OnDevice(int device);
};
int multiprocessors(int device);
int fill_bytes(void* data, int value, size_t bytes, void* stream);
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments);

// The block's dynamic shared memory, as large as the launch asked for.
__device__ inline float* shared_memory() {
    extern __shared__ float4 mimo_shared_memory[];
    return reinterpret_cast<float*>(mimo_shared_memory);
}

__device__ inline uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ inline uint4 load16_constant(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
__device__ inline void store16(void* p, uint4 value) { *static_cast<uint4*>(p) = value; }
__device__ inline void store16_whole(void* p, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

// One instruction each, to about 2 units in the last place.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two 16-bit floats in a word, the lower address in the lower half.
__device__ inline float2 widen_half2(uint32_t word) { return __half22float2(*reinterpret_cast<__half2*>(&word)); }
__device__ inline uint32_t narrow_half2(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}
__device__ inline uint32_t narrow_bfloat2(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

}  // namespace mimo
