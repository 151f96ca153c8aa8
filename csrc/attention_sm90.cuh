// Attention of frames on Hopper: one kernel for the forward, dQ and dK/dV, whose differences are what a block of scores
// becomes and what it is added to.
//
// Every pass has rows of its own and streams the other side past them. A block of threads owns two chunks of up to 64
// rows, one per warpgroup of consumers, and a producer warp streams blocks of BLOCK rows of two tensors through a ring
// of shared memory by TMA:
//
//     pass      own        streamed    per block                                          sums
//     forward   q          k, v        s = q k'; p = softmax(s)                           out += p v
//     dq        q, dout    k, v        s = q k'; dp = dout v'; ds = p (dp - delta)        dq += ds k
//     dkv       k, v       q, dout     s = k q'; dp = v dout'; ds = p (dp - delta)        dv += p dout; dk += ds q
//
// A block's scores are multiplied while the one before is added to the sums, so that the tensor cores have work during
// the exponentials. Channels are those of whole tiles of 64 (128-byte rows) and one of 16 (32-byte rows): 72 are 64 +
// 16, the last 8 zero.
//
// The list of blocks per tile comes from plan_sm90.cpp, with a state for each warpgroup: skip, bare or masked. A
// masked block turns the intervals of its rows into bits.
#pragma once

#include "attention_sm90.h"
#include "products_sm90.cuh"

namespace mimo::sm90 {

using schedule::kGroupCells, schedule::kGroupKeys, schedule::kIntervals;

enum Pass { kForward, kDq, kDkv };

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The tiles of 64 channels and that of 16.
struct TensorMaps {
    TensorMap wide, rest;
};

struct Problem {
    TensorMaps own[2], streamed[2];
    TensorMap statistics;  // streamed beside: box [2, 1, BLOCK]
    void* out[2];          // [B, L, H, D]
    float* lse;            // [B, H, L]
    const float* rows;     // statistics [B, H, 2, repeats, padded]: log2(e) lse and delta
    const int* plan;
    int tiles, groups, heads, channels;    // heads: of the own rows
    int heads_per_kv;                      // heads of q that share one of k and v
    int sequences, repeats, length, band;  // a sequence: a clip of `repeats`, or one of the batch; rows of one; how
                                           // many of them run side by side
    int padded;                            // rows of a sequence in the statistics, a multiple of 4
    float scale, scale_log2;
};

template <Pass PASS, int CHANNELS, int BLOCK>
struct Layout {
    static constexpr int OWN = PASS == kForward ? 1 : 2;
    static constexpr int WIDE = CHANNELS / 64, REST = CHANNELS % 64;
    // Which of the own rows are kept in registers: what fits. The others are read from shared memory by every product.
    static constexpr bool in_registers(int i) {
        if (PASS == kForward) return CHANNELS < 128 || BLOCK < 128;
        if (PASS == kDq) return CHANNELS < 128 || i == 0;
        return CHANNELS == 64 || (CHANNELS == 80 && i == 0);
    }
    static constexpr bool ALL_IN_REGISTERS = in_registers(0) && in_registers(OWN - 1);
    // Scores of a block are multiplied beside the sums of the one before, where registers allow.
    static constexpr bool AHEAD = PASS != kDkv || CHANNELS < 128;
    static constexpr int OWN_BYTES = kRows * CHANNELS * 2, STREAMED_BYTES = BLOCK * CHANNELS * 2;
    static constexpr int STATISTICS_BYTES = PASS == kDkv ? 2 * BLOCK * 4 : 0;
    static constexpr int STAGES = CHANNELS * BLOCK >= 128 * 128 ? 3 : 4;

