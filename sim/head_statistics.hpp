// Where each query head looks in the uncompressed cache: what tells sink, local and retrieval heads apart.
#pragma once
#include <array>
#include <string_view>
#include <vector>

#include "sim/layer.hpp"

namespace kvreplay {

inline constexpr int kHeadSteps = 64;                 // decode steps looked at, evenly spaced, the last included
inline constexpr Pos kHeadSink = 4, kHeadLocal = 32;  // tokens: the first; the latest, the step's own included

// Means over the decode steps looked at, one number per query head. A token that is both first and latest is first;
// sink, local and far add up to 1. Independent of methods and of the number of threads.
struct HeadStatistics {
  std::vector<double> sink, local, far;  // share of the attention on the first, the latest, all other tokens
  std::vector<double> entropy;           // of the attention, over the logarithm of the number of tokens: 0 to 1
  // Share of the far attention that its largest hundredth of the far tokens (at least one) holds, over the steps that
  // have any; NaN where none has.
  std::vector<double> concentration;

  static constexpr std::array<std::string_view, 5> kNames{"sink", "local", "far", "entropy", "concentration"};
  std::array<const std::vector<double>*, 5> columns() const { return {&sink, &local, &far, &entropy, &concentration}; }
};

HeadStatistics head_statistics(const Layer&, int threads);

}  // namespace kvreplay
