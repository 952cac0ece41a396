#include "sim/python/results.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "policies/help.hpp"
#include "sim/python/arrays.hpp"
#include "sim/python/bindings.hpp"

namespace kvreplay::python {
namespace {

using CellPtr = std::shared_ptr<Cell>;
using Name = std::optional<std::string>;

std::string name_of(const Series& s) { return std::string(info(s.metric).name); }
std::string compensator_of(const Cell& cell, const Series& s) {
  return s.compensator < 0 ? "" : cell.result.compensators[std::size_t(s.compensator)];
}

std::vector<std::string> metrics_of(const Cell& cell) {
  std::vector<std::string> names;
  for (const Series& s : cell.result.series) {
    if (std::find(names.begin(), names.end(), name_of(s)) == names.end()) {
      names.push_back(name_of(s));
    }
  }
  return names;
}

// The one series that is meant; ConfigError says what there is where none or more than one are.
const Series& find(const Cell& cell, const std::string& metric, const Name& compensator, const Name& span) {
  std::vector<const Series*> found;
  std::vector<std::string> choices;
  for (const Series& s : cell.result.series) {
    if (name_of(s) != metric) {
      continue;
    }
    const std::string of = compensator_of(cell, s);
    choices.push_back(of.empty() ? "span='" + s.span + "'" : "compensator='" + of + "'");
    if ((!compensator || *compensator == of) && (!span || *span == s.span)) {
      found.push_back(&s);
    }
  }
  if (found.size() == 1) {
    return *found.front();
  }
  if (choices.empty()) {
    const std::vector<std::string> names = metrics_of(cell);
    throw ConfigError(fmt::format("'{}' was not measured; the nearest is '{}' of {}", metric, nearest(metric, names),
                                  fmt::join(names, ", ")));
  }
  throw ConfigError(fmt::format("{} series of {} {} meant; say one of {}", found.empty() ? "no" : "more than one",
                                metric, found.empty() ? "is" : "are", fmt::join(choices, ", ")));
}

py::array series(const CellPtr& cell, const std::string& metric, const Name& compensator, const Name& span) {
  const Series& s = find(*cell, metric, compensator, span);
  return array_over(s.values.data(), {s.rows, s.n_steps}, py::cast(cell));
}

py::array_t<int> steps(const CellPtr& cell, const std::string& metric, const Name& compensator, const Name& span) {
  const Series& s = find(*cell, metric, compensator, span);
  if (!s.steps.empty()) {
    return copy_of<int>(s.steps);
  }
  auto all = empty_array<int>({s.n_steps});
  for (int i = 0; i < s.n_steps; ++i) {
    all.mutable_at(i) = i;
  }
  return all;
}

py::object mean(const CellPtr& cell, const std::string& metric, const Name& compensator, const Name& span) {
  return py::float_(statistics(find(*cell, metric, compensator, span).values).mean);
}

py::array_t<std::int32_t> evicted_at(const CellPtr& cell) {
  const auto& sets = cell->result.evicted_at;
  auto all = empty_array<std::int32_t>({std::ssize(sets), sets.empty() ? 0 : std::ssize(sets[0])});
  std::int32_t* at = all.mutable_data();
  for (const auto& set : sets) {
    at = std::copy(set.begin(), set.end(), at);
  }
  return all;
}

py::object acting(const CellPtr& cell) {
  const CellResult& r = cell->result;
  return r.acting < 0 ? py::none() : py::object(py::str(r.compensators[std::size_t(r.acting)]));
}

std::string foresight_of(const Cell& cell) { return std::string(foresight_name(cell.id.foresight)); }

// The columns of summary.csv, a list each.
py::dict to_dict(const Results& results) {
  static constexpr const char* kColumns[] = {"trace",  "layer",       "kv_head",   "q_head", "method", "label",
                                             "budget", "compensator", "foresight", "metric", "n",      "n_skipped",
                                             "mean",   "std",         "p50",       "p90",    "p99",    "max"};
  py::dict table;
  std::vector<py::list> columns;
  for (const char* name : kColumns) {
    table[name] = columns.emplace_back();
  }
  for (const CellPtr& cell : results.cells) {
    const CellId& id = cell->id;
    const int group_size = id.n_heads / id.n_kv_heads;
    for (const Series& s : cell->result.series) {
      const Level level = info(s.metric).level;
      for (int r = 0; r < s.rows; ++r) {
        const Statistics st = statistics(s.row(r));
        std::size_t column = 0;
        const auto put = [&](const auto& x) { columns[column++].append(x); };
        const auto put_head = [&](bool there, int head) { there ? put(head) : put(py::none()); };
        put(id.trace);
        put(id.layer);
        put_head(level != Level::layer, level == Level::query_head ? r / group_size : r);
        put_head(level == Level::query_head, r);
        put(id.method);
        put(id.label);
        put(id.budget);
        put(compensator_of(*cell, s));
        put(foresight_of(*cell));
        put(name_of(s) + (s.span.empty() ? "" : ":" + s.span));
        put(st.n);
        put(st.n_skipped);
        for (const double x : {st.mean, st.std, st.p50, st.p90, st.p99, st.max}) {
          put(x);
        }
      }
    }
  }
  return table;
}

CellPtr at(const Results& results, py::ssize_t i) {
  const auto n = std::ssize(results.cells);
  if (i < -n || i >= n) {
    throw py::index_error(fmt::format("cell {} does not exist; there are {}", i, n));
  }
  return results.cells[std::size_t(i < 0 ? i + n : i)];
}

std::string describe_cell(const Cell& cell) {
  return fmt::format("<kvreplay.Cell {} layer {}, {}{}>", cell.id.trace, cell.id.layer, cell.id.label,
                     cell.id.budget.empty() ? "" : " at budget " + cell.id.budget);
}

}  // namespace

void bind_results(py::module_& m) {
  const auto id = [](auto member) { return [member](const Cell& cell) { return cell.id.*member; }; };
  py::class_<Cell, CellPtr>(m, "Cell", "One method at one budget on one layer of one trace.")
      .def_property_readonly("trace", id(&CellId::trace), "the trace's file stem")
      .def_property_readonly("layer", id(&CellId::layer), "the model's own layer number")
      .def_property_readonly("method", id(&CellId::method), "canonical: presets expanded, defaults omitted")
      .def_property_readonly("label", id(&CellId::label), "the method as it was written")
      .def_property_readonly("budget", id(&CellId::budget), "as asked for; empty for a method without one")
      .def_property_readonly("budget_tokens", id(&CellId::budget_tokens),
                             "tokens per set, mean over the layer's sets; -1: none")
      .def_property_readonly("group", id(&CellId::group), "evictable, pinned or selection")
      .def_property_readonly("prompt_len", id(&CellId::prompt_len), "tokens of the prompt")
      .def_property_readonly("n_heads", id(&CellId::n_heads), "query heads")
      .def_property_readonly("n_kv_heads", id(&CellId::n_kv_heads), "KV heads")
      .def_property_readonly("foresight", &foresight_of, "'oracle' where the method saw later steps, else 'none'")
      .def_property_readonly(
          "n_steps", [](const Cell& c) { return c.result.n_steps; }, "decode steps")
      .def_property_readonly(
          "seconds", [](const Cell& c) { return c.result.seconds; }, "this method's own cost, summed over threads")
      .def_property_readonly(
          "compensators", [](const Cell& c) { return c.result.compensators; }, "those measured, as canonical texts")
      .def_property_readonly("acting", &acting, "the compensator that acts on the method's output, or None")
      .def_property_readonly("metrics", &metrics_of, "names of what was measured")
      .def_property_readonly("evicted_at", &evicted_at,
                             "int32 (n_sets, n_tokens): first decode step without the token; 0 = cut at the prompt, "
                             "n_steps = never")
      .def("series", &series, py::arg("metric"), py::kw_only(), py::arg("compensator") = py::none(),
           py::arg("span") = py::none(),
           R"(float32 (rows, n): a metric over time, read-only and without a copy.

Rows are query heads, KV heads, or the layer; columns are the decode steps steps(metric) names. NaN: did not count.
`compensator` and `span` say which, where there are several. ValueError names what was measured.)")
      .def("steps", &steps, py::arg("metric"), py::kw_only(), py::arg("compensator") = py::none(),
           py::arg("span") = py::none(), "int32 (n,): the decode steps that the columns of series(metric) are.")
      .def("mean", &mean, py::arg("metric"), py::kw_only(), py::arg("compensator") = py::none(),
           py::arg("span") = py::none(), "Mean over all rows and steps that count; NaN where none do.")
      .def("__repr__", &describe_cell);

  py::class_<Results, std::shared_ptr<Results>>(m, "Results", "The cells of a run, in the order they were finished.")
      .def_readonly("cells", &Results::cells, "list of Cell")
      .def_readonly("failed", &Results::failed, "one sentence for each cell or trace that failed")
      .def("to_dict", &to_dict, R"(The columns of summary.csv as lists: pandas.DataFrame(results.to_dict()).

One row per cell, metric and head; None where a row has no head, NaN where nothing counted.)")
      .def("__len__", [](const Results& r) { return r.cells.size(); })
      .def("__getitem__", &at)
      .def("__iter__", [](const Results& r) { return py::iter(py::cast(r.cells)); });
}

}  // namespace kvreplay::python
