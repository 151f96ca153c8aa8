// What the module says of the driver and of the device code in it.
#ifdef MIMO_WITH_CUDA

#include "bindings.h"
#include "driver.h"

namespace py = pybind11;

namespace {

// (source, target, contents) of everything that embed.py has put into the module.
py::list device_code() {
    py::list all;
    for (int s = 0; s < mimo::driver::kSources; s++) {
        const mimo::driver::Source& source = *mimo::driver::kAllSources[s];
        for (int t = 0; t < mimo::driver::kTargets; t++) {
            const mimo::driver::Image& image = source.images[t];
            all.append(py::make_tuple(source.name, image.target, py::bytes(image.begin, image.end - image.begin)));
        }
    }
    return all;
}

void bind_driver(py::module_& m) {
    m.def("driver_version", mimo::driver::version);
    m.def("device_code", device_code);
}

const mimo::Binding binding(bind_driver);

}  // namespace

#endif
