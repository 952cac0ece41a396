#include "trace_capture/cpu/swiglu.hpp"

#include <algorithm>

#include "trace_capture/cpu/lane_array.hpp"

namespace kvreplay {

void swiglu(float* gate, const float* up, std::size_t n) {
  for (std::size_t begin = 0; begin < n; begin += kLanes) {
    const std::size_t now = std::min<std::size_t>(kLanes, n - begin);
    LaneArray g = LaneArray::Zero(), u = LaneArray::Zero();
    std::copy_n(gate + begin, now, g.data());
    std::copy_n(up + begin, now, u.data());
    g = g * u / (1 + (-g).exp());
    std::copy_n(g.data(), now, gate + begin);
  }
}

}  // namespace kvreplay
