// What the tuner makes small: a weighted sum of statistics of metrics, as text and as a number of one cell or many.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "sim/replay.hpp"

namespace kvreplay {

// As in summary.csv: of one head over the steps that count.
enum class Statistic { mean, std, p50, p90, p99, max };

// [WEIGHT*]METRIC[.COMPENSATOR][:STATISTIC]
struct Term {
  double weight = 1;
  Metric metric = Metric::error_output;
  std::string compensator;  // canonical; empty where the metric has none
  std::string span;         // of retention
  Statistic statistic = Statistic::mean;
};

// What a region (a head, a layer, everything) has measured: additive, so that regions can be joined.
struct Sums {
  std::vector<double> weighted, n;    // per term: sum of n * statistic over heads and traces, and the steps counted
  double bytes = 0, bytes_steps = 0;  // of the cache, per KV head and step
  void add(const Sums& other);
};

struct Objective {
  std::string text;
  std::vector<Term> terms;
  double bytes = 0;  // > 0: at these bytes per KV head, between the budgets that were run

  // "error_output+0.5*evicted_mass:p90", "error_output@bytes=64KiB"; ConfigError names the piece and what is near.
  static Objective parse(const std::string& text);

  MetricSet metrics() const;                      // what has to be measured for it
  std::vector<std::string> compensators() const;  // and beside every method
  // Block means do not say it: a statistic other than the mean, or a metric that leaves steps out.
  bool needs_steps() const;
  bool per_head() const;  // false where a term is of a whole layer

  // The sums of one cell by KV head; what is of a whole layer comes last, in a row of its own: (n_kv_heads + 1).
  std::vector<Sums> measure(const CellResult& cell, int n_heads, int n_kv_heads) const;
  // NaN where some term counted nothing.
  double value(const Sums& sums) const;
  // At `bytes`, linear in their logarithm between the two budgets around them by measured bytes; NaN where the
  // budgets run do not reach to both sides. by_budget: in any order.
  double value_at_bytes(std::span<const Sums> by_budget) const;
};

std::string name_of(const Term& term);  // its text without the weight
std::string_view name_of(Statistic statistic);

}  // namespace kvreplay
