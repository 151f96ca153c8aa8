// Loads and stores of 8 consecutive values, sums across a warp, and the second pass of every deterministic sum over
// rows.
#pragma once

#include "launch.h"
#include "launcher.h"

namespace mimo {

struct half_t {
    uint16_t bits;
};
struct bfloat_t {
    uint16_t bits;
};

// The value formats, numbered as in mimo_kernels/core/launch.py. 1 is cudaErrorInvalidValue.
template <class Function>
int with_dtype(int dtype, Function function) {
    switch (dtype) {
        case 0:
            return function(float{});
        case 1:
            return function(half_t{});
        case 2:
            return function(bfloat_t{});
    }
    return 1;
}

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

inline __host__ __device__ int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline __host__ __device__ int round_up(int64_t a, int64_t b) { return divide_up(a, b) * static_cast<int>(b); }

// ---- 8 consecutive values, as stored: 16 bytes, float 32 ----

template <class T>
struct Raw8 {
    uint4 part[sizeof(T) / 2];
};

constexpr bool kConstant = true;  // what no one writes while the kernel runs: such loads may pass stores
constexpr bool kWhole = true;     // to global memory, where nvcc would make four instructions of a store

template <bool CONSTANT = false, class T>
__device__ inline Raw8<T> load8(const T* p) {
    const uint4* const parts = reinterpret_cast<const uint4*>(p);
    Raw8<T> raw;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); i++)
        raw.part[i] = CONSTANT ? load16_constant(parts + i) : load16(parts + i);
    return raw;
}

template <bool WHOLE = false, class T>
__device__ inline void store8(T* p, const Raw8<T>& raw) {
    uint4* const parts = reinterpret_cast<uint4*>(p);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); i++) {
        if constexpr (WHOLE)
            store16_whole(parts + i, raw.part[i]);
        else
            store16(parts + i, raw.part[i]);
    }
}

template <class T>
__device__ inline Raw8<T> zero8() {
    Raw8<T> raw;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); i++) raw.part[i] = uint4{0, 0, 0, 0};
    return raw;
}

__device__ inline void unpack8(const Raw8<float>& raw, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        v[4 * i] = __uint_as_float(raw.part[i].x);
        v[4 * i + 1] = __uint_as_float(raw.part[i].y);
        v[4 * i + 2] = __uint_as_float(raw.part[i].z);
        v[4 * i + 3] = __uint_as_float(raw.part[i].w);
    }
}

__device__ inline float2 widen(uint32_t word, half_t) { return widen_half2(word); }
__device__ inline float2 widen(uint32_t word, bfloat_t) {
    return float2{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ inline uint32_t narrow(float low, float high, half_t) { return narrow_half2(low, high); }
__device__ inline uint32_t narrow(float low, float high, bfloat_t) { return narrow_bfloat2(low, high); }

template <class T>
__device__ inline void unpack8(const Raw8<T>& raw, float (&v)[8]) {
    const uint32_t word[4] = {raw.part[0].x, raw.part[0].y, raw.part[0].z, raw.part[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = widen(word[i], T{});
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
    }
}

template <class T>
__device__ inline Raw8<T> pack8(const float (&v)[8]) {
    Raw8<T> raw;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            raw.part[i] = uint4{__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]), __float_as_uint(v[4 * i + 2]),
                                __float_as_uint(v[4 * i + 3])};
        }
    } else {
        raw.part[0] =
            uint4{narrow(v[0], v[1], T{}), narrow(v[2], v[3], T{}), narrow(v[4], v[5], T{}), narrow(v[6], v[7], T{})};
    }
    return raw;
}

// ---- single values ----

__device__ inline float to_float(float value) { return value; }
template <class T>
__device__ inline float to_float(T value) {
    return widen(value.bits, T{}).x;
}
template <class T>
__device__ inline T from_float(float value) {
    if constexpr (sizeof(T) == 4)
        return value;
    else
        return T{static_cast<uint16_t>(narrow(value, 0.f, T{}))};
}

// V = 8 or 1 neighbouring values, as stored.
template <class T, int V>
struct Values {
    Raw8<T> raw;
    __device__ static Values load(const T* p) { return {load8(p)}; }
    __device__ static Values zero() { return {zero8<T>()}; }
    __device__ static Values pack(const float (&v)[8]) { return {pack8<T>(v)}; }
    __device__ void unpack(float (&v)[8]) const { unpack8(raw, v); }
    __device__ void store(T* p) const { store8(p, raw); }
};
template <class T>
struct Values<T, 1> {
    T raw;
    __device__ static Values load(const T* p) { return {*p}; }
    __device__ static Values zero() { return {T{}}; }
    __device__ static Values pack(const float (&v)[1]) { return {from_float<T>(v[0])}; }
    __device__ void unpack(float (&v)[1]) const { v[0] = to_float(raw); }
    __device__ void store(T* p) const { *p = raw; }
};

