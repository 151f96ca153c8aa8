// The block emulator: fibres, barriers, shuffles, and the calls that the compiler puts before every load and store of a
// kernel.
#include "machine.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#include "async.h"
#include "emulate.h"
#include "fibres.h"

namespace mimo::emulated {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kHost = -1;  // nobody's turn: the launcher's code runs

struct Fibre {
    jmp_buf point;
    ucontext_t start;
    uintptr_t stack = 0;
    bool started = false, done = true;
    dim3 thread{0, 0, 0};
    int warp = 0, lane = 0;
};

struct Warp {
    uint32_t slot[2][kLanes];
    int lanes = 0;
    Meeting shuffle;
};

struct Machine {
    std::vector<Fibre> fibres;  // grows; a fibre keeps its stack
    std::vector<Warp> warps;
    std::vector<int> order;
    jmp_buf scheduler;
    int current = kHost, threads = 0, alive = 0;
    Meeting barrier;
    uint64_t progress = 0;
    void (*kernel)(const void*) = nullptr;
    const void* arguments = nullptr;
    size_t argument_bytes = 0;
    std::vector<char> shared;
    char* shared_begin = nullptr;  // in it, at a multiple of kSharedAlignment
    bool asynchronous = false;
    std::string failure;
    std::vector<void*> where;  // it happened: return addresses, innermost first
    dim3 where_thread{0, 0, 0};
    int order_seed = 0;
    dim3 block_index{0, 0, 0}, block_size{0, 0, 0}, grid_size{0, 0, 0};
};
static Machine machine;
Shadow shadow;

static Fibre& self() { return machine.fibres[machine.current]; }

static void leave() { _longjmp(machine.scheduler, 1); }

void wait() {
    if (!_setjmp(self().point)) leave();
}

void progress() { machine.progress++; }
int current_thread() { return machine.current; }
int thread_count() { return machine.threads; }
bool ended(int thread) { return machine.fibres[thread].done; }
char* shared_begin() { return machine.shared_begin; }

void fail(const std::string& message) {
    if (machine.current == kHost) {  // found between the turns of the fibres
        if (machine.failure.empty()) machine.failure = message;
        return;
    }
    machine.failure = message;
    machine.where_thread = self().thread;
    machine.where.resize(64);
    machine.where.resize(backtrace(machine.where.data(), machine.where.size()));
    leave();
    std::abort();
}

// ---- what a kernel calls ----

dim3 thread_index() { return self().thread; }
dim3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block_size; }
dim3 grid_size() { return machine.grid_size; }
int lane() { return self().lane; }
void stop(const char* message) { fail(message); }

bool meet(Meeting& meeting, int all, Place place) {
    if (meeting.arrived > 0 && meeting.place != place)
        fail("threads that have to meet wait at different barriers or shuffles");
    const unsigned round = meeting.round;
    meeting.place = place;
    machine.progress++;
    if (++meeting.arrived == all) {
        meeting.arrived = 0;
        meeting.round++;
        return true;
    }
    while (meeting.round == round) wait();
    return false;
}

void sync_threads(Place place) {
    if (machine.alive < machine.threads) fail("a barrier that some threads never reach: they have ended");
    if (meet(machine.barrier, machine.threads, place)) {
        shadow.barrier();
        if (machine.asynchronous) async::join(0, machine.threads);
    }
}

// Every lane puts in a value; all 32 have to come.
uint32_t shuffle_bits(unsigned mask, uint32_t value, int source, Place place) {
    if (mask != 0xffffffffu) fail("a warp shuffle names only some of the lanes");
    Warp& warp = machine.warps[self().warp];
    if (warp.lanes != kLanes) fail("a warp shuffle in a block that is not made of whole warps");
    uint32_t* const slot = warp.slot[warp.shuffle.round % 2];  // two in turn: nobody can be two rounds ahead
    slot[self().lane] = value;
    meet(warp.shuffle, kLanes, place);
    return slot[source];
}

// ---- the accesses of a kernel ----

