// AdaLN and separate LayerNorm over packed rows in one pass, with or without the gated residual in front; forward and
// backward.
//
// Forward: a warp per row, the row in registers (wider than 2048: a block per row).
// Backward: a block per chunk of rows of one group. A thread owns 8 columns, so the sums over rows stay in its
// registers; they leave once per chunk, and column_sum adds the chunks of a group in order.
#include "common.cuh"

namespace mimo::modulate {

struct Modulation {
    Rows scale, shift, gate;
    const void *weight, *bias;
    bool modulation_float, affine_float;
};

constexpr int kForwardWarps = 4;
constexpr int kNarrow = 2048;  // widest row that one warp holds

// Sum over the warp, or over the block when the row is spread over it.
template <bool WIDE>
__device__ inline float row_sum(float value, float* shared) {
    value = warp_sum(value);
    if constexpr (WIDE) {
        const int warps = blockDim.x / kWarp;
        if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
        __syncthreads();
        value = 0.f;
        for (int i = 0; i < warps; i++) value += shared[i];
        __syncthreads();
    }
    return value;
}

// Whether the vector j of a thread lies inside the row. When compiling that is known of all but the last ones of a warp
// (see with_vectors).
template <int N, bool WIDE>
__device__ inline bool inside_row(int j, int column, int dim) {
    return (!WIDE && j < (N <= 6 ? N - 1 : 6)) || column < dim;
}

// value += gate * branch; a null gate is 1.
template <bool WIDE, class T, class G, int N>
__device__ inline void add_branch(float (&value)[N][8], const Raw8<T> (&branch)[N], const G* gate, int thread,
                                  int threads, int dim) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int column = (j * threads + thread) * 8;
        if (!inside_row<N, WIDE>(j, column, dim)) continue;
        float factor[8] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f}, b[8];
        if (gate != nullptr) unpack8(load8<kConstant>(gate + column), factor);
        unpack8(branch[j], b);
#pragma unroll
        for (int i = 0; i < 8; i++) value[j][i] = fmaf(factor[i], b[i], value[j][i]);
    }
}

// y = value * rstd * (one + factor) + offset; a null factor or offset is zero.
template <bool WIDE, class T, class P, int N>
__device__ inline void store_modulated(T* y, const float (&value)[N][8], float rstd, const P* factor, const P* offset,
                                       float one, int thread, int threads, int dim) {
    constexpr int BATCH = sizeof(P) == 2 ? 2 : 1;  // loads in flight together, as far as there are registers
    const float rstd_one = rstd * one;
#pragma unroll
    for (int first = 0; first < N; first += BATCH) {
        Raw8<P> raw_factor[BATCH], raw_offset[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH && first + b < N; b++) {
            const int column = ((first + b) * threads + thread) * 8;
            const bool inside = inside_row<N, WIDE>(first + b, column, dim);
            raw_factor[b] = factor != nullptr && inside ? load8<kConstant>(factor + column) : zero8<P>();
            raw_offset[b] = offset != nullptr && inside ? load8<kConstant>(offset + column) : zero8<P>();
        }
#pragma unroll
        for (int b = 0; b < BATCH && first + b < N; b++) {
            const int column = ((first + b) * threads + thread) * 8;
            float f[8], o[8];
            unpack8(raw_factor[b], f);
            unpack8(raw_offset[b], o);
#pragma unroll
            for (int i = 0; i < 8; i++) o[i] = fmaf(value[first + b][i], fmaf(f[i], rstd, rstd_one), o[i]);
            if (inside_row<N, WIDE>(first + b, column, dim)) store8(y + column, pack8<T>(o));
        }
    }
}

// Calls function(P{}) with the type of a parameter. Outside the loop over columns, so that the loads inside can
// overlap.
template <class T, class Function>
__device__ inline void with_parameter_type(bool is_float, Function function) {
    if constexpr (sizeof(T) == 4) {
        function(float{});
    } else {
        if (is_float)
            function(float{});
        else
            function(T{});
    }
}

// Blocks a multiprocessor is to hold: it bounds the registers, which otherwise go into loading everything at once.
template <class T, int N, bool WIDE, bool GATED>
constexpr int forward_blocks() {
    if (WIDE) return 1;
    if (sizeof(T) == 4) return N <= 4 ? 4 : N <= 6 ? 3 : 2;
    return N <= 5 ? (GATED ? 4 : 5) : N == 6 ? 4 : 3;
}

