// MomentKV's eviction score: attention times what the moments of the evicted tokens fail to predict
// of the value, alpha_j |v_j - v_mean - S k_j scale / n|, decided before the step attends
// (arXiv:2606.01563, eq. 10, algorithm 1).
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "policies/column_mass.hpp"
#include "policies/look_ahead.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"
#include "policies/residuals.hpp"

namespace kvreplay {
namespace {

enum class Prefill { rerank, attention, rounds };
constexpr std::string_view kPrefills[] = {"rerank", "attention", "rounds"};
enum class Score { residual, lookahead };
constexpr std::string_view kScores[] = {"residual", "lookahead"};

class Residual final : public Selector {
 public:
  struct Config {
    Tokens sink{1, false}, window{8, false}, obs_window{32, false};
    Prefill prefill = Prefill::rerank;
    int rerank = 1;
    int rounds = 8;
    int chunk = 1;
    double ewma = 0;
    bool accumulate_prefill = true;
    Score score = Score::residual;
    int queries = 1;
  };
  static constexpr std::string_view kName = "residual";
  static constexpr std::string_view kSummary =
      "attention times the part of the value that moments of the evicted do not predict";
  static constexpr std::string_view kPaper = "arXiv:2606.01563";
  static constexpr std::string_view kDeviation =
      "The paper's decode step protects nothing (window=0) and scores the prompt in chunks of 4 "
      "(chunk=4). How it applies the score to the prompt, and how it reduces a query group, it "
      "does not say: here the prompt is cut by attention, then ranked again with the moments of "
      "that cut (prefill=attention: by attention alone; prefill=rounds: it leaves in rounds, each "
      "ranked by the moments of those before), and the group's mean attention counts. Moments "
      "are float32, centred, and never stale. In layer scope the lanes' residuals are one long "
      "vector. score=lookahead is ours: the exact change of the corrected output.";
  static constexpr std::array kParams = {
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens that are never evicted"),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens never evicted during decode; 0 = the paper"),
      number<&Config::obs_window>("obs_window", 1, kUnbounded,
                                  "last prompt tokens: they vote on the prompt and survive its cut"),
      choice<&Config::prefill>("prefill", kPrefills,
                               "rerank: attention cuts the prompt, then the residual under the moments of that cut "
                               "ranks it again; attention: attention alone; rounds: the prompt leaves in rounds"),
      number<&Config::rerank>("rerank", 0, 8, "times the prompt is ranked again by the residual; 0 = attention alone"),
      number<&Config::rounds>("rounds", 1, 256,
                              "with prefill=rounds: equal shares in which the prompt's surplus leaves, the first by "
                              "attention times |v|; no source gives a number",
                              Scale::log),
      number<&Config::chunk>("chunk", 1, 64, "adjacent prompt tokens that share their mean score; 4 = the paper"),
      number<&Config::ewma>("ewma", 0, 0.9999, "decay of averaged attention; 0 = current queries only, the paper",
                            Scale::one_minus),
      flag<&Config::accumulate_prefill>(
          "accumulate_prefill",
          "tokens that it cuts from the prompt enter the moments; those that a selector before a / cuts never do"),
      choice<&Config::score>("score", kScores,
                             "of decode tokens; residual: the paper; lookahead: how much the output corrected by "
                             "moments changes if the token joins the evicted (without a pinned prompt, soft-cap or "
                             "votes of merged tokens)"),
      number<&Config::queries>("queries", 1, 1024,
                               "with score=lookahead: last queries that it is averaged over, for each token those "
                               "that saw it",
                               Scale::log),
  };
  static Traits traits(const Config&) { return {.evict = Order::before_attention}; }
  static Needs needs(const Config& config) {
    // A percentage is of a budget that is not known here, and no budget needs more than the whole
    // prompt.
    if (config.obs_window.percent) {
      return {.prompt_queries = Needs::kAll};
    }
    return {.prompt_queries = std::max(config.obs_window.of(0), config.queries - 1)};
  }
  static void check(const Config& c, int) {
    if (c.score == Score::lookahead && c.ewma > 0) {
      throw ConfigError(
          "residual: ewma averages attention, which score=lookahead does not use; average it with queries");
    }
    if (c.score == Score::residual && c.queries > 1) {
      throw ConfigError("residual: queries=" + std::to_string(c.queries) +
                        " needs score=lookahead; score=residual averages attention with ewma");
    }
  }

