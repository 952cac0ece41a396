// What a block lost, as matrices.
#pragma once
#include <span>

#include "policies/policy.hpp"

namespace kvreplay {

// (losses, n): their keys or values, of n numbers each.
inline MatD lost_rows(std::span<const Loss> losses, const float* Loss::*of, Eigen::Index n) {
  MatD rows(static_cast<Eigen::Index>(losses.size()), n);
  for (Eigen::Index i = 0; i < rows.rows(); ++i) {
    rows.row(i) = Eigen::Map<const Eigen::RowVectorXf>(losses[static_cast<std::size_t>(i)].*of, n).cast<double>();
  }
  return rows;
}

}  // namespace kvreplay
