#pragma once

#include <string>

namespace mimo::emulated {

// Runs one of the kernels of faulty.cu in blocks of 64 threads with 64 floats of shared memory.
int run_faulty(const std::string& name, float* out, const float* in, int blocks);

}  // namespace mimo::emulated
