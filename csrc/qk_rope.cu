// RMSNorm and RoPE of queries and keys that lie anywhere: packed or in tensors of their own, fewer heads of keys than
// of queries; norm of each head, of all heads of a row together (Wan), or none; rotated pairs are neighbours or half a
// head apart; tables by three coordinates, by one position, or a row of its own for every row. Forward (also into cache
// pages) and backward, down to the tables.
//
// A block works on one operand: queries, keys or values are blockIdx.y = 0, 1, 2. A warp has a row of it, or some of
// the heads of a row; where all heads are normalised together (WIDE) a block has the row, reads it for the sum, and
// again from the cache next to it.
#include "qk_norm_rope.cuh"

namespace mimo::qk_rope {

constexpr int kMostWide = 12280;  // columns of a row whose sums fit into 48 KiB of shared memory, beside the block's

template <class T>
struct Operand {
    const T* in;  // rows of heads * head_dim values, `in_stride` apart
    int64_t in_stride;
    T* out;              // [rows, heads, head_dim]; null: not wanted
    T* cache;            // [slots, heads, head_dim]; null: none
    const void* weight;  // [head_dim], WIDE [heads, head_dim]; null: no norm
    int heads;
    bool rotates;
};
template <class T>
struct Operands {
    Operand<T> at[3];
};

struct Turns {
    const int* coords;   // [rows, axes]
    const float* table;  // [positions, head_dim / 2, 2] of cosine and sine; null: no rotation
    int axes;            // 3, 1, or 0: row i is at position i
    int positions, t_end, y_end;
    bool interleaved;  // pairs are neighbours; else half a head apart
};

// Channel i of the lane becomes x[i] cosine[i] + partner[i] sine[i].
__device__ inline void look_up(const Turns& turns, int64_t row, const Lane& lane, float (&cosine)[8],
                               float (&sine)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        cosine[i] = 1.f;
        sine[i] = 0.f;
    }
    if (turns.table == nullptr || !lane.active) return;
    int t = static_cast<int>(row), y = 0, x = 0;
    if (turns.axes == 1) t = turns.coords[row];
    if (turns.axes == 3) {
        t = turns.coords[row * 3];
        y = turns.coords[row * 3 + 1];
        x = turns.coords[row * 3 + 2];
    }
    const unsigned positions = turns.positions;  // a negative one is too large as well
    MIMO_REQUIRE(static_cast<unsigned>(t) < positions && static_cast<unsigned>(y) < positions &&
                     static_cast<unsigned>(x) < positions,
                 "qk_norm_rope: a position is negative or beyond the table; AxialRoPE.tables_on(device, max_position) "
                 "makes it longer");
    const int half = lane.lanes * 4;  // pairs
    const auto turn = [&](int pair) {
        const int at = pair < turns.t_end ? t : pair < turns.y_end ? y : x;
        return reinterpret_cast<const float2*>(turns.table)[static_cast<int64_t>(at) * half + pair];
    };
    if (turns.interleaved) {
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const float2 found = turn(lane.place * 4 + p);
            cosine[2 * p] = cosine[2 * p + 1] = found.x;
            sine[2 * p] = -found.y;
            sine[2 * p + 1] = found.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int channel = lane.place * 8 + i;
            const float2 found = turn(channel < half ? channel : channel - half);
            cosine[i] = found.x;
            sine[i] = channel < half ? -found.y : found.y;
        }
    }
}

// What the lane's channels turn with: their neighbours, or the channels half a head away, which other lanes of the team
// have: 4 channels further in theirs where the number of lanes is odd. For all lanes of the warp at once.
__device__ inline void partners(const float (&x)[8], bool interleaved, const Lane& lane, float (&partner)[8]) {
    if (interleaved) {
#pragma unroll
        for (int i = 0; i < 8; i++) partner[i] = x[i ^ 1];
        return;
    }
    const bool odd = lane.lanes % 2;
    const int first = threadIdx.x % kWarp - lane.place;
    const int low = first + (lane.place + lane.lanes / 2) % lane.lanes;
    const int high = first + (lane.place + (lane.lanes + 1) / 2) % lane.lanes;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        partner[i] = __shfl_sync(kAll, odd ? x[4 + i] : x[i], low % kWarp);
        partner[4 + i] = __shfl_sync(kAll, odd ? x[i] : x[4 + i], high % kWarp);
    }
}

