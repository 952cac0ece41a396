#include "tests/support/reference_decode_selectors.hpp"

#include <cmath>
#include <limits>
#include <map>
#include <numeric>

namespace kvreplay::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLeastFloat = 1e-38;  // below it float32 ranks nothing
using Row = std::vector<double>;

std::size_t at(int i) { return static_cast<std::size_t>(i); }
int size(const Row& row) { return static_cast<int>(row.size()); }
int steps_of(const ToyLayer& layer) { return layer.options.n_tokens - layer.options.prompt_len; }
int step_of(const SetState& s) { return s.now - s.layer->options.prompt_len + 1; }

Row softmax(const Row& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double value : x) {
    sum += std::exp(value - top);
  }
  Row out;
  for (const double value : x) {
    out.push_back(std::exp(value - top) / sum);
  }
  return out;
}

Row max_pool(const Row& x, int kernel) {
  Row out;
  for (int i = 0; i < size(x); ++i) {
    double top = -kInfinity;
    for (int j = i - kernel / 2; j <= i + kernel / 2; ++j) {
      top = j >= 0 && j < size(x) ? std::max(top, x[at(j)]) : top;
    }
    out.push_back(top);
  }
  return out;
}

// How many slots lie before the last `window` positions.
int older_than(const SetState& s, int window) {
  return static_cast<int>(
      std::count_if(s.slots.begin(), s.slots.end(), [&](Pos pos) { return pos <= s.now - window; }));
}

Row with_window(const SetState& s, const Row& old) {
  Row out = old;
  out.resize(s.slots.size(), kInfinity);
  return out;
}

// Current attention of the slots.
Row attended(const SetState& s) {
  const Eigen::VectorXd all = s.attention(s.now);
  Row out;
  for (const Pos pos : s.slots) {
    out.push_back(all[pos]);
  }
  return out;
}

// lambda * score - (1 - lambda) * redundancy, moved by a constant to where no digits cancel.
Row mixed(const Row& score, const Row& redundancy, double lambda) {
  const double top = *std::max_element(redundancy.begin(), redundancy.end());
  Row out;
  for (int i = 0; i < size(score); ++i) {
    out.push_back(lambda * score[at(i)] + (1 - lambda) * (2 * top - redundancy[at(i)]));
  }
  return out;
}

Row divided(Row x, bool by_maximum) {
  const double top = by_maximum ? *std::max_element(x.begin(), x.end()) : 1;
  for (double& value : x) {
    value /= top > 0 ? top : 1;
  }
  return x;
}

class Gkv : public ReferenceSelector {
 public:
  explicit Gkv(const ReferenceGkv& settings) : set_(settings) {}
  int surplus(const SetState& s) const override {
    const int budget = std::max(s.budget, static_cast<int>(std::floor(set_.ratio * (s.now + 1))));
    return std::max(0, static_cast<int>(s.slots.size()) - budget);
  }
  std::vector<double> score(const SetState& s) override {
    const int window = std::min(set_.window, s.budget), n = older_than(s, window);
    scored_.clear();
    if (n == 0) {
      return with_window(s, {});
    }
    Row f = local(s, window, n);
    for (int i = 0; i < n; ++i) {
      const auto old = history_.find(s.slots[at(i)]);
      double& x = f[at(i)];
      if (old != history_.end()) {
        const double before = old->second;
        switch (set_.smooth) {
          case ReferenceSmooth::max:
            x = before * set_.alpha > x ? before * set_.alpha : x;
            break;
          case ReferenceSmooth::mean:
            x = before * set_.alpha + x * (1 - set_.alpha);
            break;
          case ReferenceSmooth::sum:
            x += before * set_.alpha;
            break;
          case ReferenceSmooth::none:
            break;
        }
      }
      scored_[s.slots[at(i)]] = x;
    }
    f = max_pool(f, set_.kernel);
    if (set_.lambda < 1) {
      Row rd = reference_redundancy(s, set_.threshold, set_.first, set_.temperature);
      rd.resize(at(n));
      f = mixed(f, divided(rd, set_.normalise), set_.lambda);
    }
    return with_window(s, f);
  }
  void evicted(const SetState&, const std::vector<Pos>&) override { history_ = scored_; }

