// Per-head RMSNorm and axial 3D RoPE from the packed qkv projection, forward (also into cache pages) and backward: the
// variant of our own networks. Every other one is in qk_rope.cu.
//
// Rotated pairs stay inside a lane. A warp works on the heads of one row, so sines and cosines are looked up once per
// row.
#include "qk_norm_rope.cuh"

namespace mimo::qk_norm_rope {

constexpr int kCopies = 5;  // 8 columns each per lane: a row of 1152 at once

struct Rotation {
    const int* coords;   // [rows, 3]
    const float* table;  // [positions, head_dim / 2, 2], null for none
    int positions, t_end, y_end;
};

// Cosine and sine of the lane's four channel pairs at a row's position.
__device__ inline void look_up(const Rotation& rotation, int64_t row, const Lane& lane, float (&cosine)[4],
                               float (&sine)[4]) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        cosine[p] = 1.f;
        sine[p] = 0.f;
    }
    if (rotation.table == nullptr || !lane.active) return;
    const int* position = rotation.coords + row * 3;
    const int t = position[0], y = position[1], x = position[2];
    const unsigned positions = rotation.positions;  // a negative one is too large as well
    MIMO_REQUIRE(static_cast<unsigned>(t) < positions && static_cast<unsigned>(y) < positions &&
                     static_cast<unsigned>(x) < positions,
                 "qk_norm_rope: a position is negative or beyond the table; AxialRoPE.tables_on(device, max_position) "
                 "makes it longer");
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const int pair = lane.place * 4 + p;
        const int at = pair < rotation.t_end ? t : pair < rotation.y_end ? y : x;
        const float2 turn =
            reinterpret_cast<const float2*>(rotation.table)[static_cast<int64_t>(at) * (lane.lanes * 4) + pair];
        cosine[p] = turn.x;
        sine[p] = turn.y;
    }
}

template <class T>
struct Outputs {
    T *q, *k, *v, *k_cache, *v_cache;
    const int64_t* cache_rows;
    int64_t slots;
};

// Work items are (row, part): part i of `parts` has every parts-th group of heads. q and k heads of a row lie one after
// the other, v after them; v is copied where it is wanted.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 4)  // at most 128 registers
    qk_norm_rope_fwd_kernel(Outputs<T> out, const T* qkv, const void* q_weight, const void* k_weight, bool weight_float,
                            Rotation rotation, int64_t rows, int heads, int head_dim, float eps, int parts) {
    const Lane lane(head_dim);
    const float inverse_dim = 1.f / head_dim;
    float weight_q[8], weight_k[8];
    load_weight<T>(q_weight, weight_float, lane, weight_q);
    load_weight<T>(k_weight, weight_float, lane, weight_k);
    const int wanted = (out.v != nullptr || out.v_cache != nullptr ? 3 : 2) * heads;
    const int stride = lane.teams * parts;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; item < rows * parts;
         item += warps) {
        const int64_t row = item / parts;
        const int first = static_cast<int>(item - row * parts) * lane.teams;
        const T* source = qkv + row * 3 * heads * head_dim + lane.place * 8;
        float cosine[4], sine[4];
        look_up(rotation, row, lane, cosine, sine);
        int64_t slot = -1;
        if (out.cache_rows != nullptr) {
            slot = out.cache_rows[row];
            MIMO_REQUIRE(slot >= 0 && slot < out.slots, "qk_norm_rope_cache: cache row out of range");
        }
        for (int head0 = first; head0 < wanted; head0 += stride * kForwardHeads) {
            Raw8<T> raw[kForwardHeads];
            float squares[kForwardHeads];
#pragma unroll
            for (int u = 0; u < kForwardHeads; u++) {
                const int head = head0 + u * stride + lane.team;
                raw[u] = lane.active && head < wanted ? load8(source + head * head_dim) : zero8<T>();
            }
#pragma unroll
            for (int u = 0; u < kForwardHeads; u++) {
                float x[8];
                unpack8(raw[u], x);
                squares[u] = 0.f;
#pragma unroll
                for (int i = 0; i < 8; i++) squares[u] = fmaf(x[i], x[i], squares[u]);
            }
            team_sums(squares, lane);
#pragma unroll
            for (int u = 0; u < kForwardHeads; u++) {
                const int head = head0 + u * stride + lane.team;
                if (!lane.active || head >= wanted) continue;
                const int kind = head < heads ? 0 : head < 2 * heads ? 1 : 2;
                const int64_t at = static_cast<int64_t>(head - kind * heads) * head_dim + lane.place * 8;
                const int64_t row_size = static_cast<int64_t>(heads) * head_dim;
                if (kind < 2) {
                    const float scale = rsqrtf(fmaf(squares[u], inverse_dim, eps));
                    float x[8];
                    unpack8(raw[u], x);
#pragma unroll
                    for (int i = 0; i < 8; i++) x[i] *= scale * (kind == 0 ? weight_q[i] : weight_k[i]);
#pragma unroll
                    for (int p = 0; p < 4; p++) {
                        const float even = x[2 * p], odd = x[2 * p + 1];
                        x[2 * p] = even * cosine[p] - odd * sine[p];
                        x[2 * p + 1] = even * sine[p] + odd * cosine[p];
                    }
                    raw[u] = pack8<T>(x);
                }
                T* const plain = kind == 0 ? out.q : kind == 1 ? out.k : out.v;
                T* const cache = kind == 0 ? nullptr : kind == 1 ? out.k_cache : out.v_cache;
                if (plain != nullptr) store8(plain + row * row_size + at, raw[u]);
                if (cache != nullptr) store8(cache + slot * row_size + at, raw[u]);
            }
        }
    }
}

