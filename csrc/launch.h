// The one way to start a kernel, and the few things that differ between a GPU and the block emulator of the tests
// (MIMO_EMULATE), which runs the same sources on the CPU. Kernels use thread indices, shared_memory(), __syncthreads
// and warp shuffles, and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef MIMO_EMULATE
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>  // declares __assert_fail for the device

// Stops the kernel; the message goes to stderr and every later CUDA call of the process fails.
#define MIMO_REQUIRE(condition, message) ((condition) ? void(0) : __assert_fail(message, __FILE__, __LINE__, __func__))

namespace mimo {

// Makes `device` the current one while a function of ours runs.
class OnDevice {
public:
    explicit OnDevice(int device) {
        cudaGetDevice(&before_);
        if (before_ == device)
            before_ = -1;
        else
            cudaSetDevice(device);
    }
    ~OnDevice() {
        if (before_ >= 0) cudaSetDevice(before_);
    }

private:
    int before_ = -1;
};

inline int multiprocessors(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    // clang-format off: it knows no launches in a header
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
    // clang-format on
    return cudaGetLastError();
}

inline int fill_bytes(void* data, int value, size_t bytes, void* stream) {
    if (bytes == 0) return cudaSuccess;
    return cudaMemsetAsync(data, value, bytes, static_cast<cudaStream_t>(stream));
}

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
#endif
