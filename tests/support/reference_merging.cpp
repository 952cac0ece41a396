#include "tests/support/reference_merging.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "policies/counter_rng.hpp"

namespace kvreplay::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double cosine(const Eigen::VectorXd& a, const Eigen::VectorXd& b) { return a.dot(b) / (a.norm() * b.norm()); }

double log_sum_exp(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double value : x) {
    sum += std::exp(value - top);
  }
  return top + std::log(sum);
}

bool is_gone(const std::vector<Pos>& gone, Pos pos) { return std::find(gone.begin(), gone.end(), pos) != gone.end(); }

// The survivor of most similar key, the oldest of equals.
struct Match {
  Pos pos = -1;
  double cosine = -2;
};
Match match(const MergeLane& lane, const std::vector<Pos>& gone, Pos pos) {
  Match best;
  for (const auto& [other, slot] : lane.slots) {
    if (!is_gone(gone, other)) {
      const double u = cosine(lane.slots.at(pos).k, slot.k);
      if (u > best.cosine + 1e-12) {
        best = {other, u};
      }
    }
  }
  return best;
}

// Attention received from the whole prompt and every step since; or from some of it.
class Sums {
 public:
  explicit Sums(bool of_prompt = true) : of_prompt_(of_prompt) {}
  void observe(const MergeState& s) {
    for (std::size_t l = 0; l < s.lanes.size(); ++l) {
      std::map<Pos, double>& sum = sums_[l];
      const MergeLane& lane = s.lanes[l];
      if (!s.at_prefill()) {
        for (const auto& [pos, a] : s.mean_attention(lane)) {
          sum[pos] += a;
        }
      } else if (of_prompt_ && !lane.slots.empty()) {
        for (const int h : lane.q_heads) {
          for (Pos t = 0; t <= s.now; ++t) {
            const Softmax past =
                softmax_over(logits_at(*s.layer, h, t), s.layer->v[static_cast<std::size_t>(lane.kv_head)],
                             std::vector<bool>(static_cast<std::size_t>(t) + 1, true));
            for (Pos i = 0; i <= t; ++i) {
              sum[i] += past.weight[i] / static_cast<double>(lane.q_heads.size());
            }
          }
        }
      }
    }
  }
  double& of(std::size_t lane, Pos pos) { return sums_[lane][pos]; }

 private:
  bool of_prompt_;
  std::map<std::size_t, std::map<Pos, double>> sums_;
};

class Keep : public ReferenceMerger {
 public:
  explicit Keep(const KeepKv& settings) : set_(settings) {}

