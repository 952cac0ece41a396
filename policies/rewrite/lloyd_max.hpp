// Levels that quantise one number with the least mean square error.
#pragma once
#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

namespace kvreplay {

// Index of the nearest of ascending levels; on a circle of that circumference if period > 0.
inline int nearest_level(const std::vector<double>& levels, double x, double period = 0) {
  const auto end = std::lower_bound(levels.begin(), levels.end(), x);
  const int above = static_cast<int>(end - levels.begin()), last = static_cast<int>(levels.size()) - 1;
  const auto at = [&](int i) { return levels[static_cast<std::size_t>(i)]; };
  if (above == 0) {
    return period > 0 && x - (at(last) - period) < at(0) - x ? last : 0;
  }
  if (above > last) {
    return period > 0 && at(0) + period - x < x - at(last) ? 0 : last;
  }
  return x - at(above - 1) <= at(above) - x ? above - 1 : above;
}

// Lloyd-Max levels of a density on [lo, hi] (up to a factor): each level is the mean of the interval of numbers that
// are nearest to it.
template <class Density>
std::vector<double> lloyd_max(Density density, double lo, double hi, int n_levels) {
  // Each interval in pieces, each piece by Gauss and Legendre's three points.
  constexpr int kPieces = 32;
  const double kPoint[] = {-std::sqrt(0.6), 0, std::sqrt(0.6)}, kWeight[] = {5, 8, 5};
  std::vector<double> level(static_cast<std::size_t>(n_levels));
  for (std::size_t i = 0; i < level.size(); ++i) {
    level[i] = lo + (hi - lo) * (static_cast<double>(i) + 0.5) / n_levels;
  }
  for (double moved = 1; moved > 1e-10;) {
    moved = 0;
    double from = lo;
    for (std::size_t i = 0; i < level.size(); ++i) {
      const double to = i + 1 < level.size() ? (level[i] + level[i + 1]) / 2 : hi;
      double mass = 0, sum = 0;
      for (int j = 0; j < 3 * kPieces; ++j) {
        const int piece = j / 3;
        const double x = from + (to - from) * (piece + 0.5 + kPoint[j % 3] / 2) / kPieces;
        const double w = density(x) * kWeight[j % 3];
        mass += w;
        sum += w * x;
      }
      from = to;
      if (mass > 0) {
        moved = std::max(moved, std::abs(sum / mass - level[i]));
        level[i] = sum / mass;
      }
    }
  }
  return level;
}

}  // namespace kvreplay
