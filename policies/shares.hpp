// A whole number of tokens split in proportion to weights.
#pragma once
#include <span>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay {

enum class Leftover { remainder, last };  // what rounding down leaves: to the largest remainders; to the last that can

// Share i is between 0 and most[i]; what one cannot take goes to the others, again in proportion. All of `total` is
// given out, or as much as `most` allows. Where all weights are 0 they count as equal; of equal remainders the first.
std::vector<int> split(int total, std::span<const double> weights, std::span<const int> most,
                       Leftover leftover = Leftover::remainder);

// What no head can use more of: the prompt, as long as the budget itself is within it.
int room(const Allocator::Layers&);

// The run's total over its layers in proportion to weights: none gets more than room(), each at least 1.
std::vector<int> split_over_layers(const Allocator::Layers&, std::span<const double> weights);

}  // namespace kvreplay
