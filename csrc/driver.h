// The NVIDIA driver, looked up when it is first needed: nothing is linked to it, nor to the CUDA runtime. Kernels are
// launched from device code that lies in this module: machine code for some architectures, and PTX that the driver
// translates for newer ones.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mimo::driver {

constexpr int kMostTargets = 8;

// Device code of one source for one architecture.
struct Image {
    const char* target;  // sm_90a: machine code; compute_100: PTX, ends with a zero byte
    const char* begin;
    const char* end;
};

struct Source {
    const char* name;
    const Image* images;  // of every source for the same targets, in the same order
    std::atomic<void*> libraries[kMostTargets];
};

struct Kernel {
    const char* name;
    Source* source;
    std::atomic<void*> functions[kMostTargets];
};

// What embed.py wrote. The targets: one per image of every source.
extern const int kTargets;
extern const int kSources;
extern Source* const kAllSources[];

struct Size {
    unsigned x, y, z;
};

// Makes `device` the current one of the thread, in the context that the CUDA runtime uses too, until the end of a
// launcher; if that fails, so does `start`.
class OnDevice {
public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    bool pushed_ = false;
    int before_;
};

// Each returns a status of the driver, 0 for success, or one of those below; `error_string` says what it means.
int start(Kernel* kernel, Size grid, Size block, size_t shared_bytes, void* stream, void** arguments);
int fill_bytes(void* data, int value, size_t bytes, void* stream);

constexpr int kInvalidValue = 1;
constexpr int kNoDriver = -1;    // libcuda does not load
constexpr int kOldDriver = -2;   // it has not all functions that are used here
constexpr int kNoContext = 201;  // CUDA_ERROR_INVALID_CONTEXT
constexpr int kNoImage = 209;    // CUDA_ERROR_NO_BINARY_FOR_GPU

int multiprocessors(int device);

// The newest CUDA that the driver serves, 1000 major + 10 minor; 0 without a driver.
int version();

// Position in the list of targets of the code that a GPU of this compute capability runs, -1 for none: machine code
// made for it, else the newest of its generation, else PTX.
int choose_target(const Image* images, int count, int major, int minor);

// cuTensorMapEncodeTiled without its enumerations: a map of 128 bytes, aligned to 64, of a tensor of 4 dimensions.
int encode_tensor_map(void* map, int element_bytes, const void* base, const uint64_t* size, const uint64_t* stride,
                      const uint32_t* box, int swizzle);

}  // namespace mimo::driver
