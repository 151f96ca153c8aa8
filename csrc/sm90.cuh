// Hopper's own instructions, one wrapper each: barriers in shared memory that count bytes (mbarrier), copies of tensor
// tiles (TMA), products of warpgroups (wgmma), and what orders them. A kernel of these runs on sm_90a; under
// MIMO_EMULATE the block emulator executes the same wrappers on the CPU (tests/kernels/emulate/async.h).
//
// Shared memory is told by its 32-bit address. Tiles lie in it swizzled: of a row of W bytes (128 or 32) the 16-byte
// pieces are exchanged so that neighbouring rows use other banks; `swizzled` says where a piece is. A tile begins at a
// multiple of 1024 bytes (W = 128) or 256 (W = 32).
//
// Sources: PTX ISA 8.x, "Asynchronous warpgroup level matrix instructions", "mbarrier", "Tensor map".
#pragma once

#include "common.cuh"

namespace mimo::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kRegisters = 65536;  // of a multiprocessor

// Where the 16-byte piece `piece` of row `row` lies in a tile whose rows have W bytes.
template <int W>
__host__ __device__ constexpr uint32_t swizzled(uint32_t row, uint32_t piece) {
    const uint32_t place = row * W + piece * 16;
    return place ^ ((place >> 7 & (W / 16 - 1)) << 4);
}

// A tile as the tensor cores are told of it. Bits 0-13: address / 16; 16-29: bytes between neighbouring tiles of
// W bytes / 16; 32-45: bytes between groups of 8 rows / 16; 62-63: the swizzle.
template <int W>
__host__ __device__ constexpr uint64_t tile_descriptor(uint32_t address, uint32_t tile_bytes = 16) {
    return static_cast<uint64_t>(8 * W >> 4 | (W == 128 ? 1u : 3u) << 30) << 32 |
           static_cast<uint32_t>(address >> 4 | (tile_bytes >> 4) << 16);
}
// The same so many bytes further on: an addition to the lower half.
__host__ __device__ constexpr uint64_t advanced(uint64_t tile, uint32_t bytes) {
    return tile >> 32 << 32 | static_cast<uint32_t>(static_cast<uint32_t>(tile) + (bytes >> 4));
}

// A tensor of 16- or 32-bit values with up to four dimensions, the first one contiguous, and the box that a copy takes.
struct TensorShape {
    int element_bytes;
    uint32_t size[4], box[4];
    uint64_t stride[3];  // bytes from one to the next of dimensions 1 to 3, multiples of 16
    int swizzle;         // W, or 0
};

}  // namespace mimo::sm90

#ifdef MIMO_EMULATE
#include "async.h"
#else

namespace mimo::sm90 {

// What the driver writes (CUtensorMap) and copies are told.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

#ifndef __CUDACC__
// Between an OnDevice and the launch that takes the map.
inline int make_tensor_map(TensorMap* map, const void* base, const TensorShape& shape) {
    const uint64_t size[] = {shape.size[0], shape.size[1], shape.size[2], shape.size[3]};
    return driver::encode_tensor_map(map, shape.element_bytes, base, size, shape.stride, shape.box, shape.swizzle);
}
#else
int make_tensor_map(TensorMap* map, const void* base, const TensorShape& shape);
#endif

// As `launch`; the emulator does more for kernels that copy and multiply while they go on. Blocks have as many threads
// as the kernel's __launch_bounds__.
template <class... Parameters, class... Arguments>
int launch_wide(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                Arguments... arguments) {
    return launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MIMO_SM90 1

__device__ inline uint32_t shared_address() {
    extern __shared__ __align__(1024) unsigned char mimo_shared_tiles[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(mimo_shared_tiles));
}
__device__ inline float load_shared(uint32_t address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}
__device__ inline void store_shared(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" : : "r"(address), "f"(value) : "memory");
}

// ---- barriers ----

// `arrivals` threads have to arrive in every phase. The name is for the emulator.
__device__ inline void barrier_init(uint32_t barrier, int arrivals, const char*) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}
// After the barriers are made, before a copy or another thread uses them (with __syncthreads).
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}
// Arrives, and has the phase wait for so many bytes of copies as well.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is over. A wait that does not end (some seconds) stops the kernel: a mistake is an
// error and no hung machine.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    for (uint32_t tries = 0;; tries++) {
        uint32_t over;
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(over)
                     : "r"(barrier), "r"(parity)
                     : "memory");
        if (over) return;
        if (tries > (1u << 24)) __trap();
    }
}
__device__ inline void sync_warp() { __syncwarp(); }
// Barrier 1 to 15 of the block: `threads` of them, whole warps, arrive; the others may go on without waiting.
__device__ inline void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// Registers per thread from here on, of the whole warpgroup: a multiple of 8.
template <int COUNT>
__device__ inline void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(COUNT));
}
template <int COUNT>
__device__ inline void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(COUNT));
}

// ---- copies ----

__device__ inline void tensor_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                                   int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];"
        :
        : "r"(to), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// What this thread has stored in shared memory may be read by copies and tensor cores once the readers are behind a
// barrier.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// ---- products ----

// Four 8 x 8 matrices of 16-bit values: lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}