 private:
  Row local(const SetState& s, int window, int n) const {
    std::vector<Row> by_voter;  // per voter: attention of the old slots, reduced over the heads
    for (Pos voter = std::max<Pos>(0, s.now - window + 1); voter <= s.now; ++voter) {
      std::vector<Row> by_head;
      for (const int h : s.q_heads) {
        const Eigen::VectorXd logits = logits_at(*s.layer, h, voter);
        Row seen;
        for (const Pos pos : s.slots) {
          if (pos <= voter) {
            seen.push_back(logits[pos]);
          }
        }
        by_head.push_back(softmax(seen));
      }
      Row row;
      for (int i = 0; i < n; ++i) {
        Row x;
        for (const Row& head : by_head) {
          x.push_back(head[at(i)]);
        }
        row.push_back(s.reduce(x));
      }
      by_voter.push_back(row);
    }
    Row out;
    const auto voters = static_cast<double>(by_voter.size());
    for (int i = 0; i < n; ++i) {
      double mean = 0, squares = 0;
      for (const Row& row : by_voter) {
        mean += row[at(i)] / voters;
      }
      for (const Row& row : by_voter) {
        squares += std::pow(row[at(i)] - mean, 2);
      }
      out.push_back(mean + (voters > 1 ? set_.gamma * std::sqrt(squares / (voters - 1)) : 0));
    }
    return divided(out, set_.normalise);
  }

  ReferenceGkv set_;
  std::map<Pos, double> history_, scored_;
};

class Rkv : public ReferenceSelector {
 public:
  explicit Rkv(const ReferenceRkv& settings) : set_(settings) {}
  int surplus(const SetState& s) const override {
    const int n = static_cast<int>(s.slots.size());
    const bool full = n >= s.budget + set_.buffer;
    return s.at_prefill() || full ? std::max(0, n - s.budget) : 0;
  }
  std::vector<double> score(const SetState& s) override {
    const int window = std::min(set_.window, s.budget), n = older_than(s, window);
    if (n == 0) {
      return with_window(s, {});
    }
    Row sum(at(n), 0.0);
    int voters = 0;
    for (Pos voter = std::max<Pos>(0, s.now - window + 1); voter <= s.now; ++voter, ++voters) {
      Row logits;
      for (int i = 0; i < n; ++i) {
        Row x;
        for (const int h : s.q_heads) {
          x.push_back(logits_at(*s.layer, h, voter)[s.slots[at(i)]]);
        }
        logits.push_back(s.reduce(x));
      }
      const Row row = softmax(logits);
      for (int i = 0; i < n; ++i) {
        sum[at(i)] += row[at(i)];
      }
    }
    for (double& x : sum) {
      x /= voters;
    }
    Row out = max_pool(sum, set_.kernel);
    if (set_.lambda < 1) {
      Row rd = reference_redundancy(s, set_.threshold, set_.first);
      rd.resize(at(n));
      out = mixed(out, rd, set_.lambda);
    }
    return with_window(s, out);
  }

 private:
  ReferenceRkv set_;
};

class ScopePool : public ReferenceSelector {
 public:
  ScopePool(const ToyLayer& layer, const ReferenceScope& settings)
      : set_(settings), steps_(settings.steps > 0 ? settings.steps : steps_of(layer)) {}
  void prefill(const SetState& s) override { add(s); }
  void observe(const SetState& s) override {
    add(s);
    if (set_.mode != ReferenceScope::Mode::discontinuous) {
      return;
    }
    due_ = false;
    if (static_cast<int>(s.slots.size()) < capacity(s)) {
      return;
    }
    if (passed_ < growth_step(s)) {
      ++passed_;
    } else {
      passed_ = 0;
      due_ = true;
    }
  }
  int surplus(const SetState& s) const override {
    const bool waits = set_.mode == ReferenceScope::Mode::discontinuous && !due_ && !s.at_prefill();
    return waits ? 0 : std::max(0, static_cast<int>(s.slots.size()) - capacity(s));
  }
  std::vector<double> score(const SetState& s) override {
    Row out;
    const Row now = attended(s);
    for (std::size_t i = 0; i < s.slots.size(); ++i) {
      const Pos pos = s.slots[i];
      const bool recent = pos > s.now - std::min(set_.window, s.budget);
      out.push_back(recent ? kInfinity : set_.cumulative ? sum_.at(pos) : now[i]);
    }
    return out;
  }