  Residual(const Config& config, const SetShape& shape)
      : config_(config),
        scale_(shape.scale),
        sink_(config.sink.of(shape.budget)),
        window_(config.window.of(shape.budget)),
        obs_window_(std::max(1, config.obs_window.of(shape.budget))),
        exact_(shape.exact_scores),
        moments_(static_cast<std::size_t>(shape.n_lanes), Moments(shape.head_dim, shape.v_head_dim)),
        tracker_(shape.n_tokens, shape.scale),
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
    tracker_.forget(view);
    average(view);
  }

  void score(const View& view, std::span<float> out) override {
    if (view.at_prefill()) {
      score_prompt(view, out);
      return;
    }
    tracker_.forget(view);
    average(view);
    if (config_.score == Score::lookahead && moments_.front().n > 0) {
      score_ahead(view, out);
      protect(view, sink_, window_, out);
      return;
    }
    if (config_.ewma > 0) {
      for (std::size_t i = 0; i < out.size(); ++i) {
        const Average& a = attention_[at(view.pos[i])];
        out[i] = a.sum / a.weight;
      }
    } else {
      view.attention(out);
    }
    protect(view, sink_, window_, out);
    tracker_.score(view, moments_, exact_ ? 0 : surplus(view), out);
  }

  void evicted(const View& view, std::span<const int> slots) override {
    if (view.at_prefill()) {
      votes_ = {};
      if (!config_.accumulate_prefill) {
        return;
      }
    }
    accumulate(view, slots, moments_);
  }

 private:
  struct Average {
    float sum = 0, weight = 0;
  };
  static std::size_t at(std::ptrdiff_t i) { return static_cast<std::size_t>(i); }

  void score_prompt(const View& view, std::span<float> out) const {
    std::vector<float> votes(out.size());
    for (std::size_t i = 0; i < out.size(); ++i) {
      votes[i] = votes_[at(view.pos[i])];
    }
    if (config_.prefill == Prefill::rounds) {
      score_in_rounds(view, votes, out);
      return;
    }
    std::copy(votes.begin(), votes.end(), out.begin());
    finish_prompt(view, out);
    std::vector<int> slots(out.size());
    for (int round = 0; round < (config_.prefill == Prefill::rerank ? config_.rerank : 0); ++round) {
      std::iota(slots.begin(), slots.end(), 0);
      const auto n_out = std::clamp<std::ptrdiff_t>(surplus(view), 0, std::ssize(slots));
      lowest_first(slots, n_out, out);
      LaneMoments cut = no_moments(view);
      if (config_.accumulate_prefill) {
        accumulate(view, std::span(slots).first(at(n_out)), cut);
      }
      score_by(view, votes, cut, out);
    }
  }

  // The surplus leaves in equal shares, each ranked by the moments of those before it. A token keeps the score at
  // which it left, but for being below all that stayed longer.
  void score_in_rounds(const View& view, std::span<const float> votes, std::span<float> out) const {
    std::vector<int> slots(out.size());
    std::iota(slots.begin(), slots.end(), 0);
    const auto n_out = std::clamp<std::ptrdiff_t>(surplus(view), 0, std::ssize(slots));
    std::vector<float> left_at(out.size());  // of a slot that left: its score then
    LaneMoments gone = no_moments(view);
    std::vector<std::ptrdiff_t> ends;
    for (std::ptrdiff_t round = 0, begin = 0; round < config_.rounds; ++round) {
      score_by(view, votes, gone, out);
      const std::ptrdiff_t end = n_out * (round + 1) / config_.rounds;
      const auto share = std::span(slots).subspan(at(begin));
      lowest_first(share, end - begin, out);
      for (int slot : share.first(at(end - begin))) {
        left_at[at(slot)] = out[at(slot)];
      }
      if (config_.accumulate_prefill) {
        accumulate(view, share.first(at(end - begin)), gone);
      }
      ends.push_back(begin = end);
    }
    float bound = std::numeric_limits<float>::infinity();
    for (std::size_t i = at(n_out); i < slots.size(); ++i) {
      bound = std::min(bound, out[at(slots[i])]);
    }
    for (auto end = std::ssize(ends); end-- > 0;) {
      const float below = std::nextafter(bound, -std::numeric_limits<float>::infinity());
      for (auto i = end > 0 ? ends[at(end - 1)] : 0; i < ends[at(end)]; ++i) {
        float& score = out[at(slots[at(i)])] = std::min(left_at[at(slots[at(i)])], below);
        bound = std::min(bound, score);
      }
    }
  }

