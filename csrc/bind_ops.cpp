// Python names of the operators in ops.h: same arguments, pointers and streams as integers; a failure raises
// RuntimeError.
#ifdef MIMO_WITH_CUDA

#include <stdexcept>
#include <string>
#include <type_traits>

#include "bindings.h"
#include "ops.h"

namespace {

template <class T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <class T>
T to_cpp(FromPython<T> value) {
    if constexpr (std::is_pointer_v<T>)
        return reinterpret_cast<T>(value);
    else
        return value;
}

template <class... Parameters>
void bind(pybind11::module_& m, const char* name, int (*function)(Parameters...)) {
    m.def(name, [name, function](FromPython<Parameters>... values) {
        if (int status = function(to_cpp<Parameters>(values)...)) {
            throw std::runtime_error(std::string(name) + ": " + mimo::error_string(status));
        }
    });
}

void bind_ops(pybind11::module_& m) {
    m.def("driver_version", mimo::driver_version);
    bind(m, "gather_rows", mimo::gather_rows);
    bind(m, "scatter_rows", mimo::scatter_rows);
    bind(m, "hole_sum", mimo::hole_sum);
    bind(m, "modulate_forward", mimo::modulate_forward);
    bind(m, "modulate_backward", mimo::modulate_backward);
    bind(m, "qk_norm_rope_forward", mimo::qk_norm_rope_forward);
    bind(m, "qk_norm_rope_backward", mimo::qk_norm_rope_backward);
    bind(m, "bias_gelu_forward", mimo::bias_gelu_forward);
    bind(m, "bias_gelu_backward", mimo::bias_gelu_backward);
    bind(m, "squared_error_forward", mimo::squared_error_forward);
    bind(m, "squared_error_backward", mimo::squared_error_backward);
}

const mimo::Binding binding(bind_ops);

}  // namespace

#endif
