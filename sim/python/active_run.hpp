// The run under way. There is at most one: parts are looked up while it parses, and its selectors need to know it.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>

namespace kvreplay::python {

namespace py = pybind11;

class ActiveRun {
 public:
  ActiveRun();  // std::runtime_error where there is one already
  ~ActiveRun();
  ActiveRun(const ActiveRun&) = delete;
  ActiveRun& operator=(const ActiveRun&) = delete;
  static ActiveRun* get();  // nullptr: none

  // An exception of the user's code, as one sentence; the first is kept. Ctrl-C and the like stop the run. All with
  // the GIL held.
  std::string keep(py::error_already_set&);
  // The exception that stopped the run, or nothing; the one that a failed cell is due to, or nothing.
  py::object stopped_by() const { return stop ? error_ : py::object(); }
  py::object error() const { return error_; }
  // Ends the run at its next block for this exception.
  void stop_for(py::error_already_set&);

  std::atomic<bool> stop = false;

 private:
  py::object error_;
};

}  // namespace kvreplay::python
