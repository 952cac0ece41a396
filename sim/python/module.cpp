// `import kvreplay`: traces, methods and results for Python, and selectors written in it.
#include <pybind11/pybind11.h>

#include "policies/errors.hpp"
#include "sim/policies_json.hpp"
#include "sim/python/bindings.hpp"
#include "sim/version.hpp"
#include "traces/errors.hpp"

namespace py = pybind11;

PYBIND11_MODULE(kvreplay, m) {
  m.doc() = R"(Replays KV-cache compression methods on recorded traces.

    trace = kvreplay.open("t.h5")
    results = kvreplay.run(trace, ["h2o", "snapkv"], budgets=[64, 128])
    results[0].mean("error")

docs/python.md has the rest, and a selector written in Python.)";
  m.attr("__version__") = std::string(kvreplay::kVersion);

  py::register_exception<kvreplay::ConfigError>(m, "ConfigError", PyExc_ValueError).attr("__doc__") =
      "A method, key or argument that cannot be used as given; the message says what is allowed.";
  py::register_exception<kvreplay::TraceError>(m, "TraceError", PyExc_OSError).attr("__doc__") =
      "What is wrong with a trace: file, dataset, what was expected and what was found.";

  kvreplay::python::bind_trace(m);
  kvreplay::python::bind_view(m);
  kvreplay::python::bind_selectors(m);
  kvreplay::python::bind_results(m);
  kvreplay::python::bind_run(m);

  m.def(
      "policies",
      [](const std::string& name) { return py::module_::import("json").attr("loads")(kvreplay::policies_json(name)); },
      py::arg("name") = "",
      R"(Parts and presets as dicts: keys with type, default and bounds, papers, deviations, needs.

Of one by its name; without it {"parts": [...], "presets": [...]}. ConfigError names the nearest.)");
}