  void observe(const MergeState& s) override {
    for (std::size_t l = 0; l < s.lanes.size(); ++l) {
      const MergeLane& lane = s.lanes[l];
      if (lane.slots.empty()) {
        continue;
      }
      const Pos first = s.at_prefill() ? std::max<Pos>(0, s.now - (set_.alpha > 0 ? set_.window : 0)) : s.now;
      for (Pos t = first; t <= s.now; ++t) {
        std::map<Pos, std::vector<double>> scores;  // ln of the score, per head
        for (const int h : lane.q_heads) {
          std::vector<double> all;
          for (const auto& [pos, slot] : lane.slots) {
            if (pos <= t) {
              all.push_back(s.logit(h, t, slot.k) + slot.bias);
            }
          }
          for (const Pos pos : lane.pinned) {
            const MatD& k = s.layer->k[static_cast<std::size_t>(lane.kv_head)];
            all.push_back(s.logit(h, t, k.row(pos)));
          }
          for (const auto& [pos, slot] : lane.slots) {
            if (pos <= t) {
              scores[pos].push_back(s.logit(h, t, slot.k) - (set_.attention_domain ? log_sum_exp(all) : 0));
            }
          }
        }
        for (const auto& [pos, by_head] : scores) {
          const double mean = log_sum_exp(by_head) - std::log(static_cast<double>(by_head.size()));
          Average& a = averages_[l][pos];
          const double old = set_.alpha > 0 && a.weight > 0 ? std::log(set_.alpha) + a.log_sum : -kInfinity;
          a.log_sum = log_sum_exp({old, std::log(1 - set_.alpha) + mean});
          a.weight = set_.alpha * a.weight + 1 - set_.alpha;
        }
      }
    }
  }

  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    for (std::size_t l = 0; l < s.lanes.size(); ++l) {
      MergeLane& lane = s.lanes[l];
      std::map<Pos, std::vector<Pos>> groups;
      for (const Pos pos : gone) {
        const Match m = match(lane, gone, pos);
        if (m.pos >= 0 && m.cosine >= set_.threshold) {
          groups[m.pos].push_back(pos);
        }
      }
      for (auto& [target, sources] : groups) {
        sources.push_back(target);
        one(s, l, target, sources);
      }
    }
  }

 private:
  struct Average {
    double log_sum = 0, weight = 0;
  };

  double norm(const MergeState& s, const Average& a) const {
    return std::log(set_.as_written ? 1 - std::pow(set_.alpha, s.now + 1) : a.weight);
  }

  void one(const MergeState& s, std::size_t l, Pos target, const std::vector<Pos>& members) {
    MergeLane& lane = const_cast<MergeLane&>(s.lanes[l]);
    std::map<Pos, double> log_s, log_w;
    std::vector<double> masses, votes;
    for (const Pos pos : members) {
      const Average& a = averages_[l].at(pos);
      log_s[pos] = a.log_sum - norm(s, a);
      log_w[pos] = log_s[pos] + lane.slots.at(pos).bias;
      masses.push_back(log_w[pos]);
      votes.push_back(lane.slots.at(pos).bias);
    }
    const double mass = log_sum_exp(masses), p = log_sum_exp(votes), tau = mass - p;
    MergedSlot merged;
    merged.k = Eigen::VectorXd::Zero(lane.slots.at(target).k.size());
    merged.v = Eigen::VectorXd::Zero(lane.slots.at(target).v.size());
    double mean = 0;
    for (const Pos pos : members) {
      const double pi = std::exp(log_w[pos] - mass);
      merged.k += pi * lane.slots.at(pos).k;
      merged.v += pi * lane.slots.at(pos).v;
      mean += pi * log_s[pos];
    }
    merged.bias = p;
    KeepVariant variant = set_.variant;
    if (variant == KeepVariant::zip && (std::abs(mean) < 1e-6 || std::abs(tau / mean) > set_.lambda_max)) {
      variant = KeepVariant::soft;
    }
    if (variant == KeepVariant::zip) {
      merged.k *= tau / mean;
    } else if (variant == KeepVariant::soft) {
      merged.k = lane.slots.at(target).k;
      merged.bias = mass - log_s[target];
    } else if (variant == KeepVariant::additive) {
      const auto n = static_cast<Eigen::Index>(lane.q_heads.size());
      MatD q(n, merged.k.size());
      Eigen::VectorXd lack(n);
      for (Eigen::Index g = 0; g < n; ++g) {
        const int h = lane.q_heads[static_cast<std::size_t>(g)];
        q.row(g) = s.layer->scale * s.layer->q[static_cast<std::size_t>(h)].row(s.now);
        std::vector<double> seen;
        for (const Pos pos : members) {
          seen.push_back(s.logit(h, s.now, lane.slots.at(pos).k) + lane.slots.at(pos).bias);
        }
        lack[g] = log_sum_exp(seen) - p - s.logit(h, s.now, merged.k);
      }
      const MatD ridge = 1e-6 * q.squaredNorm() / static_cast<double>(n) * MatD::Identity(n, n);
      merged.k += q.transpose() * (q * q.transpose() + ridge).inverse() * lack;
    }
    if (variant != KeepVariant::soft) {
      Average& a = averages_[l].at(target);
      a.log_sum = tau + norm(s, a);
    }
    lane.slots.at(target) = merged;
  }

  KeepKv set_;
  std::map<std::size_t, std::map<Pos, Average>> averages_;
};

class KvPress : public ReferenceMerger {
 public:
  KvPress(double threshold, double fraction, bool always)
      : threshold_(threshold), fraction_(fraction), always_(always) {}
  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    if (!s.at_prefill() && !always_) {
      return;
    }
    for (MergeLane& lane : s.lanes) {
      std::vector<double> u;
      for (const Pos pos : gone) {
        u.push_back(match(lane, gone, pos).cosine);
      }
      std::sort(u.begin(), u.end());
      double least = threshold_;
      if (fraction_ < 1) {
        const double rank = (1 - fraction_) * (static_cast<double>(u.size()) - 1);
        const auto low = static_cast<std::size_t>(std::floor(rank)), high = static_cast<std::size_t>(std::ceil(rank));
        if (u[low] >= threshold_) {
          least = u[low] + (rank - std::floor(rank)) * (u[high] - u[low]);
        }
      }
      const std::map<Pos, MergedSlot> old = lane.slots;
      for (auto& [target, slot] : lane.slots) {
        Eigen::VectorXd sum = old.at(target).v;
        double weight = 1;
        for (const Pos pos : gone) {
          const Match m = match(lane, gone, pos);
          if (m.pos == target && m.cosine >= least) {
            const double a = old.at(pos).v.norm(), b = old.at(target).v.norm();
            const double omega = std::max(m.cosine, 0.0) * a / (a + b + 1e-6);
            sum += omega * old.at(pos).v;
            weight += omega;
          }
        }
        slot.v = sum / weight;
      }
    }
  }

 private:
  double threshold_, fraction_;
  bool always_;
};

class Look : public ReferenceMerger {
 public:
  Look(LookMWeights weights, bool always) : weights_(weights), always_(always) {}
  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    if (!s.at_prefill() && !always_) {
      return;
    }
    for (MergeLane& lane : s.lanes) {
      const std::map<Pos, MergedSlot> old = lane.slots;
      std::map<Pos, double> total;
      std::map<Pos, Match> matches;
      for (const Pos pos : gone) {
        matches[pos] = match(lane, gone, pos);
      }
      for (const auto& [pos, m] : matches) {
        if (m.pos < 0) {
          continue;
        }
        MergedSlot& to = lane.slots.at(m.pos);
        const MergedSlot &kept = old.at(m.pos), &lost = old.at(pos);
        double weight = 1;
        Eigen::VectorXd k = lost.k, v = lost.v;
        if (weights_ == LookMWeights::pivot) {
          k = (lost.k + kept.k) / 2;
          v = (lost.v + kept.v) / 2;
        } else if (weights_ == LookMWeights::weighted) {
          weight = std::max(1e-6, (m.cosine + 1) / 2);
        }
        to.k += weight * k;
        to.v += weight * v;
        total[m.pos] += weight;
      }
      for (const auto& [pos, weight] : total) {
        lane.slots.at(pos).k /= 1 + weight;
        lane.slots.at(pos).v /= 1 + weight;
      }
    }
  }

 private:
  LookMWeights weights_;
  bool always_;
};

