// The forward of attention on Hopper.
#include "attention_sm90_launch.cuh"

namespace mimo {

// out [batch, repeats * length, heads, head_dim] and lse float [batch, heads, repeats * length] of q, and of k and v
// with kv_heads heads, a divisor of heads; strides in values; and a schedule of one clip of `length` rows
// (plan_sm90.cpp), which `repeats` clips share unless there is a batch. head_dim 64, 72, 80 or 128; block: rows of k
// and v per step, 64 or 128, as in the schedule. scale > 0.
int attention_sm90_forward(void* out, float* lse, const void* q, const void* k, const void* v, const int* plan,
                           int64_t q_batch, int64_t q_row, int64_t q_head, int64_t k_batch, int64_t k_row,
                           int64_t k_head, int64_t v_batch, int64_t v_row, int64_t v_head, int tiles, int groups,
                           int band, int batch, int repeats, int length, int heads, int kv_heads, int head_dim,
                           int block, float scale, int dtype, int device, void* stream) {
    using namespace sm90;
    const Shape shape{tiles, groups, band, batch, repeats, length, heads, kv_heads, head_dim};
    if (!shape.served() || (block != 64 && block != 128)) return 1;  // cudaErrorInvalidValue
    OnDevice guard(device);
    Problem problem = make_problem(shape, plan, scale);
    problem.out[0] = out, problem.lse = lse;
    if (int status = make_maps(&problem.own[0], {q, q_batch, q_row, q_head, heads}, shape, kRows)) return status;
    if (int status = make_maps(&problem.streamed[0], {k, k_batch, k_row, k_head, kv_heads}, shape, block))
        return status;
    if (int status = make_maps(&problem.streamed[1], {v, v_batch, v_row, v_head, kv_heads}, shape, block))
        return status;
    return block == 64 ? start<kForward, 64>(problem, shape.channels(), dtype, device, stream)
                       : start<kForward, 128>(problem, shape.channels(), dtype, device, stream);
}
MIMO_LAUNCHER(attention_sm90_forward, out, lse, q, k, v, plan, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch,
              v_row, v_head, tiles, groups, band, batch, repeats, length, heads, kv_heads, head_dim, block, scale,
              dtype, device, stream)

}  // namespace mimo