static void access(const void* p, size_t bytes, bool write, size_t alignment) {
    if (machine.current == kHost) return;
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address - self().stack < kStackBytes) {
        if (machine.asynchronous) async::touch_registers(address, bytes, write);
        return;
    }
    if (!write && address - reinterpret_cast<uintptr_t>(machine.arguments) < machine.argument_bytes) return;
    if (address % alignment)
        fail("a misaligned access: " + std::to_string(bytes) + " bytes at " + shadow.name(address));
    const uintptr_t shared = address - reinterpret_cast<uintptr_t>(machine.shared_begin);
    // What lies behind it in our own buffer is its, too; behind the buffer other operands may begin.
    const size_t ours = machine.shared.data() + machine.shared.size() - machine.shared_begin;
    const std::string wrong = machine.asynchronous && shared < ours
                                  ? async::touch_shared(shared, bytes, write)
                                  : shadow.access(address, bytes, write, machine.current);
    if (!wrong.empty()) fail(wrong);
}

#define MIMO_HOOK(bytes)                                                                  \
    extern "C" void __tsan_read##bytes(void* p) { access(p, bytes, false, bytes); }       \
    extern "C" void __tsan_write##bytes(void* p) { access(p, bytes, true, bytes); }       \
    extern "C" void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, 1); } \
    extern "C" void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, 1); }
MIMO_HOOK(1)
MIMO_HOOK(2)
MIMO_HOOK(4)
MIMO_HOOK(8)
MIMO_HOOK(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false, 1); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true, 1); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
// Clang turns copies of structs into these.
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    access(from, bytes, false, 1);
    access(to, bytes, true, 1);
    return std::memcpy(to, from, bytes);
}
extern "C" void* __tsan_memset(void* to, int value, size_t bytes) {
    access(to, bytes, true, 1);
    return std::memset(to, value, bytes);
}

// ---- the scheduler ----

static void fibre_main() {
    for (;;) {
        machine.kernel(machine.arguments);
        if (machine.barrier.arrived > 0) fail("a barrier that some threads never reach: they have ended");
        self().done = true;
        machine.alive--;
        machine.progress++;
        wait();
    }
}

static void resume(int index) {
    machine.current = index;
    if (_setjmp(machine.scheduler)) {
        machine.current = kHost;
        return;
    }
    Fibre& fibre = self();
    if (fibre.started) _longjmp(fibre.point, 1);
    if (fibre.stack == 0) {
        void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) std::abort();
        fibre.stack = reinterpret_cast<uintptr_t>(stack);
    }
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = reinterpret_cast<void*>(fibre.stack);
    fibre.start.uc_stack.ss_size = kStackBytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, fibre_main, 0);
    fibre.started = true;
    setcontext(&fibre.start);
}

static void run_block() {
    machine.barrier.arrived = 0;
    machine.alive = machine.threads;
    for (Warp& warp : machine.warps) warp.shuffle.arrived = 0;
    for (int i = 0; i < machine.threads; i++) machine.fibres[i].done = false;
    shadow.begin_block();
    if (machine.asynchronous) async::begin_block();
    while (machine.alive > 0) {
        const uint64_t before = machine.progress;
        for (int i : machine.order) {
            if (machine.fibres[i].done) continue;
            resume(i);
            if (!machine.failure.empty()) return;
        }
        if (machine.asynchronous && machine.alive > 0) async::between_rounds(machine.progress == before);
        if (!machine.failure.empty()) return;
        if (machine.progress == before) {
            machine.failure = "threads wait for a barrier or a shuffle that the others never reach";
            return;
        }
    }
    if (machine.asynchronous) async::end_block();
}

static std::string coordinates(dim3 p) {
    return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
}

// Which thread failed, and its lines of the kernels' sources, innermost first: "at common.cuh:46 < modulate.cu:109".
static std::string whereabouts() {
    Dl_info library;
    if (machine.where.empty() || !dladdr(reinterpret_cast<void*>(&fibre_main), &library)) return "";
    std::string command = "addr2line -i -s -e '" + std::string(library.dli_fname) + "'", lines;
    for (void* address : machine.where) {
        char offset[24];
        std::snprintf(offset, sizeof(offset), " %#tx",
                      static_cast<char*>(address) - static_cast<char*>(library.dli_fbase) - 1);
        command += offset;
    }
    FILE* const pipe = popen((command + " 2>/dev/null").c_str(), "r");
    if (pipe == nullptr) return "";
    char line[512];
    while (std::fgets(line, sizeof(line), pipe)) {
        const std::string text(line, std::strcspn(line, " \n"));
        if (text.find(".cu") != std::string::npos) lines += (lines.empty() ? " at " : " < ") + text;
    }
    pclose(pipe);
    return "; thread " + coordinates(machine.where_thread) + " of block " + coordinates(machine.block_index) + lines;
}

