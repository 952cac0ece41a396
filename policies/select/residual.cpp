// MomentKV's eviction score: attention times what the moments of the evicted tokens fail to predict
// of the value, alpha_j |v_j - v_mean - S k_j scale / n|, decided before the step attends
// (arXiv:2606.01563, eq. 10, algorithm 1).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>

#include "policies/column_mass.hpp"
#include "policies/moments.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

// Four resident tokens at a time: k . a, k . b and v . c of each in one pass, all that an eviction asks of them.
using Four = Eigen::Array4d;
using Lanes __attribute__((vector_size(64))) = float;  // 16 sums side by side, kept in registers
struct Dots {
  Four k_a, k_b, v_c;
};

Four sums(const Lanes (&x)[4]) {
  Eigen::Array44f part;
  for (int s = 0; s < 4; ++s) {
    Eigen::Array<float, 16, 1> all;
    std::memcpy(all.data(), &x[s], sizeof x[s]);
    const Eigen::Array<float, 8, 1> half = all.head<8>() + all.tail<8>();
    part.col(s) = half.head<4>() + half.tail<4>();
  }
  return part.colwise().sum().transpose().cast<double>();
}

Dots dots(const float* const (&k)[4], const float* a, const float* b, int n, const float* const (&v)[4], const float* c,
          int m) {
  Lanes ka[4] = {}, kb[4] = {}, vc[4] = {};
  int i = 0, j = 0;
  for (; i + 16 <= n; i += 16) {
    Lanes a_i, b_i;
    std::memcpy(&a_i, a + i, sizeof a_i);
    std::memcpy(&b_i, b + i, sizeof b_i);
    for (int s = 0; s < 4; ++s) {
      Lanes k_i;
      std::memcpy(&k_i, k[s] + i, sizeof k_i);
      ka[s] += k_i * a_i;
      kb[s] += k_i * b_i;
    }
  }
  for (; j + 16 <= m; j += 16) {
    Lanes c_j;
    std::memcpy(&c_j, c + j, sizeof c_j);
    for (int s = 0; s < 4; ++s) {
      Lanes v_j;
      std::memcpy(&v_j, v[s] + j, sizeof v_j);
      vc[s] += v_j * c_j;
    }
  }
  Dots d{sums(ka), sums(kb), sums(vc)};
  for (int s = 0; s < 4; ++s) {
    for (int r = i; r < n; ++r) {
      d.k_a[s] += static_cast<double>(k[s][r] * a[r]);
      d.k_b[s] += static_cast<double>(k[s][r] * b[r]);
    }
    for (int r = j; r < m; ++r) {
      d.v_c[s] += static_cast<double>(v[s][r] * c[r]);
    }
  }
  return d;
}

