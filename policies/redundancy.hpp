// How much of a key the other resident keys say too: R-KV's redundancy, which G-KV shares.
#pragma once
#include "policies/policy.hpp"

namespace kvreplay {

// A key that resembles no later or earlier one above the threshold: nothing is forgiven (G-KV's kernel), or its
// likeness to the first slot is (R-KV's code, where "none" and "slot 0" are the same index).
enum class NoNeighbour { skip, first };
inline constexpr std::string_view kNoNeighbours[] = {"skip", "first"};

struct Likeness {
  double threshold = 0.5;
  NoNeighbour no_neighbour = NoNeighbour::skip;
};

// Mean cosine of each resident key with the others of its lane, where every key forgives its most recent neighbour
// above the threshold, so that the newest of near-duplicates is not blamed for its older copies: (n_slots).
inline Eigen::VectorXd mean_likeness(const View& view, int lane, const Likeness& how) {
  constexpr Eigen::Index kBlock = 128;  // rows of the likeness matrix at a time, which is never whole
  constexpr double kUnsure = 1e-5;      // of a float32 cosine: closer to the threshold, doubles decide
  const auto n = static_cast<Eigen::Index>(view.pos.size());
  MatF unit(n, view.head_dim);
  for (Eigen::Index i = 0; i < n; ++i) {
    const Eigen::VectorXd k = view.key(lane, static_cast<int>(i)).cast<double>();
    const double norm = k.norm();
    unit.row(i) = (k / (norm > 0 ? norm : 1)).cast<float>();
  }
  const auto alike = [&](float cosine, Eigen::Index i, Eigen::Index j) {
    if (std::abs(static_cast<double>(cosine) - how.threshold) > kUnsure) {
      return static_cast<double>(cosine) > how.threshold;
    }
    const Eigen::VectorXd a = view.key(lane, static_cast<int>(i)).cast<double>();
    const Eigen::VectorXd b = view.key(lane, static_cast<int>(j)).cast<double>();
    return a.dot(b) > how.threshold * a.norm() * b.norm();
  };
  Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(n);
  MatF cosines;  // (rows of the block, n_slots)
  for (Eigen::Index begin = 0; begin < n; begin += kBlock) {
    const Eigen::Index rows = std::min(kBlock, n - begin);
    cosines.noalias() = unit.middleRows(begin, rows) * unit.transpose();
    for (Eigen::Index r = 0; r < rows; ++r) {
      cosines(r, begin + r) = 0;
      Eigen::Index newest = n - 1;
      while (newest >= 0 && (newest == begin + r || !alike(cosines(r, newest), begin + r, newest))) {
        --newest;
      }
      if (newest >= 0 || how.no_neighbour == NoNeighbour::first) {
        cosines(r, std::max<Eigen::Index>(newest, 0)) = 0;
      }
      sum += cosines.row(r).cast<double>();
    }
  }
  return sum.transpose() / static_cast<double>(n);
}

// Softmax of the mean likeness over all slots, as a mean over the set's lanes: (n_slots).
inline Eigen::VectorXd redundancy(const View& view, const Likeness& how, double temperature = 1) {
  Eigen::VectorXd out = Eigen::VectorXd::Zero(static_cast<Eigen::Index>(view.pos.size()));
  for (int lane = 0; lane < view.n_lanes; ++lane) {
    const Eigen::VectorXd r = mean_likeness(view, lane, how) / temperature;
    const Eigen::VectorXd e = (r.array() - r.maxCoeff()).exp();
    out += e / (e.sum() * view.n_lanes);
  }
  return out;
}

}  // namespace kvreplay
