// numpy arrays of what the engine computes.
#pragma once
#include <pybind11/numpy.h>

#include <algorithm>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay::python {

namespace py = pybind11;
using Sizes = std::vector<py::ssize_t>;

// pybind11 2.10 asks a dtype for its size where numpy 1 had it; array_t of a shape knows it, so all arrays are made so.

// An array over memory that `owner` keeps alive: read-only, nothing is copied.
template <class T>
py::array_t<T> array_over(const T* data, const Sizes& shape, py::handle owner) {
  py::array_t<T> array(shape, data, owner);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

template <class T>
py::array_t<T> empty_array(const Sizes& shape) {
  return py::array_t<T>(shape);
}

template <class T>
std::span<T> span_of(py::array_t<T>& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

template <class T>
py::array_t<T> copy_of(std::span<const T> values) {
  auto array = empty_array<T>({std::ssize(values)});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

}  // namespace kvreplay::python
