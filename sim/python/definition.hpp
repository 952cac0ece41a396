// A selector as `register` was told of it, and the Config of one use of it.
#pragma once
#include <pybind11/pybind11.h>

#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "policies/part.hpp"

namespace kvreplay::python {

namespace py = pybind11;

// A Python object that may be let go from any thread.
struct Guest {
  py::object object;
  Guest() = default;
  explicit Guest(py::object o) : object(std::move(o)) {}
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  ~Guest() {
    py::gil_scoped_acquire gil;
    object.release().dec_ref();
  }
};

struct Definition {
  explicit Definition(py::object t) : type(std::move(t)) {}
  Guest type;
  std::string name, summary;
  Traits traits;
  int prompt_queries = 0;
  bool prefill = false, step = false, steps = false, evicted = false;  // which of the optional methods it has
  std::vector<ParamInfo> params;
  std::vector<ParamValue> defaults;  // of params
  std::list<std::string> texts;      // what the names and choices of params point into
  std::list<std::vector<std::string_view>> choices;
};

struct Config {
  std::shared_ptr<const Definition> of;
  std::vector<ParamValue> values;  // of its params
};

std::unique_ptr<Selector> make_selector(const Config&, const SetShape&);

}  // namespace kvreplay::python
