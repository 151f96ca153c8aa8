// The memory-bound operators, callable from C++ that knows no CUDA. All return a status; 0 is success. Pointers are
// device pointers to contiguous rows, 16-byte aligned unless said otherwise; a null pointer stands for an operand that
// is not there. dtype: 0 float, 1 half, 2 bfloat16. stream: a cudaStream_t.
#pragma once

#include <cstdint>

namespace mimo {

const char* error_string(int status);

// The newest CUDA that the driver serves, 1000 major + 10 minor; 0 without a driver.
int driver_version();

// y[i] = x[index[i]]. Any alignment. index: int32, or int64 with wide_index.
int gather_rows(void* y, const void* x, const void* index, bool wide_index, int64_t kept, int64_t rows,
                int64_t row_bytes, int device, void* stream);

// y[index[i]] = x[i], the other rows are `fill` or zero; inverse [rows] tells which row of x went where, -1 for none.
// Any alignment.
int scatter_rows(void* y, int* inverse, const void* x, const void* index, bool wide_index, const void* fill,
                 int64_t kept, int64_t rows, int64_t row_bytes, int device, void* stream);

// total [dim] = sum of dy over the rows where inverse is negative. partial: float [ceil(rows / rows_per_block), dim].
int hole_sum(void* total, float* partial, const void* dy, const int* inverse, int64_t rows, int dim, int rows_per_block,
             int dtype, int device, void* stream);

// x_new = x + gate * branch where branch is there, y = LN(x_new) * (1 + scale) + shift, or LN * weight + bias for rows
// of group -1. The strides of scale, shift and gate are in elements; *_float: those operands are float and not of type
// dtype.
int modulate_forward(void* x_new, void* y, float* mean, float* rstd, const void* x, const void* branch,
                     const void* scale, int64_t scale_stride, const void* shift, int64_t shift_stride, const void* gate,
                     int64_t gate_stride, bool modulation_float, const void* weight, const void* bias,
                     bool affine_float, const int* row, int64_t rows, int dim, float eps, int dtype, int device,
                     void* stream);

// chunks [num_chunks, 3]: first row, end row, group; ascending in the group. first [groups + 2]: where history's and
// each group's chunks begin. partial: float [num_chunks, 2 or if gated 3, dim]. If gated, x is x_new, and dx_new is its
// own gradient or null.
int modulate_backward(void* dx, void* dbranch, void* dscale, void* dshift, void* dgate, void* dweight, void* dbias,
                      float* partial, const void* dy, const void* dx_new, const void* x, const float* mean,
                      const float* rstd, const void* branch, const void* scale, int64_t scale_stride, const void* gate,
                      int64_t gate_stride, bool modulation_float, bool gated, const void* weight, bool affine_float,
                      const int* chunks, int num_chunks, const int* first, int groups, int modulation_rows, int dim,
                      int dtype, int device, void* stream);

// q, k, v (v may be null): [rows, heads, head_dim]; qkv [rows, 3, heads, head_dim]; coords int [rows, 3]; table float
// [positions, head_dim / 2, 2] of cos and sin, null for no rotation; pairs before t_end turn with t, before y_end with
// y, the others with x. k_cache, v_cache [slots, heads, head_dim]: k and v go to slot cache_rows[row] as well.
int qk_norm_rope_forward(void* q, void* k, void* v, void* k_cache, void* v_cache, const int64_t* cache_rows,
                         int64_t slots, const void* qkv, const void* q_weight, const void* k_weight, bool weight_float,
                         const int* coords, const float* table, int positions, int t_end, int y_end, int64_t rows,
                         int heads, int head_dim, float eps, int dtype, int device, void* stream);

// dv may be null: zero. partial: float [blocks, 2, head_dim]; the number of blocks fixes the order of the sums.
int qk_norm_rope_backward(void* dqkv, void* dq_weight, void* dk_weight, float* partial, int blocks, const void* dq,
                          const void* dk, const void* dv, const void* qkv, const void* q_weight, const void* k_weight,
                          bool weight_float, const int* coords, const float* table, int positions, int t_end, int y_end,
                          int64_t rows, int heads, int head_dim, float eps, int dtype, int device, void* stream);

// y = gelu(x + bias), the tanh form; rows of dim values, dim a multiple of 8. bias may be null.
int bias_gelu_forward(void* y, const void* x, const void* bias, bool bias_float, int64_t rows, int dim, int dtype,
                      int device, void* stream);

// dx = dy * gelu'(x + bias), dbias = sum of dx over the rows (null where there is no bias). partial: float [ceil(rows /
// rows_per_block), dim].
int bias_gelu_backward(void* dx, void* dbias, float* partial, const void* dy, const void* x, const void* bias,
                       bool bias_float, int64_t rows, int dim, int rows_per_block, int dtype, int device, void* stream);

// loss [1] = sum of weight[i / group] * (prediction[i] - target[i])^2 over i < count. Any alignment. partial: float
// [blocks].
int squared_error_forward(float* loss, float* partial, int blocks, const void* prediction, const void* target,
                          const float* weight, int64_t count, int64_t group, int dtype, int device, void* stream);

// dprediction[i] = 2 * dloss * weight[i / group] * (prediction[i] - target[i])
int squared_error_backward(void* dprediction, const float* dloss, const void* prediction, const void* target,
                           const float* weight, int64_t count, int64_t group, int dtype, int device, void* stream);

}  // namespace mimo