class D2o : public ReferenceMerger {
 public:
  D2o(bool paper, double alpha, double beta) : paper_(paper), alpha_(alpha), beta_(beta) {}
  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    if (s.lanes[0].slots.size() == gone.size()) {
      return;
    }
    std::map<Pos, double> u;
    double mean = 0;
    for (const Pos pos : gone) {
      for (const MergeLane& lane : s.lanes) {
        u[pos] += match(lane, gone, pos).cosine / static_cast<double>(s.lanes.size());
      }
      mean += u[pos] / static_cast<double>(gone.size());
    }
    gate_ = gate_ < -100 ? mean : alpha_ * gate_ + beta_ * mean;
    for (MergeLane& lane : s.lanes) {
      const std::map<Pos, MergedSlot> old = lane.slots;
      for (auto& [target, slot] : lane.slots) {
        const double self = paper_ ? std::exp(1.0) : 1;
        double total = self;
        slot.k *= self;
        slot.v *= self;
        for (const Pos pos : gone) {
          const Match m = match({lane.kv_head, {}, old, {}}, gone, pos);
          if (m.pos == target && u[pos] >= gate_ - 1e-6) {
            const double weight = paper_ ? std::exp(m.cosine) : m.cosine;
            slot.k += weight * old.at(pos).k;
            slot.v += weight * old.at(pos).v;
            total += paper_ ? weight : 1;
          }
        }
        slot.k /= total;
        slot.v /= total;
      }
    }
  }

 private:
  bool paper_;
  double alpha_, beta_, gate_ = -1000;
};

class CamMerger : public ReferenceMerger {
 public:
  explicit CamMerger(const Cam& settings) : set_(settings), sums_(settings.attention == CamAttention::cumulative) {}
  void observe(const MergeState& s) override { sums_.observe(s); }
  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    if (s.at_prefill() && !set_.prompt) {
      return;
    }
    for (std::size_t l = 0; l < s.lanes.size(); ++l) {
      MergeLane& lane = s.lanes[l];
      std::map<Pos, double> now = s.mean_attention(lane);
      const auto attention = [&](Pos pos) {
        return set_.attention == CamAttention::current ? now[pos] : sums_.of(l, pos);
      };
      const std::map<Pos, MergedSlot> old = lane.slots;
      for (const Pos pos : gone) {
        std::vector<Pos> window;
        for (const auto& [other, slot] : old) {
          if (other > pos && !is_gone(gone, other) && static_cast<int>(window.size()) < set_.window) {
            window.push_back(other);
          }
        }
        double sum = 0, most = 0;
        for (const Pos j : window) {
          sum += attention(j);
          most = std::max(most, attention(j));
        }
        const double n = static_cast<double>(window.size());
        const double p = attention(pos) / (set_.max ? most : sum / n);
        double share = std::min(p, 1.0);
        if (set_.mode == CamMode::deterministic) {
          share = p > 1 + 1e-6 ? 1 : 0;
        } else if (set_.mode == CamMode::bernoulli) {
          share = uniform_at(std::uint64_t{0}, 0, s.set, static_cast<int>(l), s.now, pos) < p ? 1 : 0;
        }
        for (const Pos j : window) {
          lane.slots.at(j).v += share / n * old.at(pos).v;
        }
      }
    }
  }

 private:
  Cam set_;
  Sums sums_;
};

class Weighted : public ReferenceMerger {
 public:
  Weighted(bool sum, bool votes) : sum_(sum), votes_(votes) {}
  void observe(const MergeState& s) override { sums_.observe(s); }
  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    for (std::size_t l = 0; l < s.lanes.size(); ++l) {
      MergeLane& lane = s.lanes[l];
      for (const Pos pos : gone) {
        Pos target = -1;
        for (const auto& [other, slot] : lane.slots) {
          if (!is_gone(gone, other) && (target < pos)) {
            target = other;
          }
        }
        if (target < 0) {
          continue;
        }
        const double n_own = s.now - pos + 1, n_other = s.now - target + 1;
        const double own = sums_.of(l, pos) / n_own, other = sums_.of(l, target) / n_other;
        MergedSlot& to = lane.slots.at(target);
        to.v = (own * lane.slots.at(pos).v + other * to.v) / (own + other);
        if (votes_) {
          to.bias += std::log(1 + own / other);
        }
        if (sum_) {
          sums_.of(l, target) = (own + other) * n_other;
        }
      }
    }
  }

 private:
  bool sum_, votes_;
  Sums sums_;
};

