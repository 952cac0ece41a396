// What a Python selector sees of its set.
#pragma once
#include <optional>

#include "sim/python/arrays.hpp"

namespace kvreplay::python {

// A View, lent for the length of one call: beyond it every access is an exception. Arrays are the caller's own.
class LentView {
 public:
  explicit LentView(int prompt_queries) : prompt_queries_(prompt_queries) {}
  void lend(const View* view) { view_ = view; }  // nullptr: the call is over
  const View& get() const;

  py::array_t<float> attention() const;       // (n_slots)
  py::array_t<float> head_attention() const;  // (n_lanes * n_heads, n_slots)
  py::array_t<float> keys(int lane, const py::object& slots) const;
  py::array_t<float> values(int lane, const py::object& slots) const;
  py::array_t<float> bias(int lane) const;
  py::array_t<float> queries(int lane, int last) const;                   // (last, n_heads, head_dim)
  py::array_t<double> column_mass(const std::optional<int>& last) const;  // (n_lanes * n_heads, prompt_len)

 private:
  void check_lane(int lane) const;
  void check_prompt_queries(const char* what) const;
  std::vector<int> slots_of(const py::object& slots) const;

  const View* view_ = nullptr;
  int prompt_queries_;  // of the prompt's last queries, as many as the selector declared
};

}  // namespace kvreplay::python
