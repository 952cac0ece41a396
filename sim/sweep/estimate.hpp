// What a sweep will take, from a few of its cells measured over a few steps.
#pragma once
#include <string>

#include "sim/sweep/sweep.hpp"

namespace kvreplay {

struct SweepEstimate {
  std::size_t n_traces = 0, n_layers = 0, n_configs = 0;  // n_layers: of all traces together
  Counts cells;                                           // of the shard
  std::size_t n_units = 0;
  double memory = 0;   // bytes, of the largest unit
  double disk = 0;     // bytes, of what is still to be written
  double seconds = 0;  // on this machine with these threads
  std::string sample;  // what was measured; empty where nothing is left, or nothing could be
  std::string failed;  // why a cell of the sample cannot run, if one cannot
};

// Writes nothing.
SweepEstimate estimate(const SweepRequest&);

}  // namespace kvreplay
