#include "analysis/search.hpp"

#include <algorithm>
#include <cmath>
#include <set>

#include "policies/catalogue.hpp"
#include "policies/counter_rng.hpp"
#include "policies/errors.hpp"
#include "policies/help.hpp"
#include "policies/values.hpp"

namespace kvreplay {
namespace {

bool is_number(const ParamInfo& p) {
  return p.type == ParamType::integer || p.type == ParamType::real || p.type == ParamType::tokens;
}

bool is_whole(const Axis& a) { return a.param.param->type != ParamType::real; }

// Whole numbers from 0 on have no logarithm at their end: theirs is of one more.
double log_offset(const Axis& a) { return is_whole(a) && a.lo == 0 ? 1 : 0; }

double forward(const Axis& a, double x) {
  switch (a.scale) {
    case Scale::lin:
      return x;
    case Scale::log:
      return std::log(x + log_offset(a));
    case Scale::one_minus:
      break;
  }
  return -std::log(1 - x);
}

double backward(const Axis& a, double y) {
  switch (a.scale) {
    case Scale::lin:
      return y;
    case Scale::log:
      return std::exp(y) - log_offset(a);
    case Scale::one_minus:
      break;
  }
  return 1 - std::exp(-y);
}

// x to three digits of `of` (the quantity of which even steps are made), with at most 15 decimals.
double rounded(double x, double of) {
  if (of == 0 || !std::isfinite(of)) {
    return x;
  }
  const int decimals = std::clamp(2 - int(std::floor(std::log10(std::abs(of)))), 0, 15);
  const double factor = std::pow(10.0, decimals);
  return std::round(x * factor) / factor;
}

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> pieces;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(by, begin), text.size());
    pieces.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return pieces;
}

Scale scale_named(const std::string& owner, const std::string& name) {
  for (const Scale s : {Scale::lin, Scale::log, Scale::one_minus}) {
    if (scale_name(s) == name) {
      return s;
    }
  }
  const std::string names[] = {"lin", "log", "one_minus"};
  throw ConfigError(owner + ": '" + name + "' is no scale; the nearest is '" + nearest(name, names) +
                    "' of lin, log, one_minus");
}

// Points that fill a box evenly from the first on: a Kronecker sequence along powers of the generalised golden ratio
// (Roberts 2018), from an offset that the key gives.
class Sequence {
 public:
  Sequence(std::size_t n_dims, std::uint64_t seed, std::uint64_t stream) {
    double phi = 1.5;  // root of x^(d + 1) = x + 1
    for (int i = 0; i < 64; ++i) {
      phi = std::pow(1 + phi, 1.0 / (double(n_dims) + 1));
    }
    for (std::size_t d = 0; d < n_dims; ++d) {
      step_.push_back(std::pow(phi, -double(d + 1)));
      now_.push_back(uniform_at(seed, stream, d));
    }
  }
  const std::vector<double>& next() {
    for (std::size_t d = 0; d < now_.size(); ++d) {
      now_[d] += step_[d];
      now_[d] -= std::floor(now_[d]);
    }
    return now_;
  }

 private:
  std::vector<double> step_, now_;
};

class Searching {
 public:
  Searching(const std::vector<Axis>& axes, const SearchOptions& options) : axes_(axes), options_(options) {
    for (std::size_t a = 0; a < axes.size(); ++a) {
      if (!axes[a].listed()) {
        ranges_.push_back(a);
      }
    }
  }

