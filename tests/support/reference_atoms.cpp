#include "tests/support/reference_atoms.hpp"

#include <cmath>
#include <limits>
#include <numbers>

#include "policies/counter_rng.hpp"

namespace kvreplay::testing {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

struct Member {
  Pos token;
  int joined;
};
using Group = std::vector<Member>;

// What one query head's set has lost, of its own keys and values.
struct Lost {
  const MatD *k, *v;
  Eigen::VectorX<Pos> at;  // (n_tokens) first step without the token
  std::vector<Pos> of_step(int step) const {
    std::vector<Pos> tokens;
    for (Pos p = 0; p < at.size(); ++p) {
      if (at[p] == step) {
        tokens.push_back(p);
      }
    }
    return tokens;
  }
};

Lost lost_of(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, int q_head) {
  const auto kv = static_cast<std::size_t>(layer.kv_head(q_head));
  return {&layer.k[kv], &layer.v[kv], evicted_at.row(set_of(layer, scope, q_head)).transpose()};
}

Eigen::VectorXd mean_of(const Group& group, const MatD& x, double decay, int step) {
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(x.cols());
  double weight = 0;
  for (const Member& m : group) {
    const double w = std::pow(decay, step - m.joined);
    sum += w * x.row(m.token).transpose();
    weight += w;
  }
  return sum / weight;
}

std::size_t closest(const Eigen::VectorXd& key, const std::vector<Eigen::VectorXd>& centres) {
  std::size_t best = 0;
  for (std::size_t c = 1; c < centres.size(); ++c) {
    if ((key - centres[c]).squaredNorm() < (key - centres[best]).squaredNorm()) {
      best = c;
    }
  }
  return best;
}

std::vector<Group> lloyd(const std::vector<Pos>& tokens, const MatD& k, int most, int iterations,
                         const std::vector<Pos>& starts, int step) {
  std::vector<Eigen::VectorXd> centres;
  for (const Pos p : starts) {
    if (static_cast<int>(centres.size()) < most) {
      centres.push_back(k.row(p));
    }
  }
  if (starts.empty()) {
    const auto n = static_cast<double>(tokens.size());
    const int n_centres = std::min(most, static_cast<int>(tokens.size()));
    for (int c = 0; c < n_centres; ++c) {
      centres.push_back(k.row(tokens[static_cast<std::size_t>(std::floor((c + 0.5) * n / n_centres))]));
    }
  }
  std::vector<Group> groups;
  for (int i = 0; i < iterations; ++i) {
    groups.assign(centres.size(), {});
    for (const Pos p : tokens) {
      groups[closest(k.row(p), centres)].push_back({p, step});
    }
    for (std::size_t c = 0; c < groups.size(); ++c) {
      if (!groups[c].empty()) {
        centres[c] = mean_of(groups[c], k, 1, step);
      }
    }
  }
  std::erase_if(groups, [](const Group& g) { return g.empty(); });
  return groups;
}

std::vector<Group> groups_at(const Lost& lost, const ReferenceAtoms& a, const std::vector<Pos>& starts, int step) {
  std::vector<Group> groups;
  std::vector<Pos> seen;
  for (int s = 0; s <= step; ++s) {
    const bool again = a.every > 0 && s > 0 && s % a.every == 0 && !seen.empty();
    const std::vector<Pos> tokens = lost.of_step(s);
    seen.insert(seen.end(), tokens.begin(), tokens.end());
    if (again) {
      groups = lloyd(seen, *lost.k, a.most, a.iterations, {}, s);
      continue;
    }
    if (a.assign == ReferenceAtoms::Assign::blocks) {
      groups.resize(static_cast<std::size_t>(a.most));
    }
    const auto most = static_cast<std::size_t>(a.most);
    if (a.assign == ReferenceAtoms::Assign::nearest && groups.empty() && tokens.size() > most && most > 1) {
      groups = lloyd(tokens, *lost.k, a.most, a.iterations, starts, s);
      continue;
    }
    std::vector<Eigen::VectorXd> centres;
    if (a.assign == ReferenceAtoms::Assign::nearest) {
      for (const Group& g : groups) {
        centres.push_back(mean_of(g, *lost.k, a.decay, s));
      }
      for (std::size_t i = 0; i < tokens.size() && centres.size() < most; ++i) {
        centres.push_back(lost.k->row(tokens[i]));
      }
    }
    const std::size_t known = groups.size();
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      std::size_t to = 0;
      if (a.assign == ReferenceAtoms::Assign::blocks) {
        const Pos width = (static_cast<Pos>(lost.at.size()) + a.most - 1) / a.most;
        to = static_cast<std::size_t>(tokens[i] / width);
      } else if (a.assign == ReferenceAtoms::Assign::nearest && most > 1) {
        to = known + i < most ? known + i : closest(lost.k->row(tokens[i]), centres);
      }
      if (groups.size() <= to) {
        groups.resize(to + 1);
      }
      groups[to].push_back({tokens[i], s});
    }
  }
  return groups;
}

