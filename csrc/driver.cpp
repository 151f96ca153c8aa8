// See driver.h. Types and numbers are those of cuda.h, written out, so that no toolkit is needed to build.
#ifdef MIMO_WITH_CUDA

#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "launcher.h"

namespace mimo::driver {
namespace {

using Status = int;        // CUresult
using Device = int;        // CUdevice
using Address = uint64_t;  // CUdeviceptr

constexpr int kMultiprocessors = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicShared = 8;                                                // CUfunction_attribute
constexpr int kCaptureRelaxed = 2;                                                  // CUstreamCaptureMode
constexpr size_t kSharedBytes = 48 * 1024;  // what a block gets without asking for more
constexpr int kMostDevices = 64;

struct Api {
    int status = 0;
    std::string reason;

    Status (*init)(unsigned) = nullptr;
    Status (*driver_version)(int*) = nullptr;
    Status (*error_string)(Status, const char**) = nullptr;
    Status (*device_get)(Device*, int) = nullptr;
    Status (*device_attribute)(int*, int, Device) = nullptr;
    Status (*primary_context)(void**, Device) = nullptr;
    Status (*current_context)(void**) = nullptr;
    Status (*push_context)(void*) = nullptr;
    Status (*pop_context)(void**) = nullptr;
    Status (*capture_mode)(int*) = nullptr;
    Status (*load_library)(void**, const void*, int*, void**, unsigned, int*, void**, unsigned) = nullptr;
    Status (*get_kernel)(void**, void*, const char*) = nullptr;
    Status (*set_kernel_attribute)(int, int, void*, Device) = nullptr;
    Status (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                     void**) = nullptr;
    Status (*fill_bytes)(Address, unsigned char, size_t, void*) = nullptr;
    Status (*encode_tiled)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                           const uint32_t*, int, int, int, int) = nullptr;

    Api() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            const char* why = dlerror();
            status = kNoDriver, reason = std::string("no NVIDIA driver: ") + (why ? why : "libcuda.so.1 not found");
            return;
        }
        const auto find = [&](auto& function, const char* name) {
            void* address = dlsym(library, name);
            std::memcpy(&function, &address, sizeof(address));
            if (address == nullptr && status == 0) {
                status = kOldDriver;
                reason = std::string("the NVIDIA driver has no ") + name + "; CUDA 12.0 or newer is needed";
            }
        };
        find(init, "cuInit");
        find(driver_version, "cuDriverGetVersion");
        find(error_string, "cuGetErrorString");
        find(device_get, "cuDeviceGet");
        find(device_attribute, "cuDeviceGetAttribute");
        find(primary_context, "cuDevicePrimaryCtxRetain");
        find(current_context, "cuCtxGetCurrent");
        find(push_context, "cuCtxPushCurrent_v2");
        find(pop_context, "cuCtxPopCurrent_v2");
        find(capture_mode, "cuThreadExchangeStreamCaptureMode");
        find(load_library, "cuLibraryLoadData");
        find(get_kernel, "cuLibraryGetKernel");
        find(set_kernel_attribute, "cuKernelSetAttribute");
        find(launch, "cuLaunchKernel");
        find(fill_bytes, "cuMemsetD8Async");
        find(encode_tiled, "cuTensorMapEncodeTiled");
        if (status == 0) status = init(0);
    }
};

const Api& api() {
    static const Api functions;
    return functions;
}

struct Gpu {
    std::once_flag once;
    int status = 0;
    Device device = 0;
    void* context = nullptr;
    int target = -1, multiprocessors = 0;
};

// The first time a device is used its primary context is retained, as the runtime does, and kept.
const Gpu& gpu(int index) {
    static Gpu gpus[kMostDevices];
    static Gpu none;
    if (index < 0 || index >= kMostDevices) {
        std::call_once(none.once, [] { none.status = kInvalidValue; });
        return none;
    }
    Gpu& found = gpus[index];
    std::call_once(found.once, [&] {
        const Api& cuda = api();
        int major = 0, minor = 0;
        found.status = cuda.status;
        if (!found.status) found.status = cuda.device_get(&found.device, index);
        if (!found.status) found.status = cuda.device_attribute(&major, kCapabilityMajor, found.device);
        if (!found.status) found.status = cuda.device_attribute(&minor, kCapabilityMinor, found.device);
        if (!found.status) found.status = cuda.device_attribute(&found.multiprocessors, kMultiprocessors, found.device);
        if (!found.status) found.status = cuda.primary_context(&found.context, found.device);
        if (!found.status && kSources) found.target = choose_target(kAllSources[0]->images, kTargets, major, minor);
        if (!found.status && found.target < 0) found.status = kNoImage;
    });
    return found;
}

thread_local int current = -1;  // device of the innermost OnDevice
thread_local int current_status = kNoContext;