// Sums over the block, in every thread; `shared` has kWarps * N floats.
template <int N>
__device__ inline void block_sums(float (&value)[N], float* shared) {
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < N; i++) {
        value[i] = warp_sum(value[i]);
        if (threadIdx.x % kWarp == 0) shared[warp * N + i] = value[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        value[i] = 0.f;
        for (int w = 0; w < kWarps; w++) value[i] += shared[w * N + i];
    }
    __syncthreads();
}

// Work items are (row, part): part i of `parts` has every parts-th group of heads. WIDE: the parts of a row are the
// warps of a block.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kWarps* kWarp, sizeof(T) == 4 ? 3 : 4)  // at most 168 or 128 registers
    qk_rope_fwd_kernel(Operands<T> operands, bool weight_float, Turns turns, const int64_t* cache_rows, int64_t slots,
                       int64_t rows, int head_dim, float eps, int parts) {
    const Operand<T>& operand = operands.at[blockIdx.y];
    const int heads = operand.heads;
    const bool normed = operand.weight != nullptr, rotates = operand.rotates && turns.table != nullptr;
    const Lane lane(head_dim);
    const int warp = threadIdx.x / kWarp;
    const int64_t row_size = static_cast<int64_t>(heads) * head_dim;
    const float inverse = 1.f / (WIDE ? row_size : head_dim);
    const int stride = lane.teams * parts;
    float weight[8];
    if (!WIDE && normed) load_weight<T>(operand.weight, weight_float, lane, weight);
    const int64_t items = WIDE ? rows : rows * parts;
    const int64_t step = WIDE ? gridDim.x : static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t item = WIDE ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kWarps + warp; item < items;
         item += step) {
        const int64_t row = WIDE ? item : item / parts;
        const int first = (WIDE ? warp : static_cast<int>(item - row * parts)) * lane.teams;
        const T* source = operand.in + row * operand.in_stride + lane.place * 8;
        float cosine[8], sine[8];
        if (rotates) look_up(turns, row, lane, cosine, sine);
        int64_t slot = -1;
        if (operand.cache != nullptr) {
            slot = cache_rows[row];
            MIMO_REQUIRE(slot >= 0 && slot < slots, "qk_norm_rope_cache: cache row out of range");
        }
        float scale = 1.f;
        if (WIDE && normed) {
            float squares[1] = {};
            for (int head = first + lane.team; lane.active && head < heads; head += stride) {
                float x[8];
                unpack8(load8(source + head * head_dim), x);
#pragma unroll
                for (int i = 0; i < 8; i++) squares[0] = fmaf(x[i], x[i], squares[0]);
            }
            block_sums(squares, shared_memory());
            scale = rsqrtf(fmaf(squares[0], inverse, eps));
        }
        for (int head0 = first; head0 < heads; head0 += stride * kForwardHeads) {
            Raw8<T> raw[kForwardHeads];
            float squares[kForwardHeads];
#pragma unroll
            for (int u = 0; u < kForwardHeads; u++) {
                const int head = head0 + u * stride + lane.team;
                raw[u] = lane.active && head < heads ? load8(source + head * head_dim) : zero8<T>();
            }
            if (!WIDE && normed) {
#pragma unroll
                for (int u = 0; u < kForwardHeads; u++) {
                    float x[8];
                    unpack8(raw[u], x);
                    squares[u] = 0.f;
#pragma unroll
                    for (int i = 0; i < 8; i++) squares[u] = fmaf(x[i], x[i], squares[u]);
                }
                team_sums(squares, lane);
            }
#pragma unroll
            for (int u = 0; u < kForwardHeads; u++) {
                const int head = head0 + u * stride + lane.team;
                const bool there = lane.active && head < heads;
                if (normed || rotates) {  // values pass as they are
                    float x[8];
                    unpack8(raw[u], x);
                    if (normed) {
                        if (WIDE && there) {
                            const int64_t begin =
                                static_cast<int64_t>(head) * head_dim * (weight_float ? 4 : sizeof(T));
                            load_weight<T>(static_cast<const char*>(operand.weight) + begin, weight_float, lane,
                                           weight);
                        }
                        const float factor = WIDE ? scale : rsqrtf(fmaf(squares[u], inverse, eps));
#pragma unroll
                        for (int i = 0; i < 8; i++) x[i] = there ? x[i] * (factor * weight[i]) : 0.f;
                    }
                    if (rotates) {
                        float partner[8];
                        partners(x, turns.interleaved, lane, partner);
#pragma unroll
                        for (int i = 0; i < 8; i++) x[i] = x[i] * cosine[i] + partner[i] * sine[i];
                    }
                    raw[u] = pack8<T>(x);
                }
                if (!there) continue;
                const int64_t at = static_cast<int64_t>(head) * head_dim + lane.place * 8;
                if (operand.out != nullptr) store8<kWhole>(operand.out + row * row_size + at, raw[u]);
                if (operand.cache != nullptr) store8<kWhole>(operand.cache + slot * row_size + at, raw[u]);
            }
        }
    }
}

