// The module mimo_kernels._C: what was built, and the functions of every op family (see bindings.h).
#include "bindings.h"

#include <sstream>
#include <string>
#include <vector>

#include "build_info.h"  // written by setup.py

namespace py = pybind11;

namespace mimo {

// A function-local static, because the families register from static initialisers whose order across files is not
// defined.
static std::vector<BindFunction>& bindings() {
    static std::vector<BindFunction> functions;
    return functions;
}

Binding::Binding(BindFunction bind) { bindings().push_back(bind); }

}  // namespace mimo

static py::tuple words(const std::string& text) {
    std::istringstream stream(text);
    py::list parts;
    for (std::string word; stream >> word;) parts.append(word);
    return py::tuple(parts);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled parts of mimo_kernels.";
    m.attr("cuda_archs") = words(MIMO_CUDA_ARCHS);
    m.attr("cuda_reason") = MIMO_CUDA_REASON;
    m.attr("cuda_version") = MIMO_CUDA_VERSION;
    m.attr("cuda_compiler") = MIMO_CUDA_COMPILER;
    for (mimo::BindFunction bind : mimo::bindings()) bind(m);
}
