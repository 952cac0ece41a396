// Caches fitted at the prompt's cut, slowly and in float64: what each prompt token that stays is stored as.
#pragma once
#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

// The cut that recorded evictions tell, for selectors that evict after attention.
struct FittedCut {
  const ToyLayer* layer = nullptr;
  int kv_head = 0;
  std::vector<int> q_heads;  // of the set in this KV head
  std::vector<Pos> kept;     // of the prompt
};
struct Stored {
  Eigen::VectorXd k, v;
  double bias = 0;
};
using Fit = std::function<std::map<Pos, Stored>(const FittedCut&)>;  // of those that changed; none was cut: not asked

struct ReferenceGrkv {
  int queries = 32, rounds = 1, sink = 4, window = 32;
  double ridge = 0.01, top = 0.1;
  bool values = true, keys = true;
};
Fit reference_grkv(const ReferenceGrkv& settings);

struct ReferenceMatching {
  int queries = 256, steps = 2;
  bool bias = true, values = true;
  double least = -3, most = 3, ridge = 0;
};
Fit reference_matching(const ReferenceMatching& settings);

struct ReferenceSampling {
  int sink = 4, window = 32, obs_window = 32;
};
// Chances to be kept of a prompt's tokens, by position.
std::vector<double> reference_chances(const ToyLayer& layer, int kv_head, const std::vector<int>& q_heads, int budget,
                                      const ReferenceSampling& settings);
Fit reference_inverse_chance(int budget, const ReferenceSampling& settings);

// What the method returns from the fitted cache.
Output fitted_output(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, const Fit& fit);

enum class MatchOver { rms, mean, max };
MakeSelector reference_match_keys(bool omp, MatchOver over, int queries, double most = 7);

}  // namespace kvreplay::testing