template <class T>
struct Gradient {
    const T* in;  // as in the forward; null: the gradient passes as it is
    int64_t in_stride;
    const T* gradient;  // [rows, heads, head_dim]; null: zero
    T* out;             // rows of heads * head_dim values, `out_stride` apart
    int64_t out_stride;
    const void* weight;
    float* partial;  // [blocks, columns of weight]: sums of the weight's gradient
    float* turns;    // [parts, rows, head_dim / 2, 2]: sums of the table's; null: not wanted
    int heads;
};
template <class T>
struct Gradients {
    Gradient<T> at[3];
};

// The sums of a row's gradients of cosine and sine over the warp's heads: [head_dim / 2, 2] to `out`.
__device__ inline void store_turns(float* out, float (&cosine)[8], float (&sine)[8], bool interleaved,
                                   const Lane& lane) {
    float all[2][8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        all[0][i] = all[1][i] = 0.f;
        for (int team = 0; team < lane.teams; team++) {
            const int source = team * lane.lanes + lane.place;
            all[0][i] += __shfl_sync(kAll, cosine[i], source % kWarp);
            all[1][i] += __shfl_sync(kAll, sine[i], source % kWarp);
        }
    }
    float other[2][8];
    partners(all[0], interleaved, lane, other[0]);
    partners(all[1], interleaved, lane, other[1]);
    if (!lane.active || lane.team > 0) return;
    const int half = lane.lanes * 4;
#pragma unroll
    for (int quad = 0; quad < 2; quad++) {
        if (interleaved && quad) break;
        float sums[8];
#pragma unroll
        for (int p = 0; p < 4; p++) {  // a pair's first channel has -sine: what it collected counts the other way
            const int at = 4 * quad + p;
            sums[2 * p] = interleaved ? all[0][2 * p] + other[0][2 * p] : all[0][at] + other[0][at];
            sums[2 * p + 1] = interleaved ? other[1][2 * p] - all[1][2 * p] : other[1][at] - all[1][at];
        }
        const int pair = interleaved ? lane.place * 4 : lane.place * 8 + 4 * quad;
        if (pair < half) store8<kWhole>(out + pair * 2, pack8<float>(sums));
    }
}

