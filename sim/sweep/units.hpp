// The work items of a sweep: one layer of one trace under as many of its missing cells as fit into memory.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "sim/run.hpp"
#include "sim/sweep/resolved.hpp"
#include "sim/sweep/store.hpp"

namespace kvreplay {

// The part of a sweep that one of `n` jobs does.
struct Shard {
  int index = 0, n = 1;
  static Shard parse(const std::string& text);  // "2/8"; ConfigError
  // By what is to be measured alone, never by what is finished or by what else the plan names.
  bool has(const SweepTrace&, int layer) const;
};

struct Unit {
  int trace = 0;  // of Sweep::traces
  int layer = 0;
  std::vector<int> configs;  // of Sweep::configs, ascending
};

inline constexpr std::size_t kMostCells = 256;  // of a unit: what a kill can cost

struct Units {
  std::vector<Unit> units;
  std::size_t n_done = 0, n_failed = 0;  // cells of the shard that were so before; failed ones are in the units again
};
// memory: bytes, as RunRequest::memory.
Units units_left(const Sweep&, Store&, const Shard&, std::uint64_t memory);

// What allocators have to measure before these cells can be divided by it: items that the units wait for. `configs`
// count Sweep::measuring.
std::vector<Unit> units_to_measure(const Sweep&, Store&, const std::vector<Unit>& cells);

MemoryNeed memory_need(const Sweep&, const SweepTrace&);

// For Team::agree.
std::string text_of(const std::vector<Unit>&);
std::vector<Unit> units_of(const std::string& text);

// What run() is to do for these cells of one layer.
RunRequest request_of(const Sweep&, const SweepTrace&, int layer, const std::vector<int>& configs);

}  // namespace kvreplay
