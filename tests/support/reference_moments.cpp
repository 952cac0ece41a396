#include "tests/support/reference_moments.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvreplay::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool has(const std::vector<Pos>& tokens, Pos pos) {
  return std::find(tokens.begin(), tokens.end(), pos) != tokens.end();
}

class MomentSelector : public ReferenceSelector {
 public:
  explicit MomentSelector(const MomentSelection& settings) : set_(settings) {}

  std::vector<double> score(const SetState& s) override {
    if (s.at_prefill()) {
      return prompt_score(s);
    }
    std::vector<double> out;
    for (std::size_t i = 0; i < s.slots.size(); ++i) {
      const Pos pos = s.slots[i];
      const bool by_cost = set_.look_ahead > 0 && !gone_.empty();
      out.push_back(by_cost ? cost(s, pos) : s.attention(s.now)[pos] * residual(s, gone_, pos));
    }
    protect(s, set_.window, out);
    return out;
  }

  void evicted(const SetState&, const std::vector<Pos>& victims) override {
    gone_.insert(gone_.end(), victims.begin(), victims.end());
  }

 private:
  void protect(const SetState& s, int window, std::vector<double>& out) const {
    const int sink = std::min(set_.sink, s.budget), latest = std::min(window, s.budget - sink);
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (s.slots[i] < sink || s.slots[i] > s.now - latest) {
        out[i] = kInfinity;
      }
    }
  }

  static double residual(const SetState& s, const std::vector<Pos>& gone, Pos pos) {
    const auto kv = static_cast<std::size_t>(s.kv_heads[0]);
    const MatD &k = s.layer->k[kv], &v = s.layer->v[kv];
    Eigen::VectorXd r = v.row(pos);
    if (!gone.empty()) {
      const EvictedStatistics e = statistics_of(k, v, gone);
      r -= e.v_mean + s.layer->scale * (e.scatter * k.row(pos).transpose()) / e.n;
    }
    return r.norm();
  }

  std::vector<double> prompt_score(const SetState& s) const {
    const int n_voters = std::min(set_.obs_window, s.now + 1);
    std::vector<double> votes;
    for (const Pos pos : s.slots) {
      std::vector<double> by_head;
      for (const int h : s.q_heads) {
        double sum = 0;
        for (Pos t = s.now + 1 - n_voters; t <= s.now; ++t) {
          sum += s.head_attention(h, t)[pos];
        }
        by_head.push_back(sum / n_voters);
      }
      votes.push_back(s.reduce(by_head));
    }
    if (set_.rounds == 0) {
      chunk_and_protect(s, votes);
      return votes;
    }
    const int surplus = static_cast<int>(s.slots.size()) - s.asked;
    std::vector<Pos> gone;
    std::vector<std::vector<std::size_t>> shares;
    std::vector<double> now, out(votes.size(), kInfinity);
    for (int round = 1; round <= set_.rounds; ++round) {
      now = votes;
      for (std::size_t i = 0; i < now.size(); ++i) {
        now[i] *= residual(s, gone, s.slots[i]);
      }
      chunk_and_protect(s, now);
      std::vector<std::size_t> left;
      for (std::size_t i = 0; i < now.size(); ++i) {
        if (!has(gone, s.slots[i])) {
          left.push_back(i);
        }
      }
      std::stable_sort(left.begin(), left.end(), [&](auto a, auto b) { return now[a] < now[b]; });
      left.resize(static_cast<std::size_t>(surplus * round / set_.rounds) - gone.size());
      for (const std::size_t i : left) {
        gone.push_back(s.slots[i]);
        out[i] = now[i];
      }
      shares.push_back(left);
    }
    double least = kInfinity;
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (!has(gone, s.slots[i])) {
        out[i] = now[i];
        least = std::min(least, now[i]);
      }
    }
    for (auto share = shares.rbegin(); share != shares.rend(); ++share) {
      const double below = least - std::abs(least) * 1e-7;
      for (const std::size_t i : *share) {
        out[i] = std::min(out[i], below);
        least = std::min(least, out[i]);
      }
    }
    return out;
  }

  void chunk_and_protect(const SetState& s, std::vector<double>& score) const {
    const auto chunk = static_cast<std::size_t>(set_.chunk);
    for (std::size_t i = 0; i < score.size(); i += chunk) {
      const std::size_t n = std::min(chunk, score.size() - i);
      const auto begin = score.begin() + static_cast<std::ptrdiff_t>(i), end = begin + static_cast<std::ptrdiff_t>(n);
      std::fill(begin, end, std::accumulate(begin, end, 0.0) / static_cast<double>(n));
    }
    protect(s, set_.obs_window, score);
  }

  // Attention over some tokens joined with the first-order estimate of those that are gone.
  static Eigen::VectorXd corrected(const SetState& s, int q_head, Pos t, const std::vector<Pos>& stay,
                                   const std::vector<Pos>& gone) {
    const auto kv = static_cast<std::size_t>(s.layer->kv_head(q_head));
    const MatD &k = s.layer->k[kv], &v = s.layer->v[kv];
    std::vector<bool> keep(static_cast<std::size_t>(t) + 1, false);
    for (const Pos pos : stay) {
      if (pos <= t) {
        keep[static_cast<std::size_t>(pos)] = true;
      }
    }
    ReferenceCompensator moments;
    moments.kind = Compensation::moments;
    const Eigen::VectorXd q = s.layer->q[static_cast<std::size_t>(q_head)].row(t);
    const ReferenceEstimate e = estimate(moments, statistics_of(k, v, gone), q, s.layer->scale);
    if (std::none_of(keep.begin(), keep.end(), [](bool x) { return x; })) {
      return e.value;
    }
    const Softmax kept = softmax_over(logits_at(*s.layer, q_head, t), v, keep);
    const double share = 1 / (1 + std::exp(kept.log_mass - e.log_mass));
    return kept.output + share * (e.value - kept.output);
  }

  // Each head's mean over the last queries that saw the token.
  double cost(const SetState& s, Pos pos) const {
    std::vector<Pos> stay = s.slots, gone = gone_;
    stay.erase(std::find(stay.begin(), stay.end(), pos));
    gone.push_back(pos);
    std::vector<double> by_head;
    const Pos first = std::max({pos, s.now + 1 - set_.look_ahead, 0});
    for (const int h : s.q_heads) {
      double sum = 0;
      for (Pos t = first; t <= s.now; ++t) {
        sum += (corrected(s, h, t, stay, gone) - corrected(s, h, t, s.slots, gone_)).norm();
      }
      by_head.push_back(sum / (s.now - first + 1));
    }
    return s.reduce(by_head);
  }

  MomentSelection set_;
  std::vector<Pos> gone_;
};

class MomentumByNorm : public ReferenceSelector {
 public:
  MomentumByNorm(const ToyLayer& layer, double alpha)
      : alpha_(alpha), sum_(Eigen::VectorXd::Zero(layer.options.n_tokens)) {}
  void observe(const SetState& s) override {
    const Eigen::VectorXd attention = s.attention(s.now);
    sum_ *= alpha_;
    for (const Pos pos : s.slots) {
      double norm = 0;
      for (const int kv : s.kv_heads) {
        norm += s.layer->v[static_cast<std::size_t>(kv)].row(pos).norm();
      }
      sum_[pos] += attention[pos] * norm / static_cast<double>(s.kv_heads.size());
    }
  }
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      out.push_back(sum_[pos]);
    }
    return out;
  }

 private:
  double alpha_;
  Eigen::VectorXd sum_;  // (n_tokens)
};

}  // namespace

MakeSelector reference_moment_selection(const MomentSelection& settings) {
  return [=](const ToyLayer&) { return std::make_unique<MomentSelector>(settings); };
}

MakeSelector reference_momentum_by_norm(double alpha) {
  return [=](const ToyLayer& layer) { return std::make_unique<MomentumByNorm>(layer, alpha); };
}

}  // namespace kvreplay::testing