  std::vector<Point> run(const Evaluate& evaluate) {
    const int n = options_.n_candidates, n_rounds = ranges_.empty() ? 0 : options_.n_rounds;
    coarse(n_rounds == 0 ? n : (n + 1) / 2);
    std::vector<std::size_t> shown(points_.size());
    for (std::size_t i = 0; i < shown.size(); ++i) {
      shown[i] = i;
    }
    for (int round = 0; round < n_rounds && n_left() > 0; ++round) {
      std::vector<Point> these;
      for (const std::size_t i : shown) {
        these.push_back(points_[i]);
      }
      const std::vector<std::vector<double>> values = evaluate(these, round);
      const std::size_t known = points_.size();
      const int share = (n_left() + n_rounds - round - 1) / (n_rounds - round);
      refine(shown, values, share, round);
      shown = survivors(shown, values);
      for (std::size_t i = known; i < points_.size(); ++i) {
        shown.push_back(i);
      }
    }
    return std::move(points_);
  }

 private:
  int n_left() const { return options_.n_candidates - int(points_.size()); }

  std::string value(std::size_t axis, double u) const {
    const Axis& a = axes_[axis];
    return a.listed() ? a.values[std::size_t(u)] : a.at(u);
  }

  // False where it is not a new candidate.
  bool add(const std::vector<double>& u) {
    Point p{u, {}};
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      p.values.push_back(value(a, u[a]));
    }
    const auto identity = options_.identity(p.values);
    if (!identity || !seen_.insert(*identity).second) {
      return false;
    }
    for (const std::size_t a : ranges_) {  // where it is after rounding
      double x = 0;
      std::string text = p.values[a];
      if (text.back() == '%') {
        text.pop_back();
      }
      parse_number(text, x);
      p.u[a] = axes_[a].place(x);
    }
    points_.push_back(std::move(p));
    return true;
  }

  // Every combination of lists with an even grid on the ranges, where that is at least three values each; else an even
  // sample of all combinations.
  void coarse(int n) {
    double lists = 1;
    for (const Axis& a : axes_) {
      lists *= a.listed() ? double(a.values.size()) : 1;
    }
    int on_range = 1;  // points of each range
    if (!ranges_.empty()) {
      while (lists * std::pow(on_range + 1, double(ranges_.size())) <= n) {
        ++on_range;
      }
    }
    if (lists <= n && (ranges_.empty() || on_range >= 3)) {
      spacing_ = ranges_.empty() ? 1 : 1.0 / (on_range - 1);
      std::vector<double> u(axes_.size(), 0);
      grid(0, on_range, u);
      return;
    }
    spacing_ = std::pow(n, -1.0 / double(axes_.size()));
    Sequence sequence(axes_.size(), options_.seed, 0);
    for (int tries = 0; int(points_.size()) < n && tries < 64 * n; ++tries) {
      std::vector<double> u = sequence.next();
      for (std::size_t a = 0; a < axes_.size(); ++a) {
        u[a] = axes_[a].listed() ? std::floor(u[a] * double(axes_[a].values.size())) : u[a];
      }
      add(u);
    }
  }

  void grid(std::size_t axis, int on_range, std::vector<double>& u) {
    if (axis == axes_.size()) {
      add(u);
      return;
    }
    const Axis& a = axes_[axis];
    const int n = a.listed() ? int(a.values.size()) : on_range;
    for (int i = 0; i < n; ++i) {
      u[axis] = a.listed() ? i : double(i) / (n - 1);
      grid(axis + 1, on_range, u);
    }
  }

  // The point of the smallest value; nothing where all are equal or none has a value.
  static std::optional<std::size_t> best(const std::vector<std::vector<double>>& values, std::size_t c) {
    std::optional<std::size_t> at;
    double low = 0, high = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double x = values[i][c];
      if (std::isnan(x)) {
        continue;
      }
      high = at ? std::max(high, x) : x;
      if (!at || x < low) {
        at = i;
        low = x;
      }
    }
    return at && low < high ? at : std::nullopt;
  }

  void refine(const std::vector<std::size_t>& shown, const std::vector<std::vector<double>>& values, int share,
              int round) {
    const std::size_t n_cases = values.empty() ? 0 : values.front().size();
    for (std::size_t c = 0; c < n_cases; ++c) {
      const int rest = std::min(share, n_left());
      const int n = (rest + int(n_cases - c) - 1) / int(n_cases - c);
      const int before = int(points_.size());
      const auto i = best(values, c);
      if (!i) {
        fill(n, round, c);
      } else if (ranges_.size() == 1) {
        between(points_[shown[*i]], n);
      } else {
        around(points_[shown[*i]], n, round, c);
      }
      share -= int(points_.size()) - before;
    }
  }

  // One range: evenly within the two gaps beside the best, more in the wider one.  `at` is a copy: points_ grows.
  void between(const Point at, int n) {
    const std::size_t a = ranges_.front();
    const double u = at.u[a];
    double left = 0, right = 1;
    for (const Point& p : points_) {
      bool same_list = true;
      for (std::size_t b = 0; b < axes_.size(); ++b) {
        same_list = same_list && (b == a || p.u[b] == at.u[b]);
      }
      if (same_list && p.u[a] < u) {
        left = std::max(left, p.u[a]);
      } else if (same_list && p.u[a] > u) {
        right = std::min(right, p.u[a]);
      }
    }
    const double width = right - left;
    if (width <= 0) {
      return;
    }
    const int n_left_gap =
        std::clamp(int(std::lround(n * (u - left) / width)), u > left && n > 1 ? 1 : 0, right > u && n > 1 ? n - 1 : n);
    for (int i = 0; i < n; ++i) {
      const bool below = i < n_left_gap;
      const double share = below ? double(i + 1) / (n_left_gap + 1) : double(i - n_left_gap + 1) / (n - n_left_gap + 1);
      std::vector<double> v = at.u;
      v[a] = below ? left + share * (u - left) : u + share * (right - u);
      add(v);
    }
  }

  // Several ranges: evenly in a box around the best, half as wide in every round; lists stay at the best's value.
  // `at` is a copy here too.
  void around(const Point at, int n, int round, std::size_t c) {
    const double half = spacing_ * std::pow(0.5, round);
    Sequence sequence(ranges_.size(), options_.seed, 1 + c + 1000 * std::uint64_t(round + 1));
    int added = 0;
    for (int tries = 0; added < n && tries < 64 * n; ++tries) {
      const std::vector<double>& unit = sequence.next();
      std::vector<double> u = at.u;
      for (std::size_t r = 0; r < ranges_.size(); ++r) {
        const double low = std::max(0.0, at.u[ranges_[r]] - half), high = std::min(1.0, at.u[ranges_[r]] + half);
        u[ranges_[r]] = low + unit[r] * (high - low);
      }
      added += add(u) ? 1 : 0;
    }
  }

  // Nothing is known to be better: anywhere.
  void fill(int n, int round, std::size_t c) {
    Sequence sequence(axes_.size(), options_.seed, 1 + c + 1000 * std::uint64_t(round + 1));
    int added = 0;
    for (int tries = 0; added < n && tries < 64 * n; ++tries) {
      std::vector<double> u = sequence.next();
      for (std::size_t a = 0; a < axes_.size(); ++a) {
        u[a] = axes_[a].listed() ? std::floor(u[a] * double(axes_[a].values.size())) : u[a];
      }
      added += add(u) ? 1 : 0;
    }
  }

  // Of each case the best quarter, three at least: these are looked at again.
  static std::vector<std::size_t> survivors(const std::vector<std::size_t>& shown,
                                            const std::vector<std::vector<double>>& values) {
    std::set<std::size_t> kept;
    const std::size_t n_cases = values.empty() ? 0 : values.front().size();
    for (std::size_t c = 0; c < n_cases; ++c) {
      std::vector<std::size_t> order;
      for (std::size_t i = 0; i < shown.size(); ++i) {
        if (!std::isnan(values[i][c])) {
          order.push_back(i);
        }
      }
      std::stable_sort(order.begin(), order.end(),
                       [&](std::size_t i, std::size_t j) { return values[i][c] < values[j][c]; });
      for (std::size_t i = 0; i < std::min(order.size(), std::max<std::size_t>(3, shown.size() / 4)); ++i) {
        kept.insert(shown[order[i]]);
      }
    }
    return {kept.begin(), kept.end()};
  }

  const std::vector<Axis>& axes_;
  const SearchOptions& options_;
  std::vector<std::size_t> ranges_;  // axes that are a range
  std::vector<Point> points_;
  std::set<std::string> seen_;
  double spacing_ = 1;  // between neighbours of the coarse look, in u
};

}  // namespace

