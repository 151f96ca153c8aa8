// How a launcher, a function of the host that starts kernels, becomes a function of mimo_kernels._C: one row below its
// definition, with the names by which Python calls its parameters.
//
//     int scale_rows(void* y, const void* x, int64_t rows, int dim, int dtype, int device, void* stream) { ... }
//     MIMO_LAUNCHER(scale_rows, y, x, rows, dim, dtype, device, stream)
//
// A launcher returns a status; 0 is success. Pointers are device pointers to contiguous rows, 16-byte aligned unless
// said otherwise; a null pointer stands for an operand that is not there. dtype: 0 float, 1 half, 2 bfloat16. device:
// its index. stream: a cudaStream_t. Whatever is not const is written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mimo {

// Rows that lie `stride` values apart; in Python a pair. A null pointer: not there.
struct Rows {
    const void* data;
    int64_t stride;
};

// A list of numbers on the device; in Python a pair of address and length.
struct List {
    const int* data;
    int64_t size;
};

}  // namespace mimo

// ---- what a binding needs to know of a launcher ----

#ifdef __CUDACC__
#define MIMO_LAUNCHER(...)
#else

#include <utility>

namespace mimo {

const char* error_string(int status);

struct Value {
    uintptr_t address;
    int64_t integer;
    double real;
};

// The kinds of parameters: 'w' and 'r' pointers to what is written and read, 'p' a pair of pointer and number, both
// read; 'i' and 'l' int and int64_t, 'b' bool, 'f' float.
template <class T>
struct Parameter {
    static_assert(sizeof(T) == 0, "a launcher takes pointers, Rows, List, int, int64_t, bool and float");
};
template <class T>
struct Parameter<T*> {
    static constexpr char kind = 'w';
    static T* from(const Value& v) { return reinterpret_cast<T*>(v.address); }
};
template <class T>
struct Parameter<const T*> {
    static constexpr char kind = 'r';
    static const T* from(const Value& v) { return reinterpret_cast<const T*>(v.address); }
};
template <>
struct Parameter<Rows> {
    static constexpr char kind = 'p';
    static Rows from(const Value& v) { return {reinterpret_cast<const void*>(v.address), v.integer}; }
};
template <>
struct Parameter<List> {
    static constexpr char kind = 'p';
    static List from(const Value& v) { return {reinterpret_cast<const int*>(v.address), v.integer}; }
};
template <>
struct Parameter<int> {
    static constexpr char kind = 'i';
    static int from(const Value& v) { return static_cast<int>(v.integer); }
};
template <>
struct Parameter<int64_t> {
    static constexpr char kind = 'l';
    static int64_t from(const Value& v) { return v.integer; }
};
template <>
struct Parameter<bool> {
    static constexpr char kind = 'b';
    static bool from(const Value& v) { return v.integer != 0; }
};
template <>
struct Parameter<float> {
    static constexpr char kind = 'f';
    static float from(const Value& v) { return static_cast<float>(v.real); }
};

constexpr int kMostParameters = 48;

struct Launcher {
    const char* name;
    const char* parameters;  // names, separated by ", "
    const char* kinds;       // one letter each
    int (*call)(const Value*);
    const Launcher* next;
};

// The launchers of all files, the latest first.
inline const Launcher*& launchers() {
    static const Launcher* first = nullptr;
    return first;
}

template <class Function>
struct Signature;
template <class... Parameters>
struct Signature<int (*)(Parameters...)> {
    static constexpr size_t size = sizeof...(Parameters);
    static constexpr char kinds[] = {Parameter<Parameters>::kind..., '\0'};

    template <int (*function)(Parameters...), size_t... I>
    static int call(const Value* values, std::index_sequence<I...>) {
        return function(Parameter<Parameters>::from(values[I])...);
    }
    template <int (*function)(Parameters...)>
    static int call(const Value* values) {
        return call<function>(values, std::make_index_sequence<size>{});
    }
};

constexpr size_t count_names(const char* text) {
    size_t count = 1;
    for (; *text; text++) count += *text == ',';
    return count;
}

class LauncherRow {
public:
    explicit LauncherRow(Launcher launcher) : launcher_(launcher) {
        launcher_.next = launchers();
        launchers() = &launcher_;
    }

private:
    Launcher launcher_;
};

}  // namespace mimo

#define MIMO_LAUNCHER(function, ...)                                                                       \
    static_assert(mimo::count_names(#__VA_ARGS__) == mimo::Signature<decltype(&function)>::size,           \
                  #function ": as many names as parameters");                                              \
    static_assert(mimo::Signature<decltype(&function)>::size <= mimo::kMostParameters, "kMostParameters"); \
    static const mimo::LauncherRow function##_row({#function, #__VA_ARGS__,                                \
                                                   mimo::Signature<decltype(&function)>::kinds,            \
                                                   mimo::Signature<decltype(&function)>::call<function>, nullptr});
#endif