class Sel : public ReferenceMerger {
 public:
  Sel(int window, int bucket, bool gate, double alpha) : window_(window), bucket_(bucket), gate_(gate), alpha_(alpha) {}
  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    if (!s.at_prefill()) {
      return;
    }
    std::map<Pos, double> ratio;
    for (MergeLane& lane : s.lanes) {
      const std::map<Pos, MergedSlot> old = lane.slots;
      std::map<Pos, double> mass;
      for (const int h : lane.q_heads) {
        for (Pos t = std::max<Pos>(0, s.now + 1 - window_); t <= s.now; ++t) {
          const Softmax past =
              softmax_over(logits_at(*s.layer, h, t), s.layer->v[static_cast<std::size_t>(lane.kv_head)],
                           std::vector<bool>(static_cast<std::size_t>(t) + 1, true));
          for (Pos i = 0; i <= t; ++i) {
            mass[i] += past.weight[i];
          }
        }
      }
      std::map<Pos, double> total = mass;
      std::map<Pos, Eigen::VectorXd> sum;
      for (const auto& [pos, slot] : old) {
        sum[pos] = mass[pos] * slot.v;
      }
      for (const Pos pos : gone) {
        std::map<Pos, double> looked;  // at kept tokens of its bucket, by all heads
        for (const int h : lane.q_heads) {
          std::vector<double> all;
          std::vector<Pos> where;
          for (Pos i = pos - pos % bucket_; i < pos; ++i) {
            if (!is_gone(gone, i)) {
              where.push_back(i);
              all.push_back(s.logit(h, pos, old.at(i).k));
            }
          }
          for (std::size_t i = 0; i < where.size(); ++i) {
            looked[where[i]] += std::exp(all[i] - log_sum_exp(all));
          }
        }
        if (looked.empty()) {
          continue;
        }
        Pos target = looked.begin()->first;
        for (const auto& [i, a] : looked) {
          target = a > looked[target] ? i : target;
        }
        const double g = gate_ ? std::max(cosine(old.at(pos).v, old.at(target).v), 0.0) : 1;
        total[target] += g * mass[pos];
        sum[target] += g * mass[pos] * old.at(pos).v;
      }
      for (auto& [pos, slot] : lane.slots) {
        if (total[pos] > mass[pos]) {
          slot.v = sum[pos] / total[pos];
        }
        ratio[pos] += total[pos] / mass[pos] / static_cast<double>(s.lanes.size());
      }
    }
    for (MergeLane& lane : s.lanes) {
      for (auto& [pos, slot] : lane.slots) {
        slot.bias = ratio[pos] > 1 + 1e-12 ? alpha_ * std::log(ratio[pos]) : 0;
      }
    }
  }

 private:
  int window_, bucket_;
  bool gate_;
  double alpha_;
};

class SelScore : public ReferenceSelector {
 public:
  SelScore(int window, int kernel, int recent) : window_(window), kernel_(kernel), recent_(recent) {}
  std::vector<double> score(const SetState& s) override {
    const int n = static_cast<int>(s.slots.size()), recent = std::min(recent_, s.budget);
    std::vector<double> mean(s.slots.size(), 0.0);
    std::vector<bool> wanted(s.slots.size(), false);
    for (const int kv : s.kv_heads) {
      std::vector<double> c(s.slots.size(), 0.0), pooled(s.slots.size(), 0.0);
      double heads = 0;
      for (const int h : s.q_heads) {
        if (s.layer->kv_head(h) != kv) {
          continue;
        }
        ++heads;
        for (Pos t = std::max<Pos>(0, s.now + 1 - window_); t <= s.now; ++t) {
          const Eigen::VectorXd a = s.head_attention(h, t);
          for (std::size_t i = 0; i < c.size(); ++i) {
            c[i] += a[s.slots[i]] * s.layer->v[static_cast<std::size_t>(kv)].row(s.slots[i]).norm();
          }
        }
      }
      for (int i = 0; i < n; ++i) {
        for (int j = std::max(0, i - kernel_ / 2); j <= std::min(n - 1, i + kernel_ / 2); ++j) {
          pooled[static_cast<std::size_t>(i)] += c[static_cast<std::size_t>(j)] / heads / kernel_;
        }
      }
      for (int i = 0; i < n - recent; ++i) {  // among the highest budget - recent of the older tokens
        int higher = 0;
        for (int j = 0; j < n - recent; ++j) {
          higher += pooled[static_cast<std::size_t>(j)] > pooled[static_cast<std::size_t>(i)] ? 1 : 0;
        }
        wanted[static_cast<std::size_t>(i)] = wanted[static_cast<std::size_t>(i)] || higher < s.budget - recent;
      }
      for (std::size_t i = 0; i < mean.size(); ++i) {
        mean[i] += pooled[i] / static_cast<double>(s.kv_heads.size());
      }
    }
    for (std::size_t i = 0; i < mean.size(); ++i) {
      if (static_cast<int>(i) >= n - recent) {
        mean[i] = kInfinity;
      } else if (!wanted[i]) {
        mean[i] -= 1000;
      }
    }
    return mean;
  }

 private:
  int window_, kernel_, recent_;
};

