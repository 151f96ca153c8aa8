// A small kernel of Hopper's instructions, right and with a mistake each: a producer streams four tiles through a ring
// of two, a warpgroup multiplies a tile of its own with them. out [64, 64] = sum over i of in[0] in[i]', tiles [64, 64]
// of halves; the first four rows of in[0] are overwritten with zeros.
#include <map>

#include "faulty.h"
#include "sm90.cuh"

namespace mimo::emulated {
namespace {

using namespace sm90;

enum Fault {
    kNone,
    kNoAsyncFence,
    kNoNamedBarrier,
    kWrongPhase,
    kOneArrivalTooFew,
    kArrivesTooEarly,
    kNoWaitForCopy,
    kSumsReadBeforeWait,
    kFragmentsOverwritten,
    kNoProductFence,
    kWrongSwizzle,
    kOverrun,
    kTooFewBytes,
    kBarriersWithoutFence,
    kMisplacedTile,
    kCopyLeft,
    kProductLeft,
    kBarrierOverwritten,
};

constexpr int kTile = 8192, kTiles = 4, kStages = 2;
constexpr uint32_t kBarriers = (1 + kStages) * kTile, kOwnFull = kBarriers, kFull = kBarriers + 8;
constexpr uint32_t kEmpty = kFull + 8 * kStages, kShared = kEmpty + 8 * kStages;

template <Fault FAULT>
void produce(const TensorMap& map) {
    barrier_expect(kOwnFull, kTile);
    tensor_load(FAULT == kMisplacedTile ? 512 : 0, map, kOwnFull, 0, 0, 0, 0);
    for (int i = 0; i < kTiles; i++) {
        const int stage = i % kStages;
        if (FAULT != kOverrun) barrier_wait(kEmpty + 8 * stage, i / kStages % 2 ^ 1);
        barrier_expect(kFull + 8 * stage, FAULT == kTooFewBytes ? kTile - 16 : kTile);
        tensor_load(kTile + stage * kTile, map, kFull + 8 * stage, 0, (i + 1) * 64, 0, 0);
    }
    if (FAULT == kCopyLeft) {
        barrier_wait(kEmpty, 1);
        barrier_expect(kFull, kTile);
        tensor_load(kTile, map, kFull, 0, 0, 0, 0);
    }
}

template <Fault FAULT>
void consume(float* out) {
    const int thread = threadIdx.x, lane = thread % 32;
    float x[32] = {};
    uint32_t a[4][4];
    barrier_wait(kOwnFull, 0);
    store_shared(FAULT == kBarrierOverwritten ? kFull : thread * 4, 0.f);
    if (FAULT != kNoAsyncFence) fence_async();
    if (FAULT != kNoNamedBarrier) named_sync(1, 128);
    // The first half of the channels from registers, the rest from shared memory.
    for (int k = 0; k < 2; k++) {
        const int row = thread / 32 * 16 + lane % 16;
        load_matrices(a[k], swizzled<128>(row, 2 * k + lane / 16));
    }
    for (int i = 0; i < kTiles; i++) {
        const int stage = i % kStages;
        const uint32_t tile = kTile + stage * kTile;
        if (FAULT != kNoWaitForCopy) barrier_wait(kFull + 8 * stage, i / kStages % 2 ^ (FAULT == kWrongPhase));
        if (FAULT != kNoProductFence) product_fence();
        for (int k = 0; k < 2; k++) product<half_t, 64, 0>(x, a[k], tile_descriptor<128>(tile + 32 * k), true);
        for (int k = 2; k < 4; k++)
            product<half_t, 64, 0>(x, tile_descriptor<128>(32 * k), tile_descriptor<128>(tile + 32 * k), true);
        product_commit();
        if (FAULT == kSumsReadBeforeWait) out[thread] = x[0];
        if (FAULT == kFragmentsOverwritten) a[0][0] = 0;
        if (FAULT == kArrivesTooEarly && lane == 0) barrier_arrive(kEmpty + 8 * stage);
        if (FAULT != kProductLeft || i + 1 < kTiles) product_wait<0>();
        sync_warp();
        if (FAULT != kArrivesTooEarly && lane == 0) barrier_arrive(kEmpty + 8 * stage);
    }
    if (FAULT == kProductLeft) return;
    for (int i = 0; i < 32; i++) {
        const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        out[row * 64 + column] = x[i];
    }
}

template <Fault FAULT>
void ring(float* out, const __grid_constant__ TensorMap map) {
    if (threadIdx.x == 0) {
        barrier_init(kOwnFull, 1, "own full");
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(kFull + 8 * stage, 1, "full");
            barrier_init(kEmpty + 8 * stage, FAULT == kOneArrivalTooFew ? 5 : 4, "empty");
        }
        if (FAULT != kBarriersWithoutFence) fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        shrink_registers<24>();
        if (threadIdx.x == 128) produce<FAULT>(map);
    } else {
        grow_registers<256>();
        consume<FAULT>(out);
    }
}

void more_registers_than_there_are(float*, const __grid_constant__ TensorMap) {
    if (threadIdx.x >= 256)
        shrink_registers<24>();
    else
        grow_registers<248>();
}
void no_multiple_of_8_registers(float*, const __grid_constant__ TensorMap) { shrink_registers<36>(); }
void named_barrier_of_too_few(float*, const __grid_constant__ TensorMap) {
    if (threadIdx.x < 128)
        named_sync(3, 384);
    else if (threadIdx.x < 256)
        named_arrive(3, 384);
}

using Kernel = void (*)(float*, const TensorMap);
const std::map<std::string, std::pair<Kernel, int>> kernels = {
    {"right", {ring<kNone>, 256}},
    {"no async fence", {ring<kNoAsyncFence>, 256}},
    {"no named barrier", {ring<kNoNamedBarrier>, 256}},
    {"wrong phase", {ring<kWrongPhase>, 256}},
    {"one arrival too few", {ring<kOneArrivalTooFew>, 256}},
    {"arrives too early", {ring<kArrivesTooEarly>, 256}},
    {"no wait for the copy", {ring<kNoWaitForCopy>, 256}},
    {"sums read before the wait", {ring<kSumsReadBeforeWait>, 256}},
    {"fragments overwritten", {ring<kFragmentsOverwritten>, 256}},
    {"no product fence", {ring<kNoProductFence>, 256}},
    {"wrong swizzle", {ring<kWrongSwizzle>, 256}},
    {"overrun ring", {ring<kOverrun>, 256}},
    {"too few bytes", {ring<kTooFewBytes>, 256}},
    {"barriers without fence", {ring<kBarriersWithoutFence>, 256}},
    {"misplaced tile", {ring<kMisplacedTile>, 256}},
    {"copy left", {ring<kCopyLeft>, 256}},
    {"product left", {ring<kProductLeft>, 256}},
    {"barrier overwritten", {ring<kBarrierOverwritten>, 256}},
    {"more registers than there are", {more_registers_than_there_are, 384}},
    {"no multiple of 8 registers", {no_multiple_of_8_registers, 128}},
    {"named barrier of too few", {named_barrier_of_too_few, 384}},
};

}  // namespace

int run_faulty_sm90(const std::string& name, float* out, const void* in) {
    const auto [kernel, threads] = kernels.at(name);
    const TensorShape shape{
        2, {64, (1 + kTiles) * 64, 1, 1}, {64, 64, 1, 1}, {128, 128, 128}, name == "wrong swizzle" ? 0 : 128};
    TensorMap map;
    if (int status = make_tensor_map(&map, in, shape)) return status;
    return launch_wide(kernel, dim3(1), dim3(threads), kShared, nullptr, out, map);
}

}  // namespace mimo::emulated
