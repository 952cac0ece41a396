#include "tests/support/reference_selection.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvreplay::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Differences between attention weights this small are no differences: float32 has none of them
// left.
constexpr double kLeastScore = 1e-30;

std::vector<double> pick(const Eigen::VectorXd& by_token, const std::vector<Pos>& slots) {
  std::vector<double> out;
  for (const Pos pos : slots) {
    out.push_back(by_token[pos]);
  }
  return out;
}

// The first `sink` tokens of the text and the latest `window` never leave; the budget bounds both,
// sinks first.
void protect_ends(const SetState& s, int sink, int window, std::vector<double>& score) {
  sink = std::min(sink, s.budget);
  window = std::min(window, s.budget - sink);
  for (std::size_t i = 0; i < score.size(); ++i) {
    if (s.slots[i] < sink || s.slots[i] > s.now - window) {
      score[i] = kInfinity;
    }
  }
}

// Attention that each token received from the last n prompt queries, summed over them, then reduced
// over heads.
Eigen::VectorXd received(const SetState& s, int n) {
  const Pos first = std::max<Pos>(0, s.now + 1 - n);
  std::vector<Eigen::VectorXd> by_head;
  for (const int h : s.q_heads) {
    Eigen::VectorXd sum = Eigen::VectorXd::Zero(s.layer->options.n_tokens);
    for (Pos pos = first; pos <= s.now; ++pos) {
      sum += s.head_attention(h, pos);
    }
    by_head.push_back(sum);
  }
  Eigen::VectorXd out = Eigen::VectorXd::Zero(s.layer->options.n_tokens);
  for (Eigen::Index i = 0; i < out.size(); ++i) {
    std::vector<double> x;
    for (const Eigen::VectorXd& sum : by_head) {
      x.push_back(sum[i]);
    }
    out[i] = s.reduce(x);
  }
  return out;
}

class Full : public ReferenceSelector {
 public:
  std::vector<double> score(const SetState& s) override { return std::vector<double>(s.slots.size(), kInfinity); }
};

class Streaming : public ReferenceSelector {
 public:
  explicit Streaming(int sink) : sink_(sink) {}
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out(s.slots.begin(), s.slots.end());
    protect_ends(s, sink_, 0, out);
    return out;
  }

 private:
  int sink_;
};

class H2o : public ReferenceSelector {
 public:
  H2o(const ToyLayer& layer, ReferenceTokens window, bool by_age, int sink)
      : window_(window), by_age_(by_age), sink_(sink), sum_(Eigen::VectorXd::Zero(layer.options.n_tokens)) {}
  void prefill(const SetState& s) override { sum_ = received(s, s.now + 1); }
  void observe(const SetState& s) override { sum_ += s.attention(s.now); }
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      out.push_back(by_age_ ? sum_[pos] / (s.now - pos + 1) : sum_[pos]);
    }
    protect_ends(s, sink_, window_.of(s.asked), out);
    return out;
  }

 private:
  ReferenceTokens window_;
  bool by_age_;
  int sink_;
  Eigen::VectorXd sum_;  // (n_tokens) attention received since birth
};

class Tova : public ReferenceSelector {
 public:
  explicit Tova(int window) : window_(window) {}
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out = pick(s.attention(s.now), s.slots);
    protect_ends(s, 0, window_, out);
    return out;
  }

 private:
  int window_;
};