// Cosine of neighbours' keys, mean over the lanes; -1000 beside a protected token.
std::vector<double> neighbour_links(const std::vector<std::vector<Eigen::VectorXd>>& keys, const std::vector<double>& a,
                                    int heavy, int recent, int budget) {
  const std::size_t n = a.size();
  recent = std::min({recent, budget, static_cast<int>(n)});
  heavy = std::min({heavy, budget - recent, static_cast<int>(n) - recent});
  std::vector<bool> kept(n, false);
  for (std::size_t i = 0; i < n; ++i) {
    int higher = 0;
    for (std::size_t j = 0; j + static_cast<std::size_t>(recent) < n; ++j) {
      higher += a[j] > a[i] ? 1 : 0;
    }
    kept[i] = i + static_cast<std::size_t>(recent) >= n || higher < heavy;
  }
  std::vector<double> links;
  for (std::size_t i = 0; i + 1 < n; ++i) {
    double mean = 0;
    for (const auto& lane : keys) {
      mean += cosine(lane[i], lane[i + 1]) / static_cast<double>(keys.size());
    }
    links.push_back(kept[i] || kept[i + 1] ? -1000 : mean);
  }
  return links;
}

class KvMergerMerge : public ReferenceMerger {
 public:
  KvMergerMerge(const KvMerger& settings, int budget) : set_(settings), budget_(budget) {}
  void observe(const MergeState& s) override { sums_.observe(s); }
  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    if (!s.at_prefill() && !set_.always) {
      return;
    }
    std::vector<Pos> slots;
    std::vector<double> attention;
    std::vector<std::vector<Eigen::VectorXd>> keys(s.lanes.size());
    for (const auto& [pos, slot] : s.lanes[0].slots) {
      slots.push_back(pos);
      attention.push_back(0);
      for (std::size_t l = 0; l < s.lanes.size(); ++l) {
        attention.back() += sums_.of(l, pos) / static_cast<double>(s.lanes.size());
        keys[l].push_back(s.lanes[l].slots.at(pos).k);
      }
    }
    std::vector<double> links = neighbour_links(keys, attention, set_.heavy, set_.recent, budget_);
    const int n = static_cast<int>(slots.size());
    const auto leaves = [&](int i) { return is_gone(gone, slots[static_cast<std::size_t>(i)]); };
    // Between two survivors one link at least is not made: the weakest.
    for (int a = 0; a < n; ++a) {
      int b = a + 1;
      while (b < n && leaves(b)) {
        ++b;
      }
      if (!leaves(a) && b < n && b > a + 1) {
        *std::min_element(links.begin() + a, links.begin() + b) = -1000;
      }
    }
    for (int p = 0; p < n; ++p) {
      if (leaves(p)) {
        continue;
      }
      std::vector<Pos> set;
      for (int i = p; i + 1 < n && leaves(i + 1) && links[static_cast<std::size_t>(i)] >= set_.delta; ++i) {
        set.push_back(slots[static_cast<std::size_t>(i + 1)]);
      }
      for (int i = p; i > 0 && leaves(i - 1) && links[static_cast<std::size_t>(i - 1)] >= set_.delta; --i) {
        set.push_back(slots[static_cast<std::size_t>(i - 1)]);
      }
      if (!set.empty()) {
        for (MergeLane& lane : s.lanes) {
          one(lane, slots[static_cast<std::size_t>(p)], set);
        }
      }
    }
  }

 private:
  void one(MergeLane& lane, Pos pivot, const std::vector<Pos>& set) const {
    MergedSlot& to = lane.slots.at(pivot);
    const double n = static_cast<double>(set.size()) + 1;
    double square = 0, distance = 0;
    for (const Pos pos : set) {
      square += (lane.slots.at(pos).k - to.k).squaredNorm() / n;
      distance += (lane.slots.at(pos).k - to.k).norm() / n;
    }
    const auto weights = [&](double variance) {
      std::map<Pos, double> g;
      for (const Pos pos : set) {
        g[pos] = std::exp(-(lane.slots.at(pos).k - to.k).squaredNorm() / 2 / std::max(variance, 1e-6));
      }
      return g;
    };
    const auto total = [](const std::map<Pos, double>& g) {
      double sum = 1;
      for (const auto& [pos, x] : g) {
        sum += x;
      }
      return sum;
    };
    std::map<Pos, double> g = weights(set_.sigma == KvMerger::Sigma::mean_dist ? distance * distance : square);
    if (set_.sigma == KvMerger::Sigma::two_pass) {
      const double sigma = total(g) / (std::sqrt(2.0) * n);
      g = weights(sigma * sigma);
    }
    const double sum = total(g);
    for (const auto& [pos, x] : g) {
      to.k += x * (lane.slots.at(pos).k);
      to.v += x * (lane.slots.at(pos).v);
    }
    to.k /= sum;
    to.v *= (set_.size_scale ? n : 1) / sum;
  }

  KvMerger set_;
  int budget_;
  Sums sums_;
};

