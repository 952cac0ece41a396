// The truth about what MomentKV's and Moment-KV's selectors can do beyond their defaults.
#pragma once
#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

// MomentKV's score with its choices spelled out, from the lists of tokens that left and stay.
struct MomentSelection {
  int sink = 1, window = 8, obs_window = 32;
  int chunk = 1;
  int rounds = 0;      // shares in which the prompt's surplus leaves; 0: by attention alone
  int look_ahead = 0;  // queries over which the change of the corrected output is averaged; 0: attention times residual
};
MakeSelector reference_moment_selection(const MomentSelection& settings);

// Decayed sum of attention times the value's norm, mean over the set's KV heads.
MakeSelector reference_momentum_by_norm(double alpha);

}  // namespace kvreplay::testing