class SnapKvSelector : public ReferenceSelector {
 public:
  explicit SnapKvSelector(const SnapKv& settings) : set_(settings) {}
  std::vector<double> score(const SetState& s) override {
    // The window's own columns neither vote nor are voted for.
    const int window = std::min(set_.obs_window, s.now + 1);
    const int n = static_cast<int>(s.slots.size());
    const int n_old = n - std::min(window, n);
    std::vector<std::vector<double>> by_head;
    for (const int h : s.q_heads) {
      Eigen::VectorXd votes = Eigen::VectorXd::Zero(s.layer->options.n_tokens);
      for (Pos pos = s.now + 1 - window; pos <= s.now; ++pos) {
        votes += s.head_attention(h, pos) / (set_.sum ? 1 : window);
      }
      std::vector<double> pooled;
      for (int i = 0; i < n_old; ++i) {
        double sum = 0, most = 0;
        for (int j = std::max(0, i - set_.pool / 2); j <= std::min(n_old - 1, i + set_.pool / 2); ++j) {
          sum += votes[s.slots[static_cast<std::size_t>(j)]];
          most = std::max(most, votes[s.slots[static_cast<std::size_t>(j)]]);
        }
        pooled.push_back(set_.pool_max ? most : sum / set_.pool);
      }
      by_head.push_back(pooled);
    }
    std::vector<double> out(s.slots.size(), kInfinity);
    for (int i = 0; i < n_old; ++i) {
      std::vector<double> x;
      for (const std::vector<double>& pooled : by_head) {
        x.push_back(pooled[static_cast<std::size_t>(i)]);
      }
      out[static_cast<std::size_t>(i)] = s.reduce(x);
    }
    // A budget below the window keeps the latest of it.
    for (int i = n_old; i < n - s.budget; ++i) {
      out[static_cast<std::size_t>(i)] = 1e6 + i;
    }
    return out;
  }

 private:
  SnapKv set_;
};

class Knorm : public ReferenceSelector {
 public:
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      out.push_back(-s.layer->k[static_cast<std::size_t>(s.kv_heads[0])].row(pos).norm());
    }
    return out;
  }
};

class KeyDiff : public ReferenceSelector {
 public:
  std::vector<double> score(const SetState& s) override {
    const MatD& k = s.layer->k[static_cast<std::size_t>(s.kv_heads[0])];
    Eigen::RowVectorXd anchor = Eigen::RowVectorXd::Zero(k.cols());
    for (const Pos pos : s.slots) {
      anchor += k.row(pos).normalized() / static_cast<double>(s.slots.size());
    }
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      out.push_back(-k.row(pos).dot(anchor) / (k.row(pos).norm() * anchor.norm()));
    }
    return out;
  }
};

class Momentum : public ReferenceSelector {
 public:
  Momentum(const ToyLayer& layer, double alpha)
      : alpha_(alpha), importance_(Eigen::VectorXd::Zero(layer.options.n_tokens)) {}
  void observe(const SetState& s) override { importance_ = alpha_ * importance_ + s.attention(s.now); }
  std::vector<double> score(const SetState& s) override { return pick(importance_, s.slots); }

 private:
  double alpha_;
  Eigen::VectorXd importance_;  // (n_tokens)
};

