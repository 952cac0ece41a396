// The truth: every metric of one layer, slowly, in float64, from the trace's own queries, keys and
// values and a given set of attended tokens. Written from the definitions; shares no arithmetic
// with the engine.
//
// At a step, V is every token up to the current one, R those of V that a query head attends itself,
// E = V \ R.
#pragma once
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tests/support/toy_layer.hpp"

namespace kvreplay::testing {

using Evicted = Eigen::Matrix<Pos, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Whether this query head attends the token itself at this decode step; asked for positions up to
// the current one.
using Attends = std::function<bool(int q_head, int step, Pos pos)>;

// What a method that rewrites slots returns at a step: (v_head_dim).
using Output = std::function<Eigen::VectorXd(int q_head, int step)>;

// From recorded evictions, (n_sets, n_tokens): the first decode step without the token (0 = cut at
// the prompt).
Attends attends_from(const ToyLayer& layer, Scope scope, const Evicted& evicted_at);

int n_sets(const ToyLayer& layer, Scope scope);
int set_of(const ToyLayer& layer, Scope scope, int q_head);

// Attention of one query over the tokens that `keep` names. No shift is shared between calls.
struct Softmax {
  double log_mass = 0;     // ln of the sum of exp(logit); -inf over nothing
  Eigen::VectorXd weight;  // (n_tokens seen) 0 where not kept
  Eigen::VectorXd output;  // (v_head_dim)
};
// (pos + 1) logits of the query at `pos` with every token up to it, after scale and soft-cap.
Eigen::VectorXd logits_at(const ToyLayer& layer, int q_head, Pos pos);
Softmax softmax_over(const Eigen::VectorXd& logits, const MatD& v, const std::vector<bool>& keep);

// The evicted tokens as a closed-form compensator remembers them.
struct EvictedStatistics {
  int n = 0;
  Eigen::VectorXd k_mean, v_mean;
  MatD scatter;                       // (v_head_dim, head_dim) sum of (v - v_mean)(k - k_mean)^T
  MatD key_scatter;                   // (head_dim, head_dim) sum of (k - k_mean)(k - k_mean)^T
  double radius_k = 0, radius_v = 0;  // largest distance of a key, a value from its mean
};
EvictedStatistics statistics_of(const MatD& k, const MatD& v, const std::vector<Pos>& evicted);

enum class Compensation { none, mean, moments, gaussian };
struct ReferenceCompensator {
  std::string name;
  Compensation kind = Compensation::none;
  bool full = false;  // gaussian: all covariances of the keys, not their variances alone
  double strength = 1;
  bool freeze = true, clip = true;
};
struct ReferenceEstimate {
  double log_mass = 0;    // ln of the estimated evicted mass
  Eigen::VectorXd value;  // (v_head_dim) estimated output over the evicted
  bool clipped = false;   // a bound on mass or value was reached
};
// `q` without the softmax scale, which comes apart.
ReferenceEstimate estimate(const ReferenceCompensator& c, const EvictedStatistics& s, const Eigen::VectorXd& q,
                           double scale);

struct MetricsRequest {
  Attends attends;
  std::vector<ReferenceCompensator> measured;  // beside the method
  std::optional<ReferenceCompensator> acting;  // the method's own; or
  std::optional<Output> rewritten;             // what it returns from changed slots
};

// Per metric (compensated ones as "error_corrected.NAME"): (n_heads, n_steps), NaN where the step
// is left out. After the projection, "layer.error" and so on: (1, n_steps).
using NamedSeries = std::map<std::string, MatD>;
NamedSeries reference_metrics(const ToyLayer& layer, const MetricsRequest& request);

// Slots that are resident at a step, summed over the sets of each KV head: (n_kv_heads, n_steps).
MatD reference_resident(const ToyLayer& layer, Scope scope, const Evicted& evicted_at);

// Share of the tokens in [begin, end), a range of the prompt, that is resident, mean over the sets
// of each KV head: (n_kv_heads, n_steps).
MatD reference_retention(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, Pos begin, Pos end);

// How evicted keys (or values) lie to retained ones; rows are tokens.
struct Subspaces {
  double outside_energy = 0;  // of E, outside the subspace that holds 90 % of R's energy, both
                              // centred by R and E's mean
  double subspace_cos = 0;    // mean of the first min(r_R, r_E) principal cosines of the 90 % subspaces
  double centroid_cos = 0;    // of the means, not centred
};
Subspaces reference_subspaces(const MatD& retained, const MatD& evicted);

// Rows with no usable f_R: retained mass below e^-88 of the largest weight. Only their evicted mass counts.
// Evicted mass below it has no logarithm in float32 either.
inline constexpr double kLeastLogMass = -88;
// Metrics with f_E count steps that hold at least this much evicted mass.
inline constexpr double kLeastEvictedMass = 1e-6;

}  // namespace kvreplay::testing
