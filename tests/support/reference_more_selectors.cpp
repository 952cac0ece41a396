#include "tests/support/reference_more_selectors.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

namespace kvreplay::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The first `sink` tokens and the latest `window` never leave; the budget bounds both, sinks first.
void protect(const SetState& s, int sink, int window, std::vector<double>& score) {
  sink = std::min(sink, s.budget);
  window = std::min(window, s.budget - sink);
  for (std::size_t i = 0; i < score.size(); ++i) {
    if (s.slots[i] < sink || s.slots[i] > s.now - window) {
      score[i] = kInfinity;
    }
  }
}

// Softmax of a query over these tokens alone.
std::vector<double> softmax_over(const std::vector<double>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double z = 0;
  for (const double l : logits) {
    z += std::exp(l - top);
  }
  std::vector<double> out;
  for (const double l : logits) {
    out.push_back(std::exp(l - top) / z);
  }
  return out;
}

std::vector<double> logits_of(const SetState& s, int q_head, Pos query, const std::vector<Pos>& tokens) {
  const Eigen::VectorXd all = logits_at(*s.layer, q_head, query);
  std::vector<double> out;
  for (const Pos pos : tokens) {
    out.push_back(all[pos]);
  }
  return out;
}

std::vector<double> averaged(const std::vector<double>& x, int kernel) {
  const int n = static_cast<int>(x.size());
  std::vector<double> out;
  for (int i = 0; i < n; ++i) {
    double sum = 0;
    for (int j = i - kernel / 2; j <= i + kernel / 2; ++j) {
      sum += j >= 0 && j < n ? x[static_cast<std::size_t>(j)] : 0;
    }
    out.push_back(sum / kernel);
  }
  return out;
}

// by_head[head][i], reduced over heads.
std::vector<double> reduced(const SetState& s, const std::vector<std::vector<double>>& by_head) {
  std::vector<double> out;
  for (std::size_t i = 0; i < by_head[0].size(); ++i) {
    std::vector<double> x;
    for (const std::vector<double>& head : by_head) {
      x.push_back(head[i]);
    }
    out.push_back(s.reduce(x));
  }
  return out;
}

const MatD& keys(const SetState& s, int kv_head) { return s.layer->k[static_cast<std::size_t>(kv_head)]; }
const MatD& values(const SetState& s, int kv_head) { return s.layer->v[static_cast<std::size_t>(kv_head)]; }

// The toy layers' rotation: halves, base 10000, at the token's index.
Eigen::MatrixXd rotation_at(int head_dim, double position) {
  Eigen::MatrixXd r = Eigen::MatrixXd::Zero(head_dim, head_dim);
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const double angle = position * std::pow(10000.0, -2.0 * i / head_dim);
    r(i, i) = r(i + half, i + half) = std::cos(angle);
    r(i, i + half) = -std::sin(angle);
    r(i + half, i) = std::sin(angle);
  }
  return r;
}

class MorphKvSelector : public ReferenceSelector {
 public:
  explicit MorphKvSelector(const MorphKv& settings) : set_(settings) {}
  void prefill(const SetState&) override { first_query_ = 0; }
  int surplus(const SetState& s) const override {
    const int n = static_cast<int>(s.slots.size()) + (s.at_prefill() ? 1 : 0);
    return n >= set_.evict_after * s.budget ? n - s.budget : 0;
  }
  std::vector<double> score(const SetState& s) override {
    const Pos now = s.at_prefill() ? s.now + 1 : s.now;  // the step that evicts before it attends
    std::vector<Pos> old;
    for (const Pos pos : s.slots) {
      if (pos < now - set_.obs_window) {
        old.push_back(pos);
      }
    }
    std::vector<double> out(s.slots.size(), 0);
    if (!old.empty()) {
      const Pos begin = first_query_ < 0 ? s.layer->options.prompt_len : first_query_;
      Pos first = std::max(begin, now - set_.obs_window);
      if (set_.skip_oldest && set_.obs_window > 1) {
        first = std::max(begin, now - set_.obs_window + 1);
      }
      std::vector<double> votes(old.size(), 0);
      for (Pos query = first; query < now; ++query) {
        const std::vector<double> vote = votes_of(s, query, old);
        for (std::size_t i = 0; i < votes.size(); ++i) {
          votes[i] = set_.fuse_max ? std::max(votes[i], vote[i]) : votes[i] + vote[i];
        }
      }
      std::fill(out.begin(), out.end(), *std::max_element(votes.begin(), votes.end()) + 1);
      std::copy(votes.begin(), votes.end(), out.begin());
    }
    protect(s, 0, set_.obs_window + (s.at_prefill() ? 0 : 1), out);
    return out;
  }