struct Entries {
  std::vector<double> logits;
  std::vector<Eigen::VectorXd> values;
  ReferenceEstimate merged(Eigen::Index width) const {
    ReferenceEstimate e{kNothing, Eigen::VectorXd::Zero(width)};
    double top = kNothing;
    for (const double x : logits) {
      top = std::max(top, x);
    }
    if (top == kNothing) {
      return e;
    }
    double sum = 0;
    for (std::size_t c = 0; c < logits.size(); ++c) {
      sum += std::exp(logits[c] - top);
      e.value += std::exp(logits[c] - top) * values[c];
    }
    e.log_mass = top + std::log(sum);
    e.value /= sum;
    return e;
  }
};

// `q` with the softmax scale folded in.
ReferenceEstimate of_groups(const std::vector<Group>& groups, const Lost& lost, const ReferenceAtoms& a,
                            const Eigen::VectorXd& q, int step) {
  Entries entries;
  for (const Group& group : groups) {
    if (group.empty()) {
      continue;
    }
    const Eigen::VectorXd k_mean = mean_of(group, *lost.k, a.decay, step),
                          v_mean = mean_of(group, *lost.v, a.decay, step);
    double n = 0, n_joined = 0, full = 0, diagonal = 0;
    int last = 0;
    for (const Member& m : group) {
      last = std::max(last, m.joined);
    }
    Eigen::VectorXd tilt = Eigen::VectorXd::Zero(v_mean.size());
    for (const Member& m : group) {
      const double w = std::pow(a.decay, step - m.joined);
      const Eigen::VectorXd dk = lost.k->row(m.token).transpose() - k_mean;
      n += w;
      n_joined += std::pow(a.decay, last - m.joined);
      full += w * std::pow(q.dot(dk), 2);
      diagonal += w * q.cwiseAbs2().dot(dk.cwiseAbs2());
      tilt += w * q.dot(dk) * (lost.v->row(m.token).transpose() - v_mean);
    }
    const double variance = (a.kappa == ReferenceAtoms::Kappa::full ? full : diagonal) / n;
    double kappa = a.kappa == ReferenceAtoms::Kappa::none ? 0 : variance / 2;
    tilt *= a.tilt ? 1 / n : 0;
    const double log_n = std::max(0.0, std::log(n_joined));
    if (a.freeze && a.kappa != ReferenceAtoms::Kappa::none && variance > 2 * log_n) {
      kappa = std::sqrt(variance * 2 * log_n) - log_n;
      tilt *= std::sqrt(2 * log_n / variance);
    }
    entries.logits.push_back(std::log(n) + q.dot(k_mean) + a.strength * kappa);
    entries.values.push_back(v_mean + tilt);
  }
  return entries.merged(lost.v->cols());
}

Eigen::VectorXd query(const ToyLayer& layer, int q_head, Pos pos) {
  return layer.scale * layer.q[static_cast<std::size_t>(q_head)].row(pos).transpose();
}

// Attention of one query over some tokens: ln of the mass, the largest logit, the output.
struct Over {
  double log_mass = kNothing, top = kNothing;
  Eigen::VectorXd output;
};
Over attend(const Eigen::VectorXd& q, const Lost& lost, const std::vector<Pos>& tokens) {
  Entries entries;
  Over over;
  for (const Pos p : tokens) {
    entries.logits.push_back(q.dot(lost.k->row(p)));
    entries.values.push_back(lost.v->row(p));
    over.top = std::max(over.top, entries.logits.back());
  }
  const ReferenceEstimate e = entries.merged(lost.v->cols());
  over.log_mass = e.log_mass;
  over.output = e.value;
  return over;
}

double gate(const ReferenceClusters& c, const Over& retained) {
  const double largest = retained.log_mass == kNothing ? 0 : std::exp(retained.top - retained.log_mass);
  return std::max(c.least_gate, 1 / (1 + std::exp(c.sharpness * (largest - c.threshold))));
}