class ResidualSelector : public ReferenceSelector {
 public:
  explicit ResidualSelector(const Residual& settings) : set_(settings) {}
  // Decayed mean over a token's own life, so that newcomers are not taken for weak. What the prompt's last queries say
  // counts as one full mean.
  void prefill(const SetState& s) override {
    sum_ = received(s, set_.window_prefill) / std::min(set_.window_prefill, s.now + 1);
    weight_ = Eigen::VectorXd::Zero(sum_.size());
    weight_.head(s.now + 1).setOnes();
  }
  void observe(const SetState& s) override {
    const Eigen::VectorXd now = s.attention(s.now);
    if (sum_.size() == 0) {
      sum_ = weight_ = Eigen::VectorXd::Zero(now.size());
    }
    for (const Pos pos : s.slots) {
      sum_[pos] = set_.ewma * sum_[pos] + (1 - set_.ewma) * now[pos];
      weight_[pos] = set_.ewma * weight_[pos] + (1 - set_.ewma);
    }
  }
  std::vector<double> score(const SetState& s) override {
    const int window = s.at_prefill() ? set_.window_prefill : set_.window_decode;
    const Eigen::VectorXd attention = sum_.array() / weight_.array().max(1e-300);
    std::vector<Pos> gone = gone_;
    if (s.at_prefill() && set_.re_rank && set_.accumulate_prefill) {
      // Who leaves by attention alone makes the moments by which all are ranked again; where the prompt stays out of
      // the moments there are none yet.
      std::vector<double> alone = pick(attention, s.slots);
      protect_ends(s, set_.sink, window, alone);
      std::vector<std::size_t> order(alone.size());
      std::iota(order.begin(), order.end(), std::size_t{0});
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return alone[a] < alone[b]; });
      for (std::size_t i = 0; i + static_cast<std::size_t>(s.asked) < order.size(); ++i) {
        gone.push_back(s.slots[order[i]]);
      }
    }
    const auto kv = static_cast<std::size_t>(s.kv_heads[0]);
    const MatD &k = s.layer->k[kv], &v = s.layer->v[kv];
    const EvictedStatistics e = statistics_of(k, v, gone);
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      Eigen::VectorXd residual = v.row(pos).transpose() - e.v_mean;
      if (e.n > 0) {
        residual -= s.layer->scale * (e.scatter * k.row(pos).transpose()) / e.n;
      }
      const bool by_residual = set_.re_rank || !s.at_prefill();
      out.push_back(attention[pos] * (by_residual ? residual.norm() : 1));
    }
    protect_ends(s, set_.sink, window, out);
    return out;
  }
  void evicted(const SetState& s, const std::vector<Pos>& victims) override {
    if (s.at_prefill() && !set_.accumulate_prefill) {
      return;
    }
    gone_.insert(gone_.end(), victims.begin(), victims.end());
  }

 private:
  Residual set_;
  Eigen::VectorXd sum_, weight_;  // (n_tokens) decayed attention, and what it would be if all of it were 1
  std::vector<Pos> gone_;
};

class OracleMass : public ReferenceSelector {
 public:
  std::vector<double> score(const SetState& s) override {
    Eigen::VectorXd to_come = Eigen::VectorXd::Zero(s.layer->options.n_tokens);
    for (Pos pos = s.now + 1; pos < s.layer->options.n_tokens; ++pos) {
      for (const int h : s.q_heads) {
        const Softmax all =
            softmax_over(logits_at(*s.layer, h, pos), s.layer->v[static_cast<std::size_t>(s.layer->kv_head(h))],
                         std::vector<bool>(static_cast<std::size_t>(pos) + 1, true));
        to_come.head(pos + 1) += all.weight;
      }
    }
    return pick(to_come, s.slots);
  }
};

class OracleGreedy : public ReferenceSelector {
 public:
  explicit OracleGreedy(int horizon) : horizon_(horizon) {}
  // Where several have to go, they go one by one, each the least harm to what the others left.
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out;
    for (const Pos victim : s.slots) {
      out.push_back(harm(s, {victim}));
    }
    const std::size_t budget = static_cast<std::size_t>(s.budget);
    if (s.slots.size() <= budget + 1) {
      return out;
    }
    const std::size_t surplus = s.slots.size() - budget;
    std::vector<Pos> gone;
    for (std::size_t n = 0; n < surplus; ++n) {
      std::size_t best = 0;
      double least = kInfinity;
      for (std::size_t i = 0; i < s.slots.size(); ++i) {
        if (std::find(gone.begin(), gone.end(), s.slots[i]) != gone.end()) {
          continue;
        }
        std::vector<Pos> without = gone;
        without.push_back(s.slots[i]);
        const double h = harm(s, without);
        if (h < least) {
          least = h;
          best = i;
        }
      }
      gone.push_back(s.slots[best]);
      out[best] = -static_cast<double>(surplus - n);
    }
    return out;
  }

 private:
  // Squared error over the next steps if these leave the current set and all that arrives later stays.
  double harm(const SetState& s, const std::vector<Pos>& gone) const {
    const Pos last = std::min(s.now + horizon_, s.layer->options.n_tokens - 1);
    double sum = 0;
    for (const int h : s.q_heads) {
      const MatD& v = s.layer->v[static_cast<std::size_t>(s.layer->kv_head(h))];
      for (Pos pos = s.now + 1; pos <= last; ++pos) {
        const Eigen::VectorXd logits = logits_at(*s.layer, h, pos);
        const std::vector<bool> all(static_cast<std::size_t>(pos) + 1, true);
        std::vector<bool> kept(all.size(), false);
        for (const Pos i : s.resident) {
          kept[static_cast<std::size_t>(i)] = std::find(gone.begin(), gone.end(), i) == gone.end();
        }
        std::fill(kept.begin() + s.now + 1, kept.end(), true);
        sum += (softmax_over(logits, v, all).output - softmax_over(logits, v, kept).output).squaredNorm();
      }
    }
    return sum;
  }

  int horizon_;
};

