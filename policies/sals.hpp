// What the two halves of SALS share: a layer's keys before RoPE, all KV heads as one vector, and the few directions
// that hold most of their energy. Both find them in the same tokens, so that they agree without a word.
#pragma once
#include <algorithm>
#include <cmath>

#include "policies/policy.hpp"

namespace kvreplay {

// Keys of all lanes side by side, as RoPE turned them or before it: (slots, n_lanes * head_dim).
inline MatF joint_keys(const View& view, std::span<const int> slots, const Rotation* undo) {
  MatF k(static_cast<Eigen::Index>(slots.size()), view.n_lanes * view.head_dim);
  const auto dim = static_cast<std::size_t>(view.head_dim);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      auto one = k.row(static_cast<Eigen::Index>(i)).segment(lane * view.head_dim, view.head_dim);
      one = view.key(lane, slots[i]);
      if (undo != nullptr) {
        undo->undo(view.pos[static_cast<std::size_t>(slots[i])], {one.data(), dim});
      }
    }
  }
  return k;
}

constexpr double kNoEnergy = 1e-9;  // of the largest eigenvalue; a direction below it is rounding noise

// The directions of largest energy, not centred: (dim, at most rank), orthonormal, the largest first. Fewer where the
// rows span fewer.
inline MatF leading_directions(const MatF& rows, int rank) {
  const MatD x = rows.cast<double>();
  const bool few = x.rows() < x.cols();
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(few ? Eigen::MatrixXd(x * x.transpose())
                                                                 : Eigen::MatrixXd(x.transpose() * x));
  const Eigen::VectorXd energy = eigen.eigenvalues().reverse();
  int n = 0;
  while (n < std::min<Eigen::Index>(rank, energy.size()) && energy[n] > kNoEnergy * energy[0]) {
    ++n;
  }
  Eigen::MatrixXd u = eigen.eigenvectors().rowwise().reverse().leftCols(n);
  if (few) {
    u = (x.transpose() * u).colwise().normalized();
  }
  return u.cast<float>();
}

// Numbers of a share of the joint vector, at least one.
inline int rank_of(double share, int dim) { return std::clamp(static_cast<int>(std::lround(share * dim)), 1, dim); }

// The first and last layers of the model stay as they are.
inline bool is_dense_layer(const SetShape& shape, int first, int last) {
  return shape.layer < first || shape.layer >= shape.n_model_layers - last;
}

}  // namespace kvreplay
