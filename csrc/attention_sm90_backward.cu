// The backward of attention on Hopper: what the kernels need per row, then dQ, then dK and dV. No sum depends on the
// order in which blocks of threads run.
#include "attention_sm90_launch.cuh"

namespace mimo {
namespace sm90 {

// rows [B, H, 2, clips, padded]: log2(e) lse, 0 for a row that sees no key, and delta = sum of dout out - dlse. A
// clip's rows begin at a multiple of 16 bytes; the places behind them are 0. grid: (tiles of places, heads, batch); a
// thread owns a place.
template <class T>
__global__ void __launch_bounds__(kWarpgroup)
    attention_sm90_statistics_kernel(float* rows, const T* out, const T* dout, int64_t dout_batch, int64_t dout_row,
                                     int64_t dout_head, const float* lse, const float* dlse, int clips, int length,
                                     int padded, int channels) {
    const int place = blockIdx.x * kWarpgroup + threadIdx.x, head = blockIdx.y, batch = blockIdx.z;
    if (place >= clips * padded) return;
    const int64_t line = int64_t{batch} * gridDim.y + head;
    float scaled = 0.f, delta = 0.f;
    if (place % padded < length) {
        const int row = place / padded * length + place % padded, tokens = clips * length;
        const T* const x = out + ((int64_t{batch} * tokens + row) * gridDim.y + head) * channels;
        const T* const y = dout + batch * dout_batch + row * dout_row + head * dout_head;
        for (int c = 0; c < channels; c += 8) {
            float a[8], b[8];
            unpack8(load8(x + c), a);
            unpack8(load8(y + c), b);
#pragma unroll
            for (int i = 0; i < 8; i++) delta = fmaf(a[i], b[i], delta);
        }
        const float value = lse[line * tokens + row];
        if (dlse != nullptr) delta -= dlse[line * tokens + row];
        scaled = value == -INFINITY ? 0.f : value * kLog2E;
    }
    float* const to = rows + line * 2 * clips * padded + place;
    to[0] = scaled;
    to[clips * padded] = delta;
}

}  // namespace sm90

// The gradients, contiguous; k and v, and dk and dv, have kv_heads heads, a divisor of heads. dlse: null for zero.
// rows: float [batch, heads, 2, repeats, length rounded up to 4]. The schedules have blocks of 64.
int attention_sm90_backward(void* dq, void* dk, void* dv, float* rows, const void* dout, const void* q, const void* k,
                            const void* v, const void* out, const float* lse, const float* dlse, const int* row_plan,
                            const int* key_plan, int64_t dout_batch, int64_t dout_row, int64_t dout_head,
                            int64_t q_batch, int64_t q_row, int64_t q_head, int64_t k_batch, int64_t k_row,
                            int64_t k_head, int64_t v_batch, int64_t v_row, int64_t v_head, int row_tiles,
                            int key_tiles, int groups, int band, int batch, int repeats, int length, int heads,
                            int kv_heads, int head_dim, float scale, int dtype, int device, void* stream) {
    using namespace sm90;
    constexpr int kBlock = 64;
    const Shape shape{row_tiles, groups, band, batch, repeats, length, heads, kv_heads, head_dim};
    if (!shape.served() || (dtype != 1 && dtype != 2)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    const int padded = round_up(length, 4), places = padded * repeats;
    const auto gather = [&](auto type) {
        using T = decltype(type);
        return launch(attention_sm90_statistics_kernel<T>, dim3(divide_up(places, kWarpgroup), heads, batch),
                      dim3(kWarpgroup), 0, stream, rows, static_cast<const T*>(out), static_cast<const T*>(dout),
                      dout_batch, dout_row, dout_head, lse, dlse, repeats, length, padded, head_dim);
    };
    if (int status = dtype == 1 ? gather(half_t{}) : gather(bfloat_t{})) return status;

    Problem problem = make_problem(shape, row_plan, scale);
    problem.rows = rows, problem.padded = padded;
    const Operand operands[4] = {{q, q_batch, q_row, q_head, heads},
                                 {dout, dout_batch, dout_row, dout_head, heads},
                                 {k, k_batch, k_row, k_head, kv_heads},
                                 {v, v_batch, v_row, v_head, kv_heads}};
    static_assert(kBlock == kRows, "either pass takes the same boxes");
    TensorMaps maps[4];
    for (int i = 0; i < 4; i++) {
        if (int status = make_maps(&maps[i], operands[i], shape, kRows)) return status;
    }
    problem.out[0] = dq;
    problem.own[0] = maps[0], problem.own[1] = maps[1], problem.streamed[0] = maps[2], problem.streamed[1] = maps[3];
    if (int status = start<kDq, kBlock>(problem, shape.channels(), dtype, device, stream)) return status;

    problem.plan = key_plan, problem.tiles = key_tiles, problem.heads = kv_heads;
    problem.out[0] = dk, problem.out[1] = dv;
    problem.own[0] = maps[2], problem.own[1] = maps[3], problem.streamed[0] = maps[0], problem.streamed[1] = maps[1];
    const uint64_t clip = uint64_t{4} * padded, line = clip * repeats;
    const TensorShape statistics{
        4,
        {static_cast<uint32_t>(length), static_cast<uint32_t>(repeats), 2, static_cast<uint32_t>(batch * heads)},
        {kBlock, 1, 2, 1},
        {clip, line, 2 * line},
        0};
    if (int status = make_tensor_map(&problem.statistics, rows, statistics)) return status;
    return start<kDkv, kBlock>(problem, shape.channels(), dtype, device, stream);
}
MIMO_LAUNCHER(attention_sm90_backward, dq, dk, dv, rows, dout, q, k, v, out, lse, dlse, row_plan, key_plan, dout_batch,
              dout_row, dout_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, row_tiles,
              key_tiles, groups, band, batch, repeats, length, heads, kv_heads, head_dim, scale, dtype, device, stream)

}  // namespace mimo