SetState set_state(const ToyLayer& layer, const Traits& traits, int set) {
  SetState s;
  s.layer = &layer;
  s.group = traits.group;
  for (int h = 0; h < layer.n_heads(); ++h) {
    if (set_of(layer, traits.scope, h) == set) {
      s.q_heads.push_back(h);
      if (s.kv_heads.empty() || s.kv_heads.back() != layer.kv_head(h)) {
        s.kv_heads.push_back(layer.kv_head(h));
      }
    }
  }
  return s;
}

// The slots with the n smallest scores, older first where equal.
std::vector<std::size_t> smallest(const std::vector<double>& score, std::size_t n) {
  std::vector<std::size_t> order(score.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return score[a] < score[b]; });
  order.resize(n);
  return order;
}

double relative(double difference, double to) { return difference / std::max(std::abs(to), kLeastScore); }

// One set's whole replay.
class SetReplay {
 public:
  SetReplay(const ToyLayer& layer, const SelectionRequest& request, int set, const Evicted* recorded,
            SelectionResult& result)
      : layer_(layer),
        request_(request),
        set_(set),
        recorded_(recorded),
        result_(result),
        state_(set_state(layer, request.traits, set)) {}

  void run() {
    prefill();
    const std::unique_ptr<ReferenceSelector>& selector = selector_;
    for (int step = 0; step < layer_.n_steps(); ++step) {
      state_.now = layer_.options.prompt_len + step;
      state_.slots.push_back(state_.now);
      update_resident();
      selector->observe(state_);
      const bool due = request_.traits.decode == Decode::evict && (step + 1) % request_.traits.interval == 0;
      const bool before = request_.traits.evict == Order::before_attention;
      if (due || recorded_ != nullptr) {
        evict(*selector, due && request_.budgeted, before ? step : step + 1);
      }
    }
  }

 private:
  void prefill() {
    const Pos prompt = layer_.options.prompt_len;
    std::vector<Pos> whole(static_cast<std::size_t>(prompt));
    std::iota(whole.begin(), whole.end(), 0);
    state_.now = prompt - 1;
    selector_ = request_.select(layer_);
    if (request_.prefill_select) {
      const std::unique_ptr<ReferenceSelector> first = request_.prefill_select(layer_);
      state_.budget = state_.asked = request_.prefill_budget;
      cut(*first, whole);
      pinned_ = state_.slots;
      state_.slots.clear();
    } else if (request_.traits.pool == Pool::decode) {
      pinned_ = whole;
    }
    state_.asked = request_.budget;
    state_.budget = request_.budgets.empty() ? request_.budget : request_.budgets[static_cast<std::size_t>(set_)];
    if (request_.traits.pool == Pool::all) {
      cut(*selector_, whole);
    }
  }

  void cut(ReferenceSelector& selector, const std::vector<Pos>& whole) {
    state_.slots = whole;
    update_resident();
    selector.prefill(state_);
    evict(selector, request_.budgeted, 0);
  }

