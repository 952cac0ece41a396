#include "sim/checkpoints.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "policies/counter_rng.hpp"

namespace kvreplay {
namespace {

constexpr double kEnergy = 0.9;

// Orthonormal basis of the directions that hold 90 % of a Gram matrix's energy: (dim, r).
MatD main_subspace(const MatD& gram) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(gram);
  const Eigen::VectorXd& values = solver.eigenvalues();  // ascending
  const double total = values.cwiseMax(0).sum();
  Eigen::Index r = 0;
  for (double held = 0; r < values.size() && held < kEnergy * total * (1 - 1e-12); ++r) {
    held += std::max(0.0, values[values.size() - 1 - r]);
  }
  return solver.eigenvectors().rightCols(r);
}

// Gram matrix of some rows about `centre`, and their plain sum.
MatD gram_of(const MatF& x, std::span<const Pos> rows, const Eigen::VectorXd& centre, Eigen::VectorXd& sum) {
  MatF part(rows.size(), x.cols());
  sum.setZero(x.cols());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    sum += x.row(rows[i]).transpose().cast<double>();
    part.row(Eigen::Index(i)) = x.row(rows[i]) - centre.transpose().cast<float>();
  }
  MatD gram = MatD::Zero(x.cols(), x.cols());
  constexpr Eigen::Index kPart = 512;  // float inside, double across
  for (Eigen::Index i = 0; i < part.rows(); i += kPart) {
    const auto p = part.middleRows(i, std::min(kPart, part.rows() - i));
    gram += MatF(p.transpose() * p).cast<double>();
  }
  return gram;
}

}  // namespace

TokenSums token_sums(const MatF& x, Pos n_seen) {
  TokenSums all;
  all.n = n_seen;
  all.centre = x.topRows(n_seen).cast<double>().colwise().mean();
  std::vector<Pos> every(std::size_t(n_seen), 0);
  std::iota(every.begin(), every.end(), 0);
  all.gram = gram_of(x, every, all.centre, all.sum);
  return all;
}

SetGeometry set_geometry(const MatF& x, Pos n_seen, const TokenSums& all, std::span<const Pos> retained) {
  // The smaller side is summed, the other is what is left of all.
  const bool retained_is_smaller = 2 * Pos(retained.size()) <= n_seen;
  std::vector<Pos> evicted;
  if (!retained_is_smaller) {
    std::size_t next = 0;
    for (Pos p = 0; p < n_seen; ++p) {
      if (next < retained.size() && retained[next] == p) {
        ++next;
      } else {
        evicted.push_back(p);
      }
    }
  }
  Eigen::VectorXd sum;
  const MatD gram = gram_of(x, retained_is_smaller ? retained : std::span<const Pos>(evicted), all.centre, sum);
  const MatD rest = all.gram - gram;
  const Eigen::VectorXd rest_sum = all.sum - sum;
  const MatD& gram_r = retained_is_smaller ? gram : rest;
  const MatD& gram_e = retained_is_smaller ? rest : gram;

  SetGeometry g;
  const double norms = sum.norm() * rest_sum.norm();
  g.centroid_cos = norms > 0 ? sum.dot(rest_sum) / norms : 0;
  const MatD u_r = main_subspace(gram_r), u_e = main_subspace(gram_e);
  const double energy = gram_e.trace();
  g.outside_energy = energy > 0 ? std::max(0.0, 1 - (u_r.transpose() * gram_e * u_r).trace() / energy) : 0;
  const Eigen::Index m = std::min(u_r.cols(), u_e.cols());
  if (m > 0) {
    const MatD cross = u_r.transpose() * u_e;
    const MatD square =
        cross.rows() <= cross.cols() ? MatD(cross * cross.transpose()) : MatD(cross.transpose() * cross);
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(square, Eigen::EigenvaluesOnly);
    g.subspace_cos = solver.eigenvalues().cwiseMax(0).cwiseMin(1).cwiseSqrt().sum() / double(m);
  }
  return g;
}

const Checkpoints::All& Checkpoints::all(int kv_head, Pos n_seen) {
  const std::lock_guard lock(mutex_);
  auto& entry = all_[{kv_head, n_seen}];
  if (!entry) {
    entry = std::make_unique<All>(
        All{token_sums(layer_.k[std::size_t(kv_head)], n_seen), token_sums(layer_.v[std::size_t(kv_head)], n_seen)});
  }
  return *entry;
}

// The same split for whoever asks: drawn from the place and the sizes alone.
std::pair<SetGeometry, SetGeometry> Checkpoints::chance(int kv_head, Pos n_seen, int n_retained) {
  const All& sums = all(kv_head, n_seen);
  {
    const std::lock_guard lock(mutex_);
    const auto it = chance_.find({kv_head, n_seen, n_retained});
    if (it != chance_.end()) {
      return it->second;
    }
  }
  std::vector<Pos> order(std::size_t(n_seen), 0);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < n_retained; ++i) {
    const double u = uniform_at(seed_, layer_.index, kv_head, n_seen, n_retained, i);
    std::swap(order[std::size_t(i)], order[std::size_t(i) + std::size_t(u * double(n_seen - i))]);
  }
  order.resize(std::size_t(n_retained));
  std::sort(order.begin(), order.end());
  const std::pair answer{set_geometry(layer_.k[std::size_t(kv_head)], n_seen, sums.k, order),
                         set_geometry(layer_.v[std::size_t(kv_head)], n_seen, sums.v, order)};
  const std::lock_guard lock(mutex_);
  return chance_[{kv_head, n_seen, n_retained}] = answer;
}

Checkpoints::Answer Checkpoints::measure(int kv_head, Pos now, std::span<const Pos> retained, bool with_chance) {
  const Pos n_seen = now + 1;
  const All& sums = all(kv_head, n_seen);
  Answer a;
  a.k = set_geometry(layer_.k[std::size_t(kv_head)], n_seen, sums.k, retained);
  a.v = set_geometry(layer_.v[std::size_t(kv_head)], n_seen, sums.v, retained);
  if (with_chance) {
    std::tie(a.k_chance, a.v_chance) = chance(kv_head, n_seen, int(retained.size()));
  }
  return a;
}

}  // namespace kvreplay