template <class T, int N, bool WIDE, bool GATED>
__global__ void __launch_bounds__(WIDE ? 256 : kForwardWarps * kWarp, forward_blocks<T, N, WIDE, GATED>())
    modulate_fwd_kernel(T* x_new, T* y, float* mean_out, float* rstd_out, const T* x, const T* branch, Modulation m,
                        const int* row_group, int64_t rows, int dim, float eps, int rows_per_block) {
    // N vectors of 8 columns per thread, `threads` apart
    const int threads = WIDE ? blockDim.x : kWarp;
    const int thread = threadIdx.x % threads;
    const int step = blockDim.x / threads;
    const float inverse_dim = 1.f / dim;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_per_block;
    const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
    for (int64_t row = begin + threadIdx.x / threads; row < end; row += step) {
        Raw8<T> raw[N], raw_branch[GATED ? N : 1];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int column = (j * threads + thread) * 8;
            raw[j] = inside_row<N, WIDE>(j, column, dim) ? load8(x + row * dim + column) : zero8<T>();
        }
        if constexpr (GATED) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                const int column = (j * threads + thread) * 8;
                raw_branch[j] = inside_row<N, WIDE>(j, column, dim) ? load8(branch + row * dim + column) : zero8<T>();
            }
        }
        const int group = row_group[row];
        const bool history = group < 0;

        float value[N][8];
#pragma unroll
        for (int j = 0; j < N; j++) unpack8(raw[j], value[j]);
        if constexpr (GATED) {
            with_parameter_type<T>(m.modulation_float, [&](auto type) {
                using G = decltype(type);
                const G* gate = history ? nullptr : static_cast<const G*>(m.gate.data) + group * m.gate.stride;
                add_branch<WIDE>(value, raw_branch, gate, thread, threads, dim);
            });
#pragma unroll
            for (int j = 0; j < N; j++) {
                const int column = (j * threads + thread) * 8;
                // The backward sees x_new as stored, so the statistics are of the stored values.
                raw[j] = pack8<T>(value[j]);
                unpack8(raw[j], value[j]);
                if (inside_row<N, WIDE>(j, column, dim)) store8(x_new + row * dim + column, raw[j]);
            }
        }

        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum += value[j][i];
        }
        const float mean = row_sum<WIDE>(sum, shared_memory()) * inverse_dim;
        float squares = 0.f;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const bool inside = inside_row<N, WIDE>(j, (j * threads + thread) * 8, dim);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                value[j][i] = inside ? value[j][i] - mean : 0.f;
                squares = fmaf(value[j][i], value[j][i], squares);
            }
        }
        const float rstd = rsqrtf(fmaf(row_sum<WIDE>(squares, shared_memory()), inverse_dim, eps));
        if (thread == 0) {
            mean_out[row] = mean;
            rstd_out[row] = rstd;
        }
        with_parameter_type<T>(history ? m.affine_float : m.modulation_float, [&](auto type) {
            using P = decltype(type);
            const P* factor =
                static_cast<const P*>(history ? m.weight : m.scale.data) + (history ? 0 : group * m.scale.stride);
            const P* offset =
                static_cast<const P*>(history ? m.bias : m.shift.data) + (history ? 0 : group * m.shift.stride);
            store_modulated<WIDE, T, P>(y + row * dim, value, rstd, factor, offset, history && factor ? 0.f : 1.f,
                                        thread, threads, dim);
        });
    }
}

// ---- backward ----

constexpr int kBackwardThreads = 256;

template <class T>
__device__ inline void load_parameter8(const void* base, int64_t offset, bool is_float, float (&v)[8]) {
    with_parameter_type<T>(is_float, [&](auto type) {
        using P = decltype(type);
        unpack8(load8(static_cast<const P*>(base) + offset), v);
    });
}

// Totals over the block of N values per thread, in every thread. shared [2, warps, N] alternates between its halves, so
// that one barrier per call is enough.
template <int N>
__device__ inline void block_sums(float (&values)[N], float* shared, int& half) {
    const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    float* const place = shared + half * warps * N;
    half ^= 1;
    const float total = warp_sums(values);
    if (lane % (kWarp / N) == 0) place[threadIdx.x / kWarp * N + lane / (kWarp / N)] = total;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = 0.f;
    for (int w = 0; w < warps; w++) {
#pragma unroll
        for (int i = 0; i < N; i++) values[i] += place[w * N + i];
    }
}