// With n = x * s, s = 1 / sqrt(mean(x^2) + eps), and g the output's gradient turned back:
//     dx = s * (g * weight - n * mean(g * weight * n)),   dweight = sum of g * n over rows and heads.
// dqkv's third part is dv, or zero.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 4)  // at most 128 registers
    qk_norm_rope_bwd_kernel(T* dqkv, float* partial, const T* dq, const T* dk, const T* dv, const T* qkv,
                            const void* q_weight, const void* k_weight, bool weight_float, Rotation rotation,
                            int64_t rows, int heads, int head_dim, float eps) {
    const Lane lane(head_dim);
    const float inverse_dim = 1.f / head_dim;
    float weight_q[8], weight_k[8], sum_q[8] = {}, sum_k[8] = {};
    load_weight<T>(q_weight, weight_float, lane, weight_q);
    load_weight<T>(k_weight, weight_float, lane, weight_k);
    const int64_t row_size = static_cast<int64_t>(heads) * head_dim;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < rows; row += warps) {
        const T* source = qkv + row * 3 * row_size;
        T* const target = dqkv + row * 3 * row_size;
        float cosine[4], sine[4];
        look_up(rotation, row, lane, cosine, sine);
        for (int head0 = 0; head0 < 2 * heads; head0 += lane.teams * kBackwardHeads) {
            Raw8<T> raw_x[kBackwardHeads], raw_g[kBackwardHeads];
            float sums[2 * kBackwardHeads];  // of x^2, and of g * weight * x
#pragma unroll
            for (int u = 0; u < kBackwardHeads; u++) {
                const int head = head0 + u * lane.teams + lane.team;
                const bool there = lane.active && head < 2 * heads;
                const int64_t at = static_cast<int64_t>(head) * head_dim + lane.place * 8;
                const T* gradient = head < heads ? dq + row * row_size : dk + (row - 1) * row_size;
                raw_x[u] = there ? load8(source + at) : zero8<T>();
                raw_g[u] = there ? load8(gradient + at) : zero8<T>();
            }
#pragma unroll
            for (int u = 0; u < kBackwardHeads; u++) {
                const bool is_q = head0 + u * lane.teams + lane.team < heads;
                float x[8], g[8];
                unpack8(raw_x[u], x);
                unpack8(raw_g[u], g);
                float squares = 0.f, along = 0.f;
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const float even = g[2 * p] * cosine[p] + g[2 * p + 1] * sine[p];
                    const float odd = g[2 * p + 1] * cosine[p] - g[2 * p] * sine[p];
                    g[2 * p] = even;
                    g[2 * p + 1] = odd;
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    squares = fmaf(x[i], x[i], squares);
                    along = fmaf(g[i] * (is_q ? weight_q[i] : weight_k[i]), x[i], along);
                }
                sums[2 * u] = squares;
                sums[2 * u + 1] = along;
            }
            team_sums(sums, lane);
#pragma unroll
            for (int u = 0; u < kBackwardHeads; u++) {
                const int head = head0 + u * lane.teams + lane.team;
                if (!lane.active || head >= 2 * heads) continue;
                const bool is_q = head < heads;
                const float scale = rsqrtf(fmaf(sums[2 * u], inverse_dim, eps));
                const float projection = sums[2 * u + 1] * scale * scale * inverse_dim;
                float x[8], g[8];
                unpack8(raw_x[u], x);
                unpack8(raw_g[u], g);
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const float even = g[2 * p] * cosine[p] + g[2 * p + 1] * sine[p];
                    const float odd = g[2 * p + 1] * cosine[p] - g[2 * p] * sine[p];
                    g[2 * p] = even;
                    g[2 * p + 1] = odd;
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float part = g[i] * x[i] * scale;
                    sum_q[i] += is_q ? part : 0.f;
                    sum_k[i] += is_q ? 0.f : part;
                    x[i] = scale * (g[i] * (is_q ? weight_q[i] : weight_k[i]) - x[i] * projection);
                }
                store8<kWhole>(target + static_cast<int64_t>(head) * head_dim + lane.place * 8, pack8<T>(x));
            }
        }
        for (int first = threadIdx.x % kWarp * 8; first < row_size; first += kWarp * 8 * kCopies) {
            Raw8<T> raw[kCopies];
#pragma unroll
            for (int u = 0; u < kCopies; u++) {
                const int column = first + u * kWarp * 8;
                raw[u] = dv != nullptr && column < row_size ? load8(dv + row * row_size + column) : zero8<T>();
            }
#pragma unroll
            for (int u = 0; u < kCopies; u++) {
                const int column = first + u * kWarp * 8;
                if (column < row_size) store8<kWhole>(target + 2 * row_size + column, raw[u]);
            }
        }
    }

    // Teams first into shared memory, [warps * teams, 2, head_dim], then added one after the other.
    float* const shared = shared_memory();
    const int all_teams = kWarps * lane.teams;
    if (lane.active) {
        float* const mine = shared + (threadIdx.x / kWarp * lane.teams + lane.team) * 2 * head_dim + lane.place * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            mine[i] = sum_q[i];
            mine[head_dim + i] = sum_k[i];
        }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < 2 * head_dim; column += blockDim.x) {
        float sum = 0.f;
        for (int team = 0; team < all_teams; team++) sum += shared[team * 2 * head_dim + column];
        partial[static_cast<int64_t>(blockIdx.x) * 2 * head_dim + column] = sum;
    }
}

