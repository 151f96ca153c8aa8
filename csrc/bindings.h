// How a family of host functions gets into mimo_kernels._C: in its file, compiled by the host compiler,
//
//     static void bind_planner(pybind11::module_& m) { m.def("plan_rows", ...); }
//     static const mimo::Binding binding(bind_planner);
//
// Launchers of CUDA kernels need a row alone, see launcher.h. Without nvcc only the *.cpp files are compiled.
#pragma once

#include <pybind11/pybind11.h>

namespace mimo {

using BindFunction = void (*)(pybind11::module_&);

class Binding {
public:
    explicit Binding(BindFunction bind);
};

}  // namespace mimo
