// The operators of csrc/ops.h, run by the block emulator, as a Python module with the names of mimo_kernels._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "emulate.h"
#include "ops.h"

namespace mimo {

static std::vector<BindFunction>& bindings() {
    static std::vector<BindFunction> functions;
    return functions;
}

Binding::Binding(BindFunction bind) { bindings().push_back(bind); }

const char* error_string(int status) {
    return status == emulated::kFailed ? emulated::machine.failure.c_str() : "invalid argument";
}

}  // namespace mimo

// Kernels with a mistake each, to show that the emulator finds it.
__global__ void absent_lane_kernel(float* out) {
    if (threadIdx.x == 3) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
__global__ void barrier_in_a_branch_kernel(float* out) {
    if (threadIdx.x < 32) __syncthreads();
    else out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, threadIdx.x == 40 ? (__syncthreads(), 0) : 0);
}
__global__ void overrun_kernel(float*) { mimo::shared_memory()[threadIdx.x + 1] = 1.f; }
__global__ void misaligned_kernel(float*) { mimo::load16(mimo::shared_memory() + threadIdx.x); }
__global__ void missing_barrier_kernel(float* out) {
    mimo::shared_memory()[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = mimo::shared_memory()[blockDim.x - 1 - threadIdx.x];
}

// Runs one of them with a block of 64 threads and 64 floats of shared memory; what went wrong, and what it wrote.
static std::pair<std::string, std::vector<float>> run_faulty(const std::string& name) {
    auto kernel = name == "absent lane"           ? absent_lane_kernel
                  : name == "barrier in a branch" ? barrier_in_a_branch_kernel
                  : name == "overrun"             ? overrun_kernel
                  : name == "misaligned"          ? misaligned_kernel
                                                  : missing_barrier_kernel;
    std::vector<float> out(64);
    mimo::launch(kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, out.data());
    return {mimo::emulated::machine.failure, out};
}

PYBIND11_MODULE(emulated_kernels, m) {
    for (mimo::BindFunction bind : mimo::bindings()) bind(m);
    m.def("set_order", [](int seed) { mimo::emulated::machine.order_seed = seed; });
    m.def("run_faulty", run_faulty);
    m.def("to_half", mimo::emulated::to_half);
    m.def("from_half", mimo::emulated::from_half);
    m.def("to_bfloat", mimo::emulated::to_bfloat);
}
