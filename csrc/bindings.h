// How an op family puts its functions into mimo_kernels._C: one file bind_<family>.cpp, compiled by the host compiler,
// holding
//
//     static void bind_tokens(pybind11::module_& m) { m.def("gather_rows", ...); }
//     static const mimo::Binding binding(bind_tokens);
//
// Pointers and streams come in as integers (tensor.data_ptr(), torch's stream handle) and a status goes out, so no
// torch header is needed. Functions that launch CUDA kernels stand inside #ifdef MIMO_WITH_CUDA: without nvcc only the
// *.cpp files are compiled.
#pragma once

#include <pybind11/pybind11.h>

namespace mimo {

using BindFunction = void (*)(pybind11::module_&);

class Binding {
public:
    explicit Binding(BindFunction bind);
};

}  // namespace mimo
