// Groups of numbers in few bits each, as a decoder gets them back. Halves round to even.
#pragma once
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "policies/policy.hpp"

namespace kvreplay {

// The nearest half-precision number; the largest where there is none.
inline double to_half(double x) {
  constexpr double kLargest = 65504;
  constexpr int kBits = 10, kLeastExponent = -14;
  x = std::clamp(x, -kLargest, kLargest);
  const double unit = std::ldexp(1.0, std::max(x == 0 ? kLeastExponent : std::ilogb(x), kLeastExponent) - kBits);
  return std::clamp(std::nearbyint(x / unit) * unit, -kLargest, kLargest);
}
inline float to_half(float x) { return static_cast<float>(to_half(static_cast<double>(x))); }

struct Quantiser {
  int bits = 2;
  bool symmetric = false;  // a scale alone, about zero; else a scale and a zero, from minimum to maximum
  bool fp16_constants = true;

  // One group. A constant one is exact between minimum and maximum, which have no scale then.
  void apply(Eigen::Ref<Eigen::VectorXf> x) const {
    if (symmetric) {
      about_zero(x);
    } else {
      between_ends(x);
    }
  }
  // Groups of neighbours, the last one shorter where they do not divide.
  void apply(Eigen::Ref<Eigen::VectorXf> x, Eigen::Index group) const {
    for (Eigen::Index i = 0; i < x.size(); i += group) {
      apply(x.segment(i, std::min(group, x.size() - i)));
    }
  }

  // Width of a step of the group.
  float step(const Eigen::Ref<const Eigen::VectorXf>& x) const {
    if (symmetric) {
      return bits == 1 ? 2 * x.cwiseAbs().mean() : constant(x.cwiseAbs().maxCoeff() / (levels() / 2));
    }
    return constant((x.maxCoeff() - x.minCoeff()) / levels());
  }
  // `groups` is not whole where tokens share a group's constants of 16 bits each.
  double bytes(double numbers, double groups) const { return numbers * bits / 8 + groups * (symmetric ? 2 : 4); }

 private:
  float constant(float c) const { return fp16_constants ? to_half(c) : c; }
  float levels() const { return static_cast<float>((1 << bits) - (symmetric ? 2 : 1)); }

  void between_ends(Eigen::Ref<Eigen::VectorXf> x) const {
    const float zero = constant(x.minCoeff());
    if (x.maxCoeff() == x.minCoeff()) {
      return;
    }
    const float scale = step(x);
    if (!(scale > 0)) {  // below half precision's smallest step
      x.setConstant(zero);
      return;
    }
    x = ((x.array() - zero) / scale).rint().max(0.0F).min(levels()) * scale + zero;
  }
  void about_zero(Eigen::Ref<Eigen::VectorXf> x) const {
    if (bits == 1) {
      const float size = constant(x.cwiseAbs().mean());
      x = x.unaryExpr([size](float v) { return v < 0 ? -size : size; });
      return;
    }
    const float scale = step(x), most = levels() / 2;
    if (!(scale > 0)) {
      x.setZero();
      return;
    }
    x = (x.array() / scale).rint().max(-most - 1).min(most) * scale;
  }
};

// By how much rounding noise, uniform within one step per channel, raises ln E[exp(logit)]: the mean over these queries
// (rows, channels), softmax scale folded in.
inline float noise_bias(const Eigen::Ref<const MatF>& queries, const Eigen::ArrayXf& steps) {
  double sum = 0;
  for (Eigen::Index r = 0; r < queries.rows(); ++r) {
    for (Eigen::Index c = 0; c < queries.cols(); ++c) {
      const double a = std::abs(static_cast<double>(queries(r, c)) * static_cast<double>(steps[c])) / 2;
      // ln(sinh(a) / a); its series where that would lose digits.
      sum += a < 1e-2 ? a * a / 6 : a + std::log1p(-std::exp(-2 * a)) - std::log(2 * a);
    }
  }
  return queries.rows() == 0 ? 0 : static_cast<float>(sum / static_cast<double>(queries.rows()));
}

}  // namespace kvreplay