 private:
  std::vector<double> votes_of(const SetState& s, Pos query, const std::vector<Pos>& tokens) const {
    std::vector<std::vector<double>> rows;
    std::map<int, std::vector<double>> joint;  // by KV head
    for (const int h : s.q_heads) {
      const std::vector<double> logits = logits_of(s, h, query, tokens);
      if (set_.joint) {
        std::vector<double>& sum = joint[s.layer->kv_head(h)];
        sum.resize(logits.size());
        std::transform(logits.begin(), logits.end(), sum.begin(), sum.begin(), std::plus<>());
      } else {
        rows.push_back(softmax_over(logits));
      }
    }
    for (const auto& [kv_head, logits] : joint) {
      rows.push_back(softmax_over(logits));
    }
    return reduced(s, rows);
  }

  MorphKv set_;
  Pos first_query_ = -1;  // -1: the prompt is pinned, so that only decode queries are known
};

class RpcSelector : public ReferenceSelector {
 public:
  explicit RpcSelector(const Rpc& settings) : set_(settings) {}
  int surplus(const SetState& s) const override {
    const int n = static_cast<int>(s.slots.size()), share = s.budget / set_.ratio;
    const bool due = n >= n_events_ * share + s.budget + window(s);
    return due ? n - (n_events_ + 1) * share - window(s) : 0;
  }
  std::vector<double> score(const SetState& s) override {
    const std::vector<Pos> old(s.slots.begin(), s.slots.end() - window(s));
    std::vector<std::vector<double>> by_head;
    for (const int h : s.q_heads) {
      std::vector<double> sum(old.size(), 0);
      const auto add = [&](Pos query) {
        const std::vector<double> attention = softmax_over(logits_of(s, h, query, old));
        std::transform(attention.begin(), attention.end(), sum.begin(), sum.begin(), std::plus<>());
      };
      // The list of queries ends with the newest one twice and holds as many as the window.
      const bool twice = set_.repeat_newest;
      for (Pos query = s.now - window(s) + (twice ? 2 : 1); query <= s.now; ++query) {
        add(query);
      }
      if (twice) {
        add(s.now);
      }
      by_head.push_back(sum);
    }
    std::vector<double> out = averaged(reduced(s, by_head), set_.kernel);
    out.resize(s.slots.size(), kInfinity);
    return out;
  }
  void evicted(const SetState&, const std::vector<Pos>&) override { ++n_events_; }

 private:
  int window(const SetState& s) const { return std::min(set_.obs_window, s.budget); }
  Rpc set_;
  int n_events_ = 0;
};

class LongFlowSelector : public ReferenceSelector {
 public:
  explicit LongFlowSelector(const LongFlow& settings) : set_(settings) {}
  std::vector<double> score(const SetState& s) override { return s.at_prefill() ? of_prompt(s) : of_step(s); }

 private:
  std::vector<double> of_step(const SetState& s) const {
    std::vector<std::vector<double>> by_head;
    for (const int h : s.q_heads) {
      const Eigen::VectorXd attention = s.head_attention(h, s.now);
      std::vector<double> x;
      for (const Pos pos : s.slots) {
        const Eigen::RowVectorXd v = values(s, s.layer->kv_head(h)).row(pos);
        x.push_back(attention[pos] * (set_.l2 ? std::sqrt(v.dot(v)) : v.cwiseAbs().sum()));
      }
      by_head.push_back(x);
    }
    return reduced(s, by_head);
  }
  std::vector<double> of_prompt(const SetState& s) const {
    const int window = std::min(set_.obs_window, s.now + 1);
    const std::size_t n_old = s.slots.size() - static_cast<std::size_t>(window);
    std::vector<double> out;
    if (n_old > 0) {
      std::vector<std::vector<double>> by_head;
      for (const int h : s.q_heads) {
        Eigen::VectorXd votes = Eigen::VectorXd::Zero(s.layer->options.n_tokens);
        for (Pos query = s.now + 1 - window; query <= s.now; ++query) {
          votes += s.head_attention(h, query);
        }
        by_head.emplace_back(votes.begin(), votes.begin() + static_cast<std::ptrdiff_t>(n_old));
      }
      out = averaged(reduced(s, by_head), set_.kernel);
    }
    // A budget below the window keeps the latest of it.
    const double above = n_old > 0 ? *std::max_element(out.begin(), out.end()) + 1 : 1;
    out.resize(s.slots.size(), above);
    protect(s, 0, set_.obs_window, out);
    return out;
  }
  LongFlow set_;
};

