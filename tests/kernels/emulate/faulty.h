#pragma once

#include <string>

namespace mimo::emulated {

// Runs one of the kernels of faulty.cu in blocks of 64 threads with 64 floats of shared memory.
int run_faulty(const std::string& name, float* out, const float* in, int blocks);

// Runs one of the kernels of faulty_sm90.cu: five tiles of 64 x 64 halves in, 64 x 64 floats out.
int run_faulty_sm90(const std::string& name, float* out, const void* in);

}  // namespace mimo::emulated
