#include "sim/python/active_run.hpp"

#include <fmt/format.h>

#include <stdexcept>
#include <utility>

namespace kvreplay::python {
namespace {

ActiveRun* the_run = nullptr;  // read and written with the GIL held

// The exception with its traceback, as `raise` would show it.
py::object with_traceback(const py::error_already_set& e) {
  py::object value = e.value();
  if (e.trace()) {
    PyException_SetTraceback(value.ptr(), e.trace().ptr());
  }
  return value;
}

// "proto.py:12 in score", the place that raised; empty where Python does not know.
std::string place_of(const py::object& trace) {
  if (!trace || trace.is_none()) {
    return "";
  }
  const py::list frames = py::module_::import("traceback").attr("extract_tb")(trace);
  if (frames.empty()) {
    return "";
  }
  const py::object last = frames[frames.size() - 1];
  return fmt::format(" ({}:{} in {})", py::str(last.attr("filename")).cast<std::string>(),
                     py::str(last.attr("lineno")).cast<std::string>(), py::str(last.attr("name")).cast<std::string>());
}

}  // namespace

ActiveRun::ActiveRun() {
  if (the_run != nullptr) {
    throw std::runtime_error(
        "a run is under way in this process, and there can be one at a time; give it more threads instead");
  }
  the_run = this;
}

ActiveRun::~ActiveRun() { the_run = nullptr; }

ActiveRun* ActiveRun::get() { return the_run; }

std::string ActiveRun::keep(py::error_already_set& e) {
  const py::object value = with_traceback(e);
  const bool ends_the_run = !PyErr_GivenExceptionMatches(value.ptr(), PyExc_Exception);  // KeyboardInterrupt
  if (!error_ || (ends_the_run && !stop)) {
    error_ = value;
  }
  stop = stop || ends_the_run;
  return fmt::format("{}: {}{}", py::str(e.type().attr("__name__")).cast<std::string>(),
                     py::str(value).cast<std::string>(), place_of(e.trace()));
}

void ActiveRun::stop_for(py::error_already_set& e) {
  if (!stop) {
    error_ = with_traceback(e);
    stop = true;
  }
}

}  // namespace kvreplay::python
