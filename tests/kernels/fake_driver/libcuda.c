// A driver without a GPU: what csrc/driver.cpp asks of libcuda is written down, a line each (fake_log). The environment
// says what it pretends: FAKE_VERSION, FAKE_CAPABILITIES ("80 90", a device each), FAKE_FAILURE ("cuLaunchKernel 719").
// With FAKE_OLD it has no libraries, as drivers before CUDA 12.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char text[1 << 20];
static size_t used;
static char current[64];
static char contexts[64];
static int mode;  // of capture: global

const char* fake_log(void) { return text; }

static int note(const char* function, const char* format, ...) {
    va_list arguments;
    used += snprintf(text + used, sizeof(text) - used, "%s", function);
    va_start(arguments, format);
    used += vsnprintf(text + used, sizeof(text) - used, format, arguments);
    va_end(arguments);
    used += snprintf(text + used, sizeof(text) - used, "\n");
    const char* failure = getenv("FAKE_FAILURE");
    const size_t length = strlen(function);
    if (failure && strncmp(failure, function, length) == 0 && failure[length] == ' ') return atoi(failure + length);
    return 0;
}

int cuInit(unsigned flags) { return note("cuInit", " %u", flags); }
int cuDriverGetVersion(int* version) {
    const char* set = getenv("FAKE_VERSION");
    *version = set ? atoi(set) : 12000;
    return 0;
}
int cuGetErrorString(int status, const char** message) {
    static char said[64];
    if (status < 0) return 1;
    snprintf(said, sizeof(said), "fake error %d", status);
    *message = said;
    return 0;
}
int cuDeviceGet(int* device, int index) {
    *device = 100 + index;
    return note("cuDeviceGet", " %d", index);
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    const char* list = getenv("FAKE_CAPABILITIES");
    int capability = 90;
    for (int i = 0; list && *list && i <= device - 100; i++) capability = strtol(list, (char**)&list, 10);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 16 ? 132 : -1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device - 100];
    return note("cuDevicePrimaryCtxRetain", " %d", device);
}
static void* stack[8];
static int depth;
int cuCtxGetCurrent(void** context) {
    *context = depth ? stack[depth - 1] : current;
    return 0;
}
int cuCtxPushCurrent_v2(void* context) {
    stack[depth++] = context;
    return note("cuCtxPushCurrent", " %d", (int)((char*)context - contexts));
}
int cuCtxPopCurrent_v2(void** context) {
    *context = stack[--depth];
    return note("cuCtxPopCurrent", " %d", (int)((char*)*context - contexts));
}
int cuThreadExchangeStreamCaptureMode(int* other) {
    const int before = mode;
    mode = *other, *other = before;
    return note("cuThreadExchangeStreamCaptureMode", " %d", mode);
}
#ifndef FAKE_OLD
int cuLibraryLoadData(void** library, const void* code, int* options, void** values, unsigned count, int* more,
                      void** more_values, unsigned more_count) {
    *library = (void*)code;
    if (options || values || count || more || more_values || more_count) abort();
    return note("cuLibraryLoadData", " %llu", (unsigned long long)(uintptr_t)code);
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    *kernel = strdup(name);
    return note("cuLibraryGetKernel", " %llu %s", (unsigned long long)(uintptr_t)library, name);
}
#endif
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
    return note("cuKernelSetAttribute", " %d %d %s %d", attribute, value, (const char*)kernel, device);
}

// How many bytes each parameter of a kernel has: a space before each number.
static char sizes[1 << 16];
void fake_sizes(const char* name, const char* list) { snprintf(sizes, sizeof(sizes), "%s%s", name, list); }

int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    const char* name = kernel;
    const size_t length = strlen(name);
    if (extra) abort();
    int status = note("cuLaunchKernel", " %s %u,%u,%u %u,%u,%u %u %llu", name, gx, gy, gz, bx, by, bz, shared,
                      (unsigned long long)(uintptr_t)stream);
    if (strncmp(sizes, name, length) || (sizes[length] && sizes[length] != ' ')) return status;
    used--;  // the end of the line
    char* list = sizes + length;
    for (int i = 0; *list; i++) {
        const int bytes = strtol(list, &list, 10);
        used += snprintf(text + used, sizeof(text) - used, " ");
        for (int b = 0; b < bytes; b++)
            used += snprintf(text + used, sizeof(text) - used, "%02x", ((unsigned char*)parameters[i])[b]);
    }
    used += snprintf(text + used, sizeof(text) - used, "\n");
    return status;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    return note("cuMemsetD8Async", " %llu %d %zu %llu", (unsigned long long)to, value, bytes,
                (unsigned long long)(uintptr_t)stream);
}
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* base, const uint64_t* size, const uint64_t* stride,
                           const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int promotion,
                           int fill) {
    static unsigned char made;
    if ((uintptr_t)map % 64) abort();
    memset(map, ++made, 128);
    return note("cuTensorMapEncodeTiled",
                " %d %u %llu %llu,%llu,%llu,%llu %llu,%llu,%llu %u,%u,%u,%u %u,%u,%u,%u %d %d %d %d", type, rank,
                (unsigned long long)(uintptr_t)base, (unsigned long long)size[0], (unsigned long long)size[1],
                (unsigned long long)size[2], (unsigned long long)size[3], (unsigned long long)stride[0],
                (unsigned long long)stride[1], (unsigned long long)stride[2], box[0], box[1], box[2], box[3], step[0],
                step[1], step[2], step[3], interleave, swizzle, promotion, fill);
}
