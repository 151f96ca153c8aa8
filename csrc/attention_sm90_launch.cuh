// Tensors as the kernels of attention_sm90.cuh are told of them.
#pragma once

#include "attention_sm90.cuh"
#include "launcher.h"

namespace mimo::sm90 {

// A tensor [batch, rows, heads, channels] of 16-bit values; strides in values.
struct Operand {
    const void* data;
    int64_t batch, row, head;
    int heads;
};

struct Shape {
    int tiles, groups, band, batch, repeats, length, heads, kv_heads, head_dim;

    int sequences() const { return batch * repeats; }
    int channels() const { return head_dim == 72 ? 80 : head_dim; }
    bool served() const {
        const bool one = batch == 1 || repeats == 1;
        return one && length > 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0 &&
               (head_dim == 64 || head_dim == 72 || head_dim == 80 || head_dim == 128);
    }
};

inline int make_maps(TensorMaps* maps, const Operand& x, const Shape& shape, int rows) {
    const auto bytes = [](int64_t values) { return static_cast<uint64_t>(2 * values); };
    TensorShape box{2,
                    {static_cast<uint32_t>(shape.head_dim), static_cast<uint32_t>(x.heads),
                     static_cast<uint32_t>(shape.length), static_cast<uint32_t>(shape.sequences())},
                    {64, 1, static_cast<uint32_t>(rows), 1},
                    {bytes(x.head), bytes(x.row), bytes(shape.batch > 1 ? x.batch : x.row * shape.length)},
                    128};
    if (int status = make_tensor_map(&maps->wide, x.data, box)) return status;
    box.box[0] = 16;
    box.swizzle = 32;
    return make_tensor_map(&maps->rest, x.data, box);
}

inline Problem make_problem(const Shape& shape, const int* plan, float scale) {
    Problem problem{};
    problem.plan = plan;
    problem.tiles = shape.tiles, problem.groups = shape.groups, problem.heads = shape.heads;
    problem.heads_per_kv = shape.heads / shape.kv_heads, problem.channels = shape.head_dim;
    problem.sequences = shape.sequences(), problem.repeats = shape.repeats, problem.length = shape.length;
    problem.band = shape.band;
    problem.scale = scale, problem.scale_log2 = scale * kLog2E;
    return problem;
}

template <Pass PASS, class T, int CHANNELS, int BLOCK>
int start(const Problem& problem, int device, void* stream) {
    const int64_t items = int64_t{problem.tiles} * problem.sequences * problem.heads;
    const int sharing = PASS == kDkv ? problem.heads_per_kv : 1;
    if (items * sharing > INT32_MAX) return 1;  // cudaErrorInvalidValue
    const int blocks = multiprocessors(device);
    return launch_wide(attention_sm90_kernel<PASS, T, CHANNELS, BLOCK>, dim3(items < blocks ? items : blocks),
                       dim3(kThreads), Layout<PASS, CHANNELS, BLOCK>::BYTES, stream, problem);
}

template <Pass PASS, int BLOCK>
int start(const Problem& problem, int channels, int dtype, int device, void* stream) {
    const auto start_with = [&](auto type) {
        using T = decltype(type);
        if (channels == 64) return start<PASS, T, 64, BLOCK>(problem, device, stream);
        if (channels == 80) return start<PASS, T, 80, BLOCK>(problem, device, stream);
        return start<PASS, T, 128, BLOCK>(problem, device, stream);
    };
    return dtype == 1 ? start_with(half_t{}) : dtype == 2 ? start_with(bfloat_t{}) : 1;
}

}  // namespace mimo::sm90
