// The launchers of all files as functions of mimo_kernels._C, and `launchers`: name -> ((parameter, kind), ...) in
// order. They are called by keyword, with addresses and streams as integers; a failure raises RuntimeError. Written on
// the C API of Python, because a call costs it less than half a microsecond.
#ifdef MIMO_WITH_CUDA

#include <algorithm>
#include <climits>
#include <memory>
#include <string>
#include <vector>

#include "bindings.h"
#include "launcher.h"

namespace py = pybind11;

namespace {

struct Bound {
    const mimo::Launcher* launcher;
    std::vector<PyObject*> names;  // interned
    PyMethodDef method;
};

PyObject* fail(PyObject* type, const Bound& bound, const std::string& what) {
    PyErr_SetString(type, (std::string(bound.launcher->name) + ": " + what).c_str());
    return nullptr;
}

std::string text(PyObject* name) {
    const char* utf8 = PyUnicode_AsUTF8(name);
    return utf8 ? utf8 : "?";
}

// False with a Python error set when the object is not of this kind.
bool convert(PyObject* object, char kind, mimo::Value& value) {
    switch (kind) {
        case 'w':
        case 'r':
            value.address = object == Py_None ? 0 : PyLong_AsUnsignedLongLong(object);
            break;
        case 'p':
            if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2) {
                PyErr_SetString(PyExc_TypeError, "expected a pair of address and number");
                return false;
            }
            return convert(PyTuple_GET_ITEM(object, 0), 'r', value) && convert(PyTuple_GET_ITEM(object, 1), 'l', value);
        case 'f':
            value.real = PyFloat_AsDouble(object);
            break;
        case 'b':
            value.integer = PyObject_IsTrue(object);
            break;
        default:
            value.integer = PyLong_AsLongLong(object);
            if (kind == 'i' && (value.integer > INT_MAX || value.integer < INT_MIN) && !PyErr_Occurred())
                PyErr_SetString(PyExc_OverflowError, "does not fit into 32 bits");
    }
    return !PyErr_Occurred();
}

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t positional, PyObject* keywords) {
    const Bound& bound = *static_cast<const Bound*>(PyCapsule_GetPointer(self, nullptr));
    const Py_ssize_t given = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    const Py_ssize_t wanted = static_cast<Py_ssize_t>(bound.names.size());
    if (positional) return fail(PyExc_TypeError, bound, "takes its arguments by keyword");
    mimo::Value values[mimo::kMostParameters];
    for (Py_ssize_t i = 0; i < wanted; i++) {
        Py_ssize_t at = i;  // whoever writes them in order is found at once
        if (at >= given || PyTuple_GET_ITEM(keywords, at) != bound.names[i]) {
            for (at = 0; at < given; at++) {
                PyObject* keyword = PyTuple_GET_ITEM(keywords, at);
                if (keyword == bound.names[i] || PyUnicode_Compare(keyword, bound.names[i]) == 0) break;
            }
        }
        if (at == given) return fail(PyExc_TypeError, bound, "argument " + text(bound.names[i]) + " is missing");
        if (!convert(arguments[at], bound.launcher->kinds[i], values[i])) {
            PyObject *type, *error, *trace;
            PyErr_Fetch(&type, &error, &trace);
            py::object message = py::reinterpret_steal<py::object>(error ? PyObject_Str(error) : nullptr);
            fail(type, bound, "argument " + text(bound.names[i]) + ": " + (message ? text(message.ptr()) : ""));
            Py_XDECREF(type), Py_XDECREF(error), Py_XDECREF(trace);
            return nullptr;
        }
    }
    if (given > wanted) {
        for (Py_ssize_t at = 0; at < given; at++) {
            bool known = false;
            for (PyObject* name : bound.names) known |= PyUnicode_Compare(PyTuple_GET_ITEM(keywords, at), name) == 0;
            if (!known) return fail(PyExc_TypeError, bound, "has no argument " + text(PyTuple_GET_ITEM(keywords, at)));
        }
    }
    if (int status = bound.launcher->call(values)) return fail(PyExc_RuntimeError, bound, mimo::error_string(status));
    Py_RETURN_NONE;
}

py::tuple words(const std::string& text) {
    py::list parts;
    for (size_t begin = 0, end; begin < text.size(); begin = end + 2) {
        end = std::min(text.find(", ", begin), text.size());
        parts.append(text.substr(begin, end - begin));
    }
    return py::tuple(parts);
}

void bind_launchers(py::module_& m) {
    static std::vector<std::unique_ptr<Bound>> all;  // as long as the process, like the functions
    py::dict described;
    for (const mimo::Launcher* launcher = mimo::launchers(); launcher; launcher = launcher->next) {
        auto& bound = *all.emplace_back(std::make_unique<Bound>());
        bound.launcher = launcher;
        py::list parameters;
        for (py::handle name : words(launcher->parameters)) {
            PyObject* interned = name.inc_ref().ptr();
            PyUnicode_InternInPlace(&interned);
            parameters.append(py::make_tuple(py::reinterpret_borrow<py::object>(interned),
                                             std::string(1, launcher->kinds[bound.names.size()])));
            bound.names.push_back(interned);
        }
        bound.method = {launcher->name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                        METH_FASTCALL | METH_KEYWORDS, launcher->parameters};
        auto self = py::reinterpret_steal<py::object>(PyCapsule_New(&bound, nullptr, nullptr));
        m.attr(launcher->name) = py::reinterpret_steal<py::object>(PyCFunction_New(&bound.method, self.ptr()));
        described[launcher->name] = py::tuple(parameters);
    }
    m.attr("launchers") = described;
}

const mimo::Binding binding(bind_launchers);

}  // namespace

#endif
