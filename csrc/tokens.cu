// Masked-token gather and scatter: rows are copied as they are, whatever their type, in the widest words that fit.
#include "common.cuh"

namespace mimo::tokens {

constexpr int kThreads = 256;
constexpr int kWords = 4;  // per thread, all loaded before the first is stored
constexpr int kRows = 4;   // likewise, in the sum

struct Lookup {
    const void* data;
    bool wide;  // int64
    __device__ int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int*>(data)[i];
    }
};

// y[r] = x[source[r]]; with holes, a row whose source is negative becomes `fill` or zero.
template <class Word, bool HOLES>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(Word* y, const Word* x, Lookup source, const Word* fill,
                                                             int64_t out_rows, int64_t in_rows, uint32_t row_words) {
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kWords);
    const int64_t row0 = begin / row_words;
    const uint32_t offset0 = static_cast<uint32_t>(begin - row0 * row_words) + threadIdx.x;
    int64_t to[kWords], source_row[kWords];
    uint32_t column[kWords];
#pragma unroll
    for (int k = 0; k < kWords; k++) {
        const uint32_t offset = offset0 + k * kThreads;
        const uint32_t skipped = offset / row_words;
        column[k] = offset - skipped * row_words;
        const int64_t row = row0 + skipped;
        to[k] = row < out_rows ? row * row_words + column[k] : -1;
        source_row[k] = source[row < out_rows ? row : out_rows - 1];
    }
    bool valid = true;
#pragma unroll
    for (int k = 0; k < kWords; k++) valid = valid && (HOLES || source_row[k] >= 0) && source_row[k] < in_rows;
    MIMO_REQUIRE(valid, "gather_tokens, scatter_tokens: index out of range");
    Word word[kWords];
#pragma unroll
    for (int k = 0; k < kWords; k++) {
        word[k] = Word{};
        const bool hole = HOLES && source_row[k] < 0;
        const Word* from = hole ? fill + column[k] : x + source_row[k] * row_words + column[k];
        if (!hole || fill != nullptr) word[k] = *from;
    }
#pragma unroll
    for (int k = 0; k < kWords; k++) {
        if (to[k] >= 0) y[to[k]] = word[k];
    }
}

__global__ void __launch_bounds__(kThreads) invert_kernel(int* inverse, Lookup index, int64_t kept, int64_t rows) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= kept) return;
    const int64_t row = index[i];
    MIMO_REQUIRE(row >= 0 && row < rows, "gather_tokens, scatter_tokens: index out of range");
    inverse[row] = static_cast<int>(i);
}

// partial[block, c] = sum of dy over the holes among the block's rows. V: columns per thread
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    hole_sum_kernel(float* partial, const T* dy, const int* inverse, int64_t rows, int dim, int rows_per_block) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (column >= dim) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_per_block;
    const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
    float total[V] = {};
    for (int64_t row0 = begin; row0 < end; row0 += kRows) {
        Values<T, V> raw[kRows];
#pragma unroll
        for (int k = 0; k < kRows; k++) {
            const int64_t row = row0 + k;
            const bool wanted = row < end && inverse[row] < 0;
            raw[k] = wanted ? Values<T, V>::load(dy + row * dim + column) : Values<T, V>::zero();
        }
#pragma unroll
        for (int k = 0; k < kRows; k++) {
            float value[V];
            raw[k].unpack(value);
#pragma unroll
            for (int i = 0; i < V; i++) total[i] += value[i];
        }
    }
#pragma unroll
    for (int i = 0; i < V; i++) partial[static_cast<int64_t>(blockIdx.x) * dim + column + i] = total[i];
}

template <class Word>
int copy_rows(void* y, const void* x, Lookup source, bool holes, const void* fill, int64_t out_rows, int64_t in_rows,
              int64_t row_bytes, void* stream) {
    const int64_t row_words = row_bytes / sizeof(Word);
    const int64_t blocks = (out_rows * row_words + kThreads * kWords - 1) / (kThreads * kWords);
    if (blocks > INT32_MAX || row_words > INT32_MAX) return 1;  // cudaErrorInvalidValue
    auto kernel = holes ? copy_rows_kernel<Word, true> : copy_rows_kernel<Word, false>;
    return launch(kernel, dim3(blocks), dim3(kThreads), 0, stream, static_cast<Word*>(y), static_cast<const Word*>(x),
                  source, static_cast<const Word*>(fill), out_rows, in_rows, static_cast<uint32_t>(row_words));
}