class Residual final : public Selector {
 public:
  struct Config {
    Tokens sink{1, false}, window{8, false}, obs_window{32, false};
    int rerank = 1;
    int chunk = 1;
    double ewma = 0;
    bool accumulate_prefill = true;
  };
  static constexpr std::string_view kName = "residual";
  static constexpr std::string_view kSummary =
      "attention times the part of the value that moments of the evicted do not predict";
  static constexpr std::string_view kPaper = "arXiv:2606.01563";
  static constexpr std::string_view kDeviation =
      "The paper's decode step protects nothing (window=0) and scores the prompt in chunks of 4 "
      "(chunk=4). How it applies the score to the prompt, and how it reduces a query group, it "
      "does not say: here the prompt is cut by attention, then ranked again with the moments of "
      "that cut (rerank=0: by attention alone), and the group's mean attention counts. Moments "
      "are float32, centred, and never stale. In layer scope the lanes' residuals are one long "
      "vector.";
  static constexpr std::array kParams = {
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens that are never evicted"),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens never evicted during decode; 0 = the paper"),
      number<&Config::obs_window>("obs_window", 1, kUnbounded,
                                  "last prompt tokens: they vote on the prompt and survive its cut"),
      number<&Config::rerank>("rerank", 0, 8, "times the prompt is ranked again by the residual; 0 = attention alone"),
      number<&Config::chunk>("chunk", 1, 64, "adjacent prompt tokens that share their mean score; 4 = the paper"),
      number<&Config::ewma>("ewma", 0, 0.9999, "decay of averaged attention; 0 = current queries only, the paper",
                            Scale::one_minus),
      flag<&Config::accumulate_prefill>("accumulate_prefill", "tokens cut from the prompt enter the moments"),
  };
  static Traits traits(const Config&) { return {.evict = Order::before_attention}; }
  static Needs needs(const Config& config) {
    // A percentage is of a budget that is not known here, and no budget needs more than the whole
    // prompt.
    return {.prompt_queries = config.obs_window.percent ? Needs::kAll : config.obs_window.of(0)};
  }

  Residual(const Config& config, const SetShape& shape)
      : config_(config),
        scale_(shape.scale),
        sink_(config.sink.of(shape.budget)),
        window_(config.window.of(shape.budget)),
        obs_window_(std::max(1, config.obs_window.of(shape.budget))),
        moments_(static_cast<std::size_t>(shape.n_lanes), Moments(shape.head_dim, shape.v_head_dim)),
        known_(static_cast<std::size_t>(shape.n_tokens)),
        attention_(config.ewma > 0 ? static_cast<std::size_t>(shape.n_tokens) : 0) {}

  void prefill(const View& view) override {
    const int queries = std::min<int>(obs_window_, view.prompt_len);
    const Eigen::RowVectorXf votes =
        (reduce_heads(view.group, column_mass_of_set(view, queries)) / queries).cast<float>();
    votes_.assign(votes.begin(), votes.end());
    for (std::size_t i = 0; i < votes_.size() && config_.ewma > 0; ++i) {
      attention_[i] = {votes_[i], 1};
    }
    averaged_ = view.now;
  }

  void observe(const View& view) override {
    forget(view);
    average(view);
  }

  void score(const View& view, std::span<float> out) override {
    if (view.at_prefill()) {
      score_prompt(view, out);
      return;
    }
    forget(view);
    average(view);
    learn(view);
    if (config_.ewma > 0) {
      for (std::size_t i = 0; i < out.size(); ++i) {
        const Average& a = attention_[at(view.pos[i])];
        out[i] = a.sum / a.weight;
      }
    } else {
      view.attention(out);
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] *= std::sqrt(static_cast<float>(known_[at(view.pos[i])].r_r));
    }
    protect(view, sink_, window_, out);
  }

  void evicted(const View& view, std::span<const int> slots) override {
    constexpr std::size_t kFew = 8;  // more at once: cheaper to start over than to update one by one
    if (view.at_prefill()) {
      votes_ = {};
      if (config_.accumulate_prefill) {
        accumulate(view, slots, moments_);
      }
      return;
    }
    if (slots.size() > kFew) {
      accumulate(view, slots, moments_);
      forget_all(view);
    } else {
      for (int slot : slots) {
        evict_one(view, slot);
      }
    }
  }

 private:
  // What is remembered of a token, lanes summed: r = v - v_mean - c P its residual, P = S k, c =
  // scale / n.
  struct Known {
    double r_r = -1, r_p = 0, p_p = 0;  // |r|^2, r . P, |P|^2; -1: to be computed
  };
  struct Average {
    float sum = 0, weight = 0;
  };
  static std::size_t at(Pos pos) { return static_cast<std::size_t>(pos); }

  float step_size(const Moments& m) const { return m.n > 0 ? scale_ / static_cast<float>(m.n) : 0; }

  // P2: cut by votes, then rank by votes and residual under the moments of that cut.
  void score_prompt(const View& view, std::span<float> out) {
    std::vector<float> votes(out.size());
    for (std::size_t i = 0; i < out.size(); ++i) {
      votes[i] = votes_[at(view.pos[i])];
    }
    std::copy(votes.begin(), votes.end(), out.begin());
    finish_prompt(view, out);
    std::vector<Known> known(out.size());
    std::vector<int> slots(out.size());
    for (int round = 0; round < config_.rerank; ++round) {
      std::iota(slots.begin(), slots.end(), 0);
      const auto n_out = std::clamp<std::ptrdiff_t>(surplus(view), 0, std::ssize(slots));
      std::nth_element(slots.begin(), slots.begin() + n_out, slots.end(), [&](int a, int b) {
        const float x = out[at(a)], y = out[at(b)];
        return x < y || (x == y && a < b);
      });
      std::sort(slots.begin(), slots.begin() + n_out);
      std::vector<Moments> cut(moments_.size(), Moments(view.head_dim, view.v_head_dim));
      if (config_.accumulate_prefill) {
        accumulate(view, std::span(slots).first(static_cast<std::size_t>(n_out)), cut);
      }
      std::iota(slots.begin(), slots.end(), 0);
      compute(view, slots, cut, known);
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = votes[i] * static_cast<float>(std::sqrt(known[i].r_r));
      }
      finish_prompt(view, out);
    }
  }

  void finish_prompt(const View& view, std::span<float> out) const {
    const auto chunk = static_cast<std::size_t>(config_.chunk);
    for (std::size_t i = 0; chunk > 1 && i < out.size(); i += chunk) {
      const std::span<float> piece = out.subspan(i, std::min(chunk, out.size() - i));
      const float sum = std::accumulate(piece.begin(), piece.end(), 0.0F);
      std::fill(piece.begin(), piece.end(), sum / static_cast<float>(piece.size()));
    }
    protect(view, sink_, obs_window_, out);
  }

  static void accumulate(const View& view, std::span<const int> slots, std::vector<Moments>& into) {
    constexpr std::size_t kChunk = 1024;
    MatF k, v;  // (slots of the chunk, head_dim), (., v_head_dim)
    for (std::size_t lane = 0; lane < into.size(); ++lane) {
      for (std::size_t i = 0; i < slots.size(); i += kChunk) {
        gather(view, static_cast<int>(lane), slots.subspan(i, std::min(kChunk, slots.size() - i)), k, v);
        into[lane].merge(Moments::of(k, v));
      }
    }
  }

  static void gather(const View& view, int lane, std::span<const int> slots, MatF& k, MatF& v) {
    k.resize(std::ssize(slots), view.head_dim);
    v.resize(std::ssize(slots), view.v_head_dim);
    for (Eigen::Index i = 0; i < k.rows(); ++i) {
      k.row(i) = view.key(lane, slots[at(static_cast<Pos>(i))]);
      v.row(i) = view.value(lane, slots[at(static_cast<Pos>(i))]);
    }
  }

  // Residuals from scratch, by products; out[i] belongs to slots[i].
  void compute(const View& view, std::span<const int> slots, const std::vector<Moments>& moments,
               std::span<Known> out) const {
    constexpr std::size_t kChunk = 256;
    MatF k, v, p;  // (slots of the chunk, head_dim), (., v_head_dim) twice
    std::fill(out.begin(), out.end(), Known{0, 0, 0});
    for (std::size_t lane = 0; lane < moments.size(); ++lane) {
      const Moments& m = moments[lane];
      for (std::size_t i = 0; i < slots.size(); i += kChunk) {
        const std::size_t n = std::min(kChunk, slots.size() - i);
        gather(view, static_cast<int>(lane), slots.subspan(i, n), k, v);
        p.noalias() = k * m.scatter.transpose();
        v.rowwise() -= m.v_mean.transpose();
        v -= step_size(m) * p;
        for (std::size_t j = 0; j < n; ++j) {
          const auto r = static_cast<Eigen::Index>(j);
          out[i + j].r_r += static_cast<double>(v.row(r).squaredNorm());
          out[i + j].r_p += static_cast<double>(v.row(r).dot(p.row(r)));
          out[i + j].p_p += static_cast<double>(p.row(r).squaredNorm());
        }
      }
    }
  }

  // Tokens that changed or that rounding may have reached are computed anew at the next score.
  void forget(const View& view) {
    for (Pos pos : view.rewritten) {
      known_[at(pos)].r_r = -1;
    }
  }
  void forget_all(const View& view) {
    for (Pos pos : view.pos) {
      known_[at(pos)].r_r = -1;
    }
    updates_ = 0;
  }
  void learn(const View& view) {
    std::vector<int> slots;
    for (std::size_t i = 0; i < view.pos.size(); ++i) {
      if (known_[at(view.pos[i])].r_r < 0) {
        slots.push_back(static_cast<int>(i));
      }
    }
    std::vector<Known> found(slots.size());
    compute(view, slots, moments_, found);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      known_[at(view.pos[at(slots[i])])] = found[i];
    }
  }

  // One token joins the moments: S' = S + b dv dk^T, so P' = P + t dv with t = b dk . k, and
  // r' = r + (c / n') P - e dv with e = 1 / n' + c' t. Three numbers per token follow without P
  // itself: dv . P is k . (S^T dv), and dv . r comes from dv . v.
  void evict_one(const View& view, int slot) {
    constexpr int kUpdates = 256;  // then start over, so that rounding cannot pile up
    const float n = static_cast<float>(moments_[0].n), n_after = n + 1;
    const float c = step_size(moments_[0]), c_after = scale_ / n_after, b = n / n_after;
    const double f = static_cast<double>(c / n_after);
    for (Pos pos : view.pos) {
      Known& x = known_[at(pos)];
      if (x.r_r >= 0) {
        x.r_r += 2 * f * x.r_p + f * f * x.p_p;
      }
      x.r_p += f * x.p_p;
    }
    const int n_slots = static_cast<int>(view.pos.size());
    for (std::size_t l = 0; l < moments_.size(); ++l) {
      Moments& m = moments_[l];
      const int lane = static_cast<int>(l);
      const VecF k_out = view.key(lane, slot), v_out = view.value(lane, slot);
      const Eigen::VectorXf dk = k_out - m.k_mean, dv = v_out - m.v_mean;
      const Eigen::VectorXf w = m.scatter.transpose() * dv;  // (head_dim)
      const double mean_dv = static_cast<double>(m.v_mean.dot(dv));
      const double dv_dv = static_cast<double>(dv.squaredNorm());
      for (int i = 0; i < n_slots; i += 4) {
        const float *k[4], *v[4];
        for (int s = 0; s < 4; ++s) {
          const int other = std::min(i + s, n_slots - 1);
          k[s] = view.key(lane, other).data();
          v[s] = view.value(lane, other).data();
        }
        const Dots d = dots(k, dk.data(), w.data(), view.head_dim, v, dv.data(), view.v_head_dim);
        const Four p_dv = d.k_b, r_dv = d.v_c - mean_dv + (f - static_cast<double>(c)) * p_dv;
        const Four t = static_cast<double>(b) * d.k_a;
        const Four e = static_cast<double>(1 / n_after) + static_cast<double>(c_after) * t;
        const Four more_r_r = e * (e * dv_dv - 2 * r_dv);
        const Four more_r_p = t * (r_dv - e * dv_dv) - e * p_dv;
        const Four more_p_p = t * (2 * p_dv + t * dv_dv);
        for (int s = 0; s < 4 && i + s < n_slots; ++s) {
          Known& x = known_[at(view.pos[at(i + s)])];
          if (x.r_r >= 0) {
            x.r_r = std::max(0.0, x.r_r + more_r_r[s]);
          }
          x.r_p += more_r_p[s];
          x.p_p += more_p_p[s];
        }
      }
      m.add(k_out, v_out);
    }
    if (++updates_ >= kUpdates) {
      forget_all(view);
    }
  }

  void average(const View& view) {
    if (config_.ewma == 0 || view.now == averaged_) {
      return;
    }
    averaged_ = view.now;
    row_.resize(view.pos.size());
    view.attention(row_);
    const float keep = static_cast<float>(config_.ewma);
    for (std::size_t i = 0; i < row_.size(); ++i) {
      Average& a = attention_[at(view.pos[i])];
      a.sum = keep * a.sum + (1 - keep) * row_[i];
      a.weight = keep * a.weight + (1 - keep);
    }
  }

  Config config_;
  float scale_;
  int sink_, window_, obs_window_;
  std::vector<Moments> moments_;    // per lane
  std::vector<Known> known_;        // (n_tokens) by position
  std::vector<Average> attention_;  // (n_tokens) by position; empty without ewma
  std::vector<float> votes_;        // (prompt_len) until the cut
  std::vector<float> row_;          // (n_slots)
  Pos averaged_ = -1;               // position of the last query in attention_
  int updates_ = 0;
};

}  // namespace

extern const PartInfo residual;
constinit const PartInfo residual = describe<Residual>();

}  // namespace kvreplay
