// Bias and GELU in one pass, forward and backward. The backward computes the activation again instead of having it
// saved, and sums the bias gradient on the way: a block owns a chunk of rows, a thread 8 of its columns.
#include "common.cuh"

namespace mimo::gelu {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // loaded before the first is used

// gelu(x) = x * s with s = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3): 0.5 * x * (1 + tanh(u)), written
// differently
constexpr float kCubic = 0.044715f;
constexpr float kTwoU = 1.5957691216057308f;      // 2 sqrt(2 / pi)
constexpr float kExponent = -2.302208198144325f;  // -2 sqrt(2 / pi) / log(2)

__device__ inline float gate(float x, float square) {
    return fast_reciprocal(1.f + fast_exp2(kExponent * x * fmaf(kCubic, square, 1.f)));
}
__device__ inline float gelu(float x) { return x * gate(x, x * x); }
__device__ inline float gelu_slope(float x) {
    const float square = x * x, s = gate(x, square);
    return fmaf(x * (s - s * s), kTwoU * fmaf(3.f * kCubic, square, 1.f), s);
}

template <class T>
__device__ inline void load_bias(const void* bias, bool is_float, int column, float (&value)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) value[i] = 0.f;
    if (bias == nullptr) return;
    if (is_float)
        unpack8(load8(static_cast<const float*>(bias) + column), value);
    else
        unpack8(load8(static_cast<const T*>(bias) + column), value);
}

// out = gelu(x + bias), or with BACKWARD dy * gelu'(x + bias) and its sum over the block's rows.
template <class T, bool BACKWARD>
__global__ void __launch_bounds__(kThreads)
    bias_gelu_kernel(T* out, float* partial, const T* dy, const T* x, const void* bias, bool bias_float, int64_t rows,
                     int dim, int rows_per_block) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (column >= dim) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_per_block;
    const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
    float b[8], total[8] = {};
    load_bias<T>(bias, bias_float, column, b);
    for (int64_t row0 = begin; row0 < end; row0 += kRows) {
        Raw8<T> raw_x[kRows], raw_dy[BACKWARD ? kRows : 1];
#pragma unroll
        for (int k = 0; k < kRows; k++) {
            const bool inside = row0 + k < end;
            raw_x[k] = inside ? load8(x + (row0 + k) * dim + column) : zero8<T>();
            if constexpr (BACKWARD) raw_dy[k] = inside ? load8(dy + (row0 + k) * dim + column) : zero8<T>();
        }
#pragma unroll
        for (int k = 0; k < kRows; k++) {
            if (row0 + k >= end) continue;
            float value[8];
            unpack8(raw_x[k], value);
            if constexpr (BACKWARD) {
                float g[8];
                unpack8(raw_dy[k], g);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    value[i] = g[i] * gelu_slope(value[i] + b[i]);
                    total[i] += value[i];
                }
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) value[i] = gelu(value[i] + b[i]);
            }
            store8(out + (row0 + k) * dim + column, pack8<T>(value));
        }
    }
    if (BACKWARD && partial != nullptr)
        store8(partial + static_cast<int64_t>(blockIdx.x) * dim + column, pack8<float>(total));
}

// The columns of a row over blocks of nearly equal size.
dim3 threads_for(int dim) {
    const int vectors = dim / 8, blocks = divide_up(vectors, kThreads);
    return dim3(round_up(divide_up(vectors, blocks), kWarp));
}

// y = gelu(x + bias), the tanh form; rows of dim values, dim a multiple of 8. bias may be null.
int bias_gelu_forward(void* y, const void* x, const void* bias, bool bias_float, int64_t rows, int dim, int dtype,
                      int device, void* stream) {
    if (dim < 8 || dim % 8) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const dim3 block = threads_for(dim);
        const dim3 grid(divide_up(rows, kRows), divide_up(dim / 8, block.x));
        return launch(bias_gelu_kernel<T, false>, grid, block, 0, stream, static_cast<T*>(y), nullptr, nullptr,
                      static_cast<const T*>(x), bias, bias_float, rows, dim, kRows);
    });
}
MIMO_LAUNCHER(bias_gelu_forward, y, x, bias, bias_float, rows, dim, dtype, device, stream)

// dx = dy * gelu'(x + bias), dbias = sum of dx over the rows (null where there is no bias). partial: float [ceil(rows /
// rows_per_block), dim].
int bias_gelu_backward(void* dx, void* dbias, float* partial, const void* dy, const void* x, const void* bias,
                       bool bias_float, int64_t rows, int dim, int rows_per_block, int dtype, int device,
                       void* stream) {
    if (dim < 8 || dim % 8) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const dim3 block = threads_for(dim);
        const int parts = divide_up(rows, rows_per_block);
        const dim3 grid(parts, divide_up(dim / 8, block.x));
        if (int status = launch(bias_gelu_kernel<T, true>, grid, block, 0, stream, static_cast<T*>(dx),
                                dbias ? partial : nullptr, static_cast<const T*>(dy), static_cast<const T*>(x), bias,
                                bias_float, rows, dim, rows_per_block)) {
            return status;
        }
        if (dbias == nullptr) return 0;
        const SumOutputs out{dbias, nullptr, nullptr};
        return bias_float ? column_sum<float>(out, partial, nullptr, parts, 1, 1, 1, dim, parts, stream)
                          : column_sum<T>(out, partial, nullptr, parts, 1, 1, 1, dim, parts, stream);
    });
}
MIMO_LAUNCHER(bias_gelu_backward, dx, dbias, partial, dy, x, bias, bias_float, rows, dim, rows_per_block, dtype, device,
              stream)

}  // namespace mimo::gelu
