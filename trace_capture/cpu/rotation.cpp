#include "trace_capture/cpu/rotation.hpp"

#include <cmath>

namespace kvreplay {

void Rotation::prepare(const RopeTable& table, Pos first, Pos n) {
  half_ = static_cast<std::ptrdiff_t>(table.inv_freq.size());
  cos_.clear();
  sin_.clear();
  for (Pos i = 0; i < n; ++i) {
    for (const double inv_freq : table.inv_freq) {
      const double angle = static_cast<double>(static_cast<float>(first + i) * static_cast<float>(inv_freq));
      cos_.push_back(static_cast<float>(std::cos(angle) * table.attention_factor));
      sin_.push_back(static_cast<float>(std::sin(angle) * table.attention_factor));
    }
  }
}

void Rotation::apply(Rows rows) const {
  for (std::ptrdiff_t i = 0; i < rows.n; ++i) {
    const float* cos = cos_.data() + i * half_;
    const float* sin = sin_.data() + i * half_;
    for (float* head = rows[i]; head < rows[i] + rows.width; head += 2 * half_) {
      for (std::ptrdiff_t j = 0; j < half_; ++j) {
        const float low = head[j], high = head[j + half_];
        head[j] = low * cos[j] - high * sin[j];
        head[j + half_] = high * cos[j] + low * sin[j];
      }
    }
  }
}

}  // namespace kvreplay
