// What the kernels of QK-norm and RoPE share: a team of head_dim / 8 neighbouring lanes holds a head, 8 channels each:
// 9 lanes for 72 channels, so a warp holds 3 such heads.
#pragma once

#include "common.cuh"

namespace mimo {

constexpr int kWarps = 4;
constexpr int kForwardHeads = 4;  // per team in flight
constexpr int kBackwardHeads = 2;

// Which part of the work a lane does.
struct Lane {
    int team, teams, lanes;  // this team, teams per warp, lanes per team
    int place;               // in the team; channels 8 place to 8 place + 7
    int reach;               // the largest power of two below `lanes`
    bool active;             // lanes that are left over hold no channels
    __device__ explicit Lane(int head_dim) {
        const int lane = threadIdx.x % kWarp;
        lanes = head_dim / 8;
        teams = kWarp / lanes;
        team = lane / lanes;
        place = lane - team * lanes;
        active = team < teams;
        reach = 1;
        while (reach < lanes) reach *= 2;
        reach /= 2;
    }
};

// Sums over the team, of several heads at once; in every lane of the team.
template <int N>
__device__ inline void team_sums(float (&value)[N], const Lane& lane) {
    int count = lane.lanes;
    for (int offset = lane.reach; offset; offset /= 2) {  // lanes [0, count) of the team hold what is left to add
#pragma unroll
        for (int u = 0; u < N; u++) {
            const float other = __shfl_down_sync(kAll, value[u], offset);
            if (lane.place + offset < count) value[u] += other;
        }
        count = offset;
    }
    const int first = threadIdx.x % kWarp - lane.place;
#pragma unroll
    for (int u = 0; u < N; u++) value[u] = __shfl_sync(kAll, value[u], first);
}

template <class T>
__device__ inline void load_weight(const void* weight, bool is_float, const Lane& lane, float (&value)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) value[i] = 0.f;
    if (!lane.active) return;
    if (is_float)
        unpack8(load8(static_cast<const float*>(weight) + lane.place * 8), value);
    else
        unpack8(load8(static_cast<const T*>(weight) + lane.place * 8), value);
}

inline bool unsupported(int head_dim) { return head_dim < 8 || head_dim > 256 || head_dim % 8; }

}  // namespace mimo
