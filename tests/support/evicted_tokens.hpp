// Random tokens that left, and attention over them alone.
#pragma once
#include <cmath>
#include <random>

#include "policies/policy.hpp"

namespace kvreplay::test {

// In float64.
struct Exact {
  Eigen::ArrayXd log_mass;  // (rows of q)
  MatD value;               // (rows of q, v_head_dim)
  Exact(const MatF& q, const MatF& k, const MatF& v) : log_mass(q.rows()), value(q.rows(), v.cols()) {
    for (Eigen::Index r = 0; r < q.rows(); ++r) {
      const Eigen::ArrayXd logits = (k.cast<double>() * q.row(r).transpose().cast<double>()).array();
      const Eigen::ArrayXd weights = (logits - logits.maxCoeff()).exp();
      log_mass[r] = logits.maxCoeff() + std::log(weights.sum());
      value.row(r) = weights.matrix().transpose() * v.cast<double>() / weights.sum();
    }
  }
};

inline MatF normal(int rows, int cols, float std, std::mt19937& gen) {
  std::normal_distribution<float> draw(0, std);
  MatF m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) {
    m.data()[i] = draw(gen);
  }
  return m;
}

}  // namespace kvreplay::test