Axis Axis::parse(const std::string& text, const std::string& method, const std::vector<MethodParam>& params,
                 const TableReader& read_table) {
  const std::string owner = "--param " + text;
  const std::size_t equals = text.find('=');
  Axis axis;
  axis.param = param_named(params, method, text.substr(0, equals));
  const ParamInfo& p = *axis.param.param;
  const std::string what = equals == std::string::npos ? "" : text.substr(equals + 1);
  if (what.empty()) {
    throw ConfigError(owner + ": write " + axis.param.name + "=LO:HI or a list of values; it takes " + allowed(p));
  }
  const std::vector<std::string> bounds = split(what, ':');
  axis.scale = p.scale;
  if (bounds.size() == 1 || !is_number(p) || what.front() == '@') {
    for (const std::string& v : split(what, ',')) {
      if (is_number(p) && !axis.param.engine && v.starts_with("@")) {
        if (read_table) {
          read_table(v.substr(1));  // ConfigError where it is none
        }
        axis.values.push_back(v);
        continue;
      }
      axis.values.push_back(format_value(p, parse_value(owner, p, v)));
    }
    return axis;
  }
  if (bounds.size() > 3) {
    throw ConfigError(owner + ": a range is LO:HI or LO:HI:SCALE with SCALE one of lin, log, one_minus");
  }
  const ParamValue lo = parse_value(owner, p, bounds[0]), hi = parse_value(owner, p, bounds[1]);
  if (bounds.size() == 3) {
    axis.scale = scale_named(owner, bounds[2]);
  }
  if (lo.percent != hi.percent) {
    throw ConfigError(owner + ": one end is in percent of the budget and the other in tokens");
  }
  if (!(lo.number < hi.number)) {
    throw ConfigError(owner + ": " + bounds[0] + " is not below " + bounds[1]);
  }
  axis.lo = lo.number;
  axis.hi = hi.number;
  axis.percent = lo.percent;
  if (axis.scale == Scale::log && axis.lo + log_offset(axis) <= 0) {
    throw ConfigError(owner + ": " + bounds[0] + " has no logarithm; start above 0, or write :lin after the range");
  }
  if (axis.scale == Scale::one_minus && axis.hi >= 1) {
    throw ConfigError(owner +
                      ": on the scale one_minus a range ends below 1, as 0.999, because it is even in the "
                      "logarithm of 1 - " +
                      axis.param.name + "; or write :lin after the range");
  }
  return axis;
}

std::string Axis::at(double u) const {
  const double from = forward(*this, lo), to = forward(*this, hi);
  double x = u <= 0 ? lo : u >= 1 ? hi : backward(*this, from + u * (to - from));
  if (is_whole(*this)) {
    x = std::round(x);
  } else if (u > 0 && u < 1) {
    x = rounded(x, scale == Scale::lin ? hi - lo : scale == Scale::log ? x : 1 - x);
  }
  return format_value(*param.param, {std::clamp(x, lo, hi), percent, {}});
}

double Axis::place(double value) const {
  const double from = forward(*this, lo), to = forward(*this, hi);
  return std::clamp((forward(*this, value) - from) / (to - from), 0.0, 1.0);
}

std::vector<Point> search(const std::vector<Axis>& axes, const SearchOptions& options, const Evaluate& evaluate) {
  return Searching(axes, options).run(evaluate);
}

}  // namespace kvreplay