    // Places in shared memory.
    static constexpr uint32_t own(int warpgroup, int i) { return (warpgroup * OWN + i) * OWN_BYTES; }
    static constexpr uint32_t RING = kConsumers * OWN * OWN_BYTES;
    static constexpr uint32_t streamed(int stage, int i) { return RING + (stage * 2 + i) * STREAMED_BYTES; }
    static constexpr uint32_t STATISTICS = RING + STAGES * 2 * STREAMED_BYTES;
    static constexpr uint32_t statistics(int stage) { return STATISTICS + stage * STATISTICS_BYTES; }
    static constexpr uint32_t BARRIERS = STATISTICS + STAGES * STATISTICS_BYTES;
    static constexpr uint32_t own_full(int warpgroup) { return BARRIERS + 8 * warpgroup; }
    static constexpr uint32_t own_empty(int warpgroup) { return BARRIERS + 8 * (kConsumers + warpgroup); }
    static constexpr uint32_t full(int stage, int i) { return BARRIERS + 8 * (2 * kConsumers + stage * 2 + i); }
    static constexpr uint32_t empty(int stage, int i) { return full(STAGES + stage, i); }
    static constexpr uint32_t BYTES = BARRIERS + 8 * (2 * kConsumers + 4 * STAGES);
    static_assert(OWN_BYTES % 1024 == 0 && STREAMED_BYTES % 1024 == 0 && BYTES <= 227 << 10);
};

// A place in the ring.
template <int STAGES>
struct Slot {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void step() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// How many heads of the streamed side go past a head's own rows: of k and v one, of q and dout all that share it.
template <Pass PASS>
__device__ inline int sharing(const Problem& problem) {
    return PASS == kDkv ? problem.heads_per_kv : 1;
}

// What a block of threads works on, item after item: a tile of a sequence of a head, with one head of the streamed
// side. Heads are fastest, since a row's heads share their memory. The same block has all heads that share own rows,
// adds them up and stores with the last; that is told by the item's number, since consumers have no register to keep it
// in.
template <Pass PASS>
struct Work {
    const int* tile;
    int head, streamed_head, sequence;
    __device__ Work(const Problem& problem, int item) {
        const int shared_by = item % sharing<PASS>(problem);
        item /= sharing<PASS>(problem);
        head = item % problem.heads;
        streamed_head = PASS == kDkv ? head * problem.heads_per_kv + shared_by : head / problem.heads_per_kv;
        item /= problem.heads;
        const int in_band = problem.tiles * problem.band;
        const int first = item / in_band * problem.band, inside = item % in_band;
        const int left = problem.sequences - first, side_by_side = left < problem.band ? left : problem.band;
        sequence = first + inside % side_by_side;
        tile = problem.plan + inside / side_by_side * kTileColumns;
    }
    __device__ int start(int warpgroup) const { return tile[2 * warpgroup]; }
    __device__ int end(int warpgroup) const { return tile[2 * warpgroup + 1]; }