// Loads the source's code for the target, unless it is loaded; both in a mode that lets a stream being captured go on.
Status find_kernel(const Api& cuda, Kernel& kernel, int target) {
    static std::mutex loading;
    const std::lock_guard<std::mutex> lock(loading);
    if (kernel.functions[target].load()) return 0;
    int mode = kCaptureRelaxed;
    if (Status status = cuda.capture_mode(&mode)) return status;
    Status status = 0;
    void *library = kernel.source->libraries[target].load(), *function = nullptr;
    if (library == nullptr) {
        status =
            cuda.load_library(&library, kernel.source->images[target].begin, nullptr, nullptr, 0, nullptr, nullptr, 0);
        if (!status) kernel.source->libraries[target].store(library);
    }
    if (!status) status = cuda.get_kernel(&function, library, kernel.name);
    if (!status) kernel.functions[target].store(function);
    const Status restored = cuda.capture_mode(&mode);
    return status ? status : restored;
}

}  // namespace

int choose_target(const Image* images, int count, int major, int minor) {
    int chosen = -1, best = -1;
    for (int i = 0; i < count; i++) {
        const char* const target = images[i].target;
        const bool ptx = std::strncmp(target, "compute_", 8) == 0;
        char* suffix = nullptr;
        const int number = static_cast<int>(std::strtol(target + (ptx ? 8 : 3), &suffix, 10)),
                  wanted = 10 * major + minor;
        const bool exact = number == wanted, generation = number / 10 == major && number <= wanted;
        // 'a': of one architecture alone. 'f' and machine code: of a generation, from one architecture on.
        if (*suffix == 'a' ? !exact : (*suffix == 'f' || !ptx) ? !generation : number > wanted) continue;
        const int rank = (ptx ? 0 : 2000) + 2 * number + (*suffix != '\0');
        if (rank > best) chosen = i, best = rank;
    }
    return chosen;
}

OnDevice::OnDevice(int device) : before_(current) {
    const Gpu& found = gpu(device);
    current = device, current_status = found.status;
    if (current_status) return;
    void* context = nullptr;
    current_status = api().current_context(&context);
    if (current_status || context == found.context) return;
    current_status = api().push_context(found.context);
    pushed_ = current_status == 0;
}

OnDevice::~OnDevice() {
    void* context = nullptr;
    if (pushed_) api().pop_context(&context);
    current = before_, current_status = current < 0 ? kNoContext : gpu(current).status;
}

int start(Kernel* kernel, Size grid, Size block, size_t shared_bytes, void* stream, void** arguments) {
    if (current_status) return current_status;
    const Api& cuda = api();
    const Gpu& here = gpu(current);
    void* function = kernel->functions[here.target].load(std::memory_order_acquire);
    if (function == nullptr) {
        if (Status status = find_kernel(cuda, *kernel, here.target)) return status;
        function = kernel->functions[here.target].load();
    }
    if (shared_bytes > kSharedBytes) {
        const int bytes = static_cast<int>(shared_bytes);
        if (Status status = cuda.set_kernel_attribute(kMaxDynamicShared, bytes, function, here.device)) return status;
    }
    return cuda.launch(function, grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared_bytes),
                       stream, arguments, nullptr);
}

int fill_bytes(void* data, int value, size_t bytes, void* stream) {
    if (bytes == 0) return 0;
    if (current_status) return current_status;
    return api().fill_bytes(reinterpret_cast<Address>(data), static_cast<unsigned char>(value), bytes, stream);
}

int multiprocessors(int device) {
    const Gpu& found = gpu(device);
    return found.multiprocessors > 0 ? found.multiprocessors : 1;
}

int encode_tensor_map(void* map, int element_bytes, const void* base, const uint64_t* size, const uint64_t* stride,
                      const uint32_t* box, int swizzle) {
    // CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
    constexpr int kUint16 = 1, kFloat32 = 7, kSwizzle32 = 1, kSwizzle128 = 3, kPromote128 = 2;
    if (current_status) return current_status;
    const uint32_t steps[4] = {1, 1, 1, 1};
    return api().encode_tiled(map, element_bytes == 4 ? kFloat32 : kUint16, 4, const_cast<void*>(base), size, stride,
                              box, steps, 0,
                              swizzle == 128  ? kSwizzle128
                              : swizzle == 32 ? kSwizzle32
                                              : 0,
                              kPromote128, 0);
}

}  // namespace mimo::driver

const char* mimo::error_string(int status) {
    const driver::Api& cuda = driver::api();
    const char* text = nullptr;
    if (cuda.error_string && cuda.error_string(status, &text) == 0 && text) return text;
    if (status == driver::kNoDriver || status == driver::kOldDriver) return cuda.reason.c_str();
    if (status == driver::kNoImage) return "no device code for this GPU";
    return status == driver::kInvalidValue ? "invalid argument" : "an unknown error of the NVIDIA driver";
}

int mimo::driver::version() {
    int version = 0;
    const Api& cuda = api();
    if (cuda.driver_version) cuda.driver_version(&version);
    return version;
}

#endif