Eigen::VectorXd mixed(const Over& retained, double log_mass, const Eigen::VectorXd& value) {
  if (log_mass == kNothing) {
    return retained.output;
  }
  const double share = 1 / (1 + std::exp(retained.log_mass - log_mass));
  return (1 - share) * retained.output + share * value;
}

ReferenceAtoms entries_of(const ReferenceClusters& c, int n) {
  ReferenceAtoms a;
  a.most = n;
  a.iterations = c.iterations;
  a.every = c.every;
  a.kappa = ReferenceAtoms::Kappa::none;
  return a;
}

}  // namespace

Estimator reference_atoms(const ToyLayer& layer, Scope scope, const Evicted& evicted_at,
                          const ReferenceAtoms& settings) {
  return [&layer, scope, evicted_at, settings](int q_head, int step) {
    const Lost lost = lost_of(layer, scope, evicted_at, q_head);
    const Eigen::VectorXd q = query(layer, q_head, layer.options.prompt_len + step);
    return of_groups(groups_at(lost, settings, {}, step), lost, settings, q, step);
  };
}

Estimator reference_clusters(const ToyLayer& layer, Scope scope, const Evicted& evicted_at,
                             const ReferenceClusters& c) {
  struct Plan {
    int entries = 0;
    std::vector<Pos> starts;
  };
  const Pos prompt_len = layer.options.prompt_len;
  // What the prompt's queries say, once per set.
  std::vector<Plan> plans;
  for (int set = 0; set < n_sets(layer, scope) * (scope == Scope::layer ? layer.options.n_kv_heads : 1); ++set) {
    Plan plan;
    plan.entries = c.entries;
    std::vector<int> heads;
    for (int h = 0; h < layer.n_heads(); ++h) {
      if ((scope == Scope::query_head ? h : layer.kv_head(h)) == set) {
        heads.push_back(h);
      }
    }
    const Lost lost = lost_of(layer, scope, evicted_at, heads[0]);
    std::vector<Pos> evicted, retained, all;
    for (Pos p = 0; p < prompt_len; ++p) {
      (lost.at[p] == 0 ? evicted : retained).push_back(p);
      all.push_back(p);
    }
    const int wanted = c.fit + (c.validate ? c.judge : 0), n = std::min(wanted, prompt_len);
    const int judges = c.validate ? std::clamp(n * c.judge / (c.fit + c.judge), 1, c.judge) : 0;
    if (!evicted.empty() && n > 0) {
      std::vector<std::pair<double, Pos>> ranked;
      for (const Pos e : evicted) {
        double mass = 0;
        for (Pos t = prompt_len - n; t < prompt_len - judges; ++t) {
          for (const int h : heads) {
            const Eigen::VectorXd q = query(layer, h, t);
            mass += std::exp(q.dot(lost.k->row(e)) - attend(q, lost, all).log_mass);
          }
        }
        ranked.emplace_back(-mass, e);
      }
      std::sort(ranked.begin(), ranked.end());
      if (n > judges && c.fit > 0) {
        for (const auto& [mass, p] : ranked) {
          plan.starts.push_back(p);
        }
      }
      if (judges > 0) {
        const auto loss = [&](int entries) {
          double sum = 0;
          for (Pos t = prompt_len - judges; t < prompt_len; ++t) {
            for (const int h : heads) {
              const Eigen::VectorXd q = query(layer, h, t);
              const Over kept = attend(q, lost, retained), exact = attend(q, lost, all);
              Eigen::VectorXd out = kept.output;
              if (entries > 0) {
                const ReferenceAtoms a = entries_of(c, entries);
                ReferenceEstimate e = of_groups(groups_at(lost, a, plan.starts, 0), lost, a, q, 0);
                e.log_mass += c.gate ? std::log(gate(c, kept)) : 0;
                out = mixed(kept, e.log_mass, e.value);
              }
              sum += (exact.output - out).squaredNorm();
            }
          }
          return sum;
        };
        double least = (1 - c.margin) * loss(0);
        plan.entries = 0;
        for (int quarter = 1; quarter <= 4; ++quarter) {
          const int entries = c.entries * quarter / 4;
          if (entries > 0 && loss(entries) < least) {
            least = loss(entries);
            plan.entries = entries;
          }
        }
      }
    }
    plans.push_back(plan);
  }
  return [&layer, scope, evicted_at, c, plans](int q_head, int step) {
    const Plan& plan = plans[static_cast<std::size_t>(scope == Scope::query_head ? q_head : layer.kv_head(q_head))];
    const Lost lost = lost_of(layer, scope, evicted_at, q_head);
    ReferenceEstimate e{kNothing, Eigen::VectorXd::Zero(lost.v->cols())};
    if (plan.entries == 0) {
      return e;
    }
    const Pos now = layer.options.prompt_len + step;
    const Eigen::VectorXd q = query(layer, q_head, now);
    const ReferenceAtoms a = entries_of(c, plan.entries);
    e = of_groups(groups_at(lost, a, plan.starts, step), lost, a, q, step);
    std::vector<Pos> retained;
    for (Pos p = 0; p <= now; ++p) {
      if (step < lost.at[p]) {
        retained.push_back(p);
      }
    }
    e.log_mass += c.gate ? std::log(gate(c, attend(q, lost, retained))) : 0;
    return e;
  };
}