    __device__ static int items(const Problem& problem) {
        return problem.tiles * problem.sequences * problem.heads * sharing<PASS>(problem);
    }
    __device__ static int first_item(const Problem& problem) { return blockIdx.x * sharing<PASS>(problem); }
    __device__ static int next_item(const Problem& problem, int item) {
        if (PASS != kDkv) return item + gridDim.x;
        item++;
        return begins(problem, item) ? item + (gridDim.x - 1) * sharing<PASS>(problem) : item;
    }
    // Whether an item is the first for its own rows.
    __device__ static bool begins(const Problem& problem, int item) { return item % sharing<PASS>(problem) == 0; }
};

// Walks through a tile's blocks: runs of (first row, blocks, states, first group).
template <int BLOCK>
struct Blocks {
    const int* run;
    int runs, left = 0, start = 0, states = 0, group = 0;
    template <Pass PASS>
    __device__ Blocks(const Problem& problem, const Work<PASS>& work)
        : run(problem.plan + work.tile[4]), runs(work.tile[5]) {}
    __device__ bool next() {
        if (left == 0) {
            if (runs == 0) return false;
            const uint4 cells = load16_constant(run);
            run += kRunColumns, runs--;
            start = static_cast<int>(cells.x) - BLOCK, left = cells.y, states = cells.z, group = cells.w;
        }
        start += BLOCK, left--;
        return true;
    }
    __device__ int state(int warpgroup) const { return states >> 2 * warpgroup & 3; }
};

#ifdef MIMO_SM90

// All lanes of a warp are done with what the barrier guards.
__device__ inline void leave(uint32_t barrier) {
    sync_warp();
    if (lane_id() == 0) barrier_arrive(barrier);
}

template <int CHANNELS, int ROWS>
__device__ inline void load_tile(uint32_t to, const TensorMaps& maps, uint32_t barrier, int head, int row,
                                 int sequence) {
    constexpr int WIDE = CHANNELS / 64;
#pragma unroll
    for (int c = 0; c < WIDE; c++) tensor_load(to + c * ROWS * 128, maps.wide, barrier, 64 * c, head, row, sequence);
    if constexpr (CHANNELS % 64)
        tensor_load(to + WIDE * ROWS * 128, maps.rest, barrier, 64 * WIDE, head, row, sequence);
}

template <Pass PASS, int CHANNELS, int BLOCK>
__device__ inline void produce(const Problem& problem, uint32_t base) {
    using L = Layout<PASS, CHANNELS, BLOCK>;
    Slot<L::STAGES> slot;
    uint32_t own_parity[kConsumers] = {};
    using Work = sm90::Work<PASS>;
    const int items = Work::items(problem);
    for (int item = Work::first_item(problem); item < items; item = Work::next_item(problem, item)) {
        const Work work(problem, item);
#pragma unroll
        for (int w = 0; w < kConsumers; w++) {
            if (work.start(w) == work.end(w)) continue;
            const uint32_t full = base + L::own_full(w);
            barrier_wait(base + L::own_empty(w), own_parity[w] ^ 1);
            own_parity[w] ^= 1;
            barrier_expect(full, L::OWN * L::OWN_BYTES);
#pragma unroll
            for (int i = 0; i < L::OWN; i++)
                load_tile<CHANNELS, kRows>(base + L::own(w, i), problem.own[i], full, work.head, work.start(w),
                                           work.sequence);
        }
        Blocks<BLOCK> blocks(problem, work);
        while (blocks.next()) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t full = base + L::full(slot.stage, i);
                const int statistics = i == 1 ? L::STATISTICS_BYTES : 0;
                barrier_wait(base + L::empty(slot.stage, i), slot.parity ^ 1);
                barrier_expect(full, L::STREAMED_BYTES + statistics);
                load_tile<CHANNELS, BLOCK>(base + L::streamed(slot.stage, i), problem.streamed[i], full,
                                           work.streamed_head, blocks.start, work.sequence);
                if (statistics)
                    tensor_load(
                        base + L::statistics(slot.stage), problem.statistics, full, blocks.start,
                        work.sequence % problem.repeats, 0,
                        work.sequence / problem.repeats * problem.heads * problem.heads_per_kv + work.streamed_head);
            }
            slot.step();
        }
    }
}

// ---- masks ----

__device__ inline uint32_t low_bits(int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }
__device__ inline uint32_t bits_between(int start, int end) { return low_bits(end) & ~low_bits(start); }

// The intervals that two rows of a thread see; none for rows that are not the chunk's.
struct SeenKeys {
    int bounds[2][2 * kIntervals];
    __device__ void find(const Problem& problem, int group, int row, int end) {
        const int* cells = problem.plan + problem.tiles * kTileColumns + group * kGroupCells;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool there = row + 8 * h < end;
            while (there && cells[1] <= row + 8 * h) cells += kGroupCells;
#pragma unroll
            for (int i = 0; i < 2 * kIntervals; i++) bounds[h][i] = there ? cells[kGroupKeys + i] : 0;
        }
    }
    template <int BLOCK>
    __device__ void bits(uint32_t (&seen)[2][BLOCK / 32], int start) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int i = 0; i < BLOCK / 32; i++) {
                seen[h][i] = 0;
#pragma unroll
                for (int j = 0; j < kIntervals; j++)
                    seen[h][i] |=
                        bits_between(bounds[h][2 * j] - start - 32 * i, bounds[h][2 * j + 1] - start - 32 * i);
            }
        }
    }
};

// The rows that see a thread's two keys, among BLOCK rows whose first one is in or before `group`.
template <int BLOCK>
__device__ inline void bits_of_rows(uint32_t (&seen)[2][BLOCK / 32], const Problem& problem, int group, int start,
                                    int key) {
    const int* const groups = problem.plan + problem.tiles * kTileColumns;
#pragma unroll
    for (int i = 0; i < BLOCK / 32; i++) seen[0][i] = seen[1][i] = 0;
    for (; group < problem.groups; group++) {
        const int* const cells = groups + group * kGroupCells;
        const int first = cells[0] - start, end = cells[1] - start;
        if (first >= BLOCK) break;
        bool sees[2] = {false, false};
#pragma unroll
        for (int j = 0; j < kIntervals; j++) {
            const int low = cells[kGroupKeys + 2 * j], high = cells[kGroupKeys + 2 * j + 1];
#pragma unroll
            for (int h = 0; h < 2; h++) sees[h] = sees[h] || (key + 8 * h >= low && key + 8 * h < high);
        }
#pragma unroll
        for (int i = 0; i < BLOCK / 32; i++) {
            const uint32_t rows = bits_between(first - 32 * i, end - 32 * i);
#pragma unroll
            for (int h = 0; h < 2; h++) seen[h][i] |= sees[h] ? rows : 0;
        }
    }
}