  void update_resident() {
    state_.resident = pinned_;
    state_.resident.insert(state_.resident.end(), state_.slots.begin(), state_.slots.end());
  }

  // Takes out what has to go from step `effect` on. Recorded evictions are followed even where none
  // is due.
  void evict(ReferenceSelector& selector, bool due, int effect) {
    const std::size_t n = state_.slots.size();
    const std::size_t surplus =
        due ? static_cast<std::size_t>(std::clamp(selector.surplus(state_), 0, static_cast<int>(n))) : 0;
    std::vector<std::size_t> victims;
    if (recorded_ != nullptr && effect < layer_.n_steps()) {
      for (std::size_t i = 0; i < n; ++i) {
        if ((*recorded_)(set_, state_.slots[i]) == effect) {
          victims.push_back(i);
        }
      }
      // Eviction before attention: 0 is the prompt's cut and the first step's eviction alike.
      if (state_.at_prefill() && request_.traits.evict == Order::before_attention && victims.size() > surplus) {
        const std::vector<double> score = selector.score(state_);
        std::stable_sort(victims.begin(), victims.end(), [&](auto a, auto b) { return score[a] < score[b]; });
        victims.resize(surplus);
      }
      if (victims.size() != surplus) {
        result_.excess = kInfinity;
      }
      if (victims.empty()) {
        return;
      }
    } else if (surplus == 0) {
      return;
    }
    const std::vector<double> score = selector.score(state_);
    const std::vector<std::size_t> own = smallest(score, surplus);
    if (recorded_ == nullptr || effect >= layer_.n_steps()) {
      victims = own;
      if (surplus < n) {
        const double last = score[own.back()], next = score[smallest(score, surplus + 1).back()];
        result_.margin = std::min(result_.margin, next == kInfinity ? kInfinity : relative(next - last, last));
      }
    } else if (surplus > 0) {
      const double limit = score[own.back()];
      for (const std::size_t i : victims) {
        result_.excess = std::max(result_.excess, score[i] == limit ? 0 : relative(score[i] - limit, limit));
      }
    }
    std::vector<Pos> gone, stay;
    for (std::size_t i = 0; i < n; ++i) {
      const bool leaves = std::find(victims.begin(), victims.end(), i) != victims.end();
      (leaves ? gone : stay).push_back(state_.slots[i]);
    }
    selector.evicted(state_, gone);
    for (const Pos pos : gone) {
      result_.evicted_at(set_, pos) = std::min(effect, layer_.n_steps());
    }
    state_.slots = stay;
    update_resident();
  }

  const ToyLayer& layer_;
  const SelectionRequest& request_;
  int set_;
  const Evicted* recorded_;
  SelectionResult& result_;
  SetState state_;
  std::vector<Pos> pinned_;
  std::unique_ptr<ReferenceSelector> selector_;
};

SelectionResult replay(const ToyLayer& layer, const SelectionRequest& request, const Evicted* recorded) {
  SelectionResult result;
  const int sets = n_sets(layer, request.traits.scope);
  result.evicted_at = Evicted::Constant(sets, layer.options.n_tokens, layer.n_steps());
  result.margin = kInfinity;
  for (int set = 0; set < sets; ++set) {
    SetReplay(layer, request, set, recorded, result).run();
  }
  return result;
}

template <class T, class... Args>
MakeSelector make(Args... args) {
  return [=](const ToyLayer&) { return std::make_unique<T>(args...); };
}

}  // namespace

Eigen::VectorXd SetState::head_attention(int q_head, Pos pos) const {
  std::vector<bool> keep(static_cast<std::size_t>(pos) + 1, false);
  for (const Pos i : resident) {
    if (i <= pos) {
      keep[static_cast<std::size_t>(i)] = true;
    }
  }
  Eigen::VectorXd out = Eigen::VectorXd::Zero(layer->options.n_tokens);
  out.head(pos + 1) =
      softmax_over(logits_at(*layer, q_head, pos), layer->v[static_cast<std::size_t>(layer->kv_head(q_head))], keep)
          .weight;
  return out;
}

