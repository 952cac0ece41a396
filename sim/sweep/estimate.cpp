#include "sim/sweep/estimate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "policies/errors.hpp"
#include "sim/sweep/rows.hpp"

namespace kvreplay {
namespace {

constexpr std::size_t kSampleCells = 12;
constexpr int kSampleSteps = 256;

// What a decode step costs grows with the tokens that it sees.
double work(const SweepTrace& t, int n_steps) {
  return double(n_steps) * (t.prompt_len + 0.5 * n_steps) * t.n_heads * (t.head_dim + t.v_head_dim);
}

struct Sample {
  std::size_t n_cells = 0;
  double seconds = 0;                                      // in all
  double own_seconds = 0;                                  // of the cells' own, summed over threads
  double item_bytes = 0, step_bytes = 0, token_bytes = 0;  // step_bytes: per step; token_bytes: per token
};

Sample measure(const SweepRequest& request, const Sweep& sweep, const SweepTrace& trace, int layer,
               const std::vector<int>& configs, int n_steps) {
  RunRequest r = request_of(sweep, trace, layer, configs);
  r.max_steps = n_steps;
  r.output_steps.clear();
  r.detail.outputs = false;
  r.threads = request.threads;
  r.memory = request.memory;
  r.stop = request.stop;
  Sample s;
  ItemRows rows(sweep);
  r.cell = [&](const CellId& id, const CellResult& cell, const Layer&) {
    rows.add(s.n_cells++, id, cell);
    s.own_seconds += cell.seconds;
    for (const Series& series : cell.series) {
      s.step_bytes += sweep.has("steps") ? 4.0 * double(series.values.size()) / n_steps : 0;
    }
    if (sweep.has("retained")) {
      s.token_bytes += 4.0 * double(cell.evicted_at.size());
      s.step_bytes += double(cell.attended.size()) / n_steps;
    }
  };
  const auto start = std::chrono::steady_clock::now();
  run(r);
  s.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  ItemHead head;
  std::string body;
  rows.write(head, body);
  s.item_bytes = double(body.size()) + 68.0 * double(s.n_cells);  // and a key each
  return s;
}

}  // namespace

SweepEstimate estimate(const SweepRequest& request) {
  const Sweep sweep = resolve(request);
  Store store(request.out / "items");
  const Units left = units_left(sweep, store, request.shard, request.memory);
  SweepEstimate e;
  e.n_traces = sweep.traces.size();
  e.n_configs = sweep.configs.size();
  e.n_units = left.units.size();
  e.cells.done = left.n_done;
  e.cells.failed = left.n_failed;
  for (const SweepTrace& t : sweep.traces) {
    e.n_layers += t.layers.size();
  }
  for (const Unit& u : left.units) {
    const MemoryNeed need = memory_need(sweep, sweep.traces[std::size_t(u.trace)]);
    e.memory = std::max(e.memory, need.shared + need.own * double(u.configs.size()));
    e.cells.left += u.configs.size();
  }
  e.cells.left -= e.cells.failed;
  if (left.units.empty()) {
    return e;
  }
  const Unit& first = left.units.front();
  const SweepTrace& trace = sweep.traces[std::size_t(first.trace)];
  const int n_steps = std::min(trace.n_steps(), kSampleSteps);
  std::vector<int> configs;
  const std::size_t n = std::min(first.configs.size(), kSampleCells);
  for (std::size_t i = 0; i < n; ++i) {
    const int c = first.configs[first.configs.size() * i / n];
    try {
      RunRequest r = request_of(sweep, trace, first.layer, {c});
      r.memory = request.memory;
      check(r);
      configs.push_back(c);
    } catch (const ConfigError& error) {
      e.failed = error.what();
    }
  }
  if (configs.empty()) {
    return e;
  }
  const Sample s = measure(request, sweep, trace, first.layer, configs, n_steps);
  if (s.n_cells == 0) {
    return e;
  }
  const double cells = double(s.n_cells), own = s.own_seconds / request.threads / cells;
  const double shared = std::max(0.0, s.seconds - own * cells);
  for (const Unit& u : left.units) {
    const SweepTrace& t = sweep.traces[std::size_t(u.trace)];
    const double n_cells = double(u.configs.size());
    e.seconds += (shared + own * n_cells) * work(t, t.n_steps()) / work(trace, n_steps);
    // The item, and about as much again in the tables.
    e.disk += n_cells / cells * (2 * s.item_bytes + s.step_bytes * t.n_steps() + s.token_bytes * t.n_tokens);
  }
  e.sample = fmt::format("{} cells over {} steps of {} layer {} in {:.2f} s", s.n_cells, n_steps, trace.stem,
                         first.layer, s.seconds);
  return e;
}

}  // namespace kvreplay