// With h = (x - mean) * rstd and w = dy * factor:   dx = rstd * (w - mean(w) - h * mean(w * h)) + dx_new,   dbranch =
// gate * dx, and over the rows   dscale = sum dy * h,   dshift = sum dy,   dgate = sum dx * branch. N vectors of 8
// columns per thread, ROWS rows at a time. With more than one vector, the second half reads the row again (it is in the
// L1 or L2 cache) rather than keep it in registers.
template <class T, int N, int ROWS, bool GATED>
__global__ void __launch_bounds__(kBackwardThreads)
    modulate_bwd_kernel(T* dx, T* dbranch, float* partial, const T* dy, const T* dx_new, const T* x,
                        const float* mean_in, const float* rstd_in, const T* branch, Modulation m, const int* chunks,
                        int dim) {
    constexpr bool KEEP = N == 1;
    const int begin = chunks[3 * blockIdx.x], end = chunks[3 * blockIdx.x + 1], group = chunks[3 * blockIdx.x + 2];
    const bool history = group < 0;
    const float inverse_dim = 1.f / dim;
    float sum_scale[N][8] = {}, sum_shift[N][8] = {}, sum_gate[GATED ? N : 1][8] = {};

    const auto factor_of = [&](int column, float (&factor)[8]) {
        if (history && m.weight == nullptr) {
#pragma unroll
            for (int i = 0; i < 8; i++) factor[i] = 1.f;
            return;
        }
        load_parameter8<T>(history ? m.weight : m.scale.data, (history ? 0 : group * m.scale.stride) + column,
                           history ? m.affine_float : m.modulation_float, factor);
#pragma unroll
        for (int i = 0; i < 8; i++) factor[i] += history ? 0.f : 1.f;
    };
    const auto gate_of = [&](int column, float (&gate)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) gate[i] = 1.f;
        if (!history) load_parameter8<T>(m.gate.data, group * m.gate.stride + column, m.modulation_float, gate);
    };
    float kept_factor[8] = {}, kept_gate[8] = {};
    if (KEEP && static_cast<int>(threadIdx.x) * 8 < dim) {
        factor_of(threadIdx.x * 8, kept_factor);
        if constexpr (GATED) gate_of(threadIdx.x * 8, kept_gate);
    }

    int half = 0;
    for (int row0 = begin; row0 < end; row0 += ROWS) {
        float mean[ROWS], rstd[ROWS], sums[2 * ROWS] = {};  // sum of w, sum of w * h, of each row
        Raw8<T> raw_x[ROWS], raw_dy[ROWS], raw_new[GATED ? ROWS : 1], raw_branch[GATED ? ROWS : 1];
        const auto load = [&](int r, int column) {
            const bool inside = row0 + r < end && column < dim;
            const int64_t at = static_cast<int64_t>(row0 + r) * dim + column;
            raw_x[r] = inside ? load8(x + at) : zero8<T>();
            raw_dy[r] = inside ? load8(dy + at) : zero8<T>();
        };
        const auto load_gated = [&](int r, int column) {
            const bool inside = row0 + r < end && column < dim;
            const int64_t at = static_cast<int64_t>(row0 + r) * dim + column;
            raw_new[r] = inside && dx_new != nullptr ? load8(dx_new + at) : zero8<T>();
            raw_branch[r] = inside ? load8(branch + at) : zero8<T>();
        };
        if constexpr (KEEP) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                load(r, threadIdx.x * 8);
                if constexpr (GATED) load_gated(r, threadIdx.x * 8);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            mean[r] = row0 + r < end ? mean_in[row0 + r] : 0.f;
            rstd[r] = row0 + r < end ? rstd_in[row0 + r] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int column = (j * static_cast<int>(blockDim.x) + threadIdx.x) * 8;
            float factor[8] = {};
            if (!KEEP && column < dim) factor_of(column, factor);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float vx[8], vdy[8];
                if constexpr (!KEEP) load(r, column);
                unpack8(raw_x[r], vx);
                unpack8(raw_dy[r], vdy);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float h = (vx[i] - mean[r]) * rstd[r];
                    const float w = vdy[i] * (KEEP ? kept_factor[i] : factor[i]);
                    sums[2 * r] += w;
                    sums[2 * r + 1] = fmaf(w, h, sums[2 * r + 1]);
                    sum_scale[j][i] = fmaf(vdy[i], h, sum_scale[j][i]);
                    sum_shift[j][i] += vdy[i];
                }
            }
        }
        block_sums(sums, shared_memory(), half);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int column = (j * static_cast<int>(blockDim.x) + threadIdx.x) * 8;
            if (column >= dim) continue;
            float factor[8], gate[8];
            if constexpr (!KEEP) {
                factor_of(column, factor);
                if constexpr (GATED) gate_of(column, gate);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (row0 + r >= end) continue;
                const int64_t at = static_cast<int64_t>(row0 + r) * dim + column;
                if constexpr (!KEEP) {
                    load(r, column);
                    if constexpr (GATED) load_gated(r, column);
                }
                float vx[8], vdy[8], d[8];
                unpack8(raw_x[r], vx);
                unpack8(raw_dy[r], vdy);
                if constexpr (GATED) unpack8(raw_new[r], d);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float h = (vx[i] - mean[r]) * rstd[r];
                    const float w = vdy[i] * (KEEP ? kept_factor[i] : factor[i]);
                    const float through = rstd[r] * (w - (sums[2 * r] + h * sums[2 * r + 1]) * inverse_dim);
                    d[i] = GATED ? d[i] + through : through;
                }
                store8(dx + at, pack8<T>(d));
                if constexpr (GATED) {
                    float b[8];
                    unpack8(raw_branch[r], b);
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        sum_gate[j][i] = fmaf(d[i], b[i], sum_gate[j][i]);
                        d[i] *= KEEP ? kept_gate[i] : gate[i];
                    }
                    store8(dbranch + at, pack8<T>(d));
                }
            }
        }
    }

    constexpr int SUMS = GATED ? 3 : 2;
    float* const out = partial + static_cast<int64_t>(blockIdx.x) * SUMS * dim;
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int column = (j * static_cast<int>(blockDim.x) + threadIdx.x) * 8;
        if (column >= dim) continue;
        store8(out + column, pack8<float>(sum_scale[j]));
        store8(out + dim + column, pack8<float>(sum_shift[j]));
        if constexpr (GATED) store8(out + 2 * dim + column, pack8<float>(sum_gate[j]));
    }
}