template <int BLOCK>
__device__ inline void hide(float (&s)[BLOCK / 2], const uint32_t (&seen)[2][BLOCK / 32]) {
    const int column = lane_id() % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < BLOCK / 32; i++) {
            const uint32_t word = seen[h][i] >> column;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float& x = s[16 * i + j / 2 * 4 + 2 * h + j % 2];
                x = word >> (j / 2 * 8 + j % 2) & 1 ? x : -INFINITY;
            }
        }
    }
}

// ---- consumers ----

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
}

template <Pass PASS, class T, int CHANNELS, int BLOCK>
struct Consumer {
    using L = Layout<PASS, CHANNELS, BLOCK>;
    using Work = sm90::Work<PASS>;
    const Problem& problem;
    const uint32_t base;
    const int warpgroup;
    Own<CHANNELS, L::in_registers(0)> first_own;
    Own<CHANNELS, L::in_registers(L::OWN - 1)> second_own;  // where there is one
    float s[BLOCK / 2], dp[PASS == kForward ? 1 : BLOCK / 2];
    uint32_t p[PASS == kDq ? 1 : BLOCK / 16][4], ds[PASS == kForward ? 1 : BLOCK / 16][4];
    Sums<CHANNELS> sums[PASS == kDkv ? 2 : 1];
    float top[2], total[2], decay[2];  // forward: the running maximum, and what it takes from the sums; dq: statistics
    SeenKeys keys;
    int first_key;

    __device__ Consumer(const Problem& problem, uint32_t base, int warpgroup)
        : problem(problem), base(base), warpgroup(warpgroup) {}