// Before products use registers that anything else has written.
__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
// The products since the last one are a group.
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Until at most COUNT groups are under way.
template <int COUNT>
__device__ inline void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(COUNT) : "memory");
}
// Uses of these registers stay where they are, before or after.
template <int N>
__device__ inline void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#define MIMO_R4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define MIMO_F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define MIMO_F8(x, i) MIMO_F4(x, i), MIMO_F4(x, i + 4)
#define MIMO_F32(x, i) MIMO_F8(x, i), MIMO_F8(x, i + 8), MIMO_F8(x, i + 16), MIMO_F8(x, i + 24)
#define MIMO_LIST8 MIMO_R4(0, 1, 2, 3) ", " MIMO_R4(4, 5, 6, 7)
#define MIMO_LIST32                                                                                               \
    MIMO_LIST8 ", " MIMO_R4(8, 9, 10, 11) ", " MIMO_R4(12, 13, 14, 15) ", " MIMO_R4(16, 17, 18, 19) ", " MIMO_R4( \
        20, 21, 22, 23) ", " MIMO_R4(24, 25, 26, 27) ", " MIMO_R4(28, 29, 30, 31)
#define MIMO_LIST64                                                                                                  \
    MIMO_LIST32 ", " MIMO_R4(32, 33, 34, 35) ", " MIMO_R4(36, 37, 38, 39) ", " MIMO_R4(40, 41, 42, 43) ", " MIMO_R4( \
        44, 45, 46, 47) ", " MIMO_R4(48, 49, 50, 51) ", " MIMO_R4(52, 53, 54,                                        \
                                                                  55) ", " MIMO_R4(56, 57, 58,                       \
                                                                                   59) ", " MIMO_R4(60, 61, 62, 63)
// a: where the operands after the accumulators begin
#define MIMO_PRODUCT_R(n, type, list, outputs, a0, a1, a2, a3, b, p, t)                                            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
                 "." type " {" list "}, {" MIMO_R4(a0, a1, a2, a3) "}, %" #b ", p, 1, 1, %" #t "; }"               \
                 : outputs                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(int(add)), "n"(TRANSPOSED))
#define MIMO_PRODUCT_S(n, type, list, outputs, ad, b, p, t)                                                        \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
                 "." type " {" list "}, %" #ad ", %" #b ", p, 1, 1, 0, %" #t "; }"                                 \
                 : outputs                                                                                         \
                 : "l"(a), "l"(tile), "r"(int(add)), "n"(TRANSPOSED))
#define MIMO_OUT8 MIMO_F8(x, 0)
#define MIMO_OUT32 MIMO_F32(x, 0)
#define MIMO_OUT64 MIMO_F32(x, 0), MIMO_F32(x, 32)

// x [64, N] (+)= a [64, 16] b, issued by the 128 threads of a warpgroup. a in registers, as load_matrices leaves it
// (first and last 8 rows, then those of the last 8 channels). b: `tile`, rows of 16 consecutive values each N of them,
// or, TRANSPOSED, 16 rows of N consecutive values. Thread t holds of row 16 (t / 32) + t % 32 / 4 + 8 h and column
// 8 n + 2 (t % 4) + j the value x[4 n + 2 h + j].
template <class T, int N, int TRANSPOSED>
__device__ inline void product(float (&x)[N / 2], const uint32_t* a, uint64_t tile, bool add) {
    static_assert(N == 16 || N == 64 || N == 128);
    constexpr bool HALF = std::is_same_v<T, half_t>;
    if constexpr (N == 16 && HALF)
        MIMO_PRODUCT_R(16, "f16", MIMO_LIST8, MIMO_OUT8, 8, 9, 10, 11, 12, 13, 14);
    else if constexpr (N == 16)
        MIMO_PRODUCT_R(16, "bf16", MIMO_LIST8, MIMO_OUT8, 8, 9, 10, 11, 12, 13, 14);
    else if constexpr (N == 64 && HALF)
        MIMO_PRODUCT_R(64, "f16", MIMO_LIST32, MIMO_OUT32, 32, 33, 34, 35, 36, 37, 38);
    else if constexpr (N == 64)
        MIMO_PRODUCT_R(64, "bf16", MIMO_LIST32, MIMO_OUT32, 32, 33, 34, 35, 36, 37, 38);
    else if constexpr (HALF)
        MIMO_PRODUCT_R(128, "f16", MIMO_LIST64, MIMO_OUT64, 64, 65, 66, 67, 68, 69, 70);
    else
        MIMO_PRODUCT_R(128, "bf16", MIMO_LIST64, MIMO_OUT64, 64, 65, 66, 67, 68, 69, 70);
}

// The same with a in shared memory: 64 rows of 16 consecutive values.
template <class T, int N, int TRANSPOSED>
__device__ inline void product(float (&x)[N / 2], uint64_t a, uint64_t tile, bool add) {
    static_assert(N == 64 || N == 128);
    constexpr bool HALF = std::is_same_v<T, half_t>;
    if constexpr (N == 64 && HALF)
        MIMO_PRODUCT_S(64, "f16", MIMO_LIST32, MIMO_OUT32, 32, 33, 34, 35);
    else if constexpr (N == 64)
        MIMO_PRODUCT_S(64, "bf16", MIMO_LIST32, MIMO_OUT32, 32, 33, 34, 35);
    else if constexpr (HALF)
        MIMO_PRODUCT_S(128, "f16", MIMO_LIST64, MIMO_OUT64, 64, 65, 66, 67);
    else
        MIMO_PRODUCT_S(128, "bf16", MIMO_LIST64, MIMO_OUT64, 64, 65, 66, 67);
}

__device__ inline float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif  // sm_90a

}  // namespace mimo::sm90
#endif
