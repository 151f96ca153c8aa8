// Each of Hopper's instructions alone, on one tile: what a GPU is asked first (tests/gpu/test_sm90_probe.py), before
// the attention kernels that are made of the same pieces. A copy shows where TMA puts 16-byte pieces, a product whether
// our reading of descriptors, fragments and swizzles is the hardware's.
#include "attention_sm90_launch.cuh"

namespace mimo {
namespace sm90 {

// What is written to out: the tile of b as it lies in shared memory (32-bit words); a b' with a in registers, in shared
// memory; (a b') b.
enum Step { kCopied, kScores, kScoresFromShared, kSums, kSteps };

constexpr int kProbeThreads = kThreads;  // as in the attention kernels: registers per thread follow from it

template <Step STEP, class T, int CHANNELS, int BLOCK>
__global__ void __launch_bounds__(kProbeThreads, 1)
    probe_sm90_kernel(const __grid_constant__ TensorMaps a, const __grid_constant__ TensorMaps b, float* out) {
#ifdef MIMO_SM90
    constexpr uint32_t A = 0, B = kRows * CHANNELS * 2, BARRIER = B + BLOCK * CHANNELS * 2;
    const uint32_t base = shared_address();
    if (threadIdx.x == 0) {
        barrier_init(base + BARRIER, 1, "copied");
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= kWarpgroup) {
        shrink_registers<24>();
        if (threadIdx.x == kWarpgroup) {
            barrier_expect(base + BARRIER, (kRows + BLOCK) * CHANNELS * 2);
            load_tile<CHANNELS, kRows>(base + A, a, base + BARRIER, 0, 0, 0);
            load_tile<CHANNELS, BLOCK>(base + B, b, base + BARRIER, 0, 0, 0);
        }
        return;
    }
    grow_registers<240>();
    barrier_wait(base + BARRIER, 0);
    const int row = threadIdx.x / kWarp * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
    if constexpr (STEP == kCopied) {
        for (int i = threadIdx.x; i < BLOCK * CHANNELS / 2; i += kWarpgroup) out[i] = load_shared(base + B + 4 * i);
    } else {
        Own<CHANNELS, STEP != kScoresFromShared> own;
        own.load(base + A);
        float s[BLOCK / 2];
        product_fence();
        multiply<T, CHANNELS, BLOCK>(s, own, base + B);
        product_commit();
        product_wait<0>();
        pin(s);
        if constexpr (STEP != kSums) {
#pragma unroll
            for (int i = 0; i < BLOCK / 2; i++) out[(row + i / 2 % 2 * 8) * BLOCK + i / 4 * 8 + column + i % 2] = s[i];
        } else {
            uint32_t p[BLOCK / 16][4];
            Sums<CHANNELS> sums;
            sums.clear();
            narrow_all<T, BLOCK>(p, s);
            product_fence();
            add_product<T, CHANNELS, BLOCK>(sums, p, base + B);
            product_commit();
            product_wait<0>();
            sums.pinned();
#pragma unroll
            for (int i = 0; i < CHANNELS / 2; i++)
                out[(row + i / 2 % 2 * 8) * CHANNELS + i / 4 * 8 + column + i % 2] = sums(i);
        }
    }
#endif
}

template <Step STEP, class T, int CHANNELS, int BLOCK>
int probe(const TensorMaps& a, const TensorMaps& b, float* out, void* stream) {
    return launch_wide(probe_sm90_kernel<STEP, T, CHANNELS, BLOCK>, dim3(1), dim3(kProbeThreads),
                       (kRows + BLOCK) * CHANNELS * 2 + 16, stream, a, b, out);
}

template <class T, int CHANNELS, int BLOCK>
int probe(int step, const TensorMaps& a, const TensorMaps& b, float* out, void* stream) {
    switch (step) {
        case kCopied:
            return probe<kCopied, T, CHANNELS, BLOCK>(a, b, out, stream);
        case kScores:
            return probe<kScores, T, CHANNELS, BLOCK>(a, b, out, stream);
        case kScoresFromShared:
            return probe<kScoresFromShared, T, CHANNELS, BLOCK>(a, b, out, stream);
        default:
            return probe<kSums, T, CHANNELS, BLOCK>(a, b, out, stream);
    }
}

template <class T, int BLOCK>
int probe(int step, int channels, const TensorMaps& a, const TensorMaps& b, float* out, void* stream) {
    if (channels == 64) return probe<T, 64, BLOCK>(step, a, b, out, stream);
    if (channels == 80) return probe<T, 80, BLOCK>(step, a, b, out, stream);
    return probe<T, 128, BLOCK>(step, a, b, out, stream);
}

}  // namespace sm90

// a [64, head_dim], b [block, head_dim]; out as `Step` says. block: 64, with half also 128.
int probe_sm90(float* out, const void* a, const void* b, int step, int head_dim, int block, int dtype, int device,
               void* stream) {
    using namespace sm90;
    const Shape rows{1, 1, 1, 1, 1, kRows, 1, 1, head_dim}, streamed{1, 1, 1, 1, 1, block, 1, 1, head_dim};
    const bool known = step >= 0 && step < kSteps && (dtype == 1 || (dtype == 2 && block == 64));
    if (!rows.served() || !known || (block != 64 && block != 128)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    TensorMaps maps[2];
    if (int status = make_maps(&maps[0], {a, head_dim, head_dim, head_dim, 1}, rows, kRows)) return status;
    if (int status = make_maps(&maps[1], {b, head_dim, head_dim, head_dim, 1}, streamed, block)) return status;
    const int channels = rows.channels();
    if (dtype == 2) return probe<bfloat_t, 64>(step, channels, maps[0], maps[1], out, stream);
    return block == 64 ? probe<half_t, 64>(step, channels, maps[0], maps[1], out, stream)
                       : probe<half_t, 128>(step, channels, maps[0], maps[1], out, stream);
}
MIMO_LAUNCHER(probe_sm90, out, a, b, step, head_dim, block, dtype, device, stream)

}  // namespace mimo