Eigen::VectorXd SetState::attention(Pos pos) const {
  std::vector<Eigen::VectorXd> by_head;
  for (const int h : q_heads) {
    by_head.push_back(head_attention(h, pos));
  }
  Eigen::VectorXd out = Eigen::VectorXd::Zero(layer->options.n_tokens);
  for (Eigen::Index i = 0; i < out.size(); ++i) {
    std::vector<double> x;
    for (const Eigen::VectorXd& head : by_head) {
      x.push_back(head[i]);
    }
    out[i] = reduce(x);
  }
  return out;
}

double SetState::reduce(const std::vector<double>& by_head) const {
  const double sum = std::accumulate(by_head.begin(), by_head.end(), 0.0);
  switch (group) {
    case Reduce::mean:
      return sum / static_cast<double>(by_head.size());
    case Reduce::sum:
      return sum;
    case Reduce::max:
      return *std::max_element(by_head.begin(), by_head.end());
  }
  return sum;
}

int ReferenceTokens::of(int budget) const {
  return static_cast<int>(of_budget ? std::floor(value * budget + 1e-9) : value);
}

MakeSelector reference_full() { return make<Full>(); }
MakeSelector reference_streaming(int sink) { return make<Streaming>(sink); }
MakeSelector reference_h2o(ReferenceTokens window, bool by_age, int sink) {
  return [=](const ToyLayer& layer) { return std::make_unique<H2o>(layer, window, by_age, sink); };
}
MakeSelector reference_tova(int window) { return make<Tova>(window); }
MakeSelector reference_snapkv(const SnapKv& settings) { return make<SnapKvSelector>(settings); }
MakeSelector reference_knorm() { return make<Knorm>(); }
MakeSelector reference_keydiff() { return make<KeyDiff>(); }
MakeSelector reference_momentum(double alpha) {
  return [=](const ToyLayer& layer) { return std::make_unique<Momentum>(layer, alpha); };
}
MakeSelector reference_residual(const Residual& settings) { return make<ResidualSelector>(settings); }
MakeSelector reference_oracle_mass() { return make<OracleMass>(); }
MakeSelector reference_oracle_greedy(int horizon) { return make<OracleGreedy>(horizon); }

SelectionResult reference_selection(const ToyLayer& layer, const SelectionRequest& request) {
  return replay(layer, request, nullptr);
}

SelectionResult check_selection(const ToyLayer& layer, const SelectionRequest& request, const Evicted& recorded) {
  return replay(layer, request, &recorded);
}

std::vector<bool> reference_topk(const ToyLayer& layer, int q_head, Pos now, int n, bool together) {
  const int group = layer.options.group_size;
  const int first = together ? q_head / group * group : q_head, heads = together ? group : 1;
  Eigen::VectorXd attention = Eigen::VectorXd::Zero(now + 1);
  for (int h = first; h < first + heads; ++h) {
    attention += softmax_over(logits_at(layer, h, now), layer.v[static_cast<std::size_t>(layer.kv_head(h))],
                              std::vector<bool>(static_cast<std::size_t>(now) + 1, true))
                     .weight /
                 heads;
  }
  std::vector<std::size_t> order(static_cast<std::size_t>(now) + 1);
  std::iota(order.begin(), order.end(), std::size_t{0});
  // Ties drop the older token: of equals the later comes first.
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const double x = attention[static_cast<Eigen::Index>(a)], y = attention[static_cast<Eigen::Index>(b)];
    return x != y ? x > y : a > b;
  });
  std::vector<bool> chosen(order.size(), false);
  for (std::size_t i = 0; i < std::min(order.size(), static_cast<std::size_t>(n)); ++i) {
    chosen[order[i]] = true;
  }
  return chosen;
}

