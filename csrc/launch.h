// The one way to start a kernel, and the few things that differ between those who read a file of kernels:
//   the compiler of device code (device.h), nvcc or NVRTC: takes the kernels, and launchers only to see which instances
//     of a kernel there are;
//   the compiler of the host (host.h), g++: takes the launchers, and of a kernel only its name;
//   the block emulator of the tests (MIMO_EMULATE, emulate.h): runs the same sources on the CPU.
// Kernels use thread indices, shared_memory(), __syncthreads and warp shuffles, and nothing else. They stand in named
// namespaces: a name in an anonymous one is another for every compiler.
#pragma once

#if defined(MIMO_EMULATE)
#include "emulate.h"
#elif defined(__CUDACC__)
#include "device.h"
#else
#include "host.h"
#endif
