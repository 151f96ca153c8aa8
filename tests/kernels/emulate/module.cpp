// The launchers of csrc, run by the block emulator, as a Python module with the names of mimo_kernels._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "async.h"
#include "bindings.h"
#include "emulate.h"
#include "faulty.h"
#include "machine.h"
#include "launcher.h"

namespace mimo {

static std::vector<BindFunction>& bindings() {
    static std::vector<BindFunction> functions;
    return functions;
}

Binding::Binding(BindFunction bind) { bindings().push_back(bind); }

const char* error_string(int status) {
    return status == emulated::kFailed ? emulated::failure().c_str() : "invalid argument";
}

}  // namespace mimo

PYBIND11_MODULE(emulated_kernels, m) {
    using namespace mimo::emulated;
    for (mimo::BindFunction bind : mimo::bindings()) bind(m);
    m.def("set_order", set_order);
    m.def("set_asynchrony", async::set_asynchrony);
    m.def("lend", [](const std::string& name, uintptr_t address, int64_t rows, int64_t row_bytes, int64_t stride,
                     bool writable, uintptr_t storage, size_t storage_bytes) {
        shadow.lend({name, address, rows, row_bytes, stride, writable}, storage, storage_bytes);
    });
    m.def("unwritten", [] { return shadow.unwritten(); });
    m.def("take_back", [] { shadow.clear(); });
    m.def("run_faulty", [](const std::string& name, uintptr_t out, uintptr_t in, int blocks) {
        return run_faulty(name, reinterpret_cast<float*>(out), reinterpret_cast<const float*>(in), blocks) ? failure()
                                                                                                           : "";
    });
    m.def("run_faulty_sm90", [](const std::string& name, uintptr_t out, uintptr_t in) {
        return run_faulty_sm90(name, reinterpret_cast<float*>(out), reinterpret_cast<const void*>(in)) ? failure() : "";
    });
    m.def("to_half", to_half);
    m.def("from_half", from_half);
    m.def("to_bfloat", to_bfloat);
}