class VatpSelector : public ReferenceSelector {
 public:
  explicit VatpSelector(const Vatp& settings) : set_(settings) {}
  void prefill(const SetState& s) override {
    std::vector<Eigen::VectorXd> by_head;
    mass_ = Eigen::VectorXd::Zero(s.layer->options.n_tokens);
    for (const int h : s.q_heads) {
      by_head.push_back(Eigen::VectorXd::Zero(mass_.size()));
      for (Pos query = 0; query <= s.now; ++query) {
        by_head.back() += s.head_attention(h, query);
      }
    }
    for (Eigen::Index i = 0; i < mass_.size(); ++i) {
      std::vector<double> x;
      for (const Eigen::VectorXd& head : by_head) {
        x.push_back(head[i]);
      }
      mass_[i] = s.reduce(x);
    }
  }
  void observe(const SetState& s) override {
    const Eigen::VectorXd now = s.attention(s.now);
    mass_ = set_.sum && mass_.size() > 0 ? Eigen::VectorXd(mass_ + now) : now;
  }
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      double norm = 0;
      for (const int kv : s.kv_heads) {
        const Eigen::RowVectorXd v = values(s, kv).row(pos);
        norm += set_.l1 ? v.cwiseAbs().sum() : std::sqrt(v.dot(v));
      }
      out.push_back(mass_[pos] * norm / static_cast<double>(s.kv_heads.size()));
    }
    protect(s, set_.sink, set_.window.of(s.asked), out);
    return out;
  }

 private:
  Vatp set_;
  Eigen::VectorXd mass_;  // (n_tokens)
};

class ScissorhandsSelector : public ReferenceSelector {
 public:
  explicit ScissorhandsSelector(const Scissorhands& settings) : set_(settings) {}
  void prefill(const SetState& s) override {
    for (Pos query = 0; query <= s.now; ++query) {
      rows_.emplace_back(query, s.attention(query));
    }
  }
  void observe(const SetState& s) override { rows_.emplace_back(s.now, s.attention(s.now)); }
  int surplus(const SetState& s) const override {
    const int over = static_cast<int>(s.slots.size()) - s.budget;
    const int burst = std::min(std::max(1, set_.drop.of(s.asked)), s.budget);
    return over > 0 ? std::max(over, burst) : 0;
  }
  std::vector<double> score(const SetState& s) override {
    const int history = std::max(1, set_.history.of(s.asked)), window = set_.window.of(s.asked);
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      int count = 0;
      for (const auto& [query, attention] : rows_) {
        if (query > s.now - history && pos <= query && attention[pos] < 1.0 / (query + 1)) {
          ++count;
        }
      }
      out.push_back(pos > s.now - window ? 0 : -count);
    }
    return out;
  }

 private:
  Scissorhands set_;
  std::vector<std::pair<Pos, Eigen::VectorXd>> rows_;
};

class ExpectedSelector : public ReferenceSelector {
 public:
  explicit ExpectedSelector(const ExpectedAttention& settings) : set_(settings) {}
  void prefill(const SetState&) override { has_prompt_ = true; }
  std::vector<double> score(const SetState& s) override {
    const int d = s.layer->options.head_dim, prompt_len = s.layer->options.prompt_len;
    // Which queries, of which so many are dropped, and where the future begins.
    int n_queries = s.now + 1, dropped = set_.sink, future = s.now + 1;
    if (!s.at_prefill()) {
      const Pos last = last_event_ < 0 ? prompt_len - 1 : last_event_;
      n_queries = set_.kvpress ? std::min(s.now - last, set_.buffer + 1)
                               : std::min(has_prompt_ ? s.now + 1 : s.now + 1 - prompt_len, set_.buffer);
      dropped = set_.kvpress ? set_.sink : 0;
      future = set_.kvpress ? n_queries : s.now + 1;
    }
    dropped = n_queries > dropped ? dropped : 0;
    Eigen::MatrixXd mean_rotation = Eigen::MatrixXd::Zero(d, d);
    for (int p = future; p < future + set_.future; ++p) {
      mean_rotation += rotation_at(d, p) / set_.future;
    }
    std::vector<std::vector<double>> by_head;
    for (const int h : s.q_heads) {
      Eigen::MatrixXd q(n_queries - dropped, d);
      for (Eigen::Index i = 0; i < q.rows(); ++i) {
        const Pos pos = s.now + 1 - n_queries + dropped + static_cast<Pos>(i);
        q.row(i) = s.layer->q[static_cast<std::size_t>(h)].row(pos) * rotation_at(d, pos);  // R^T q
      }
      by_head.push_back(of_head(s, h, q, mean_rotation));
    }
    const std::vector<double> attended = by_head[0].empty() ? std::vector<double>() : reduced(s, by_head);
    std::vector<double> out;
    const double above = attended.empty() ? 1 : *std::max_element(attended.begin(), attended.end()) + 1;
    for (std::size_t i = 0, next = 0; i < s.slots.size(); ++i) {
      out.push_back(s.slots[i] < set_.sink ? above : attended[next++]);
    }
    protect(s, set_.sink, 0, out);
    return out;
  }
  void evicted(const SetState& s, const std::vector<Pos>&) override {
    last_event_ = s.at_prefill() ? last_event_ : s.now;
  }

