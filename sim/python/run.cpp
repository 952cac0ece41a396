// kvreplay.run: a RunRequest from Python values, and a run that Python can interrupt.
#include "sim/run.hpp"

#include <fmt/format.h>
#include <pybind11/stl.h>

#include <optional>
#include <thread>

#include "policies/method.hpp"
#include "sim/python/active_run.hpp"
#include "sim/python/bindings.hpp"
#include "sim/python/results.hpp"

namespace kvreplay::python {
namespace {

constexpr const char* kCompensators = "mean,moments,gaussian";  // as `kvreplay run` has it

// One value, or a list or other iterable of values.
std::vector<py::object> values_of(const py::object& given) {
  std::vector<py::object> all;
  if (given.is_none()) {
    return all;
  }
  if (py::isinstance<py::str>(given) || !py::hasattr(given, "__iter__")) {
    return {given};
  }
  for (const py::handle& value : given) {
    all.push_back(py::reinterpret_borrow<py::object>(value));
  }
  return all;
}

std::string text_of(const py::object& value) { return py::str(value).cast<std::string>(); }

// Texts of one or more elements each: "h2o,snapkv" or ["h2o", "snapkv"].
std::vector<std::string> texts_of(const py::object& given) {
  std::vector<std::string> all;
  for (const py::object& value : values_of(given)) {
    for (std::string& text : split_methods(text_of(value))) {
      all.push_back(std::move(text));
    }
  }
  return all;
}

std::vector<std::filesystem::path> paths_of(const py::object& given) {
  const py::object fspath = py::module_::import("os").attr("fspath");
  std::vector<std::filesystem::path> all;
  const bool one = py::hasattr(given, "__fspath__");  // a path, or a Trace
  for (const py::object& value : one ? std::vector<py::object>{given} : values_of(given)) {
    all.emplace_back(text_of(fspath(value)));
  }
  return all;
}

std::vector<int> layers_of(const py::object& given) {
  std::vector<int> all;
  for (const py::object& value : values_of(given)) {
    const std::vector<int> some = parse_integers("layers", text_of(value));
    all.insert(all.end(), some.begin(), some.end());
  }
  if (all.empty() && !given.is_none()) {
    throw ConfigError("layers is empty; leave it out for all layers");
  }
  return all;
}

int at_least(const char* name, int least, int value) {
  if (value < least) {
    throw ConfigError(fmt::format("{}={} is outside of {} and more", name, value, least));
  }
  return value;
}

// Raises RunError with what did succeed, because of the exception that made a cell fail, if there was one.
[[noreturn]] void raise_failed(const py::handle& type, const std::shared_ptr<Results>& results,
                               const py::object& cause) {
  const std::size_t n = results->failed.size();
  py::object error = type(results->failed[0] +
                          (n > 1 ? fmt::format(" (and {} more, listed in the error's results.failed)", n - 1) : ""));
  error.attr("results") = results;
  if (cause) {
    error.attr("__cause__") = cause;
  }
  PyErr_SetObject(type.ptr(), error.ptr());
  throw py::error_already_set();
}

struct Options {
  py::object traces, methods, budgets, compensators, metrics, layers;
  std::optional<int> prompt_len, max_steps;
  int threads, checkpoints;
  std::uint64_t seed;
  py::object memory, progress;
};

RunRequest request_of(const Options& o) {
  RunRequest r;
  r.traces = paths_of(o.traces);
  r.methods = texts_of(o.methods);
  r.budgets = texts_of(o.budgets);
  r.compensators = texts_of(o.compensators);
  r.compensators_given = r.compensators != split_methods(kCompensators);
  if (r.compensators == std::vector<std::string>{"none"}) {
    r.compensators.clear();
  }
  r.metrics = MetricSet::parse(fmt::format("{}", fmt::join(texts_of(o.metrics), ",")));
  r.layers = layers_of(o.layers);
  r.prompt_len = o.prompt_len ? at_least("prompt_len", 1, *o.prompt_len) : 0;
  r.max_steps = o.max_steps ? at_least("max_steps", 1, *o.max_steps) : 0;
  constexpr int kMostThreads = 1024;  // as the command has it; a stack for each is taken from the caller's
  if (at_least("threads", 0, o.threads) > kMostThreads) {
    throw ConfigError(fmt::format("threads={} is outside of 0 to {}", o.threads, kMostThreads));
  }
  r.threads = o.threads;
  if (r.threads == 0) {
    r.threads = std::max(1, int(std::thread::hardware_concurrency()));
  }
  r.n_checkpoints = at_least("checkpoints", 1, o.checkpoints);
  r.seed = o.seed;
  if (py::isinstance<py::int_>(o.memory)) {
    if (PyLong_AsLongLong(o.memory.ptr()) <= 0) {
      PyErr_Clear();  // of a number that is too large
      throw ConfigError("memory=" + text_of(o.memory) + " is no number of bytes from 1 on");
    }
    r.memory = o.memory.cast<std::uint64_t>();
  } else if (!o.memory.is_none()) {
    r.memory = parse_bytes("memory", text_of(o.memory));
  }
  return r;
}

std::shared_ptr<Results> run_request(RunRequest& r, const py::object& on_progress, const py::handle& error_type) {
  ActiveRun active;
  r.stop = &active.stop;
  auto results = std::make_shared<Results>();
  r.cell = [&](const CellId& id, const CellResult& cell, const Layer&) {
    results->cells.push_back(std::make_shared<Cell>(Cell{id, cell}));
  };
  r.progress = [&](double done, double total, const std::string& what) {
    py::gil_scoped_acquire gil;
    try {
      if (PyErr_CheckSignals() != 0) {
        throw py::error_already_set();
      }
      if (!on_progress.is_none()) {
        on_progress(done, total, what);
      }
    } catch (py::error_already_set& e) {
      active.stop_for(e);
    }
  };
  RunOutcome outcome;
  {
    py::gil_scoped_release other_threads;
    outcome = run(r);
  }
  if (const py::object reason = active.stopped_by()) {
    PyErr_SetObject(py::type::handle_of(reason).ptr(), reason.ptr());
    throw py::error_already_set();
  }
  results->failed = outcome.failed;
  if (!results->failed.empty()) {
    raise_failed(error_type, results, active.error());
  }
  return results;
}

}  // namespace

void bind_run(py::module_& m) {
  const py::object error = py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(
      "kvreplay.RunError", "Cells of a run failed; `results` has those that did not, and `failed`, a sentence each.",
      PyExc_RuntimeError, nullptr));
  m.attr("RunError") = error;

