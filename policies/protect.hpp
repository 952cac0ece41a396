// Tokens that no score can evict: the first `sink` and the latest `window` of a set's budget.
#pragma once
#include <algorithm>
#include <limits>

#include "policies/policy.hpp"

namespace kvreplay {

// Sinks and windows never exceed the set's own budget; where they would, the window shrinks first.
inline void protect(const View& view, int sink, int window, std::span<float> out) {
  constexpr float kKeep = std::numeric_limits<float>::infinity();
  sink = std::min(sink, view.budget);
  window = std::min(window, view.budget - sink);
  for (std::size_t i = 0; i < out.size() && view.pos[i] < sink; ++i) {
    out[i] = kKeep;
  }
  for (std::size_t i = out.size(); i-- > 0 && view.pos[i] > view.now - window;) {
    out[i] = kKeep;
  }
}

}  // namespace kvreplay