 private:
  std::vector<double> of_head(const SetState& s, int h, const Eigen::MatrixXd& q, const Eigen::MatrixXd& turn) const {
    const Eigen::VectorXd mean = q.colwise().mean().transpose();
    const Eigen::MatrixXd centred = q.rowwise() - mean.transpose();
    const Eigen::MatrixXd covariance = centred.transpose() * centred / static_cast<double>(q.rows());
    const Eigen::VectorXd future_mean = turn * mean;
    const Eigen::MatrixXd future_covariance = turn * covariance * turn.transpose();
    const int kv = s.layer->kv_head(h);
    std::vector<double> x, norm;
    for (const Pos pos : s.slots) {
      if (pos < set_.sink) {
        continue;
      }
      const Eigen::VectorXd k = s.layer->scale * keys(s, kv).row(pos).transpose();
      x.push_back(future_mean.dot(k) + (set_.covariance ? 0.5 * k.dot(future_covariance * k) : 0));
      norm.push_back(values(s, kv).row(pos).norm());
    }
    if (x.empty()) {
      return {};
    }
    std::vector<double> out = softmax_over(x);
    for (std::size_t i = 0; set_.value_norm && i < out.size(); ++i) {
      out[i] = (out[i] + set_.epsilon) * norm[i];
    }
    return out;
  }

  ExpectedAttention set_;
  bool has_prompt_ = false;
  Pos last_event_ = -1;
};

class InfiniPotSelector : public ReferenceSelector {
 public:
  explicit InfiniPotSelector(const InfiniPot& settings) : set_(settings) {}
  int surplus(const SetState& s) const override {
    const int n = static_cast<int>(s.slots.size());
    if (n <= s.budget) {
      return 0;
    }
    int held = 0;
    if (s.at_prefill() && !set_.once) {
      for (int i = 0; i < n; ++i) {
        held = held + 1 > s.budget ? target(s) : held + 1;
      }
      return n - held;
    }
    return n - target(s);
  }
  std::vector<double> score(const SetState& s) override {
    std::vector<Pos> sinks, rest = s.slots;
    while (!rest.empty() && rest[0] < set_.sink && static_cast<int>(sinks.size()) < target(s)) {
      sinks.push_back(rest[0]);
      rest.erase(rest.begin());
    }
    const int n_keep = target(s) - static_cast<int>(sinks.size());
    std::map<Pos, double> score;
    for (const Pos pos : sinks) {
      score[pos] = kInfinity;
    }
    if (s.at_prefill() && !set_.once) {
      std::vector<Pos> held;
      double event = 0;
      for (const Pos pos : rest) {
        held.push_back(pos);
        score[pos] = kInfinity;
        if (static_cast<int>(held.size() + sinks.size()) > s.budget) {
          const std::vector<double> x = judge(s, held, n_keep);
          std::vector<Pos> stay;
          for (const std::size_t i : best(x, n_keep)) {
            stay.push_back(held[i]);
          }
          std::sort(stay.begin(), stay.end());
          for (const Pos p : held) {
            score[p] = std::binary_search(stay.begin(), stay.end(), p) ? kInfinity : event;
          }
          held = stay;
          event += 1;
        }
      }
    } else {
      const std::vector<double> x = judge(s, rest, n_keep);
      for (std::size_t i = 0; i < rest.size(); ++i) {
        score[rest[i]] = x[i];
      }
    }
    std::vector<double> out;
    for (const Pos pos : s.slots) {
      out.push_back(score[pos]);
    }
    return out;
  }