int copy_rows(void* y, const void* x, Lookup source, bool holes, const void* fill, int64_t out_rows, int64_t in_rows,
              int64_t row_bytes, void* stream) {
    if (row_bytes == 0) return 0;
    const uint64_t all =
        reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(fill) | row_bytes;
    if (all % 16 == 0) return copy_rows<uint4>(y, x, source, holes, fill, out_rows, in_rows, row_bytes, stream);
    if (all % 4 == 0) return copy_rows<uint32_t>(y, x, source, holes, fill, out_rows, in_rows, row_bytes, stream);
    if (all % 2 == 0) return copy_rows<uint16_t>(y, x, source, holes, fill, out_rows, in_rows, row_bytes, stream);
    return copy_rows<uint8_t>(y, x, source, holes, fill, out_rows, in_rows, row_bytes, stream);
}

// y[i] = x[index[i]]. Any alignment. index: int32, or int64 with wide_index.
int gather_rows(void* y, const void* x, const void* index, bool wide_index, int64_t kept, int64_t rows,
                int64_t row_bytes, int device, void* stream) {
    OnDevice guard(device);
    return copy_rows(y, x, Lookup{index, wide_index}, false, nullptr, kept, rows, row_bytes, stream);
}
MIMO_LAUNCHER(gather_rows, y, x, index, wide_index, kept, rows, row_bytes, device, stream)

// y[index[i]] = x[i], the other rows are `fill` or zero; inverse [rows] tells which row of x went where, -1 for none.
// Any alignment.
int scatter_rows(void* y, int* inverse, const void* x, const void* index, bool wide_index, const void* fill,
                 int64_t kept, int64_t rows, int64_t row_bytes, int device, void* stream) {
    OnDevice guard(device);
    if (int status = fill_bytes(inverse, 0xff, rows * sizeof(int), stream)) return status;
    const dim3 grid(divide_up(kept, kThreads));
    if (int status =
            launch(invert_kernel, grid, dim3(kThreads), 0, stream, inverse, Lookup{index, wide_index}, kept, rows))
        return status;
    return copy_rows(y, x, Lookup{inverse, false}, true, fill, rows, kept, row_bytes, stream);
}
MIMO_LAUNCHER(scatter_rows, y, inverse, x, index, wide_index, fill, kept, rows, row_bytes, device, stream)

// total [dim] = sum of dy over the rows where inverse is negative. partial: float [ceil(rows / rows_per_block), dim].
int hole_sum(void* total, float* partial, const void* dy, const int* inverse, int64_t rows, int dim, int rows_per_block,
             int dtype, int device, void* stream) {
    OnDevice guard(device);
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const int vector = dim % 8 == 0 ? 8 : 1;
        const int columns = dim / vector;
        const int threads = columns < kThreads ? round_up(columns, kWarp) : kThreads;
        const int blocks = divide_up(rows, rows_per_block);
        auto kernel = vector == 8 ? hole_sum_kernel<T, 8> : hole_sum_kernel<T, 1>;
        const dim3 grid(blocks, divide_up(columns, threads > 0 ? threads : 1));
        if (int status = launch(kernel, grid, dim3(threads), 0, stream, partial, static_cast<const T*>(dy), inverse,
                                rows, dim, rows_per_block)) {
            return status;
        }
        return column_sum<T>(SumOutputs{total, nullptr, nullptr}, partial, nullptr, blocks, 1, 1, 1, dim, blocks,
                             stream);
    });
}
MIMO_LAUNCHER(hole_sum, total, partial, dy, inverse, rows, dim, rows_per_block, dtype, device, stream)

}  // namespace mimo::tokens
