// Weighted squared error as a single pass over prediction and target, and its gradient. The sum has a fixed order.
#include "common.cuh"

namespace mimo::losses {

constexpr int kThreads = 256;

// partial[block] = sum over the block's share. V: values per load, 8 or 1; a group is a whole number of loads.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) squared_error_kernel(float* partial, const T* prediction, const T* target,
                                                                 const float* weight, int64_t count, int64_t group) {
    float total = 0.f;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; i < count; i += stride) {
        float p[V], t[V], sum = 0.f;
        Values<T, V>::load(prediction + i).unpack(p);
        Values<T, V>::load(target + i).unpack(t);
#pragma unroll
        for (int k = 0; k < V; k++) sum = fmaf(p[k] - t[k], p[k] - t[k], sum);
        total = fmaf(weight[i / group], sum, total);
    }
    total = warp_sum(total);
    float* const shared = shared_memory();
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        total = 0.f;
        for (int i = 0; i < kThreads / kWarp; i++) total += shared[i];
        partial[blockIdx.x] = total;
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    squared_error_bwd_kernel(T* dprediction, const float* dloss, const T* prediction, const T* target,
                             const float* weight, int64_t count, int64_t group) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
    if (i >= count) return;
    const float scale = 2.f * dloss[0] * weight[i / group];
    float p[V], t[V];
    Values<T, V>::load(prediction + i).unpack(p);
    Values<T, V>::load(target + i).unpack(t);
#pragma unroll
    for (int k = 0; k < V; k++) p[k] = scale * (p[k] - t[k]);
    Values<T, V>::pack(p).store(dprediction + i);
}

bool in_vectors(const void* a, const void* b, const void* c, int64_t group) {
    const uintptr_t all =
        reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
    return all % 16 == 0 && group % 8 == 0;
}

// loss [1] = sum of weight[i / group] * (prediction[i] - target[i])^2 over i < count. Any alignment. partial: float
// [blocks].
int squared_error_forward(float* loss, float* partial, int blocks, const void* prediction, const void* target,
                          const float* weight, int64_t count, int64_t group, int dtype, int device, void* stream) {
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        auto kernel =
            in_vectors(prediction, target, nullptr, group) ? squared_error_kernel<T, 8> : squared_error_kernel<T, 1>;
        if (int status =
                launch(kernel, dim3(blocks), dim3(kThreads), sizeof(float) * kThreads / kWarp, stream, partial,
                       static_cast<const T*>(prediction), static_cast<const T*>(target), weight, count, group)) {
            return status;
        }
        return column_sum<float>(SumOutputs{loss, nullptr, nullptr}, partial, nullptr, blocks, 1, 1, 1, 1, blocks,
                                 stream);
    });
}
MIMO_LAUNCHER(squared_error_forward, loss, partial, blocks, prediction, target, weight, count, group, dtype, device,
              stream)

// dprediction[i] = 2 * dloss * weight[i / group] * (prediction[i] - target[i])
int squared_error_backward(void* dprediction, const float* dloss, const void* prediction, const void* target,
                           const float* weight, int64_t count, int64_t group, int dtype, int device, void* stream) {
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const bool vectors = in_vectors(prediction, target, dprediction, group);
        auto kernel = vectors ? squared_error_bwd_kernel<T, 8> : squared_error_bwd_kernel<T, 1>;
        return launch(kernel, dim3(divide_up(count, kThreads * (vectors ? 8 : 1))), dim3(kThreads), 0, stream,
                      static_cast<T*>(dprediction), dloss, static_cast<const T*>(prediction),
                      static_cast<const T*>(target), weight, count, group);
    });
}
MIMO_LAUNCHER(squared_error_backward, dprediction, dloss, prediction, target, weight, count, group, dtype, device,
              stream)

}  // namespace mimo::losses
