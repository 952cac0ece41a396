// Which values of some parameters to try: a coarse look over all of their range, then more around the best.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "policies/settings.hpp"

namespace kvreplay {

// One --param: what it says of one parameter of the method.
struct Axis {
  MethodParam param;
  Scale scale = Scale::lin;
  double lo = 0, hi = 0;            // of a range
  bool percent = false;             // the range is in percent of the budget
  std::vector<std::string> values;  // of a list; empty for a range

  // "alpha=0.3:0.995", "alpha=0.3:0.995:lin", "window=4,16,64", "evict=after_attention,before_attention"; ConfigError.
  static Axis parse(const std::string& text, const std::string& method, const std::vector<MethodParam>& params,
                    const TableReader& read_table = {});

  bool listed() const { return !values.empty(); }
  // u in [0, 1] along the scale to a value's text, and back. A value is rounded to what its type takes, a real one to
  // three digits of what the scale makes even steps of.
  std::string at(double u) const;
  double place(double value) const;
};

// One candidate: a value per axis, as text. u is where: [0, 1] on a range, the index in a list.
struct Point {
  std::vector<double> u;
  std::vector<std::string> values;
};

struct SearchOptions {
  int n_candidates = 32;
  int n_rounds = 1;  // calls of `evaluate` before the last, which is the caller's and sees all candidates
  std::uint64_t seed = 0;
  // What a candidate is, so that two texts of one thing count once; nothing where it cannot be.
  std::function<std::optional<std::string>(const std::vector<std::string>& values)> identity;
};

// What is to be made small, for each point at each case (a budget): (n_points, n_cases), NaN where there is no value.
// `round` counts from 0; later rounds look closer.
using Evaluate = std::function<std::vector<std::vector<double>>(std::span<const Point>, int round)>;

// At most n_candidates distinct points, in the order in which they were thought of: half of them over the whole range
// and the rest around the best of each case, round by round. Lists alone, or no rounds: all at once.
std::vector<Point> search(const std::vector<Axis>& axes, const SearchOptions& options, const Evaluate& evaluate);

}  // namespace kvreplay
