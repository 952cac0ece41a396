#include "analysis/objective.hpp"

#include <algorithm>
#include <cmath>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "policies/values.hpp"
#include "sim/results.hpp"
#include "sim/run.hpp"

namespace kvreplay {
namespace {

constexpr std::string_view kStatistics[] = {"mean", "std", "p50", "p90", "p99", "max"};

double statistic_of(const Statistics& s, Statistic which) {
  switch (which) {
    case Statistic::mean:
      return s.mean;
    case Statistic::std:
      return s.std;
    case Statistic::p50:
      return s.p50;
    case Statistic::p90:
      return s.p90;
    case Statistic::p99:
      return s.p99;
    case Statistic::max:
      break;
  }
  return s.max;
}

// Metrics that count at every step, up to steps without any usable output.
bool counts_always(Metric m) {
  switch (m) {
    case Metric::evicted_mass:
    case Metric::error:
    case Metric::error_output:
    case Metric::error_corrected:
    case Metric::resident:
    case Metric::attended:
    case Metric::bytes:
    case Metric::bytes_read:
    case Metric::retention:
    case Metric::lost_mass:
    case Metric::projected_error:
    case Metric::projected_error_output:
    case Metric::projected_error_corrected:
      return true;
    default:
      return false;
  }
}

[[noreturn]] void refuse(const std::string& term, const std::string& why) {
  throw ConfigError("--objective: in '" + term + "' " + why);
}

Metric metric_named(const std::string& term, const std::string& name) {
  std::vector<std::string> names;
  for (const MetricInfo& i : all_metrics()) {
    if (i.name == name) {
      return i.metric;
    }
    names.emplace_back(i.name);
  }
  refuse(term, "'" + name + "' is no metric; the nearest is '" + nearest(name, names) + "'");
}

Statistic statistic_named(const std::string& term, const std::string& name) {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < std::size(kStatistics); ++i) {
    if (kStatistics[i] == name) {
      return static_cast<Statistic>(i);
    }
    names.emplace_back(kStatistics[i]);
  }
  refuse(term, "'" + name + "' is no statistic; the nearest is '" + nearest(name, names) +
                   "' of mean, std, p50, p90, p99, max");
}

Term parse_term(const std::string& text) {
  Term term;
  std::string rest = text;
  if (const std::size_t star = rest.find('*'); star != std::string::npos) {
    if (!parse_number(std::string_view(rest).substr(0, star), term.weight) || term.weight == 0) {
      refuse(text, "'" + rest.substr(0, star) + "' is no weight; write a number other than 0, as 0.5*evicted_mass");
    }
    rest = rest.substr(star + 1);
  }
  const std::size_t name_end = std::min(rest.find_first_of(".:"), rest.size());
  term.metric = metric_named(text, rest.substr(0, name_end));
  const MetricInfo& metric = info(term.metric);
  rest = rest.substr(name_end);
  if (metric.per_span) {
    const std::size_t end = rest.empty() ? 0 : std::min(rest.find(':', 1), rest.size());
    term.span = end > 1 ? rest.substr(1, end - 1) : "";
    if (term.span.empty() || rest.front() != ':') {
      refuse(text,
             "the span is missing; write " + std::string(metric.name) + ":NAME with the name of a span of the trace");
    }
    rest = rest.substr(end);
  }
  // A last piece without "=" is a statistic: the keys of a compensator follow a colon too.
  if (const std::size_t colon = rest.rfind(':');
      colon != std::string::npos && rest.find('=', colon) == std::string::npos) {
    term.statistic = statistic_named(text, rest.substr(colon + 1));
    rest = rest.substr(0, colon);
  }
  if (metric.per_compensator && rest.size() < 2) {
    refuse(text, std::string(metric.name) + " needs a compensator; write for example " + std::string(metric.name) +
                     ".moments");
  }
  if (!metric.per_compensator && !rest.empty()) {
    refuse(text, "'" + rest.substr(1) + "' cannot follow " + std::string(metric.name) +
                     ", which is measured without a compensator; write METRIC[.COMPENSATOR][:STATISTIC]");
  }
  if (metric.per_compensator) {
    if (rest.front() != '.') {
      refuse(text, std::string(metric.name) + " needs a compensator; write for example " + std::string(metric.name) +
                       ".moments");
    }
    const PartUse use = parse_part(rest.substr(1), Role::compensate);
    if (use.info->is_default) {
      refuse(text, "'none' measures nothing; the error without a correction is the metric error");
    }
    term.compensator = canonical(use);
  }
  return term;
}

// "+" joins terms, except in a number such as 1e+3.
std::vector<std::string> split_terms(const std::string& text) {
  std::vector<std::string> terms;
  std::size_t begin = 0;
  for (std::size_t i = 1; i <= text.size(); ++i) {
    const bool exponent = i >= 2 && i < text.size() && (text[i - 1] == 'e' || text[i - 1] == 'E') &&
                          text[i - 2] >= '0' && text[i - 2] <= '9';
    if (i == text.size() || (text[i] == '+' && !exponent)) {
      terms.push_back(text.substr(begin, i - begin));
      begin = i + 1;
    }
  }
  return terms;
}

}  // namespace

void Sums::add(const Sums& other) {
  weighted.resize(std::max(weighted.size(), other.weighted.size()));
  n.resize(weighted.size());
  for (std::size_t t = 0; t < other.weighted.size(); ++t) {
    weighted[t] += other.weighted[t];
    n[t] += other.n[t];
  }
  bytes += other.bytes;
  bytes_steps += other.bytes_steps;
}

