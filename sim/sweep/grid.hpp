// The values that one parameter takes in a sweep.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "policies/params.hpp"

namespace kvreplay {

// From one number to another, both included: in steps, so many of them, or so many at random.
struct GridRange {
  double from = 0, to = 0;
  double step = 0;  // 0: `count` values
  int count = 0;
  bool random = false;  // `count` draws; a greater count keeps the draws there were
  Scale scale = Scale::lin;
  std::uint64_t seed = 0;
};

struct GridAxis {
  std::string param;                // as a method's text names it: "alpha", "mean.x", "prefill.window"
  std::vector<std::string> values;  // of a list
  std::optional<GridRange> range;   // in its place

  // The values as text, whole numbers where the parameter takes no others. Steps are exact to 12 digits; what a scale
  // or chance gives is rounded to 4 (of 1 - x on the scale one_minus), but for the two ends.
  std::vector<std::string> texts(bool whole) const;
};

}  // namespace kvreplay