    __device__ void begin(const Work& work, bool anew) {
        const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane_id() / 4, start = work.start(warpgroup);
        const int end = work.end(warpgroup);
        first_key = start + row;
        if (anew) {
            sums[0].clear();
            if constexpr (PASS == kDkv) sums[1].clear();
        }
        if constexpr (PASS != kDkv) keys.find(problem, work.tile[6 + warpgroup], start + row, end);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[h] = -INFINITY, total[h] = 0.f, decay[h] = 1.f;
            if constexpr (PASS == kDq) {
                const int64_t line = int64_t{work.sequence / problem.repeats} * problem.heads + work.head;
                const int64_t places = int64_t{problem.repeats} * problem.padded;
                const float* const at = problem.rows + 2 * line * places +
                                        work.sequence % problem.repeats * problem.padded + start + row + 8 * h;
                const bool there = start + row + 8 * h < end;
                top[h] = there ? at[0] : 0.f;
                total[h] = there ? at[places] : 0.f;
            }
        }
    }

    __device__ void issue_scores(int stage) {
        product_fence();
        multiply<T, CHANNELS, BLOCK>(s, first_own, base + L::streamed(stage, 0));
        if constexpr (PASS != kForward) multiply<T, CHANNELS, BLOCK>(dp, second_own, base + L::streamed(stage, 1));
        product_commit();
    }

    __device__ void issue_sums(int stage) {
        product_fence();
        if constexpr (PASS == kForward) add_product<T, CHANNELS, BLOCK>(sums[0], p, base + L::streamed(stage, 1));
        if constexpr (PASS != kForward) add_product<T, CHANNELS, BLOCK>(sums[0], ds, base + L::streamed(stage, 0));
        if constexpr (PASS == kDkv) add_product<T, CHANNELS, BLOCK>(sums[1], p, base + L::streamed(stage, 1));
        product_commit();
    }

    __device__ void pin_scores() {
        pin(s);
        if constexpr (PASS != kForward) pin(dp);
    }
    __device__ void pin_sums() {
        sums[0].pinned();
        if constexpr (PASS == kDkv) sums[1].pinned();
    }

    // Scores become what is added, in place.
    __device__ void weigh(const Blocks<BLOCK>& block, int stage) {
        if (block.state(warpgroup) == kMasked) {
            uint32_t seen[2][BLOCK / 32];
            if constexpr (PASS == kDkv)
                bits_of_rows<BLOCK>(seen, problem, block.group, block.start, first_key);
            else
                keys.bits<BLOCK>(seen, block.start);
            hide<BLOCK>(s, seen);
        }
        if constexpr (PASS == kForward) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float highest = s[2 * h];
#pragma unroll
                for (int i = 0; i < BLOCK / 4; i++) highest = fmaxf(highest, s[i / 2 * 4 + 2 * h + i % 2]);
                highest = fmaxf(top[h], quad_max(highest) * problem.scale_log2);
                const float middle = highest == -INFINITY ? 0.f : highest;
                decay[h] = fast_exp2(top[h] - middle);
                top[h] = highest;
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < BLOCK / 4; i++) {
                    float& x = s[i / 2 * 4 + 2 * h + i % 2];
                    x = fast_exp2(fmaf(x, problem.scale_log2, -middle));
                    sum += x;
                }
                total[h] = fmaf(total[h], decay[h], sum);
            }
        } else {
#pragma unroll
            for (int i = 0; i < BLOCK / 2; i++) {
                float lse, delta;
                if constexpr (PASS == kDq) {
                    lse = top[i / 2 % 2], delta = total[i / 2 % 2];
                } else {
                    const uint32_t column = base + L::statistics(stage) + (i / 4 * 8 + lane_id() % 4 * 2 + i % 2) * 4;
                    lse = load_shared(column), delta = load_shared(column + BLOCK * 4);
                }
                s[i] = fast_exp2(fmaf(s[i], problem.scale_log2, -lse));
                dp[i] = s[i] * (dp[i] - delta);
            }
        }
    }

    // Behind the products that used the last ones.
    __device__ void hand_over() {
        if constexpr (PASS == kForward) sums[0].scale(decay);
        if constexpr (PASS != kDq) narrow_all<T, BLOCK>(p, s);
        if constexpr (PASS != kForward) narrow_all<T, BLOCK>(ds, dp);
    }

    __device__ void wait_for_scores(const Slot<L::STAGES>& slot) const {
        barrier_wait(base + L::full(slot.stage, 0), slot.parity);
        if constexpr (PASS != kForward) barrier_wait(base + L::full(slot.stage, 1), slot.parity);
    }
    __device__ void wait_for_sums(const Slot<L::STAGES>& slot) const {
        if constexpr (PASS == kForward) barrier_wait(base + L::full(slot.stage, 1), slot.parity);
    }
    // Which of the two tensors are not needed for the sums.
    __device__ void leave_scores(int stage) const {
        if constexpr (PASS == kForward) leave(base + L::empty(stage, 0));
        if constexpr (PASS == kDq) leave(base + L::empty(stage, 1));
    }
    __device__ void leave_sums(int stage) const {
        if constexpr (PASS != kForward) leave(base + L::empty(stage, 0));
        if constexpr (PASS != kDq) leave(base + L::empty(stage, 1));
    }

    __device__ void finish_sums(const Slot<L::STAGES>& slot) {
        wait_for_sums(slot);
        issue_sums(slot.stage);
        product_wait<0>();
        pin_sums();
        leave_sums(slot.stage);
    }

    __device__ void attend(const Work& work, Slot<L::STAGES>& slot) {
        Blocks<BLOCK> block(problem, work);
        bool more = block.next();
        while (more) {
            if (block.state(warpgroup) == kSkip) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    barrier_wait(base + L::full(slot.stage, i), slot.parity);
                    leave(base + L::empty(slot.stage, i));
                }
                slot.step();
                more = block.next();
                continue;
            }
            wait_for_scores(slot);
            issue_scores(slot.stage);
            product_wait<0>();
            pin_scores();
            leave_scores(slot.stage);
            weigh(block, slot.stage);
            hand_over();
            Slot<L::STAGES> before = slot;
            slot.step();
            more = block.next();
            if constexpr (L::AHEAD) {
                while (more && block.state(warpgroup) != kSkip) {
                    wait_for_scores(slot);
                    issue_scores(slot.stage);
                    wait_for_sums(before);
                    issue_sums(before.stage);
                    product_wait<1>();
                    pin_scores();
                    leave_scores(slot.stage);
                    weigh(block, slot.stage);
                    product_wait<0>();
                    pin_sums();
                    leave_sums(before.stage);
                    hand_over();
                    before = slot;
                    slot.step();
                    more = block.next();
                }
            }
            finish_sums(before);
        }
    }

    __device__ void store(const Work& work) {
        const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane_id() / 4;
        const int first = work.start(warpgroup) + row, left = work.end(warpgroup) - first;
        const int64_t stride = int64_t{problem.heads} * problem.channels;
        const int64_t place = (int64_t{work.sequence} * problem.length + first) * stride + work.head * problem.channels;
        float factor[2] = {problem.scale, problem.scale};
        if constexpr (PASS == kForward) {
            const int64_t line = int64_t{work.sequence / problem.repeats} * problem.heads + work.head;
            float* const lse = problem.lse + line * problem.length * problem.repeats +
                               work.sequence % problem.repeats * problem.length + first;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float sum = quad_sum(total[h]);
                factor[h] = sum > 0.f ? 1.f / sum : 0.f;
                if (lane_id() % 4 == 0 && 8 * h < left)
                    lse[8 * h] = sum > 0.f ? (top[h] + fast_log2(sum)) * kLn2 : -INFINITY;
            }
        }
        store_rows<T, CHANNELS>(static_cast<T*>(problem.out[0]) + place, stride, left, sums[0], factor,
                                problem.channels);
        if constexpr (PASS == kDkv) {
            const float one[2] = {1.f, 1.f};
            store_rows<T, CHANNELS>(static_cast<T*>(problem.out[1]) + place, stride, left, sums[1], one,
                                    problem.channels);
        }
    }
};