  m.def(
      "run",
      [error](const py::object& traces, const py::object& methods, const py::object& budgets,
              const py::object& compensators, const py::object& metrics, const py::object& layers,
              const std::optional<int>& prompt_len, const std::optional<int>& max_steps, int threads,
              std::uint64_t seed, int checkpoints, const py::object& memory, const py::object& progress) {
        RunRequest r = request_of({traces, methods, budgets, compensators, metrics, layers, prompt_len, max_steps,
                                   threads, checkpoints, seed, memory, progress});
        return run_request(r, progress, error);
      },
      py::arg("traces"), py::arg("methods"), py::arg("budgets") = py::none(), py::kw_only(),
      py::arg("compensators") = kCompensators, py::arg("metrics") = "all", py::arg("layers") = py::none(),
      py::arg("prompt_len") = py::none(), py::arg("max_steps") = py::none(), py::arg("threads") = 1,
      py::arg("seed") = 0, py::arg("checkpoints") = 16, py::arg("memory") = py::none(),
      py::arg("progress") = py::none(),
      R"(Replays traces under methods, and gives the results in memory; writes nothing.

traces: a path, a Trace, or several. methods: one text, "h2o:window=128+adakv", or several. budgets: tokens (128), a
share of the prompt ("25%" or 0.25), bytes per KV head ("64KiB"), or several; left out for methods without a budget.
compensators: measured beside every method; "none" for none. metrics: names, or "all", or "all,diagnostics"; fewer are
faster and take less memory. layers: the model's layer numbers, as [0, 4] or "0,4-7". prompt_len: moves the boundary
between prompt and decode. max_steps: the first so many decode steps alone. threads: 0 for all of the machine's; 1 is
best with selectors in Python, which run one at a time. memory: bytes, or "8GiB". progress: called after every block of
steps as progress(done, total, what). The numbers are those of `kvreplay run`, for any number of threads.

ConfigError and TraceError before anything runs where the request cannot be met. RunError where cells failed: its
`results` has the others, its __cause__ the exception of the selector. Ctrl-C ends the run within a block of steps.)");
}

}  // namespace kvreplay::python
