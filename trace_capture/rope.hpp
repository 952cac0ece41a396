// Rotary frequencies of every scaling type that the supported families use.
#pragma once
#include <vector>

#include "trace_capture/config.hpp"

namespace kvreplay {

struct RopeTable {
  std::vector<double> inv_freq;  // (head_dim / 2)
  double attention_factor = 1;   // multiplies cos and sin
};

// The table for a pass after which the sequence is `n_tokens` long. Only `dynamic` depends on it: its base grows once
// the sequence is longer than the model's context, and tokens that were passed before keep their rotation.
RopeTable rope_table(const RopeConfig& config, int head_dim, int max_positions, int n_tokens);

// Do the frequencies stay the same for a sequence of n_tokens, passed in whatever pieces?
bool rope_is_fixed(const RopeConfig& config, int max_positions, int n_tokens);

}  // namespace kvreplay
