#include "sim/python/view.hpp"

#include <fmt/format.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>

#include "policies/column_mass.hpp"
#include "policies/errors.hpp"
#include "sim/python/bindings.hpp"

namespace kvreplay::python {

const View& LentView::get() const {
  if (view_ == nullptr) {
    throw std::runtime_error("this view was lent for one call of the selector, which is over; keep copies, not views");
  }
  return *view_;
}

void LentView::check_lane(int lane) const {
  if (lane < 0 || lane >= get().n_lanes) {
    throw py::index_error(fmt::format("lane {} does not exist; this set has {}", lane, get().n_lanes));
  }
}

// Which queries of the prompt were read depends on what else runs, so none are shown beyond those declared.
void LentView::check_prompt_queries(const char* what) const {
  if (get().at_prefill() && prompt_queries_ == 0) {
    throw ConfigError(fmt::format(
        "{} of the prompt needs its queries; register the selector with prompt_queries=1 or more, or 'all'", what));
  }
}

py::array_t<float> LentView::attention() const {
  check_prompt_queries("attention");
  auto out = empty_array<float>({std::ssize(get().pos)});
  get().attention(span_of(out));
  return out;
}

py::array_t<float> LentView::head_attention() const {
  check_prompt_queries("head_attention");
  const View& view = get();
  const std::size_t n = view.pos.size();
  auto out = empty_array<float>({view.n_lanes * view.n_heads, std::ssize(view.pos)});
  for (int lane = 0; lane < view.n_lanes; ++lane) {
    for (int head = 0; head < view.n_heads; ++head) {
      view.head_attention(lane, head, span_of(out).subspan(std::size_t(lane * view.n_heads + head) * n, n));
    }
  }
  return out;
}

std::vector<int> LentView::slots_of(const py::object& slots) const {
  const int n = int(get().pos.size());
  std::vector<int> all;
  if (slots.is_none()) {
    all.resize(std::size_t(n));
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  const auto given = py::array::ensure(slots);
  const std::string kind = given ? given.attr("dtype").attr("kind").cast<std::string>() : "";
  if (!given || given.ndim() != 1 || (given.size() > 0 && kind != "i" && kind != "u")) {
    throw py::type_error("slots: expected a list or array of slot numbers, in one dimension");
  }
  for (const py::ssize_t i : py::cast<std::vector<py::ssize_t>>(given)) {
    const py::ssize_t slot = i < 0 ? i + n : i;
    if (slot < 0 || slot >= n) {
      throw py::index_error(fmt::format("slot {} does not exist; this set has {}", i, n));
    }
    all.push_back(int(slot));
  }
  return all;
}

namespace {

// Rows of some slots, one below the other.
template <class Row>
py::array_t<float> rows_of(const std::vector<int>& slots, int width, Row row) {
  auto out = empty_array<float>({std::ssize(slots), width});
  float* at = out.mutable_data();
  for (const int slot : slots) {
    const VecF x = row(slot);
    at = std::copy(x.begin(), x.end(), at);
  }
  return out;
}

}  // namespace

py::array_t<float> LentView::keys(int lane, const py::object& slots) const {
  check_lane(lane);
  return rows_of(slots_of(slots), get().head_dim, [&](int slot) { return get().key(lane, slot); });
}

py::array_t<float> LentView::values(int lane, const py::object& slots) const {
  check_lane(lane);
  return rows_of(slots_of(slots), get().v_head_dim, [&](int slot) { return get().value(lane, slot); });
}

py::array_t<float> LentView::bias(int lane) const {
  check_lane(lane);
  auto out = empty_array<float>({std::ssize(get().pos)});
  for (py::ssize_t i = 0; i < out.size(); ++i) {
    out.mutable_at(i) = get().bias(lane, int(i));
  }
  return out;
}

py::array_t<float> LentView::queries(int lane, int last) const {
  check_lane(lane);
  check_prompt_queries("queries");
  const View& view = get();
  if (last < 1) {
    throw ConfigError(fmt::format("queries: last={} is outside of 1 and more", last));
  }
  const Pos first = prompt_queries_ == Needs::kAll ? 0 : std::max<Pos>(0, view.prompt_len - prompt_queries_);
  const MatF q = view.queries(lane, std::min(last, view.now + 1 - first));
  auto out = empty_array<float>({q.rows() / view.n_heads, view.n_heads, q.cols()});
  std::copy(q.data(), q.data() + q.size(), out.mutable_data());
  return out;
}

py::array_t<double> LentView::column_mass(const std::optional<int>& last) const {
  const View& view = get();
  if (!view.at_prefill()) {
    throw std::runtime_error(
        "column_mass is about the prompt, and there at its end alone: in prefill() and its score()");
  }
  check_prompt_queries("column_mass");
  const int n = last.value_or(prompt_queries_);
  if (n != prompt_queries_ && (n < 1 || (prompt_queries_ != Needs::kAll && n > prompt_queries_))) {
    throw ConfigError(fmt::format("column_mass: last={} is outside of 1 to the {} that the selector declared", n,
                                  prompt_queries_ == Needs::kAll ? view.prompt_len : prompt_queries_));
  }
  const MatD mass = column_mass_of_set(view, n);
  auto out = empty_array<double>({mass.rows(), mass.cols()});
  std::copy(mass.data(), mass.data() + mass.size(), out.mutable_data());
  return out;
}

void bind_view(py::module_& m) {
  py::class_<LentView>(m, "View", R"(A set of slots at one step: what is kept now, present and past only.

A slot is one kept token; slot i is older than slot i + 1. A lane is the set's part in one KV head: a set of
scope="layer" has one for each, any other has one. The view is lent for one call of the selector; used later it
raises RuntimeError. Its arrays are new ones that may be kept and written to.)")
      .def_property_readonly(
          "now", [](const LentView& v) { return v.get().now; }, "position of the current token")
      .def_property_readonly(
          "prompt_len", [](const LentView& v) { return v.get().prompt_len; }, "tokens of the prompt")
      .def_property_readonly(
          "budget", [](const LentView& v) { return v.get().budget; }, "slots this set may keep")
      .def_property_readonly(
          "head_dim", [](const LentView& v) { return v.get().head_dim; }, "width of keys and queries")
      .def_property_readonly(
          "v_head_dim", [](const LentView& v) { return v.get().v_head_dim; }, "width of values")
      .def_property_readonly(
          "n_lanes", [](const LentView& v) { return v.get().n_lanes; }, "KV heads of the set")
      .def_property_readonly(
          "n_heads", [](const LentView& v) { return v.get().n_heads; }, "query heads per lane")
      .def_property_readonly(
          "n_slots", [](const LentView& v) { return v.get().pos.size(); }, "tokens kept now")
      .def_property_readonly(
          "at_prefill", [](const LentView& v) { return v.get().at_prefill(); },
          "True at the prompt's end, False in decode steps")
      .def_property_readonly(
          "pos", [](const LentView& v) { return copy_of<Pos>(v.get().pos); },
          "int32 (n_slots,): positions of the tokens, ascending; the current token is the last")
      .def_property_readonly(
          "rewritten", [](const LentView& v) { return copy_of<Pos>(v.get().rewritten); },
          "int32: positions of tokens whose key or value was rewritten since the previous step")
      .def("attention", &LentView::attention,
           R"(float32 (n_slots,): softmax weights of the current queries over the slots.

Reduced over the set's query heads as its `group` key says (mean, max or sum).)")
      .def("head_attention", &LentView::head_attention,
           "float32 (n_lanes * n_heads, n_slots): the same of each query head, lanes one above the other.")
      .def(
          "keys", &LentView::keys, py::arg("lane") = 0, py::arg("slots") = py::none(),
          "float32 (n_slots, head_dim): keys as stored now, after RoPE; of `slots` alone where given (-1: the newest).")
      .def("values", &LentView::values, py::arg("lane") = 0, py::arg("slots") = py::none(),
           "float32 (n_slots, v_head_dim): values as stored now; of `slots` alone where given.")
      .def("bias", &LentView::bias, py::arg("lane") = 0,
           "float32 (n_slots,): what is added to the slots' logits; 0 unless a rewriter merged tokens.")
      .def("queries", &LentView::queries, py::arg("lane") = 0, py::arg("last") = 1,
           R"(float32 (last, n_heads, head_dim): the last queries up to now, oldest first.

The softmax scale is folded in: logit = q . k. Fewer than `last` where the sequence, or what the selector declared of
the prompt, starts later.)")
      .def("column_mass", &LentView::column_mass, py::arg("last") = py::none(),
           R"(float64 (n_lanes * n_heads, prompt_len): attention that each token of the prompt received.

From the last `last` prompt queries (None: as many as the selector declared), each softmaxed over its own past, summed
over these queries. At the prompt's end alone. Computed once for all methods.)");
}

}  // namespace kvreplay::python