 private:
  void add(const SetState& s) {
    const Row now = attended(s);
    for (std::size_t i = 0; i < s.slots.size(); ++i) {
      sum_[s.slots[i]] += now[i];
    }
  }
  int growth_step(const SetState& s) const {
    const int beta2 = std::min(set_.window, s.budget), beta1 = s.budget - beta2;
    return beta1 == 0 || steps_ < beta2 ? 0 : (steps_ - beta2) / beta1;
  }
  int capacity(const SetState& s) const {
    if (set_.mode == ReferenceScope::Mode::slide || s.at_prefill() || growth_step(s) == 0) {
      return s.budget;
    }
    const int beta2 = std::min(set_.window, s.budget), beta1 = s.budget - beta2, t = step_of(s);
    int beta1_now = (t - 1) / growth_step(s);
    if (set_.paper) {
      beta1_now = t > beta2 ? (t - beta2) * beta1 / (steps_ - beta2) : 0;
    }
    return std::min(s.budget, beta2 + beta1_now);
  }

  ReferenceScope set_;
  int steps_, passed_ = 0;
  bool due_ = false;
  std::map<Pos, double> sum_;
};

class LazyEviction : public ReferenceSelector {
 public:
  explicit LazyEviction(const ReferenceLazyEviction& settings) : set_(settings) {}
  void observe(const SetState& s) override {
    const Row now = attended(s);
    const int t = step_of(s);
    for (std::size_t i = 0; i < s.slots.size(); ++i) {
      // Tokens of the prompt begin at 0, others at the step before their own.
      Track& x = track_.try_emplace(s.slots[i], Track{s.slots[i] < s.now ? 0 : t - 1, 0}).first->second;
      if (now[i] >= set_.threshold) {
        x.mri = std::max(x.mri, t - x.ts);
        x.ts = t;
      }
    }
  }
  std::vector<double> score(const SetState& s) override {
    const Row now = attended(s);
    Row out;
    for (std::size_t i = 0; i < s.slots.size(); ++i) {
      const Pos pos = s.slots[i];
      if (pos > s.now - std::min(set_.window, s.budget)) {
        out.push_back(kInfinity);
      } else if (s.at_prefill()) {
        out.push_back(now[i]);
      } else {
        out.push_back(importance(track_.at(pos), step_of(s)));
      }
    }
    return out;
  }

 private:
  struct Track {
    int ts, mri;
  };
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  double importance(const Track& x, int t) const {
    const double gap = t - x.ts, mri = x.mri;
    double h1 = 2 / (1 + std::exp(1 + gap / (mri + 1e-5)));
    if (set_.paper) {
      h1 = gap == 0 ? 1 : mri == 0 ? 0 : 2 * sigmoid(-gap / mri);
    }
    const double longest = set_.open ? std::max(mri, gap) : mri;
    return h1 + (mri != 0 ? 2 * sigmoid(-(longest - 1)) : 0);
  }

  ReferenceLazyEviction set_;
  std::map<Pos, Track> track_;
};

class Raas : public ReferenceSelector {
 public:
  explicit Raas(const ReferenceRaas& settings) : set_(settings) {}
  void prefill(const SetState& s) override { observe(s); }
  void observe(const SetState& s) override {
    const Row now = attended(s);
    std::map<int, double> attention;
    for (std::size_t i = 0; i < s.slots.size(); ++i) {
      attention[page(s, s.slots[i])] += now[i] < kLeastFloat ? 0 : now[i];
    }
    std::vector<std::pair<double, int>> order;
    for (const auto& [id, a] : attention) {
      order.emplace_back(a, id);
    }
    std::sort(order.rbegin(), order.rend());
    for (std::size_t i = 0; i < order.size(); ++i) {
      const bool best = static_cast<double>(i) < set_.fraction * static_cast<double>(order.size());
      if (set_.by_threshold ? order[i].first >= set_.threshold : best) {
        stamp_[order[i].second] = step_of(s);
      }
    }
    stamp_[page(s, s.now)] = step_of(s);
  }
  int surplus(const SetState& s) const override {
    std::map<int, int> tokens;
    for (const Pos pos : s.slots) {
      ++tokens[page(s, pos)];
    }
    std::vector<std::pair<int, int>> order;  // stamp, page
    for (const auto& [id, n] : tokens) {
      if (id != page(s, s.now)) {
        order.emplace_back(stamp(id), id);
      }
    }
    std::sort(order.begin(), order.end());
    const int n = static_cast<int>(s.slots.size());
    int left = n;
    for (std::size_t i = 0; i < order.size() && left > s.budget; ++i) {
      left -= tokens[order[i].second];
    }
    return n - std::min(left, s.budget);
  }
  std::vector<double> score(const SetState& s) override {
    Row out;
    for (const Pos pos : s.slots) {
      // Of equals the older; the newest page last of all.
      const double time = page(s, pos) == page(s, s.now) ? step_of(s) + 1 : stamp(page(s, pos));
      out.push_back(2 * s.layer->options.n_tokens * (time + 2) + pos);
    }
    return out;
  }

