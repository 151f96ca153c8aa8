#include "launch.h"
#include "launcher.h"

const char* mimo::error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int mimo::driver_version() {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
}