  LaneMoments no_moments(const View& view) const {
    return LaneMoments(moments_.size(), Moments(view.head_dim, view.v_head_dim));
  }

  // Brings the n lowest of these slots to the front, in order of position.
  static void lowest_first(std::span<int> slots, std::ptrdiff_t n, std::span<const float> score) {
    std::nth_element(slots.begin(), slots.begin() + n, slots.end(), [&](int a, int b) {
      const float x = score[at(a)], y = score[at(b)];
      return x < y || (x == y && a < b);
    });
    std::sort(slots.begin(), slots.begin() + n);
  }

  void score_by(const View& view, std::span<const float> votes, const LaneMoments& moments,
                std::span<float> out) const {
    std::vector<int> all(out.size());
    std::iota(all.begin(), all.end(), 0);
    std::vector<float> found(out.size());
    residuals(view, all, moments, scale_, found);
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = votes[i] * found[i];
    }
    finish_prompt(view, out);
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

  // Each token's mean over those of the last queries that saw it, then the heads reduced as attention is.
  void score_ahead(const View& view, std::span<float> out) const {
    const auto n = static_cast<Eigen::Index>(out.size());
    MatD cost = MatD::Zero(view.n_lanes * view.n_heads, n), k(n, view.head_dim), v(n, view.v_head_dim);
    Eigen::RowVectorXd seen = Eigen::RowVectorXd::Zero(n);  // queries that saw each slot
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      for (int i = 0; i < static_cast<int>(n); ++i) {
        k.row(i) = view.key(lane, i).cast<double>();
        v.row(i) = view.value(lane, i).cast<double>();
      }
      const MatD q = view.queries(lane, config_.queries).cast<double>();  // (queries * n_heads, head_dim)
      const Evicted64 evicted = Evicted64::of(moments_[at(lane)]);
      const int n_queries = static_cast<int>(q.rows()) / view.n_heads;
      for (int i = 0; i < n_queries; ++i) {
        const auto past = std::upper_bound(view.pos.begin(), view.pos.end(), view.now - n_queries + 1 + i);
        const Eigen::Index n_past = past - view.pos.begin();
        if (n_past == 0) {
          continue;
        }
        if (lane == 0) {
          seen.head(n_past).array() += 1;
        }
        for (int head = 0; head < view.n_heads; ++head) {
          const Eigen::VectorXd one = q.row(i * view.n_heads + head).transpose();
          const Eigen::ArrayXd logits = k.topRows(n_past) * one;
          cost.row(lane * view.n_heads + head).head(n_past) +=
              look_ahead(evicted, one, logits, v.topRows(n_past)).matrix().transpose();
        }
      }
    }
    const Eigen::RowVectorXf mean = reduce_heads(view.group, cost.array().rowwise() / seen.array()).cast<float>();
    std::copy(mean.begin(), mean.end(), out.begin());
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
  bool exact_;
  LaneMoments moments_;             // of what it evicted
  ResidualTracker tracker_;         // residuals of the resident under moments_
  std::vector<Average> attention_;  // (n_tokens) by position; empty without ewma
  std::vector<float> votes_;        // (prompt_len) until the cut
  std::vector<float> row_;          // (n_slots)
  Pos averaged_ = -1;               // position of the last query in attention_
};

}  // namespace

extern const PartInfo residual;
constinit const PartInfo residual = describe<Residual>();

}  // namespace kvreplay
