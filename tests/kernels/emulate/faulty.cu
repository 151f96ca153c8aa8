// Kernels with a mistake each, and beside some of them the same without it, to show what the emulator finds.
#include "faulty.h"

#include <map>

#include "launch.h"

namespace mimo::emulated {
namespace {

__global__ void absent_lane(float* out, const float*) {
    if (threadIdx.x == 3) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
__global__ void barrier_in_a_branch(float* out, const float*) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, threadIdx.x == 40 ? (__syncthreads(), 0) : 0);
}
__global__ void barrier_in_two_branches(float*, const float*) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
__global__ void barrier_after_an_exit(float*, const float*) {
    if (threadIdx.x == 3) return;
    __syncthreads();
}
__global__ void exit_after_a_barrier(float*, const float*) {
    if (threadIdx.x != 63) __syncthreads();
}
__global__ void misaligned(float* out, const float*) { store16(out + threadIdx.x, uint4{}); }
__global__ void misaligned_word(float* out, const float*) { *reinterpret_cast<float2*>(out + threadIdx.x) = float2{}; }

__global__ void shared_overrun(float*, const float*) { shared_memory()[threadIdx.x + 1] = 1.f; }
__global__ void read_past_the_end(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x + 1]; }
__global__ void read_16_bytes_past_the_end(float* out, const float* in) {
    out[threadIdx.x] = __uint_as_float(load16(in + threadIdx.x / 4 * 4 + 4).x);
}
__global__ void read_before_the_start(float* out, const float* in) {
    out[threadIdx.x] = in[static_cast<int>(threadIdx.x) - 1];
}
__global__ void read_of_nothing(float* out, const float*) { out[threadIdx.x] = *static_cast<const float*>(nullptr); }
__global__ void read_of_another_threads_stack(float* out, const float*) {
    float mine = threadIdx.x;
    auto const at = reinterpret_cast<float**>(shared_memory());
    if (threadIdx.x == 0) *at = &mine;
    __syncthreads();
    out[threadIdx.x] = **at;
}
__global__ void write_past_the_end(float* out, const float*) { out[threadIdx.x + 1] = 1.f; }
__global__ void write_to_an_input(float*, const float* in) { const_cast<float*>(in)[threadIdx.x] = 1.f; }

__global__ void output_read_first(float* out, const float*) { out[threadIdx.x] += 1.f; }
__global__ void shared_read_first(float* out, const float*) { out[threadIdx.x] = shared_memory()[threadIdx.x]; }
__global__ void shared_of_the_block_before(float* out, const float*) {
    if (blockIdx.x == 0)
        shared_memory()[threadIdx.x] = 1.f;
    else
        out[threadIdx.x] = shared_memory()[threadIdx.x];
}

__global__ void missing_barrier(float* out, const float*) {
    shared_memory()[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared_memory()[blockDim.x - 1 - threadIdx.x];
}
__global__ void with_the_barrier(float* out, const float*) {
    shared_memory()[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = shared_memory()[blockDim.x - 1 - threadIdx.x];
}
// The lane above has stored before it comes to the shuffle, and yet its store may be seen later.
__global__ void shuffle_as_a_barrier(float* out, const float*) {
    shared_memory()[threadIdx.x] = threadIdx.x;
    __shfl_xor_sync(0xffffffffu, 1.f, 1);
    out[threadIdx.x] = shared_memory()[threadIdx.x ^ 1];
}
// Sums with one barrier per round: right with two places in turn; with one, a thread that is late reads the next
// round's values.
template <int PLACES>
__global__ void rounds(float* out, const float* in) {
    float total = 0.f;
    for (int round = 0; round < 3; round++) {
        float* const place = shared_memory() + round % PLACES * 2;
        if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = in[threadIdx.x + round];
        __syncthreads();
        total += place[0] + place[1];
    }
    out[threadIdx.x] = total;
}
__global__ void two_writers(float* out, const float*) { out[threadIdx.x / 2] = 1.f; }
__global__ void two_writers_of_two_halves(float* out, const float*) {
    reinterpret_cast<uint16_t*>(out)[threadIdx.x] = 1;
}
__global__ void two_blocks_write(float* out, const float*) { out[threadIdx.x] = 1.f; }
__global__ void a_block_reads_what_another_wrote(float* out, const float*) {
    if (blockIdx.x == 0)
        out[threadIdx.x] = 1.f;
    else
        out[0] = out[threadIdx.x] + 1.f;
}
// The first block has read; the second reads as well, and only then writes.
__global__ void a_block_writes_what_another_read(float* out, const float*) {
    const float* const defined = out + 64;
    float sum = defined[threadIdx.x];
    if (blockIdx.x == 1) out[64 + threadIdx.x] = sum;
}
__global__ void define_second_half(float* out, const float*) {
    if (blockIdx.x == 0) out[64 + threadIdx.x] = 0.f;
}

using Kernel = void (*)(float*, const float*);
const std::map<std::string, Kernel> kernels = {
    {"absent lane", absent_lane},
    {"barrier in a branch", barrier_in_a_branch},
    {"barrier in two branches", barrier_in_two_branches},
    {"barrier after an exit", barrier_after_an_exit},
    {"exit after a barrier", exit_after_a_barrier},
    {"misaligned", misaligned},
    {"misaligned word", misaligned_word},
    {"shared overrun", shared_overrun},
    {"read past the end", read_past_the_end},
    {"read 16 bytes past the end", read_16_bytes_past_the_end},
    {"read before the start", read_before_the_start},
    {"read of nothing", read_of_nothing},
    {"read of another thread's stack", read_of_another_threads_stack},
    {"write past the end", write_past_the_end},
    {"write to an input", write_to_an_input},
    {"output read first", output_read_first},
    {"shared read first", shared_read_first},
    {"shared of the block before", shared_of_the_block_before},
    {"missing barrier", missing_barrier},
    {"with the barrier", with_the_barrier},
    {"shuffle as a barrier", shuffle_as_a_barrier},
    {"one place for all rounds", rounds<1>},
    {"two places in turn", rounds<2>},
    {"two writers", two_writers},
    {"two writers of two halves", two_writers_of_two_halves},
    {"two blocks write", two_blocks_write},
    {"a block reads what another wrote", a_block_reads_what_another_wrote},
    {"a block writes what another read", a_block_writes_what_another_read},
    {"define the second half", define_second_half},
};

}  // namespace

int run_faulty(const std::string& name, float* out, const float* in, int blocks) {
    return launch(kernels.at(name), dim3(blocks), dim3(64), 64 * sizeof(float), nullptr, out, in);
}

}  // namespace mimo::emulated