Estimator reference_linear(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, int features,
                           std::uint64_t seed) {
  return [&layer, scope, evicted_at, features, seed](int q_head, int step) {
    const Lost lost = lost_of(layer, scope, evicted_at, q_head);
    const int kv_head = layer.kv_head(q_head), layer_index = 0;
    const double root = std::sqrt(layer.scale);
    MatD w(features, layer.options.head_dim);
    for (Eigen::Index r = 0; r < w.rows(); ++r) {
      for (Eigen::Index i = 0; i < w.cols(); ++i) {
        const double radius = std::sqrt(-2 * std::log(1 - uniform_at(seed, layer_index, kv_head, r, i, 0)));
        w(r, i) = radius * std::cos(2 * std::numbers::pi * uniform_at(seed, layer_index, kv_head, r, i, 1));
      }
    }
    const Eigen::VectorXd x = root * layer.q[static_cast<std::size_t>(q_head)].row(layer.options.prompt_len + step);
    Entries entries;
    for (Pos p = 0; p <= layer.options.prompt_len + step; ++p) {
      if (lost.at[p] > step) {
        continue;
      }
      const Eigen::VectorXd y = root * lost.k->row(p);
      for (Eigen::Index r = 0; r < w.rows(); ++r) {
        entries.logits.push_back(w.row(r).dot(x + y) - (x.squaredNorm() + y.squaredNorm()) / 2 - std::log(features));
        entries.values.push_back(lost.v->row(p));
      }
    }
    return entries.merged(lost.v->cols());
  };
}

NamedSeries estimate_metrics(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, const std::string& name,
                             const Estimator& estimator) {
  const MatD left_out = MatD::Constant(layer.n_heads(), layer.n_steps(), std::numeric_limits<double>::quiet_NaN());
  NamedSeries out;
  MatD& mass = out["evicted_mass"] = left_out;
  MatD& corrected = out["error_corrected." + name] = left_out;
  MatD& ratio = out["log_mass_ratio." + name] = left_out;
  MatD& cosine = out["cos_estimate." + name] = left_out;
  const Attends attends = attends_from(layer, scope, evicted_at);
  for (int h = 0; h < layer.n_heads(); ++h) {
    const MatD& v = layer.v[static_cast<std::size_t>(layer.kv_head(h))];
    for (int step = 0; step < layer.n_steps(); ++step) {
      const Eigen::VectorXd logits = logits_at(layer, h, layer.options.prompt_len + step);
      std::vector<bool> all(static_cast<std::size_t>(logits.size()), true), kept(all.size()), lost(all.size());
      bool any = false;
      for (std::size_t p = 0; p < all.size(); ++p) {
        kept[p] = attends(h, step, static_cast<Pos>(p));
        lost[p] = !kept[p];
        any = any || lost[p];
      }
      const Softmax full = softmax_over(logits, v, all), retained = softmax_over(logits, v, kept),
                    evicted = softmax_over(logits, v, lost);
      const double w = any ? 1 / (1 + std::exp(retained.log_mass - evicted.log_mass)) : 0;
      mass(h, step) = w;
      if (!(retained.log_mass >= logits.maxCoeff() + kLeastLogMass)) {
        continue;
      }
      const ReferenceEstimate e = estimator(h, step);
      const Over over{retained.log_mass, 0, retained.output};
      corrected(h, step) = any ? (full.output - mixed(over, e.log_mass, e.value)).norm() / full.output.norm() : 0;
      if (!any || e.log_mass == kNothing) {
        continue;
      }
      if (evicted.log_mass >= logits.maxCoeff() + kLeastLogMass) {
        ratio(h, step) = evicted.log_mass - e.log_mass;
      }
      if (w >= kLeastEvictedMass) {
        cosine(h, step) = evicted.output.dot(e.value) / (evicted.output.norm() * e.value.norm());
      }
    }
  }
  return out;
}

}  // namespace kvreplay::testing