std::vector<bool> reference_quest(const ToyLayer& layer, int q_head, Pos now, int page, int n_pages) {
  const MatD& k = layer.k[static_cast<std::size_t>(layer.kv_head(q_head))];
  const Eigen::VectorXd q = layer.q[static_cast<std::size_t>(q_head)].row(now);
  const int pages = now / page + 1;
  std::vector<double> bound;
  for (int p = 0; p < pages; ++p) {
    const MatD tokens = k.middleRows(p * page, std::min(page, now + 1 - p * page));
    double sum = 0;
    for (Eigen::Index c = 0; c < k.cols(); ++c) {
      sum += std::max(q[c] * tokens.col(c).maxCoeff(), q[c] * tokens.col(c).minCoeff());
    }
    bound.push_back(p + 1 == pages ? kInfinity : sum);  // the page being written is always read
  }
  std::vector<bool> chosen(static_cast<std::size_t>(now) + 1, false);
  std::vector<int> order(static_cast<std::size_t>(pages));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    const double x = bound[static_cast<std::size_t>(a)], y = bound[static_cast<std::size_t>(b)];
    return x != y ? x > y : a > b;
  });
  for (int i = 0; i < std::min(pages, n_pages); ++i) {
    const int p = order[static_cast<std::size_t>(i)];
    for (Pos pos = p * page; pos <= std::min(now, (p + 1) * page - 1); ++pos) {
      chosen[static_cast<std::size_t>(pos)] = true;
    }
  }
  return chosen;
}

std::vector<double> quantised(const std::vector<double>& x, int bits) {
  const double levels = std::ldexp(1.0, bits) - 1;
  const double low = *std::min_element(x.begin(), x.end()), high = *std::max_element(x.begin(), x.end());
  const double zero = round_to(low, Element::f16), step = round_to((high - low) / levels, Element::f16);
  if (step == 0) {
    return x;
  }
  std::vector<double> out;
  for (const double value : x) {
    out.push_back(std::nearbyint(std::clamp((value - zero) / step, 0.0, levels)) * step + zero);
  }
  return out;
}

Eigen::VectorXd reference_kivi(const ToyLayer& layer, const Kivi& settings, int q_head, int step) {
  const auto kv = static_cast<std::size_t>(layer.kv_head(q_head));
  const Pos now = layer.options.prompt_len + step;
  MatD k = layer.k[kv].topRows(now + 1), v = layer.v[kv].topRows(now + 1);
  // What was encoded at the end of the step before: `now` tokens were there.
  const Pos n_keys = now - now % settings.residual;
  for (Pos first = 0; first < n_keys; first += settings.group) {
    for (Eigen::Index c = 0; c < k.cols(); ++c) {
      std::vector<double> x;
      for (Pos i = first; i < first + settings.group; ++i) {
        x.push_back(k(i, c));
      }
      x = quantised(x, settings.bits);
      for (Pos i = first; i < first + settings.group; ++i) {
        k(i, c) = x[static_cast<std::size_t>(i - first)];
      }
    }
  }
  const Eigen::Index width = std::min<Eigen::Index>(settings.group, v.cols());
  for (Pos i = 0; i < std::max(0, now - settings.residual); ++i) {
    for (Eigen::Index first = 0; first < v.cols(); first += width) {
      std::vector<double> x;
      for (Eigen::Index c = first; c < std::min(first + width, v.cols()); ++c) {
        x.push_back(v(i, c));
      }
      x = quantised(x, settings.bits);
      for (std::size_t j = 0; j < x.size(); ++j) {
        v(i, first + static_cast<Eigen::Index>(j)) = x[j];
      }
    }
  }
  ToyLayer encoded = layer;
  encoded.k[kv] = k;
  return softmax_over(logits_at(encoded, q_head, now), v, std::vector<bool>(static_cast<std::size_t>(now) + 1, true))
      .output;
}

}  // namespace kvreplay::testing
