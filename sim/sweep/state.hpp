// What of a sweep is finished: one layer of one trace at a time, so that a sweep of any size needs little memory.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "sim/sweep/resolved.hpp"
#include "sim/sweep/store.hpp"

namespace kvreplay {

enum class CellState { left, failed, done };

struct LayerState {
  std::vector<CellState> cells;        // by config
  std::vector<ItemHead> items;         // of this layer
  std::vector<int> item, line;         // by config, where done: which item, and the number of its lines there
  std::vector<std::string> sentences;  // by config, where failed
  std::size_t count(CellState s) const;
};

LayerState state_of(const Sweep&, Store&, const SweepTrace&, int layer);

// Cells of the whole sweep.
struct Counts {
  std::size_t done = 0, failed = 0, left = 0;
};

// Why cells failed: one sentence, how many cells said so, and which was the first.
struct Failure {
  std::string sentence, first;
  std::size_t n_cells = 0;
};

struct SweepState {
  Counts counts;
  std::vector<Failure> failures;  // in the order of their first cells
  std::vector<std::string> damaged;
};
SweepState state_of(const Sweep&, Store&);

// "a layer 3, h2o at budget 64"
std::string name_of(const Sweep&, const SweepTrace&, int layer, int config);

}  // namespace kvreplay