std::string_view name_of(Statistic statistic) { return kStatistics[static_cast<std::size_t>(statistic)]; }

std::string name_of(const Term& t) {
  std::string text(info(t.metric).name);
  text += t.span.empty() ? "" : ":" + t.span;
  text += t.compensator.empty() ? "" : "." + t.compensator;
  return text + (t.statistic == Statistic::mean ? "" : ":" + std::string(name_of(t.statistic)));
}

Objective Objective::parse(const std::string& text) {
  Objective o;
  o.text = text;
  if (text.empty()) {
    throw ConfigError("--objective: '' has an empty term; write for example error_output+0.5*evicted_mass");
  }
  std::size_t n_at = 0;
  for (std::string term : split_terms(text)) {
    if (const std::size_t at = term.find('@'); at != std::string::npos) {
      const std::string what = term.substr(at + 1);
      if (!what.starts_with("bytes=")) {
        refuse(term, "'@" + what + "' is not @bytes=SIZE, as @bytes=64KiB");
      }
      const double bytes = static_cast<double>(parse_bytes("--objective " + term, what.substr(6)));
      if (n_at > 0 && bytes != o.bytes) {
        refuse(text, "terms are at different bytes; all of them take the same");
      }
      o.bytes = bytes;
      ++n_at;
      term = term.substr(0, at);
    }
    if (term.empty()) {
      throw ConfigError("--objective: '" + text +
                        "' has an empty term; write for example error_output+0.5*evicted_mass");
    }
    o.terms.push_back(parse_term(term));
  }
  if (n_at > 0 && n_at != o.terms.size()) {
    refuse(text, "some terms are at bytes and some are not; write @bytes=SIZE after each of them or after none");
  }
  return o;
}

MetricSet Objective::metrics() const {
  MetricSet set = MetricSet::parse("error_output");  // the tables' own; resident and bytes are always there
  for (const Term& t : terms) {
    set.set(t.metric);
  }
  return set;
}

std::vector<std::string> Objective::compensators() const {
  std::vector<std::string> all;
  for (const Term& t : terms) {
    if (!t.compensator.empty() && std::find(all.begin(), all.end(), t.compensator) == all.end()) {
      all.push_back(t.compensator);
    }
  }
  return all;
}

bool Objective::needs_steps() const {
  return std::any_of(terms.begin(), terms.end(),
                     [](const Term& t) { return t.statistic != Statistic::mean || !counts_always(t.metric); });
}

bool Objective::per_head() const {
  return std::none_of(terms.begin(), terms.end(), [](const Term& t) { return info(t.metric).level == Level::layer; });
}

std::vector<Sums> Objective::measure(const CellResult& cell, int n_heads, int n_kv_heads) const {
  const Sums none{.weighted = std::vector<double>(terms.size(), 0), .n = std::vector<double>(terms.size(), 0)};
  std::vector<Sums> rows(std::size_t(n_kv_heads) + 1, none);
  const int group_size = n_heads / n_kv_heads;
  const auto row_of = [&](const Series& s, int r) {
    const Level level = info(s.metric).level;
    return std::size_t(level == Level::query_head ? r / group_size : level == Level::kv_head ? r : n_kv_heads);
  };
  for (const Series& s : cell.series) {
    const std::string compensator = s.compensator >= 0 ? cell.compensators[std::size_t(s.compensator)] : "";
    for (std::size_t t = 0; t < terms.size(); ++t) {
      if (terms[t].metric != s.metric || terms[t].compensator != compensator || terms[t].span != s.span) {
        continue;
      }
      for (int r = 0; r < s.rows; ++r) {
        const Statistics st = statistics(s.row(r));
        if (st.n > 0) {
          rows[row_of(s, r)].weighted[t] += st.n * statistic_of(st, terms[t].statistic);
          rows[row_of(s, r)].n[t] += st.n;
        }
      }
    }
    if (s.metric == Metric::bytes) {
      for (int r = 0; r < s.rows; ++r) {
        const Statistics st = statistics(s.row(r));
        rows[std::size_t(r)].bytes += st.n > 0 ? st.n * st.mean : 0;
        rows[std::size_t(r)].bytes_steps += st.n;
      }
    }
  }
  return rows;
}

double Objective::value(const Sums& sums) const {
  double total = 0;
  for (std::size_t t = 0; t < terms.size(); ++t) {
    total += terms[t].weight * (sums.n.at(t) > 0 ? sums.weighted[t] / sums.n[t] : std::nan(""));
  }
  return total;
}

double Objective::value_at_bytes(std::span<const Sums> by_budget) const {
  struct At {
    double bytes, value;
  };
  std::vector<At> known;
  for (const Sums& s : by_budget) {
    if (s.bytes_steps > 0 && !s.n.empty() && !std::isnan(value(s))) {
      known.push_back({s.bytes / s.bytes_steps, value(s)});
    }
  }
  std::sort(known.begin(), known.end(), [](const At& a, const At& b) { return a.bytes < b.bytes; });
  for (std::size_t i = 0; i < known.size(); ++i) {
    if (known[i].bytes == bytes) {
      return known[i].value;
    }
    if (i > 0 && known[i - 1].bytes < bytes && bytes < known[i].bytes) {
      const double share = std::log(bytes / known[i - 1].bytes) / std::log(known[i].bytes / known[i - 1].bytes);
      return known[i - 1].value + share * (known[i].value - known[i - 1].value);
    }
  }
  return std::nan("");
}

}  // namespace kvreplay