// Calls function with the vectors per lane of a row that one warp holds; widths in between leave some lanes idle in the
// last vector.
template <class Function>
int with_vectors(int vectors, Function function) {
    switch (divide_up(vectors, kWarp)) {
        case 1:
            return function(std::integral_constant<int, 1>{});
        case 2:
            return function(std::integral_constant<int, 2>{});
        case 3:
            return function(std::integral_constant<int, 3>{});
        case 4:
            return function(std::integral_constant<int, 4>{});
        case 5:
            return function(std::integral_constant<int, 5>{});
        case 6:
            return function(std::integral_constant<int, 6>{});
        default:
            return function(std::integral_constant<int, 8>{});
    }
}

bool unsupported(int dim) { return dim < 8 || dim > 8192 || dim % 8; }

// x_new = x + gate * branch where branch is there, y = LN(x_new) * (1 + scale) + shift, or LN * weight + bias for rows
// of group -1. *_float: those operands are float and not of type
// dtype.
int modulate_forward(void* x_new, void* y, float* mean, float* rstd, const void* x, const void* branch, Rows scale,
                     Rows shift, Rows gate, bool modulation_float, const void* weight, const void* bias,
                     bool affine_float, const int* row, int64_t rows, int dim, float eps, int dtype, int device,
                     void* stream) {
    if (unsupported(dim)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    const Modulation m{scale, shift, gate, weight, bias, modulation_float, affine_float};
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto start = [&](auto kernel, int threads, int rows_per_block, size_t shared) {
            return launch(kernel, dim3(divide_up(rows, rows_per_block)), dim3(threads), shared, stream,
                          static_cast<T*>(x_new), static_cast<T*>(y), mean, rstd, static_cast<const T*>(x),
                          static_cast<const T*>(branch), m, row, rows, dim, eps, rows_per_block);
        };
        if (dim > kNarrow) {
            const int threads = round_up(divide_up(dim / 8, 4), kWarp);
            const auto kernel = branch ? modulate_fwd_kernel<T, 4, true, true> : modulate_fwd_kernel<T, 4, true, false>;
            return start(kernel, threads, 1, sizeof(float) * (threads / kWarp));
        }
        // Neighbouring rows share their modulation, which then comes from the L1 cache; with few rows it matters more
        // to use every multiprocessor.
        const int64_t waves = rows / (static_cast<int64_t>(multiprocessors(device)) * kForwardWarps * 16);
        const int rows_per_block = kForwardWarps * (waves >= 4 ? 4 : waves >= 2 ? 2 : 1);
        return with_vectors(dim / 8, [&](auto vectors) {
            constexpr int N = decltype(vectors)::value;
            const auto kernel =
                branch ? modulate_fwd_kernel<T, N, false, true> : modulate_fwd_kernel<T, N, false, false>;
            return start(kernel, kForwardWarps * kWarp, rows_per_block, 0);
        });
    });
}
MIMO_LAUNCHER(modulate_forward, x_new, y, mean, rstd, x, branch, scale, shift, gate, modulation_float, weight, bias,
              affine_float, row, rows, dim, eps, dtype, device, stream)

