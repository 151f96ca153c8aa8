// Products of a warpgroup as attention on Hopper needs them: a chunk of 64 rows times the rows of a tile, what follows
// from that times the tile, and sums on their way to memory. Channels are those of whole tiles of 64 (128-byte rows)
// and one of 16 (32-byte rows).
#pragma once

#include "sm90.cuh"

namespace mimo::sm90 {

constexpr int kRows = 64;  // of a chunk: what a product of a warpgroup has

#ifdef MIMO_SM90

__device__ inline int lane_id() { return threadIdx.x % kWarp; }

// A chunk's rows as the left side of products: fragments [16 channels] or a tile.
template <int CHANNELS, bool IN_REGISTERS>
struct Own {
    uint32_t x[CHANNELS / 16][4];
    __device__ void load(uint32_t tile) {
        const int lane = lane_id(), row = threadIdx.x % kWarpgroup / kWarp * 16 + lane % 16, half = lane / 16;
#pragma unroll
        for (int k = 0; k < CHANNELS / 16; k++) {
            const bool wide = k < CHANNELS / 64 * 4;
            load_matrices(x[k], tile + k / 4 * kRows * 128 +
                                    (wide ? swizzled<128>(row, k % 4 * 2 + half) : swizzled<32>(row, half)));
        }
    }
    __device__ const uint32_t* operator[](int k) const { return x[k]; }
};
template <int CHANNELS>
struct Own<CHANNELS, false> {
    uint32_t tile;
    __device__ void load(uint32_t at) { tile = at; }
    __device__ uint64_t operator[](int k) const {
        const bool in_wide = k < CHANNELS / 64 * 4;
        return in_wide ? advanced(tile_descriptor<128>(tile), k / 4 * kRows * 128 + k % 4 * 32)
                       : tile_descriptor<32>(tile + k / 4 * kRows * 128);
    }
};

// s [64, BLOCK] = own [64, CHANNELS] times the rows of a tile
template <class T, int CHANNELS, int BLOCK, bool IN_REGISTERS>
__device__ inline void multiply(float (&s)[BLOCK / 2], const Own<CHANNELS, IN_REGISTERS>& own, uint32_t tile) {
    constexpr int WIDE = CHANNELS / 64;
    const uint64_t wide = tile_descriptor<128>(tile);
#pragma unroll
    for (int k = 0; k < WIDE * 4; k++)
        product<T, BLOCK, 0>(s, own[k], advanced(wide, k / 4 * BLOCK * 128 + k % 4 * 32), k > 0);
    if constexpr (CHANNELS % 64)
        product<T, BLOCK, 0>(s, own[WIDE * 4], tile_descriptor<32>(tile + WIDE * BLOCK * 128), true);
}

template <int CHANNELS>
struct Sums {
    float wide[CHANNELS / 64 * 32], rest[8];
    __device__ void clear() {
#pragma unroll
        for (float& x : wide) x = 0.f;
#pragma unroll
        for (float& x : rest) x = 0.f;
    }
    // Rows of a warp's lower and upper half of 16.
    __device__ void scale(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < CHANNELS / 64 * 32; i++) wide[i] *= factor[i / 2 % 2];
        if constexpr (CHANNELS % 64) {
#pragma unroll
            for (int i = 0; i < 8; i++) rest[i] *= factor[i / 2 % 2];
        }
    }
    __device__ void pinned() {
        pin(wide);
        if constexpr (CHANNELS % 64) pin(rest);
    }
    __device__ float operator()(int i) const { return i < CHANNELS / 64 * 32 ? wide[i] : rest[i % 8]; }
};

// sums [64, CHANNELS] += p [64, BLOCK] times a tile [BLOCK, CHANNELS]
template <class T, int CHANNELS, int BLOCK>
__device__ inline void add_product(Sums<CHANNELS>& sums, const uint32_t (&p)[BLOCK / 16][4], uint32_t tile) {
    constexpr int WIDE = CHANNELS / 64;
    const uint64_t wide = tile_descriptor<128>(tile, BLOCK * 128);
    const uint64_t rest = tile_descriptor<32>(tile + WIDE * BLOCK * 128);
#pragma unroll
    for (int k = 0; k < BLOCK / 16; k++) {
        product<T, 64 * WIDE, 1>(sums.wide, p[k], advanced(wide, k * 16 * 128), true);
        if constexpr (CHANNELS % 64) product<T, 16, 1>(sums.rest, p[k], advanced(rest, k * 16 * 32), true);
    }
}

// Sums as the left side of the next product.
template <class T, int BLOCK>
__device__ inline void narrow_all(uint32_t (&p)[BLOCK / 16][4], const float (&s)[BLOCK / 2]) {
#pragma unroll
    for (int i = 0; i < BLOCK / 4; i++) p[i / 4][i % 4] = narrow(s[2 * i], s[2 * i + 1], T{});
}

// Rows of a thread's quad change places with columns: each lane then stores 8 neighbouring channels at a time.
template <class T, int CHANNELS>
__device__ inline void store_rows(T* out, int64_t row_stride, int rows_left, const Sums<CHANNELS>& sums,
                                  const float (&factor)[2], int channels) {
    const int quad = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int first = 0; first < CHANNELS / 8; first += 4) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = (first + i) * 4 + 2 * h;
                w[i] = first + i < CHANNELS / 8 ? narrow(sums(at) * factor[h], sums(at + 1) * factor[h], T{}) : 0;
            }
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (i & step) continue;
                    const bool upper = quad & step;
                    const uint32_t got = __shfl_xor_sync(kAll, upper ? w[i] : w[i + step], step);
                    if (upper)
                        w[i] = got;
                    else
                        w[i + step] = got;
                }
            }
            const int channel = (first + quad) * 8;
            if (8 * h < rows_left && channel < channels)
                store16(out + 8 * h * row_stride + channel, uint4{w[0], w[1], w[2], w[3]});
        }
    }
}

#endif  // MIMO_SM90

}  // namespace mimo::sm90