// With n = x * s, s = 1 / sqrt(mean(x^2) + eps), and g the output's gradient turned back:
//     dx = s * (g * weight - n * mean(g * weight * n)),   dweight = sum of g * n over rows (and heads),
// the means over a head, or WIDE over the row; without norm dx = g. Of the tables: with y = weight * n before the
// rotation and h the output's gradient, dcosine = h y and dsine = h partner(y), the sign of sine's channel in front.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kWarps* kWarp, 3)  // at most 168 registers
    qk_rope_bwd_kernel(Gradients<T> operands, bool weight_float, Turns turns, int64_t rows, int head_dim, float eps) {
    const Gradient<T>& operand = operands.at[blockIdx.y];
    const int heads = operand.heads;
    const bool normed = operand.weight != nullptr, passes = operand.in == nullptr;
    const bool rotates = !passes && turns.table != nullptr;
    const Lane lane(head_dim);
    const int warp = threadIdx.x / kWarp;
    const int64_t row_size = static_cast<int64_t>(heads) * head_dim;
    const float inverse = 1.f / (WIDE ? row_size : head_dim);
    const int stride = WIDE ? lane.teams * kWarps : lane.teams, first = WIDE ? warp * lane.teams : 0;
    const int chunks = heads * lane.lanes;
    float* const sums_of_block = shared_memory();         // WIDE: [kWarps, 2]
    float* const columns = shared_memory() + kWarps * 2;  // WIDE: [8, chunks], each of one thread
    float weight[8], sum[8] = {};
    if (!WIDE && normed) load_weight<T>(operand.weight, weight_float, lane, weight);
    if (WIDE && normed) {
        for (int i = threadIdx.x; i < 8 * chunks; i += blockDim.x) columns[i] = 0.f;
        __syncthreads();
    }
    const auto weigh = [&](int head, bool there) {
        if (!WIDE || !there) return;
        const int64_t begin = static_cast<int64_t>(head) * head_dim * (weight_float ? 4 : sizeof(T));
        load_weight<T>(static_cast<const char*>(operand.weight) + begin, weight_float, lane, weight);
    };
    const int64_t step = WIDE ? gridDim.x : static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t row = WIDE ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < rows; row += step) {
        const T* const source = passes ? nullptr : operand.in + row * operand.in_stride + lane.place * 8;
        const T* const gradient =
            operand.gradient == nullptr ? nullptr : operand.gradient + row * row_size + lane.place * 8;
        float cosine[8], sine[8], cosine_sum[8] = {}, sine_sum[8] = {};
        if (rotates) look_up(turns, row, lane, cosine, sine);
        const auto turn_back = [&](float (&g)[8]) {
            if (!rotates) return;
            float partner[8];
            partners(g, turns.interleaved, lane, partner);
#pragma unroll
            for (int i = 0; i < 8; i++) g[i] = g[i] * cosine[i] - partner[i] * sine[i];
        };
        float scale = 1.f, projection = 0.f;
        if (WIDE && normed) {
            float sums[2] = {};  // of x^2, and of g * weight * x
            for (int head0 = first; head0 < heads; head0 += stride) {
                const int head = head0 + lane.team;
                const bool there = lane.active && head < heads;
                float x[8], g[8];
                unpack8(there ? load8(source + head * head_dim) : zero8<T>(), x);
                unpack8(there ? load8(gradient + head * head_dim) : zero8<T>(), g);
                turn_back(g);
                weigh(head, there);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    sums[0] = fmaf(x[i], x[i], sums[0]);
                    sums[1] = there ? fmaf(g[i] * weight[i], x[i], sums[1]) : sums[1];
                }
            }
            block_sums(sums, sums_of_block);
            scale = rsqrtf(fmaf(sums[0], inverse, eps));
            projection = sums[1] * scale * scale * inverse;
        }
        for (int head0 = first; head0 < heads; head0 += stride * kBackwardHeads) {
            Raw8<T> raw_x[kBackwardHeads], raw_g[kBackwardHeads];
            float sums[2 * kBackwardHeads];
#pragma unroll
            for (int u = 0; u < kBackwardHeads; u++) {
                const int head = head0 + u * stride + lane.team;
                const bool there = lane.active && head < heads;
                raw_x[u] = there && !passes ? load8(source + head * head_dim) : zero8<T>();
                raw_g[u] = there && gradient != nullptr ? load8(gradient + head * head_dim) : zero8<T>();
            }
            if (!WIDE && normed) {
#pragma unroll
                for (int u = 0; u < kBackwardHeads; u++) {
                    float x[8], g[8];
                    unpack8(raw_x[u], x);
                    unpack8(raw_g[u], g);
                    turn_back(g);
                    float squares = 0.f, along = 0.f;
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        squares = fmaf(x[i], x[i], squares);
                        along = fmaf(g[i] * weight[i], x[i], along);
                    }
                    sums[2 * u] = squares;
                    sums[2 * u + 1] = along;
                }
                team_sums(sums, lane);
            }
