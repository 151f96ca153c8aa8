#include "launch.h"
#include "ops.h"

const char* mimo::error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
