// The pieces of the module, each bound where it is written.
#pragma once
#include <pybind11/pybind11.h>

namespace kvreplay::python {

void bind_trace(pybind11::module_&);
void bind_view(pybind11::module_&);
void bind_selectors(pybind11::module_&);
void bind_results(pybind11::module_&);
void bind_run(pybind11::module_&);

}  // namespace kvreplay::python