#pragma unroll
            for (int u = 0; u < kBackwardHeads; u++) {
                const int head = head0 + u * stride + lane.team;
                const bool there = lane.active && head < heads;
                if (!passes) {
                    float x[8], g[8];
                    unpack8(raw_x[u], x);
                    unpack8(raw_g[u], g);
                    if (normed) {
                        weigh(head, there);
                        if (!WIDE) {
                            scale = rsqrtf(fmaf(sums[2 * u], inverse, eps));
                            projection = sums[2 * u + 1] * scale * scale * inverse;
                        }
                    }
                    if (operand.turns != nullptr) {
                        float y[8], partner[8];
#pragma unroll
                        for (int i = 0; i < 8; i++) y[i] = there ? (normed ? x[i] * (scale * weight[i]) : x[i]) : 0.f;
                        partners(y, turns.interleaved, lane, partner);
#pragma unroll
                        for (int i = 0; i < 8; i++) {
                            cosine_sum[i] = fmaf(g[i], y[i], cosine_sum[i]);
                            sine_sum[i] = fmaf(g[i], partner[i], sine_sum[i]);
                        }
                    }
                    turn_back(g);
                    if (normed && there) {
#pragma unroll
                        for (int i = 0; i < 8; i++) {
                            const float part = g[i] * x[i] * scale;
                            if (WIDE)
                                columns[i * chunks + head * lane.lanes + lane.place] += part;
                            else
                                sum[i] += part;
                            g[i] = scale * (g[i] * weight[i] - x[i] * projection);
                        }
                    }
                    raw_g[u] = pack8<T>(g);
                }
                if (there)
                    store8<kWhole>(
                        operand.out + row * operand.out_stride + static_cast<int64_t>(head) * head_dim + lane.place * 8,
                        raw_g[u]);
            }
        }
        if (operand.turns != nullptr) {
            const int64_t part = WIDE ? blockIdx.y * kWarps + warp : blockIdx.y;
            store_turns(operand.turns + (part * rows + row) * head_dim, cosine_sum, sine_sum, turns.interleaved, lane);
        }
    }
    if (!normed) return;

    // Each column once, in a fixed order: WIDE it has one thread, else teams go into shared memory, [warps * teams,
    // head_dim], and are added one after the other.
    const int all_teams = kWarps * lane.teams, width = WIDE ? heads * head_dim : head_dim;
    if (!WIDE && lane.active) {
        float* const mine = shared_memory() + (warp * lane.teams + lane.team) * head_dim + lane.place * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) mine[i] = sum[i];
    }
    __syncthreads();
#pragma unroll 1
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        float total = 0.f;
        if (WIDE)
            total = columns[column % 8 * chunks + column / 8];
        else
            for (int team = 0; team < all_teams; team++) total += shared_memory()[team * head_dim + column];
        operand.partial[static_cast<int64_t>(blockIdx.x) * width + column] = total;
    }
}

// Queries, keys and values: rows of heads, kv_heads and kv_heads heads. Of values there is nothing but the copy: v may
// be null, and any of the outputs. q, k, v: [rows, heads or kv_heads, head_dim]; k_cache, v_cache [slots, kv_heads,
// head_dim]: k and v go to slot cache_rows[row]. q_weight, k_weight: [head_dim], or all heads' where the norm is
// `wide`; null for none. coords int [rows, axes], axes 3 or 1; 0: null, row i is at position i. table: float
// [positions, head_dim / 2, 2] of cos and sin, null for no rotation; pairs before t_end turn with the first coordinate,
// before y_end with the second, the others with the third.
int qk_rope_forward(void* q, void* k, void* v, void* k_cache, void* v_cache, const int64_t* cache_rows, int64_t slots,
                    Rows q_in, Rows k_in, Rows v_in, const void* q_weight, const void* k_weight, bool weight_float,
                    bool wide, const int* coords, int axes, const float* table, int positions, int t_end, int y_end,
                    bool interleaved, int64_t rows, int heads, int kv_heads, int head_dim, float eps, int dtype,
                    int device, void* stream) {
    if (unsupported(head_dim)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto operand = [](Rows in, void* out, void* cache, const void* weight, int heads, bool rotates) {
            return Operand<T>{static_cast<const T*>(in.data),
                              in.stride,
                              static_cast<T*>(out),
                              static_cast<T*>(cache),
                              weight,
                              heads,
                              rotates};
        };
        const Operands<T> operands{{operand(q_in, q, nullptr, q_weight, heads, true),
                                    operand(k_in, k, k_cache, k_weight, kv_heads, true),
                                    operand(v_in, v, v_cache, nullptr, kv_heads, false)}};
        const Turns turns{coords, table, axes, positions, t_end, y_end, interleaved};
        const bool values = v_in.data != nullptr && (v != nullptr || v_cache != nullptr);
        const int64_t resident = static_cast<int64_t>(multiprocessors(device)) * 32;  // warps
        const int teams = kWarp / (head_dim / 8);
        const auto start = [&](auto kernel, int parts, int64_t warps) {
            const int64_t blocks = (warps + kWarps - 1) / kWarps, most = resident * 4 / kWarps;
            return launch(kernel, dim3(blocks < most ? blocks : most, values ? 3 : 2), dim3(kWarps * kWarp),
                          sizeof(float) * kWarps, stream, operands, weight_float, turns, cache_rows, slots, rows,
                          head_dim, eps, parts);
        };
        if (wide) return start(qk_rope_fwd_kernel<T, true>, kWarps, rows * kWarps);
        // A warp takes a whole row where there are enough of them, else the heads of a row are shared between warps.
        const int steps = divide_up(heads, teams * kForwardHeads);
        const int parts = rows * 2 > resident || steps < 1 ? 1 : steps;
        return start(qk_rope_fwd_kernel<T, false>, parts, rows * parts);
    });
}
MIMO_LAUNCHER(qk_rope_forward, q, k, v, k_cache, v_cache, cache_rows, slots, q_in, k_in, v_in, q_weight, k_weight,
              weight_float, wide, coords, axes, table, positions, t_end, y_end, interleaved, rows, heads, kv_heads,
              head_dim, eps, dtype, device, stream)