// q, k, v (v may be null): [rows, heads, head_dim]; qkv [rows, 3, heads, head_dim]; coords int [rows, 3]; table float
// [positions, head_dim / 2, 2] of cos and sin, null for no rotation; pairs before t_end turn with t, before y_end with
// y, the others with x. k_cache, v_cache [slots, heads, head_dim]: k and v go to slot cache_rows[row] as well.
int qk_norm_rope_forward(void* q, void* k, void* v, void* k_cache, void* v_cache, const int64_t* cache_rows,
                         int64_t slots, const void* qkv, const void* q_weight, const void* k_weight, bool weight_float,
                         const int* coords, const float* table, int positions, int t_end, int y_end, int64_t rows,
                         int heads, int head_dim, float eps, int dtype, int device, void* stream) {
    if (unsupported(head_dim)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const Outputs<T> out{static_cast<T*>(q),
                             static_cast<T*>(k),
                             static_cast<T*>(v),
                             static_cast<T*>(k_cache),
                             static_cast<T*>(v_cache),
                             cache_rows,
                             slots};
        const Rotation rotation{coords, table, positions, t_end, y_end};
        // A warp takes a whole row where there are enough of them, else the heads of a row are shared between warps.
        const int teams = kWarp / (head_dim / 8);
        const int64_t resident = static_cast<int64_t>(multiprocessors(device)) * 32;  // warps
        const int steps = divide_up(3 * heads, teams * kForwardHeads);
        const int parts = rows * 2 > resident ? 1 : steps;
        const int64_t blocks = (rows * parts + kWarps - 1) / kWarps, most = resident * 4 / kWarps;
        return launch(qk_norm_rope_fwd_kernel<T>, dim3(blocks < most ? blocks : most), dim3(kWarps * kWarp), 0, stream,
                      out, static_cast<const T*>(qkv), q_weight, k_weight, weight_float, rotation, rows, heads,
                      head_dim, eps, parts);
    });
}
MIMO_LAUNCHER(qk_norm_rope_forward, q, k, v, k_cache, v_cache, cache_rows, slots, qkv, q_weight, k_weight, weight_float,
              coords, table, positions, t_end, y_end, rows, heads, head_dim, eps, dtype, device, stream)

// dv may be null: zero. partial: float [blocks, 2, head_dim]; the number of blocks fixes the order of the sums.
int qk_norm_rope_backward(void* dqkv, void* dq_weight, void* dk_weight, float* partial, int blocks, const void* dq,
                          const void* dk, const void* dv, const void* qkv, const void* q_weight, const void* k_weight,
                          bool weight_float, const int* coords, const float* table, int positions, int t_end, int y_end,
                          int64_t rows, int heads, int head_dim, float eps, int dtype, int device, void* stream) {
    if (unsupported(head_dim)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const Rotation rotation{coords, table, positions, t_end, y_end};
        const size_t shared = sizeof(float) * kWarps * (kWarp / (head_dim / 8)) * 2 * head_dim;
        if (int status = launch(qk_norm_rope_bwd_kernel<T>, dim3(blocks), dim3(kWarps * kWarp), shared, stream,
                                static_cast<T*>(dqkv), partial, static_cast<const T*>(dq), static_cast<const T*>(dk),
                                static_cast<const T*>(dv), static_cast<const T*>(qkv), q_weight, k_weight, weight_float,
                                rotation, rows, heads, head_dim, eps)) {
            return status;
        }
        const SumOutputs out{dq_weight, dk_weight, nullptr};
        return weight_float ? column_sum<float>(out, partial, nullptr, blocks, 1, 1, 2, head_dim, blocks, stream)
                            : column_sum<T>(out, partial, nullptr, blocks, 1, 1, 2, head_dim, blocks, stream);
    });
}
MIMO_LAUNCHER(qk_norm_rope_backward, dqkv, dq_weight, dk_weight, partial, blocks, dq, dk, dv, qkv, q_weight, k_weight,
              weight_float, coords, table, positions, t_end, y_end, rows, heads, head_dim, eps, dtype, device, stream)

}  // namespace mimo::qk_norm_rope
