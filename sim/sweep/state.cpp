#include "sim/sweep/state.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <unordered_map>

namespace kvreplay {
namespace {

// The body of an item of failures: a JSON list of one sentence per key; empty where it is none.
std::vector<std::string> sentences_of(const std::string& body, std::size_t n) {
  const nlohmann::json j = nlohmann::json::parse(body, nullptr, false);
  std::vector<std::string> all;
  for (const nlohmann::json& sentence : j.is_array() ? j : nlohmann::json::array()) {
    all.push_back(sentence.is_string() ? sentence.get<std::string>() : "");
  }
  return all.size() == n ? all : std::vector<std::string>{};
}

}  // namespace

std::size_t LayerState::count(CellState s) const { return std::size_t(std::count(cells.begin(), cells.end(), s)); }

LayerState state_of(const Sweep& sweep, Store& store, const SweepTrace& trace, int layer) {
  const std::string group = sweep.group(trace, layer);
  const std::size_t n = sweep.configs.size();
  LayerState state{std::vector(n, CellState::left), store.heads(group), std::vector(n, -1), std::vector(n, -1),
                   std::vector<std::string>(n)};
  if (state.items.empty()) {
    return state;
  }
  std::unordered_map<std::string, int> configs;  // by key
  for (int c = 0; c < int(n); ++c) {
    configs.emplace(sweep.key(group, trace, c), c);
  }
  for (int i = 0; i < int(state.items.size()); ++i) {
    const ItemHead& head = state.items[std::size_t(i)];
    const bool enough = std::includes(head.detail.begin(), head.detail.end(), sweep.detail.begin(), sweep.detail.end());
    std::string body;
    std::vector<std::string> sentences;
    if (head.kind == ItemKind::failed && store.body(head, body)) {
      sentences = sentences_of(body, head.keys.size());
    }
    if (head.kind == ItemKind::measured || (head.kind == ItemKind::cells && !enough) ||
        (head.kind == ItemKind::failed && sentences.empty())) {
      continue;
    }
    for (int line = 0; line < int(head.keys.size()); ++line) {
      const auto it = configs.find(head.keys[std::size_t(line)]);
      if (it == configs.end()) {
        continue;  // of a cell that the plan no longer names
      }
      const auto c = std::size_t(it->second);
      if (head.kind == ItemKind::cells && state.cells[c] != CellState::done) {
        state.cells[c] = CellState::done;
        state.item[c] = i;
        state.line[c] = line;
      } else if (head.kind == ItemKind::failed && state.cells[c] == CellState::left) {
        state.cells[c] = CellState::failed;
        state.sentences[c] = sentences[std::size_t(line)];
      }
    }
  }
  return state;
}

std::string name_of(const Sweep& sweep, const SweepTrace& trace, int layer, int config) {
  const std::string& budget = sweep.budget(config);
  return fmt::format("{} layer {}, {}{}", trace.stem, layer, sweep.method(config).label,
                     budget.empty() ? "" : " at budget " + budget);
}

SweepState state_of(const Sweep& sweep, Store& store) {
  SweepState all;
  std::map<std::string, std::size_t> index;  // of a failure by its sentence
  for (const SweepTrace& trace : sweep.traces) {
    for (const int layer : trace.layers) {
      const LayerState state = state_of(sweep, store, trace, layer);
      all.counts.done += state.count(CellState::done);
      all.counts.failed += state.count(CellState::failed);
      all.counts.left += state.count(CellState::left);
      for (std::size_t c = 0; c < state.cells.size(); ++c) {
        if (state.cells[c] != CellState::failed) {
          continue;
        }
        const auto [it, first] = index.emplace(state.sentences[c], all.failures.size());
        if (first) {
          all.failures.push_back({state.sentences[c], name_of(sweep, trace, layer, int(c)), 0});
        }
        ++all.failures[it->second].n_cells;
      }
    }
  }
  all.damaged = store.damaged();
  return all;
}

}  // namespace kvreplay
