// Orthogonality of the evicted set at a few steps: subspaces and centroids of retained and evicted keys and values.
#pragma once
#include <map>
#include <mutex>
#include <tuple>

#include "sim/layer.hpp"

namespace kvreplay {

// Sums over all tokens seen at a checkpoint, shared by every method.
struct TokenSums {
  Eigen::VectorXd sum;  // (dim)
  MatD gram;            // (dim, dim) sum of x x^T about `centre`
  Eigen::VectorXd centre;
  double n = 0;
};

struct SetGeometry {
  double outside_energy = 0, subspace_cos = 0, centroid_cos = 0;
};

// Of `retained` against all other tokens of rows [0, n_seen) of x, centred by the mean over both.
SetGeometry set_geometry(const MatF& x, Pos n_seen, const TokenSums& all, std::span<const Pos> retained);
TokenSums token_sums(const MatF& x, Pos n_seen);

// Geometry at the checkpoints of one layer: the sums over all tokens and the random splits are made once for all
// methods that ask. Safe from several threads.
class Checkpoints {
 public:
  Checkpoints(const Layer& layer, std::uint64_t seed) : layer_(layer), seed_(seed) {}
  struct Answer {
    SetGeometry k, v, k_chance, v_chance;
  };
  static constexpr int kLeast = 8;  // tokens on either side below which there is no answer
  Answer measure(int kv_head, Pos now, std::span<const Pos> retained, bool with_chance);

 private:
  struct All {
    TokenSums k, v;
  };
  const All& all(int kv_head, Pos n_seen);
  std::pair<SetGeometry, SetGeometry> chance(int kv_head, Pos n_seen, int n_retained);

  const Layer& layer_;
  std::uint64_t seed_;
  std::mutex mutex_;
  std::map<std::pair<int, Pos>, std::unique_ptr<All>> all_;
  std::map<std::tuple<int, Pos, int>, std::pair<SetGeometry, SetGeometry>> chance_;
};

}  // namespace kvreplay
