#include "trace_capture/cpu/norm.hpp"

#include <cmath>

namespace kvreplay {

void rms_norm(ConstRows x, std::span<const float> weight, double eps, Rows y) {
  constexpr std::ptrdiff_t kSums = 8;  // independent sums, so that the processor need not wait for the last
  for (std::ptrdiff_t i = 0; i < x.n; ++i) {
    double partial[kSums] = {};
    std::ptrdiff_t j = 0;
    for (; j + kSums <= x.width; j += kSums) {
      for (std::ptrdiff_t s = 0; s < kSums; ++s) {
        const double value = x[i][j + s];
        partial[s] += value * value;
      }
    }
    double sum = 0;
    for (; j < x.width; ++j) {
      sum += static_cast<double>(x[i][j]) * static_cast<double>(x[i][j]);
    }
    for (const double part : partial) {
      sum += part;
    }
    const float scale = static_cast<float>(1 / std::sqrt(sum / static_cast<double>(x.width) + eps));
    for (j = 0; j < x.width; ++j) {
      y[i][j] = x[i][j] * scale * weight[static_cast<std::size_t>(j)];
    }
  }
}

}  // namespace kvreplay