class KvMergerSelector : public ReferenceSelector {
 public:
  KvMergerSelector(int heavy, int recent) : heavy_(heavy), recent_(recent) {}
  // Joins the two most similar neighbouring sets again and again; who is not its set's best any more leaves then.
  std::vector<double> score(const SetState& s) override {
    std::vector<double> a;
    std::vector<std::vector<Eigen::VectorXd>> keys(s.kv_heads.size());
    for (const Pos pos : s.slots) {
      a.push_back(0);
      for (std::size_t l = 0; l < s.kv_heads.size(); ++l) {
        keys[l].push_back(s.layer->k[static_cast<std::size_t>(s.kv_heads[l])].row(pos));
      }
    }
    for (const int h : s.q_heads) {
      for (Pos t = 0; t <= s.now; ++t) {
        const Eigen::VectorXd row = s.head_attention(h, t);
        for (std::size_t i = 0; i < a.size(); ++i) {
          a[i] += row[s.slots[i]] / static_cast<double>(s.q_heads.size());
        }
      }
    }
    std::vector<double> links = neighbour_links(keys, a, heavy_, recent_, s.budget);
    std::vector<double> out;
    for (const double x : a) {
      out.push_back(2 + x / (1 + x));
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      const bool alone = (i == 0 || links[i - 1] < -2) && (i + 1 == out.size() || links[i] < -2);
      if (alone && is_protected(a, i, s.budget)) {
        out[i] = kInfinity;
      }
    }
    std::vector<std::size_t> set(out.size());
    std::iota(set.begin(), set.end(), std::size_t{0});
    for (;;) {
      const auto best = std::max_element(links.begin(), links.end());
      if (best == links.end() || *best < -2) {
        return out;
      }
      const std::size_t left = set[static_cast<std::size_t>(best - links.begin())],
                        right = set[static_cast<std::size_t>(best - links.begin()) + 1];
      std::size_t leader[2] = {left, right};
      for (std::size_t i = 0; i < set.size(); ++i) {
        if (set[i] == left && a[i] > a[leader[0]]) {
          leader[0] = i;
        } else if (set[i] == right && a[i] > a[leader[1]]) {
          leader[1] = i;
        }
      }
      out[a[leader[0]] >= a[leader[1]] ? leader[1] : leader[0]] = -*best;
      for (std::size_t& x : set) {
        x = x == right ? left : x;
      }
      *best = -1000;
    }
  }

 private:
  bool is_protected(const std::vector<double>& a, std::size_t i, int budget) const {
    const int n = static_cast<int>(a.size()), recent = std::min({recent_, budget, n});
    const int heavy = std::min({heavy_, budget - recent, n - recent});
    int higher = 0;
    for (int j = 0; j < n - recent; ++j) {
      higher += a[static_cast<std::size_t>(j)] > a[i] ? 1 : 0;
    }
    return static_cast<int>(i) >= n - recent || higher < heavy;
  }

  int heavy_, recent_;
};

class Zs : public ReferenceMerger {
 public:
  Zs(const ZsMerge& settings, int budget)
      : set_(settings),
        budget_(budget),
        n_residual_(std::min(settings.residual, budget)),
        tail_(std::min(settings.tail, budget - n_residual_)) {}

  void observe(const MergeState& s) override {
    if (s.at_prefill()) {
      for (const MergeLane& lane : s.lanes) {
        for (const int h : lane.q_heads) {
          for (Pos t = 0; t <= s.now && !lane.slots.empty(); ++t) {
            const Softmax past =
                softmax_over(logits_at(*s.layer, h, t), s.layer->v[static_cast<std::size_t>(lane.kv_head)],
                             std::vector<bool>(static_cast<std::size_t>(t) + 1, true));
            for (Pos i = 0; i <= t; ++i) {
              score_[i] += std::pow(set_.decay, s.now - t) * past.weight[i];
            }
          }
        }
      }
      return;
    }
    for (auto& [pos, x] : score_) {
      x *= set_.decay;
    }
    for (const MergeLane& lane : s.lanes) {
      for (const int h : lane.q_heads) {
        for (const auto& [pos, a] : s.attention(lane, h)) {
          score_[pos] += a;
        }
      }
    }
  }

  std::map<Pos, double> score(const MergeState& s) override {
    std::map<Pos, double> out;
    for (const auto& [pos, slot] : s.lanes[0].slots) {
      out[pos] = score_[pos];
    }
    if (s.at_prefill()) {
      group(s);
      for (const auto& run : runs_) {
        for (const Pos pos : run) {
          out[pos] = 0;
        }
      }
    } else if (hosts_.empty()) {
      for (const auto& [pos, slot] : s.lanes[0].slots) {
        if (static_cast<int>(hosts_.size()) < n_residual_) {
          hosts_.push_back(pos);
        }
      }
    }
    for (auto& [pos, x] : out) {
      if (pos > s.now - tail_ || is_gone(hosts_, pos)) {
        x = kInfinity;
      }
    }
    return out;
  }

  void merge(MergeState& s, const std::vector<Pos>& gone) override {
    for (std::size_t l = 0; l < s.lanes.size(); ++l) {
      MergeLane& lane = s.lanes[l];
      std::map<Pos, std::vector<Pos>> merges;
      for (const Pos pos : gone) {
        Pos best = -1;
        double most = -kInfinity;
        for (std::size_t r = 0; r < hosts_.size(); ++r) {
          const Eigen::VectorXd &a = lane.slots.at(pos).k, &b = lane.slots.at(hosts_[r]).k;
          double close = set_.l2 ? -(a - b).squaredNorm() : a.dot(b);
          if (s.at_prefill()) {
            close = is_gone(runs_[r], pos) ? 1 : 0;
          }
          if (close > most) {
            most = close;
            best = hosts_[r];
          }
        }
        merges[best].push_back(pos);
      }
      for (auto& [host, from] : merges) {
        MergedSlot& to = lane.slots.at(host);
        double& votes = votes_[{l, host}];
        votes = std::max(votes, 1.0);
        for (const Pos pos : from) {  // one after the other
          const double more = std::max(votes_[{l, pos}], 1.0);
          to.k = (votes * to.k + more * lane.slots.at(pos).k) / (votes + more);
          to.v = (votes * to.v + more * lane.slots.at(pos).v) / (votes + more);
          votes += more;
        }
        to.bias = set_.scale_factor * std::log(votes);
      }
    }
  }