// ---- sums ----

__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
    return value;
}

// N sums over the warp with about N + log2(32 / N) shuffles instead of 5 N: each step hands half of the values to the
// other half of the lanes. Lane l gets the total of values[l / (32 / N)].
template <int N>
__device__ inline float warp_sums(float (&values)[N]) {
    const int lane = threadIdx.x % kWarp;
    int offset = kWarp / 2;
#pragma unroll
    for (int n = N / 2; n; n /= 2, offset /= 2) {
        const bool upper = lane & offset;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float kept = upper ? values[i + n] : values[i];
            values[i] = kept + __shfl_xor_sync(kAll, upper ? values[i] : values[i + n], offset);
        }
    }
#pragma unroll
    for (; offset; offset /= 2) values[0] += __shfl_xor_sync(kAll, values[0], offset);
    return values[0];
}

// Second pass of a sum over rows: out[s][list, c] = sum of partial[i, s, c] over the parts i of the list, always in the
// same order.
struct SumOutputs {
    void *s0, *s1, *s2;  // a null one is not wanted
};

// COLUMNS per thread, a warp's width apart: few lists need many blocks to be done soon, many lists wide loads.
template <class T, int COLUMNS>
__global__ void column_sum_kernel(SumOutputs out, const float* partial, const int* first, int parts, int lists,
                                  int sums, int dim) {
    // grid: (lists, column tiles, sums); block: (32, lanes that share a list)
    const int list = blockIdx.x, s = blockIdx.z;
    T* const result = static_cast<T*>(s == 0 ? out.s0 : s == 1 ? out.s1 : out.s2);
    if (result == nullptr) return;
    const int begin = list >= lists ? 0 : first ? first[list] : 0;
    const int end = list >= lists ? 0 : first ? first[list + 1] : parts;
    const int column = blockIdx.y * (kWarp * COLUMNS) + threadIdx.x;
    float total[COLUMNS] = {};
    constexpr int LOADS = 16 / COLUMNS;  // of each column, under way at once
    for (int i0 = begin + static_cast<int>(threadIdx.y); i0 < end; i0 += blockDim.y * LOADS) {
        float value[LOADS][COLUMNS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            const int i = i0 + u * static_cast<int>(blockDim.y);
            const float* row = partial + (static_cast<int64_t>(i) * sums + s) * dim;
#pragma unroll
            for (int k = 0; k < COLUMNS; k++)
                value[u][k] = i < end && column + k * kWarp < dim ? row[column + k * kWarp] : 0.f;
        }
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
#pragma unroll
            for (int k = 0; k < COLUMNS; k++) total[k] += value[u][k];
        }
    }
    float* shared = shared_memory();  // [lanes, COLUMNS, 32]
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) shared[(threadIdx.y * COLUMNS + k) * kWarp + threadIdx.x] = total[k];
    __syncthreads();
    // Each lane finishes some of the columns, so that long lists end quickly too.
    for (int k = threadIdx.y; k < COLUMNS; k += blockDim.y) {
        float sum = 0.f;
        for (int lane = 0; lane < static_cast<int>(blockDim.y); lane++) {
            sum += shared[(lane * COLUMNS + k) * kWarp + threadIdx.x];
        }
        if (column + k * kWarp < dim)
            result[static_cast<int64_t>(list) * dim + column + k * kWarp] = from_float<T>(sum);
    }
}

// first: where the parts of a list begin, [lists + 1]; null for one list of all `parts`. out_lists >= lists; the rest
// become zero. typical: parts in a list, about; decides how many threads share it.
template <class T>
int column_sum(SumOutputs out, const float* partial, const int* first, int parts, int lists, int out_lists, int sums,
               int dim, int typical, void* stream) {
    const int lanes = typical > 64 ? 16 : typical > 8 ? 8 : 4;
    const auto start = [&](auto kernel, int columns) {
        const dim3 grid(out_lists, divide_up(dim, kWarp * columns), sums), block(kWarp, lanes);
        return launch(kernel, grid, block, sizeof(float) * kWarp * columns * lanes, stream, out, partial, first, parts,
                      lists, sums, dim);
    };
    return out_lists == 1 ? start(column_sum_kernel<T, 1>, 1) : start(column_sum_kernel<T, 4>, 4);
}

}  // namespace mimo
