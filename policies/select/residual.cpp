// MomentKV's eviction score: attention times what the moments of the evicted tokens fail to predict
// of the value, alpha_j |v_j - v_mean - S k_j scale / n|, decided before the step attends
// (arXiv:2606.01563, eq. 10, algorithm 1).
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "policies/column_mass.hpp"
#include "policies/moments.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

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
      flag<&Config::accumulate_prefill>(
          "accumulate_prefill",
          "tokens that it cuts from the prompt enter the moments; those that a selector before a / cuts never do"),
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
    if (config_.ewma > 0) {
      for (std::size_t i = 0; i < out.size(); ++i) {
        const Average& a = attention_[at(view.pos[i])];
        out[i] = a.sum / a.weight;
      }
    } else {
      view.attention(out);
    }
    protect(view, sink_, window_, out);
    if (at_look_.empty()) {
      look(view);
    }
    learn(view);
    judge(view, out);
  }

  void evicted(const View& view, std::span<const int> slots) override {
    constexpr std::size_t kFew = 8;  // more at once are cheaper merged than one by one
    if (view.at_prefill()) {
      votes_ = {};
    }
    if (view.at_prefill() && !config_.accumulate_prefill) {
      return;
    }
    if (slots.size() > kFew) {
      accumulate(view, slots, moments_);
      return;
    }
    for (std::size_t lane = 0; lane < moments_.size(); ++lane) {
      for (int slot : slots) {
        moments_[lane].add(view.key(static_cast<int>(lane), slot), view.value(static_cast<int>(lane), slot));
      }
    }
  }

 private:
  // Of a token under the moments of the last look, lanes together.
  struct Known {
    float residual = -1;  // |v - v_mean - M k|; -1: to be computed
    float reach = 0;      // |k - k_mean|
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
    std::vector<float> residuals(out.size());
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
      compute(view, slots, cut, residuals);
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = votes[i] * residuals[i];
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

  // |v - v_mean - S k scale / n| of each slot under `moments`, from scratch; out[i] belongs to slots[i].
  void compute(const View& view, std::span<const int> slots, const std::vector<Moments>& moments,
               std::span<float> out) const {
    constexpr std::size_t kChunk = 256, kFew = 8;
    std::vector<double> squares(slots.size(), 0.0);
    MatF k, v;  // (slots of the chunk, head_dim), (., v_head_dim)
    for (std::size_t lane = 0; lane < moments.size(); ++lane) {
      const Moments& m = moments[lane];
      if (slots.size() <= kFew) {  // a product would spend its time on rearranging S
        for (std::size_t i = 0; i < slots.size(); ++i) {
          const int l = static_cast<int>(lane);
          const Eigen::VectorXf r =
              view.value(l, slots[i]) - m.v_mean - m.scatter * (step_size(m) * view.key(l, slots[i]));
          squares[i] += static_cast<double>(r.squaredNorm());
        }
        continue;
      }
      for (std::size_t i = 0; i < slots.size(); i += kChunk) {
        const std::size_t n = std::min(kChunk, slots.size() - i);
        gather(view, static_cast<int>(lane), slots.subspan(i, n), k, v);
        k *= step_size(m);
        v.rowwise() -= m.v_mean.transpose();
        v.noalias() -= k * m.scatter.transpose();
        for (std::size_t j = 0; j < n; ++j) {
          squares[i + j] += static_cast<double>(v.row(static_cast<Eigen::Index>(j)).squaredNorm());
        }
      }
    }
    for (std::size_t i = 0; i < slots.size(); ++i) {
      out[i] = static_cast<float>(std::sqrt(squares[i]));
    }
  }

  // From now on residuals are known under the moments as they are.
  void look(const View& view) {
    at_look_ = moments_;
    for (Pos pos : view.pos) {
      known_[at(pos)].residual = -1;
    }
    judged_ = 0;
  }

  void forget(const View& view) {
    for (Pos pos : view.rewritten) {
      known_[at(pos)].residual = -1;
    }
  }

  // Tokens that are new or changed, under the moments of the last look.
  void learn(const View& view) {
    std::vector<int> slots;
    for (std::size_t i = 0; i < view.pos.size(); ++i) {
      if (known_[at(view.pos[i])].residual < 0) {
        slots.push_back(static_cast<int>(i));
      }
    }
    std::vector<float> residuals(slots.size());
    compute(view, slots, at_look_, residuals);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      double reach = 0;
      for (std::size_t lane = 0; lane < at_look_.size(); ++lane) {
        reach +=
            static_cast<double>((view.key(static_cast<int>(lane), slots[i]) - at_look_[lane].k_mean).squaredNorm());
      }
      known_[at(view.pos[at(slots[i])])] = {residuals[i], static_cast<float>(std::sqrt(reach))};
    }
  }

  // How far residuals may have moved since the last look: |r' - r| <= all + per_reach * reach, for
  // r - r' = (v_mean' - v_mean) + (M' - M) k_mean + (M' - M)(k - k_mean).
  struct Drift {
    float all = 0, per_reach = 0;
  };
  Drift drift() const {
    double all = 0, per_reach = 0;
    MatF slope;
    for (std::size_t lane = 0; lane < moments_.size(); ++lane) {
      const Moments& m = moments_[lane];
      const Moments& before = at_look_[lane];
      slope = step_size(m) * m.scatter - step_size(before) * before.scatter;
      all += static_cast<double>((m.v_mean - before.v_mean + slope * before.k_mean).squaredNorm());
      per_reach = std::max(per_reach, static_cast<double>(slope.squaredNorm()));
    }
    return {static_cast<float>(std::sqrt(all)), static_cast<float>(std::sqrt(per_reach))};
  }

  // out: attention, infinite where protected -> scores. Moments move little in a step, so that few tokens can be the
  // ones to leave: their scores are exact. All others get a bound from below that is above those.
  void judge(const View& view, std::span<float> out) {
    constexpr float kSlack = 1e-4F;    // rounding
    constexpr std::size_t kShare = 4;  // of the slots: a fresh look costs about as much as judging so many
    const Drift moved = drift();
    low_.resize(out.size());
    highs_.clear();
    for (std::size_t i = 0; i < out.size(); ++i) {
      const Known& x = known_[at(view.pos[i])];
      const float by = moved.all + moved.per_reach * x.reach + kSlack * x.residual;
      low_[i] = std::isinf(out[i]) ? out[i] : out[i] * std::max(0.0F, x.residual - by);
      if (!std::isinf(out[i])) {
        highs_.push_back(out[i] * (x.residual + by));
      }
    }
    const auto n_out = std::min<std::ptrdiff_t>(surplus(view), std::ssize(highs_));
    candidates_.clear();
    if (n_out <= 0) {
      judged_ = out.size();  // nobody has to leave, so nobody is a candidate: the scores are asked for themselves
    } else {
      const auto last = highs_.begin() + (n_out - 1);
      std::nth_element(highs_.begin(), last, highs_.end());
      for (std::size_t i = 0; i < out.size(); ++i) {
        if (low_[i] <= *last && out[i] > 0 && !std::isinf(out[i])) {
          candidates_.push_back(static_cast<int>(i));
        }
      }
    }
    judged_ += candidates_.size();
    if (judged_ > out.size() / kShare) {
      look(view);
      learn(view);
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] *= std::isinf(out[i]) ? 1 : known_[at(view.pos[i])].residual;
      }
      return;
    }
    std::vector<float> residuals(candidates_.size());
    compute(view, candidates_, moments_, residuals);
    for (std::size_t j = 0; j < candidates_.size(); ++j) {
      const std::size_t i = at(candidates_[j]);
      low_[i] = out[i] * residuals[j];
    }
    std::copy(low_.begin(), low_.end(), out.begin());
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
  std::vector<Moments> at_look_;    // per lane, when all residuals were last computed
  std::vector<Known> known_;        // (n_tokens) by position
  std::vector<Average> attention_;  // (n_tokens) by position; empty without ewma
  std::vector<float> votes_;        // (prompt_len) until the cut
  std::vector<float> row_;          // (n_slots)
  Pos averaged_ = -1;               // position of the last query in attention_
  std::size_t judged_ = 0;          // candidates since the last look
  std::vector<float> low_, highs_;  // (n_slots), (slots not protected): bounds on scores
  std::vector<int> candidates_;     // slots whose score is computed
};

}  // namespace

extern const PartInfo residual;
constinit const PartInfo residual = describe<Residual>();

}  // namespace kvreplay
