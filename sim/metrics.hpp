// What is measured: the catalogue of metrics and the series that one cell fills. docs/metrics.md defines each.
#pragma once
#include <bitset>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay {

enum class Metric {
  evicted_mass,
  error,
  error_output,
  cos_retained_evicted,
  directional_mismatch,
  norm_ratio_evicted,
  error_parallel,
  error_orthogonal,
  logit_variance,
  logit_spread,
  error_corrected,
  cos_estimate,
  log_mass_ratio,
  error_exact_mass,
  error_exact_direction,
  resident,
  attended,
  bytes,
  bytes_read,
  retention,
  lost_mass,
  outside_energy_k,
  outside_energy_v,
  outside_energy_k_chance,
  outside_energy_v_chance,
  subspace_cos_k,
  subspace_cos_v,
  subspace_cos_k_chance,
  subspace_cos_v_chance,
  centroid_cos_k,
  centroid_cos_v,
  projected_error,
  projected_error_output,
  projected_error_corrected,
  future_missed_mass,
  future_missed_mass_no_sink,
  top1_agreement,
  top16_jaccard,
  churn,
  importance_return,
  lost_importance,
  importance_gain,
  importance_loss,
  count
};
inline constexpr int kMetrics = static_cast<int>(Metric::count);

enum class Level { query_head, kv_head, layer };

struct MetricInfo {
  Metric metric;
  std::string_view name;
  Level level;
  bool per_compensator;
  bool needs_evicted_output;  // contains f_E, so that sums over all tokens are kept in double
  bool at_checkpoints;
  std::string_view doc;
  bool per_span = false;    // one series for each name of the trace's spans
  bool diagnostic = false;  // only where asked by name, or as one of `diagnostics`: not one of `all`
  bool at_end = false;      // one number, at the last step
};
std::span<const MetricInfo> all_metrics();
inline const MetricInfo& info(Metric m) { return all_metrics()[static_cast<std::size_t>(m)]; }

class MetricSet {
 public:
  static MetricSet all();  // but the diagnostics
  // "error,evicted_mass", "all", "all,diagnostics"; ConfigError names the nearest metric. resident, attended and bytes
  // are always there.
  static MetricSet parse(const std::string& list);
  bool has(Metric m) const { return bits_[static_cast<std::size_t>(m)]; }
  void set(Metric m, bool on = true) { bits_[static_cast<std::size_t>(m)] = on; }
  bool any(bool (*of)(const MetricInfo&)) const;
  bool needs_evicted_output() const {
    return any([](const MetricInfo& i) { return i.needs_evicted_output; });
  }
  bool at_checkpoints() const {
    return any([](const MetricInfo& i) { return i.at_checkpoints; });
  }
  bool projected() const {
    return any([](const MetricInfo& i) { return i.level == Level::layer; });
  }
  bool operator==(const MetricSet&) const = default;

 private:
  std::bitset<kMetrics> bits_;
};

inline constexpr float kSkipped = std::numeric_limits<float>::quiet_NaN();

// One metric of one cell over time. A step that does not count holds NaN.
struct Series {
  Metric metric;
  int compensator = -1;       // index into the cell's compensators, or -1
  std::string span;           // of a metric of spans
  int rows = 0;               // query heads, KV heads, or 1
  std::vector<int> steps;     // the decode steps measured; empty: all of them
  int n_steps = 0;            // length of a row
  std::vector<float> values;  // (rows, n_steps)

  float& at(int row, int i) { return values[std::size_t(row) * std::size_t(n_steps) + std::size_t(i)]; }
  std::span<const float> row(int r) const {
    return {values.data() + std::size_t(r) * std::size_t(n_steps), std::size_t(n_steps)};
  }
};

}  // namespace kvreplay
