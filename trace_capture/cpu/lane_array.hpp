// Registers as Eigen arrays, for exponentials. Eigen computes the ends of a longer array one by one, with another
// exponential whose last bit may differ, and where those ends are depends on addresses; an array of one register has
// none.
#pragma once
#include <Eigen/Core>

#include "trace_capture/cpu/product.hpp"

namespace kvreplay {

using LaneArray = Eigen::Array<float, kLanes, 1>;

inline Eigen::Map<LaneArray> lanes_at(float* data) { return Eigen::Map<LaneArray>(data); }

}  // namespace kvreplay