template <Pass PASS, class T, int CHANNELS, int BLOCK>
__device__ inline void consume(const Problem& problem, uint32_t base, int warpgroup) {
    using L = Layout<PASS, CHANNELS, BLOCK>;
    Slot<L::STAGES> slot;
    uint32_t own_parity = 0;
    Consumer<PASS, T, CHANNELS, BLOCK> consumer(problem, base, warpgroup);
    using Work = sm90::Work<PASS>;
    const int items = Work::items(problem);
    for (int item = Work::first_item(problem); item < items; item = Work::next_item(problem, item)) {
        const Work work(problem, item);
        const bool empty = work.start(warpgroup) == work.end(warpgroup);
        if (!empty) {
            barrier_wait(base + L::own_full(warpgroup), own_parity);
            own_parity ^= 1;
            consumer.first_own.load(base + L::own(warpgroup, 0));
            if constexpr (L::OWN == 2) consumer.second_own.load(base + L::own(warpgroup, 1));
            if constexpr (L::ALL_IN_REGISTERS) leave(base + L::own_empty(warpgroup));
        }
        consumer.begin(work, Work::begins(problem, item));
        consumer.attend(work, slot);
        if (!empty) {
            if constexpr (!L::ALL_IN_REGISTERS) leave(base + L::own_empty(warpgroup));
        }
        if (Work::begins(problem, item + 1)) consumer.store(work);
    }
}

#endif  // MIMO_SM90

template <Pass PASS, class T, int CHANNELS, int BLOCK>
__global__ void __launch_bounds__(kThreads, 1) attention_sm90_kernel(const __grid_constant__ Problem problem) {
#ifdef MIMO_SM90
    using L = Layout<PASS, CHANNELS, BLOCK>;
    const uint32_t base = shared_address();
    if (threadIdx.x == 0) {
        for (int w = 0; w < kConsumers; w++) {
            barrier_init(base + L::own_full(w), 1, "own full");
            barrier_init(base + L::own_empty(w), kWarpgroup / kWarp, "own empty");
        }
        for (int stage = 0; stage < L::STAGES; stage++) {
            for (int i = 0; i < 2; i++) {
                barrier_init(base + L::full(stage, i), 1, i ? "second full" : "first full");
                barrier_init(base + L::empty(stage, i), kConsumers * kWarpgroup / kWarp,
                             i ? "second empty" : "first empty");
            }
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == kConsumers) {
        shrink_registers<kProducerRegisters>();
        if (threadIdx.x == kConsumers * kWarpgroup) produce<PASS, CHANNELS, BLOCK>(problem, base);
    } else {
        grow_registers<kConsumerRegisters>();
        consume<PASS, T, CHANNELS, BLOCK>(problem, base, warpgroup);
    }
#endif
}

}  // namespace mimo::sm90