// chunks [size, 3]: first row, end row, group; ascending in the group. first [groups + 2]: where history's and each
// group's chunks begin. partial: float [chunks, 2 or if gated 3, dim]. If gated, x is x_new, and dx_new is its
// own gradient or null.
int modulate_backward(void* dx, void* dbranch, void* dscale, void* dshift, void* dgate, void* dweight, void* dbias,
                      float* partial, const void* dy, const void* dx_new, const void* x, const float* mean,
                      const float* rstd, const void* branch, Rows scale, Rows gate, bool modulation_float, bool gated,
                      const void* weight, bool affine_float, List chunks, List first, int modulation_rows, int dim,
                      int dtype, int device, void* stream) {
    if (unsupported(dim)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    const Modulation m{scale, Rows{}, gate, weight, nullptr, modulation_float, affine_float};
    const int num_chunks = static_cast<int>(chunks.size), groups = static_cast<int>(first.size) - 2;
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int ROWS = 2;
        const bool narrow = dim <= kBackwardThreads * 8;
        const auto start = [&](auto kernel, int rows) {
            const int threads = narrow ? round_up(dim / 8, kWarp) : kBackwardThreads;
            const size_t shared = sizeof(float) * 2 * (threads / kWarp) * 2 * rows;
            return launch(kernel, dim3(num_chunks), dim3(threads), shared, stream, static_cast<T*>(dx),
                          static_cast<T*>(dbranch), partial, static_cast<const T*>(dy), static_cast<const T*>(dx_new),
                          static_cast<const T*>(x), mean, rstd, static_cast<const T*>(branch), m, chunks.data, dim);
        };
        const int status =
            narrow ? start(gated ? modulate_bwd_kernel<T, 1, ROWS, true> : modulate_bwd_kernel<T, 1, ROWS, false>, ROWS)
                   : start(gated ? modulate_bwd_kernel<T, 4, 1, true> : modulate_bwd_kernel<T, 4, 1, false>, 1);
        if (status) return status;
        const int sums = gated ? 3 : 2;
        const auto sum = [&](bool is_float, SumOutputs out, const int* list, int lists, int out_lists, int typical) {
            return is_float
                       ? column_sum<float>(out, partial, list, num_chunks, lists, out_lists, sums, dim, typical, stream)
                       : column_sum<T>(out, partial, list, num_chunks, lists, out_lists, sums, dim, typical, stream);
        };
        const int typical = num_chunks / (groups > 0 ? groups : 1);
        if (int failed = sum(modulation_float, SumOutputs{dscale, dshift, dgate}, first.data + 1, groups,
                             modulation_rows, typical)) {
            return failed;
        }
        if (dweight == nullptr && dbias == nullptr) return 0;
        return sum(affine_float, SumOutputs{dweight, dbias, nullptr}, first.data, 1, 1, num_chunks);
    });
}
MIMO_LAUNCHER(modulate_backward, dx, dbranch, dscale, dshift, dgate, dweight, dbias, partial, dy, dx_new, x, mean, rstd,
              branch, scale, gate, modulation_float, gated, weight, affine_float, chunks, first, modulation_rows, dim,
              dtype, device, stream)

}  // namespace mimo::modulate