 private:
  void group(const MergeState& s) {
    std::vector<std::pair<double, Pos>> old;
    for (const auto& [pos, slot] : s.lanes[0].slots) {
      if (pos <= s.now - tail_) {
        old.emplace_back(score_[pos], pos);
      }
    }
    std::sort(old.begin(), old.end());
    old.resize(old.size() - static_cast<std::size_t>(budget_ - tail_ - n_residual_));
    std::vector<Pos> rest;
    for (const auto& [x, pos] : old) {
      rest.push_back(pos);
    }
    std::sort(rest.begin(), rest.end());
    const std::size_t n = static_cast<std::size_t>(n_residual_);
    std::size_t next = 0;
    for (std::size_t r = 0; r < n; ++r) {
      runs_.emplace_back();
      Pos host = rest[next];
      for (std::size_t i = 0; i < rest.size() / n + (r < rest.size() % n ? 1 : 0); ++i) {
        runs_.back().push_back(rest[next]);
        host = score_[rest[next]] > score_[host] ? rest[next] : host;
        ++next;
      }
      hosts_.push_back(host);
    }
  }

  ZsMerge set_;
  int budget_, n_residual_, tail_;
  std::map<Pos, double> score_;
  std::vector<std::vector<Pos>> runs_;
  std::vector<Pos> hosts_;
  std::map<std::pair<std::size_t, Pos>, double> votes_;
};

class MergeReplay {
 public:
  MergeReplay(const ToyLayer& layer, const MergingRequest& request, int set, const Evicted& recorded,
              MergingResult& result)
      : layer_(layer),
        request_(request),
        recorded_(recorded),
        result_(result),
        merger_(request.merger()),
        before_(request.traits.evict == Order::before_attention) {
    state_.layer = &layer;
    state_.set = set;
    for (int h = 0; h < layer.n_heads(); ++h) {
      if (set_of(layer, request.traits.scope, h) == set) {
        if (state_.lanes.empty() || state_.lanes.back().kv_head != layer.kv_head(h)) {
          state_.lanes.push_back({layer.kv_head(h), {}, {}, {}});
        }
        state_.lanes.back().q_heads.push_back(h);
      }
    }
  }

  void run() {
    const Pos prompt = layer_.options.prompt_len;
    const bool pinned = request_.traits.pool == Pool::decode;
    state_.now = prompt - 1;
    for (Pos pos = 0; pos < prompt; ++pos) {
      for (MergeLane& lane : state_.lanes) {
        if (pinned) {
          lane.pinned.push_back(pos);
        } else {
          add(lane, pos);
        }
      }
    }
    observe();
    evict(pinned ? -1 : 0);
    for (int step = 0; step < layer_.n_steps(); ++step) {
      state_.now = prompt + step;
      for (MergeLane& lane : state_.lanes) {
        add(lane, state_.now);
      }
      observe();
      if (before_) {
        evict(step);
      }
      for (const MergeLane& lane : state_.lanes) {
        for (const int h : lane.q_heads) {
          result_.output[static_cast<std::size_t>(h)].row(step) = state_.output(lane, h);
        }
        for (const auto& [pos, slot] : lane.slots) {
          result_.biased(lane.kv_head, step) += slot.bias != 0 ? 1 : 0;
        }
      }
      if (!before_ && step + 1 < layer_.n_steps()) {
        evict(step + 1);
      }
    }
  }

 private:
  void add(MergeLane& lane, Pos pos) const {
    const auto kv = static_cast<std::size_t>(lane.kv_head);
    lane.slots[pos] = {layer_.k[kv].row(pos), layer_.v[kv].row(pos), 0};
  }

  void observe() {
    merger_->observe(state_);
    sums_.observe(state_);
  }

  void evict(int effect) {
    std::vector<Pos> gone, slots;
    for (const auto& [pos, slot] : state_.lanes[0].slots) {
      slots.push_back(pos);
      if (recorded_(state_.set, pos) == effect) {
        gone.push_back(pos);
      }
    }
    if (gone.empty()) {
      return;
    }
    if (request_.selection != MergedSelection::elsewhere) {
      check(slots, gone);
    }
    merger_->merge(state_, gone);
    for (MergeLane& lane : state_.lanes) {
      for (const Pos pos : gone) {
        lane.slots.erase(pos);
      }
    }
  }