 private:
  int page(const SetState& s, Pos pos) const {
    const int width = std::min(set_.page, s.asked);
    return static_cast<int>(std::floor(static_cast<double>(pos - s.layer->options.prompt_len) / width));
  }
  int stamp(int id) const {
    const auto it = stamp_.find(id);
    return it == stamp_.end() ? -1 : it->second;
  }

  ReferenceRaas set_;
  std::map<int, int> stamp_;
};

class H2oCurrent : public ReferenceSelector {
 public:
  explicit H2oCurrent(ReferenceTokens window) : window_(window) {}
  std::vector<double> score(const SetState& s) override {
    Eigen::VectorXd mass = Eigen::VectorXd::Zero(s.layer->options.n_tokens);
    std::vector<Eigen::VectorXd> by_head;
    for (const int h : s.q_heads) {
      Eigen::VectorXd sum = Eigen::VectorXd::Zero(mass.size());
      for (Pos pos = s.at_prefill() ? 0 : s.now; pos <= s.now; ++pos) {
        sum += s.head_attention(h, pos);
      }
      by_head.push_back(sum);
    }
    Row out;
    for (const Pos pos : s.slots) {
      Row x;
      for (const Eigen::VectorXd& head : by_head) {
        x.push_back(head[pos]);
      }
      out.push_back(pos > s.now - std::min(window_.of(s.asked), s.budget) ? kInfinity : s.reduce(x));
    }
    return out;
  }

 private:
  ReferenceTokens window_;
};

class StreamingFirst : public ReferenceSelector {
 public:
  StreamingFirst(int window, int sink) : window_(window), sink_(sink) {}
  std::vector<double> score(const SetState& s) override {
    Row out;
    const int sink = std::min(sink_, s.budget), window = std::min(window_, s.budget - sink);
    for (const Pos pos : s.slots) {
      out.push_back(pos < sink || pos > s.now - window ? kInfinity : s.now - pos);
    }
    // Of those that may leave, the latest.
    for (double& x : out) {
      x = x == kInfinity ? x : 1 + x;
    }
    return out;
  }

 private:
  int window_, sink_;
};

template <class T, class Settings>
MakeSelector make(const Settings& settings) {
  return [=](const ToyLayer&) { return std::make_unique<T>(settings); };
}

}  // namespace

std::vector<double> reference_redundancy(const SetState& s, double threshold, bool first, double temperature) {
  const std::size_t n = s.slots.size();
  Row out(n, 0.0);
  for (const int kv : s.kv_heads) {
    const MatD& k = s.layer->k[at(kv)];
    MatD c(n, n);
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) {
        const auto a = k.row(s.slots[i]), b = k.row(s.slots[j]);
        const double norms = a.norm() * b.norm();
        c(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) = i == j || norms == 0 ? 0 : a.dot(b) / norms;
      }
    }
    for (Eigen::Index i = 0; i < c.rows(); ++i) {
      Eigen::Index newest = -1;
      for (Eigen::Index j = 0; j < c.cols(); ++j) {
        newest = j != i && c(i, j) > threshold ? j : newest;
      }
      if (newest < 0 && first) {
        newest = 0;
      }
      if (newest >= 0) {
        c(i, newest) = 0;
      }
    }
    Row r;
    for (Eigen::Index j = 0; j < c.cols(); ++j) {
      r.push_back(c.col(j).mean() / temperature);
    }
    r = softmax(r);
    for (std::size_t j = 0; j < n; ++j) {
      out[j] += r[j] / static_cast<double>(s.kv_heads.size());
    }
  }
  return out;
}

MakeSelector reference_gkv(const ReferenceGkv& settings) { return make<Gkv>(settings); }
MakeSelector reference_rkv(const ReferenceRkv& settings) { return make<Rkv>(settings); }
MakeSelector reference_scope(const ReferenceScope& settings) {
  return [=](const ToyLayer& layer) { return std::make_unique<ScopePool>(layer, settings); };
}
MakeSelector reference_lazyeviction(const ReferenceLazyEviction& settings) { return make<LazyEviction>(settings); }
MakeSelector reference_raas(const ReferenceRaas& settings) { return make<Raas>(settings); }
MakeSelector reference_h2o_current(ReferenceTokens window) { return make<H2oCurrent>(window); }
MakeSelector reference_streaming_first(int window, int sink) {
  return [=](const ToyLayer&) { return std::make_unique<StreamingFirst>(window, sink); };
}

}  // namespace kvreplay::testing
