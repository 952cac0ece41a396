#include "sim/sweep/grid.hpp"

#include <algorithm>
#include <cmath>

#include "policies/counter_rng.hpp"
#include "policies/values.hpp"

namespace kvreplay {
namespace {

double rounded(double x, int digits) {
  if (x == 0 || !std::isfinite(x)) {
    return x;
  }
  const double factor = std::pow(10.0, digits - 1 - int(std::floor(std::log10(std::abs(x)))));
  return std::isfinite(factor) ? std::round(x * factor) / factor : x;
}

// u in [0, 1] along the scale.
double at(const GridRange& r, double u) {
  switch (r.scale) {
    case Scale::lin:
      return r.from + u * (r.to - r.from);
    case Scale::log:
      return r.from * std::pow(r.to / r.from, u);
    case Scale::one_minus:
      break;
  }
  return 1 - (1 - r.from) * std::pow((1 - r.to) / (1 - r.from), u);
}

std::vector<double> numbers(const GridRange& r, const std::string& param) {
  std::vector<double> all;
  if (r.step > 0) {
    const int n = int(std::floor((r.to - r.from) / r.step + 1e-9));
    for (int i = 0; i <= n; ++i) {
      all.push_back(rounded(r.from + i * r.step, 12));
    }
    return all;
  }
  std::uint64_t stream = 0;
  for (const char c : param) {
    stream = mix_bits(stream ^ std::uint64_t(static_cast<unsigned char>(c)));
  }
  for (int i = 0; i < r.count; ++i) {
    const bool end = !r.random && (i == 0 || i + 1 == r.count);
    const double u = r.random ? uniform_at(r.seed, stream, i) : r.count == 1 ? 0 : double(i) / (r.count - 1);
    const double x = end ? (i == 0 ? r.from : r.to) : at(r, u);
    const int digits = r.scale == Scale::lin && !r.random ? 12 : 4;
    all.push_back(end ? x : r.scale == Scale::one_minus ? 1 - rounded(1 - x, digits) : rounded(x, digits));
  }
  return all;
}

}  // namespace

std::vector<std::string> GridAxis::texts(bool whole) const {
  if (!range) {
    return values;
  }
  std::vector<std::string> all;
  for (const double x : numbers(*range, param)) {
    all.push_back(format_number(whole ? std::round(x) : rounded(x, 15)));
  }
  return all;
}

}  // namespace kvreplay