  void check(const std::vector<Pos>& slots, const std::vector<Pos>& gone) {
    std::map<Pos, double> score;
    if (request_.selection == MergedSelection::by_merger) {
      score = merger_->score(state_);
    }
    for (std::size_t l = 0; l < state_.lanes.size() && request_.selection != MergedSelection::by_merger; ++l) {
      std::map<Pos, double> now = state_.mean_attention(state_.lanes[l]);
      for (const Pos pos : slots) {
        score[pos] += request_.selection == MergedSelection::h2o ? sums_.of(l, pos) : now[pos];
      }
    }
    if (request_.selection == MergedSelection::h2o) {
      for (const Pos pos : slots) {
        if (pos > state_.now - std::min(request_.budget / 2, request_.budget)) {
          score[pos] = kInfinity;
        }
      }
    }
    std::vector<double> sorted;
    for (const auto& [pos, x] : score) {
      sorted.push_back(x);
    }
    std::sort(sorted.begin(), sorted.end());
    if (slots.size() != static_cast<std::size_t>(request_.budget) + gone.size()) {
      result_.excess = kInfinity;
      return;
    }
    const double limit = sorted[gone.size() - 1];
    for (const Pos pos : gone) {
      const double x = score[pos];
      result_.excess = std::max(result_.excess, x <= limit ? 0 : (x - limit) / std::max(limit, 1e-30));
    }
  }

  const ToyLayer& layer_;
  const MergingRequest& request_;
  const Evicted& recorded_;
  MergingResult& result_;
  std::unique_ptr<ReferenceMerger> merger_;
  bool before_;
  MergeState state_;
  Sums sums_;
};

template <class T, class... Args>
MakeMerger make(Args... args) {
  return [=] { return std::make_unique<T>(args...); };
}

}  // namespace

double MergeState::logit(int q_head, Pos query, const Eigen::VectorXd& k) const {
  return layer->scale * layer->q[static_cast<std::size_t>(q_head)].row(query).dot(k);
}

std::map<Pos, double> MergeState::attention(const MergeLane& lane, int q_head) const {
  const MatD& k = layer->k[static_cast<std::size_t>(lane.kv_head)];
  std::map<Pos, double> a;
  for (const Pos pos : lane.pinned) {
    a[pos] = logit(q_head, now, k.row(pos));
  }
  for (const auto& [pos, slot] : lane.slots) {
    a[pos] = logit(q_head, now, slot.k) + slot.bias;
  }
  std::vector<double> all;
  for (const auto& [pos, x] : a) {
    all.push_back(x);
  }
  const double log_z = all.empty() ? 0 : log_sum_exp(all);
  for (auto& [pos, x] : a) {
    x = std::exp(x - log_z);
  }
  return a;
}

std::map<Pos, double> MergeState::mean_attention(const MergeLane& lane) const {
  std::map<Pos, double> mean;
  for (const int h : lane.q_heads) {
    for (const auto& [pos, a] : attention(lane, h)) {
      mean[pos] += a / static_cast<double>(lane.q_heads.size());
    }
  }
  return mean;
}

Eigen::VectorXd MergeState::output(const MergeLane& lane, int q_head) const {
  const MatD& v = layer->v[static_cast<std::size_t>(lane.kv_head)];
  Eigen::VectorXd out = Eigen::VectorXd::Zero(v.cols());
  for (const auto& [pos, a] : attention(lane, q_head)) {
    const auto it = lane.slots.find(pos);
    out += a * (it != lane.slots.end() ? it->second.v : Eigen::VectorXd(v.row(pos)));
  }
  return out;
}

MakeMerger reference_keepkv(const KeepKv& settings) { return make<Keep>(settings); }
MakeMerger reference_kvpress_merging(double threshold, double fraction, bool always) {
  return make<KvPress>(threshold, fraction, always);
}
MakeMerger reference_lookm(LookMWeights weights, bool always) { return make<Look>(weights, always); }
MakeMerger reference_d2o(bool paper, double alpha, double beta) { return make<D2o>(paper, alpha, beta); }
MakeMerger reference_cam(const Cam& settings) { return make<CamMerger>(settings); }
MakeMerger reference_weightedkv(bool sum, bool votes) { return make<Weighted>(sum, votes); }
MakeMerger reference_selkv(int window, int bucket, bool gate, double alpha) {
  return make<Sel>(window, bucket, gate, alpha);
}
MakeSelector reference_selkv_score(int window, int kernel, int recent) {
  return [=](const ToyLayer&) { return std::make_unique<SelScore>(window, kernel, recent); };
}
MakeMerger reference_kvmerger(const KvMerger& settings, int budget) { return make<KvMergerMerge>(settings, budget); }
MakeMerger reference_zsmerge(const ZsMerge& settings, int budget) { return make<Zs>(settings, budget); }
MakeSelector reference_kvmerger_sets(int heavy, int recent) {
  return [=](const ToyLayer&) { return std::make_unique<KvMergerSelector>(heavy, recent); };
}

MergingResult reference_merging(const ToyLayer& layer, const MergingRequest& request, const Evicted& recorded) {
  MergingResult result;
  result.output.assign(static_cast<std::size_t>(layer.n_heads()),
                       MatD::Zero(layer.n_steps(), layer.options.v_head_dim));
  result.biased = MatD::Zero(layer.options.n_kv_heads, layer.n_steps());
  for (int set = 0; set < n_sets(layer, request.traits.scope); ++set) {
    MergeReplay(layer, request, set, recorded, result).run();
  }
  return result;
}

}  // namespace kvreplay::testing
