#include "sim/metrics.hpp"

#include <algorithm>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"

namespace kvreplay {
namespace {

using enum Metric;
using enum Level;

constexpr MetricInfo kInfo[] = {
    {evicted_mass, "evicted_mass", query_head, false, false, false, "share of the attention mass on evicted tokens"},
    {error, "error", query_head, false, false, false, "relative output error of plain eviction"},
    {error_output, "error_output", query_head, false, false, false,
     "relative error of what the method as written returns"},
    {cos_retained_evicted, "cos_retained_evicted", query_head, false, true, false,
     "cosine between the retained and the evicted output"},
    {directional_mismatch, "directional_mismatch", query_head, false, true, false, "1 - cos_retained_evicted"},
    {norm_ratio_evicted, "norm_ratio_evicted", query_head, false, true, false,
     "ln of the evicted over the retained output's norm"},
    {error_parallel, "error_parallel", query_head, false, true, false, "the error's part along the retained output"},
    {error_orthogonal, "error_orthogonal", query_head, false, true, false,
     "the error's part orthogonal to the retained output"},
    {logit_variance, "logit_variance", query_head, false, false, false, "population variance of the evicted logits"},
    {logit_spread, "logit_spread", query_head, false, false, false,
     "largest distance of an evicted logit from their mean"},
    {error_corrected, "error_corrected", query_head, true, false, false,
     "relative error with the compensator on the same evictions"},
    {cos_estimate, "cos_estimate", query_head, true, true, false, "cosine between the evicted output and its estimate"},
    {log_mass_ratio, "log_mass_ratio", query_head, true, false, false, "ln of the evicted mass over its estimate"},
    {error_exact_mass, "error_exact_mass", query_head, true, false, false,
     "error_corrected with the true evicted mass put in"},
    {error_exact_direction, "error_exact_direction", query_head, true, true, false,
     "error_corrected with the true evicted output put in"},
    {resident, "resident", kv_head, false, false, false, "tokens kept"},
    {attended, "attended", kv_head, false, false, false, "tokens attended, mean over the group's query heads"},
    {bytes, "bytes", kv_head, false, false, false, "bytes kept"},
    {bytes_read, "bytes_read", kv_head, false, false, false, "bytes read in the step"},
    {retention, "retention", kv_head, false, false, false, "share of a span's tokens that is kept", true},
    {lost_mass, "lost_mass", query_head, false, false, false, "share of the attention mass on a span's evicted tokens",
     true},
    {outside_energy_k, "outside_energy_k", kv_head, false, false, true,
     "energy of the evicted keys outside the subspace of 90 % of the retained keys' energy"},
    {outside_energy_v, "outside_energy_v", kv_head, false, false, true, "the same for values"},
    {outside_energy_k_chance, "outside_energy_k_chance", kv_head, false, false, true,
     "outside_energy_k of a random split of equal sizes"},
    {outside_energy_v_chance, "outside_energy_v_chance", kv_head, false, false, true, "the same for values"},
    {subspace_cos_k, "subspace_cos_k", kv_head, false, false, true,
     "mean principal cosine between the retained and the evicted keys' subspaces"},
    {subspace_cos_v, "subspace_cos_v", kv_head, false, false, true, "the same for values"},
    {subspace_cos_k_chance, "subspace_cos_k_chance", kv_head, false, false, true,
     "subspace_cos_k of a random split of equal sizes"},
    {subspace_cos_v_chance, "subspace_cos_v_chance", kv_head, false, false, true, "the same for values"},
    {centroid_cos_k, "centroid_cos_k", kv_head, false, false, true,
     "cosine between the retained and the evicted keys' means, uncentred"},
    {centroid_cos_v, "centroid_cos_v", kv_head, false, false, true, "the same for values"},
    {projected_error, "projected_error", layer, false, false, false, "error after the output projection, heads summed"},
    {projected_error_output, "projected_error_output", layer, false, false, false,
     "error_output after the output projection"},
    {projected_error_corrected, "projected_error_corrected", layer, true, false, false,
     "error_corrected after the output projection"},
    {future_missed_mass, "future_missed_mass", query_head, false, false, false,
     "share of the next 32 steps' attention on existing tokens that goes to tokens that have left", false, true},
    {future_missed_mass_no_sink, "future_missed_mass_no_sink", query_head, false, false, false,
     "the same without attention on the first 4 tokens", false, true},
    {top1_agreement, "top1_agreement", query_head, false, false, false,
     "whether the token attended most is the full cache's", false, true},
    {top16_jaccard, "top16_jaccard", query_head, false, false, false,
     "overlap of the 16 tokens attended most with the full cache's", false, true},
    {churn, "churn", kv_head, false, false, false,
     "Jaccard distance between what is attended at a step and at the one before", false, true},
    {importance_return, "importance_return", query_head, false, false, false,
     "share of windows of tokens, unimportant 4 events long, that are important again within 8", false, true, true},
    {lost_importance, "lost_importance", query_head, false, false, false,
     "importance_return of the windows that had left the cache by then", false, true, true},
    {importance_gain, "importance_gain", query_head, false, false, false,
     "share of unimportant windows that are important at the next event", false, true, true},
    {importance_loss, "importance_loss", query_head, false, false, false,
     "share of important windows that are not at the next event", false, true, true},
};
static_assert(std::size(kInfo) == kMetrics);

}  // namespace

std::span<const MetricInfo> all_metrics() { return kInfo; }

bool MetricSet::any(bool (*of)(const MetricInfo&)) const {
  return std::any_of(std::begin(kInfo), std::end(kInfo), [&](const MetricInfo& i) { return has(i.metric) && of(i); });
}

MetricSet MetricSet::all() {
  MetricSet s;
  for (const MetricInfo& i : kInfo) {
    s.set(i.metric, !i.diagnostic);
  }
  return s;
}

MetricSet MetricSet::parse(const std::string& list) {
  MetricSet s;
  for (Metric m : {resident, attended, bytes, bytes_read}) {
    s.set(m);
  }
  std::vector<std::string> names;
  for (const MetricInfo& i : kInfo) {
    names.emplace_back(i.name);
  }
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t end = std::min(list.find(',', begin), list.size());
    const std::string name = list.substr(begin, end - begin);
    begin = end + 1;
    if (name == "all" || name == "diagnostics") {
      for (const MetricInfo& i : kInfo) {
        s.set(i.metric, s.has(i.metric) || i.diagnostic == (name == "diagnostics"));
      }
      continue;
    }
    const auto it = std::find(names.begin(), names.end(), name);
    if (it == names.end()) {
      throw ConfigError("--metrics: '" + name + "' is not a metric; the nearest is '" + nearest(name, names) +
                        "', 'all' selects every one but the diagnostics, and 'diagnostics' selects those");
    }
    s.set(static_cast<Metric>(it - names.begin()));
  }
  return s;
}

}  // namespace kvreplay