// dq_in, dk_in, dv_in: rows like the inputs', in_stride apart; dv_in may be null (and dv: zero). q_partial, k_partial:
// float [blocks, columns of the weight]; the number of blocks fixes the order of the sums. turns: float [parts, rows,
// head_dim / 2, 2], parts 2, wide 8: gradients of cos and sin of the rows, to be added; null: not wanted.
int qk_rope_backward(void* dq_in, void* dk_in, void* dv_in, int64_t q_stride, int64_t k_stride, void* dq_weight,
                     void* dk_weight, float* q_partial, float* k_partial, float* turns, int blocks, const void* dq,
                     const void* dk, const void* dv, Rows q_in, Rows k_in, const void* q_weight, const void* k_weight,
                     bool weight_float, bool wide, const int* coords, int axes, const float* table, int positions,
                     int t_end, int y_end, bool interleaved, int64_t rows, int heads, int kv_heads, int head_dim,
                     float eps, int dtype, int device, void* stream) {
    const int widest = (heads > kv_heads ? heads : kv_heads) * head_dim;
    if (unsupported(head_dim) || (wide && widest > kMostWide)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto operand = [&](Rows in, const void* gradient, void* out, int64_t stride, const void* weight,
                                 float* partial, float* turns, int heads) {
            return Gradient<T>{static_cast<const T*>(in.data),
                               in.stride,
                               static_cast<const T*>(gradient),
                               static_cast<T*>(out),
                               stride,
                               weight,
                               partial,
                               turns,
                               heads};
        };
        const Gradients<T> operands{{operand(q_in, dq, dq_in, q_stride, q_weight, q_partial, turns, heads),
                                     operand(k_in, dk, dk_in, k_stride, k_weight, k_partial, turns, kv_heads),
                                     operand(Rows{}, dv, dv_in, k_stride, nullptr, nullptr, nullptr, kv_heads)}};
        const Turns rotation{coords, table, axes, positions, t_end, y_end, interleaved};
        const dim3 grid(blocks, dv_in != nullptr ? 3 : 2);
        const auto start = [&](auto kernel, int columns) {
            return launch(kernel, grid, dim3(kWarps * kWarp), sizeof(float) * columns, stream, operands, weight_float,
                          rotation, rows, head_dim, eps);
        };
        const int teams = kWarp / (head_dim / 8);
        const int status = wide ? start(qk_rope_bwd_kernel<T, true>, kWarps * 2 + widest)
                                : start(qk_rope_bwd_kernel<T, false>, kWarps * teams * head_dim);
        if (status || q_weight == nullptr) return status;
        const auto add = [&](void* out, const float* partial, int columns) {
            const SumOutputs sums{out, nullptr, nullptr};
            return weight_float ? column_sum<float>(sums, partial, nullptr, blocks, 1, 1, 1, columns, blocks, stream)
                                : column_sum<T>(sums, partial, nullptr, blocks, 1, 1, 1, columns, blocks, stream);
        };
        if (int failed = add(dq_weight, q_partial, wide ? heads * head_dim : head_dim)) return failed;
        return add(dk_weight, k_partial, wide ? kv_heads * head_dim : head_dim);
    });
}
MIMO_LAUNCHER(qk_rope_backward, dq_in, dk_in, dv_in, q_stride, k_stride, dq_weight, dk_weight, q_partial, k_partial,
              turns, blocks, dq, dk, dv, q_in, k_in, q_weight, k_weight, weight_float, wide, coords, axes, table,
              positions, t_end, y_end, interleaved, rows, heads, kv_heads, head_dim, eps, dtype, device, stream)

}  // namespace mimo::qk_rope