int run(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void*), const void* arguments,
        size_t argument_bytes, bool asynchronous) {
    machine.failure.clear();
    machine.where.clear();
    machine.kernel = kernel;
    machine.arguments = arguments;
    machine.argument_bytes = argument_bytes;
    machine.grid_size = grid;
    machine.block_size = block;
    machine.threads = block.x * block.y * block.z;
    if (machine.threads < 1 || machine.threads > 1024)
        machine.failure = "a block of " + std::to_string(machine.threads) + " threads";
    machine.asynchronous = asynchronous;
    if (shared_bytes > (asynchronous ? kMostShared : size_t{48 << 10}))
        machine.failure = std::to_string(shared_bytes) + " bytes of shared memory";
    if (!machine.failure.empty()) return kFailed;
    if (static_cast<int>(machine.fibres.size()) < machine.threads) machine.fibres.resize(machine.threads);
    machine.warps.assign((machine.threads + kLanes - 1) / kLanes, Warp{});
    for (int i = 0; i < machine.threads; i++) {
        Fibre& fibre = machine.fibres[i];
        fibre.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
        fibre.warp = i / kLanes;
        fibre.lane = i % kLanes;
        machine.warps[fibre.warp].lanes++;
    }
    machine.order.resize(machine.threads);
    std::iota(machine.order.begin(), machine.order.end(), 0);
    if (machine.order_seed == 1) std::reverse(machine.order.begin(), machine.order.end());
    if (machine.order_seed > 1)
        std::shuffle(machine.order.begin(), machine.order.end(), std::mt19937(machine.order_seed));
    machine.shared.resize(shared_bytes + 2 * kSharedAlignment);
    const auto unaligned = reinterpret_cast<uintptr_t>(machine.shared.data());
    machine.shared_begin = machine.shared.data() + (kSharedAlignment - unaligned % kSharedAlignment);
    shadow.begin_launch(reinterpret_cast<uintptr_t>(machine.shared_begin), shared_bytes);
    if (asynchronous) async::begin_launch(machine.threads, shared_bytes);
    for (uint64_t b = 0; b < uint64_t{grid.x} * grid.y * grid.z && machine.failure.empty(); b++) {
        machine.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (uint64_t{grid.x} * grid.y));
        run_block();
    }
    if (machine.failure.empty()) return 0;
    machine.failure += whereabouts();
    for (Fibre& fibre : machine.fibres) fibre.started = false;  // the others stopped half-way: begin them anew
    return kFailed;
}

void set_order(int seed) { machine.order_seed = seed; }
const std::string& failure() { return machine.failure; }

// ---- 16-bit floats ----

uint16_t to_half(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7fffu;
    if (magnitude >= 65520.f) return sign | 0x7c00u;
    if (magnitude < 6.103515625e-05f)
        return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.f));  // steps of 2^-24
    const uint32_t rest = bits & 0x7fffffffu;
    return sign | static_cast<uint16_t>((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

float from_half(uint16_t half) {
    const float sign = half & 0x8000u ? -1.f : 1.f;
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
    return sign * std::ldexp(1.f + mantissa / 1024.f, exponent - 15);
}

uint16_t to_bfloat(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (std::isnan(value)) return 0x7fffu;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace mimo::emulated

namespace mimo {

float* shared_memory() { return reinterpret_cast<float*>(emulated::machine.shared_begin); }

uint4 load16(const void* p) {
    emulated::access(p, 16, false, 16);
    return *static_cast<const uint4*>(p);
}

void store16(void* p, uint4 value) {
    emulated::access(p, 16, true, 16);
    *static_cast<uint4*>(p) = value;
}

int fill_bytes(void* data, int value, size_t bytes, void*) {
    emulated::machine.failure = emulated::shadow.fill(reinterpret_cast<uintptr_t>(data), bytes);
    if (!emulated::machine.failure.empty()) return emulated::kFailed;
    std::memset(data, value, bytes);
    return 0;
}

}  // namespace mimo