 private:
  int target(const SetState& s) const { return std::max(1, s.budget - set_.delta.of(s.budget)); }
  static std::vector<std::size_t> best(const std::vector<double>& x, int n) {
    std::vector<std::size_t> order(x.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return x[a] != x[b] ? x[a] > x[b] : a > b; });
    order.resize(static_cast<std::size_t>(std::max(0, n)));
    return order;
  }
  Eigen::VectorXd unit(const SetState& s, int kv, Pos pos) const {
    Eigen::VectorXd k = keys(s, kv).row(pos).transpose();
    if (set_.raw) {
      k = rotation_at(static_cast<int>(k.size()), pos).transpose() * k;
    }
    return k / (k.norm() + 1e-9);
  }
  double alike(const SetState& s, int kv, const std::vector<Pos>& tokens, std::size_t i,
               const std::vector<std::size_t>& recent) const {
    const auto block = static_cast<std::size_t>(set_.block);
    const Eigen::VectorXd u = unit(s, kv, tokens[i]);
    std::vector<double> cos;  // against what the mapping compares
    std::map<std::size_t, double> best_of_block;
    Eigen::VectorXd sum = Eigen::VectorXd::Zero(u.size());
    for (const std::size_t j : recent) {
      const Eigen::VectorXd other = unit(s, kv, tokens[j]);
      const double c = u.dot(other);
      sum += other;
      if (set_.mapping == 'A' && j % block == i % block) {
        cos.push_back(c);
      }
      const auto [it, first] = best_of_block.emplace(set_.mapping == 'C' ? 0 : j / block, c);
      it->second = std::max(it->second, c);
    }
    if (set_.mapping == 'D') {
      cos = {u.dot(sum) / sum.norm()};
    } else if (set_.mapping != 'A') {
      for (const auto& [b, c] : best_of_block) {
        cos.push_back(c);
      }
    }
    return cos.empty() ? 0 : std::accumulate(cos.begin(), cos.end(), 0.0) / static_cast<double>(cos.size());
  }
  std::vector<double> judge(const SetState& s, const std::vector<Pos>& tokens, int n_keep) const {
    const int n = static_cast<int>(tokens.size()), frames = n / set_.block;
    const int tar = n_keep - static_cast<int>(std::nearbyint((1 - set_.tar_ratio) * n_keep));
    int recent_frames = static_cast<int>(set_.query_ratio * frames + 1e-9);
    if (set_.query_ratio > 0 && recent_frames == 0 && frames > 0) {
      recent_frames = 1;
    }
    const int n_old = (frames - recent_frames) * set_.block;
    std::vector<double> norm;
    for (const Pos pos : tokens) {
      double sum = 0;
      for (const int kv : s.kv_heads) {
        sum += values(s, kv).row(pos).norm();
      }
      norm.push_back(sum / static_cast<double>(s.kv_heads.size()));
    }
    std::vector<double> out = averaged(norm, set_.kernel);
    const double above = *std::max_element(out.begin(), out.end()) + 1;
    const int kept_recent = std::min(tar, n - n_old);
    for (int i = n - kept_recent; i < n; ++i) {
      out[static_cast<std::size_t>(i)] = above;
    }
    std::vector<std::size_t> recent;
    for (int i = n_old; i < n; ++i) {
      recent.push_back(static_cast<std::size_t>(i));
    }
    std::vector<double> unlike;
    for (int i = 0; i < n_old; ++i) {
      double sum = 0;
      for (const int kv : s.kv_heads) {
        sum -= recent.empty() ? 0 : alike(s, kv, tokens, static_cast<std::size_t>(i), recent);
      }
      unlike.push_back(sum);
    }
    for (const std::size_t i : best(unlike, std::min(tar - kept_recent, n_old))) {
      out[i] = above;
    }
    return out;
  }

  InfiniPot set_;
};

template <class T, class Settings>
MakeSelector make(const Settings& settings) {
  return [settings](const ToyLayer&) { return std::make_unique<T>(settings); };
}

}  // namespace

MakeSelector reference_morphkv(const MorphKv& settings) { return make<MorphKvSelector>(settings); }
MakeSelector reference_rpc(const Rpc& settings) { return make<RpcSelector>(settings); }
MakeSelector reference_longflow(const LongFlow& settings) { return make<LongFlowSelector>(settings); }
MakeSelector reference_vatp(const Vatp& settings) { return make<VatpSelector>(settings); }
MakeSelector reference_scissorhands(const Scissorhands& settings) { return make<ScissorhandsSelector>(settings); }
MakeSelector reference_expected(const ExpectedAttention& settings) { return make<ExpectedSelector>(settings); }
MakeSelector reference_infinipot(const InfiniPot& settings) { return make<InfiniPotSelector>(settings); }

}  // namespace kvreplay::testing
