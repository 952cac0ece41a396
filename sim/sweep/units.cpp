#include "sim/sweep/units.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <set>
#include <sstream>

#include "policies/counter_rng.hpp"
#include "policies/errors.hpp"
#include "sim/sweep/state.hpp"

namespace kvreplay {

Shard Shard::parse(const std::string& text) {
  Shard s;
  const char* end = text.data() + text.size();
  const auto [slash, error] = std::from_chars(text.data(), end, s.index);
  if (error == std::errc() && slash != end && *slash == '/') {
    const auto [last, other] = std::from_chars(slash + 1, end, s.n);
    if (other == std::errc() && last == end && s.n >= 1 && s.n <= 1000000 && s.index >= 0 && s.index < s.n) {
      return s;
    }
  }
  throw ConfigError("--shard: '" + text + "' is none; write i/n with i from 0 to n - 1, as 2/8");
}

bool Shard::has(const SweepTrace& trace, int layer) const {
  if (n == 1) {
    return true;
  }
  std::uint64_t h = std::uint64_t(layer);
  for (const char c : trace.content_hash) {
    h = mix_bits(h ^ std::uint64_t(static_cast<unsigned char>(c)));
  }
  return int(h % std::uint64_t(n)) == index;
}

MemoryNeed memory_need(const Sweep& sweep, const SweepTrace& t) {
  return memory_need({t.n_tokens, t.n_steps(), t.n_heads, t.n_kv_heads, t.head_dim, t.v_head_dim},
                     MetricSet::parse(fmt::format("{}", fmt::join(sweep.metrics, ","))), t.compensators.size());
}

Units units_left(const Sweep& sweep, Store& store, const Shard& shard, std::uint64_t memory) {
  Units all;
  for (int t = 0; t < int(sweep.traces.size()); ++t) {
    const SweepTrace& trace = sweep.traces[std::size_t(t)];
    const std::size_t fit =
        std::clamp<std::size_t>(memory_need(sweep, trace).cells_in(memory_allowed(memory)), 1, kMostCells);
    for (const int layer : trace.layers) {
      if (!shard.has(trace, layer)) {
        continue;
      }
      const LayerState state = state_of(sweep, store, trace, layer);
      all.n_done += state.count(CellState::done);
      all.n_failed += state.count(CellState::failed);
      std::vector<int> missing;
      for (int c = 0; c < int(state.cells.size()); ++c) {
        if (state.cells[std::size_t(c)] != CellState::done) {
          missing.push_back(c);
        }
      }
      // Units of equal size, so that none is left over with a cell or two.
      const std::size_t n_units = (missing.size() + fit - 1) / fit;
      for (std::size_t u = 0; u < n_units; ++u) {
        const auto at = [&](std::size_t i) { return missing.begin() + std::ptrdiff_t(missing.size() * i / n_units); };
        all.units.push_back({t, layer, {at(u), at(u + 1)}});
      }
    }
  }
  return all;
}

std::vector<Unit> units_to_measure(const Sweep& sweep, Store& store, const std::vector<Unit>& cells) {
  std::map<int, std::set<std::string>> needed;  // by trace: allocators
  for (const Unit& u : cells) {
    for (const int c : u.configs) {
      for (const auto& [text, with_files] : sweep.method(c).measuring) {
        needed[u.trace].insert(text);
      }
    }
  }
  const auto measuring = sweep.measuring();
  std::vector<Unit> units;
  for (const auto& [t, allocators] : needed) {
    const SweepTrace& trace = sweep.traces[std::size_t(t)];
    for (const int layer : trace.layers) {  // all that it divides over, whoever replays them
      const std::string group = sweep.measured_group(trace, layer);
      std::set<std::string> known;
      for (const ItemHead& head : store.heads(group)) {
        if (std::string body; store.body(head, body)) {
          known.insert(head.keys.begin(), head.keys.end());
        }
      }
      Unit unit{t, layer, {}};
      for (const std::string& text : allocators) {
        const auto it = measuring.find(text);
        if (known.count(Sweep::measured_key(group, it->second)) == 0) {
          unit.configs.push_back(int(std::distance(measuring.begin(), it)));
        }
      }
      if (!unit.configs.empty()) {
        units.push_back(std::move(unit));
      }
    }
  }
  return units;
}

std::string text_of(const std::vector<Unit>& units) {
  std::string text;
  for (const Unit& u : units) {
    text += fmt::format("{} {} {}\n", u.trace, u.layer, fmt::join(u.configs, " "));
  }
  return text;
}

std::vector<Unit> units_of(const std::string& text) {
  std::vector<Unit> all;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream numbers(line);
    Unit& u = all.emplace_back();
    numbers >> u.trace >> u.layer;
    for (int c = 0; numbers >> c;) {
      u.configs.push_back(c);
    }
  }
  return all;
}

RunRequest request_of(const Sweep& sweep, const SweepTrace& trace, int layer, const std::vector<int>& configs) {
  RunRequest r;
  r.traces = {trace.path};
  for (const int c : configs) {
    const SweepMethod& m = sweep.method(c);
    if (r.methods.empty() || r.methods.back() != m.label) {
      r.methods.push_back(m.label);
    }
    if (!sweep.budget(c).empty()) {
      r.budgets_of[m.label].push_back(sweep.budget(c));
    }
  }
  r.tables.insert(sweep.tables.begin(), sweep.tables.end());
  r.compensators = sweep.compensators;
  r.compensators_given = sweep.compensators_given;
  r.metrics = MetricSet::parse(fmt::format("{}", fmt::join(sweep.metrics, ",")));
  r.layers = trace.layers;
  r.replay = {layer};
  r.prompt_len = trace.prompt_len;
  r.max_steps = trace.n_steps();
  r.detail.steps = sweep.has("steps");
  r.detail.retained = sweep.has("retained");
  r.detail.outputs = !sweep.output_steps.empty();
  r.output_steps = sweep.output_steps;
  r.n_checkpoints = sweep.checkpoints;
  r.seed = sweep.seed;
  return r;
}

}  // namespace kvreplay
