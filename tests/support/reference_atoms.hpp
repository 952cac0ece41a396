// What atoms, clusters and the linear state estimate, slowly and in float64: groups are lists of tokens, and every
// statistic is taken from them anew. Tokens of one step are taken in order of position.
#pragma once
#include "tests/support/reference.hpp"

namespace kvreplay::testing {

// -inf: nothing to add.
using Estimator = std::function<ReferenceEstimate(int q_head, int step)>;

struct ReferenceAtoms {
  enum class Assign { one, blocks, nearest };
  Assign assign = Assign::nearest;
  int most = 16, iterations = 4, every = 0;
  enum class Kappa { none, diagonal, full };
  Kappa kappa = Kappa::diagonal;
  bool tilt = false, freeze = true;
  double strength = 1, decay = 1;
};
Estimator reference_atoms(const ToyLayer& layer, Scope scope, const Evicted& evicted_at,
                          const ReferenceAtoms& settings);

struct ReferenceClusters {
  int entries = 0, fit = 96, judge = 32, iterations = 4, every = 0;
  bool validate = true, gate = true;
  double margin = 0.01, threshold = 0.25, sharpness = 12, least_gate = 0;
};
Estimator reference_clusters(const ToyLayer& layer, Scope scope, const Evicted& evicted_at,
                             const ReferenceClusters& settings);

// `seed` is the run's.
Estimator reference_linear(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, int features,
                           std::uint64_t seed);

// error_corrected, log_mass_ratio and cos_estimate under that name, beside evicted_mass.
NamedSeries estimate_metrics(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, const std::string& name,
                             const Estimator& estimator);

}  // namespace kvreplay::testing
