// Scissorhands: drop, many at once, the tokens that got less than an average token's attention most often of late.
#include "policies/last_queries.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Scissorhands final : public Selector {
 public:
  struct Config {
    Tokens window{25, true}, history{50, true}, drop{50, true};
  };
  static constexpr std::string_view kName = "scissorhands";
  static constexpr std::string_view kSummary = "counts how often a token was of little use lately; evicts in bursts";
  static constexpr std::string_view kPaper = "arXiv:2305.17118";
  static constexpr std::string_view kDeviation =
      "rule and defaults of a third party's code, not of the paper (recalled, unverified: history=400, window=10, "
      "drop=50%); one set per KV head with the group's mean attention (scope=query_head: one per head)";
  static constexpr std::array kParams{
      number<&Config::window>("window", 0, kUnbounded, "latest tokens, whose count is taken as 0", Scale::log),
      number<&Config::history>("history", 1, kUnbounded,
                               "latest queries, of which it counts those that gave a token less than 1 / (tokens "
                               "seen); a token unborn then was of use",
                               Scale::log),
      number<&Config::drop>("drop", 1, kUnbounded, "tokens that leave at once when the set is over its budget",
                            Scale::log),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = c.history.percent ? Needs::kAll : c.history.of(0)}; }
  static void check(const Config& c, int budget) {
    if (c.drop.of(budget) > budget) {
      throw ConfigError("scissorhands: drop=" + std::to_string(c.drop.of(budget)) + " is more than the budget of " +
                        std::to_string(budget));
    }
  }

  Scissorhands(const Config& config, const SetShape& shape)
      : window_(config.window.of(shape.budget)),
        history_(std::max(1, config.history.of(shape.budget))),
        drop_(std::max(1, config.drop.of(shape.budget))),
        low_(static_cast<std::size_t>(shape.n_tokens)),
        count_(static_cast<std::size_t>(shape.n_tokens), 0) {}

  void prefill(const View& view) override {
    const int n = static_cast<int>(view.pos.size()), voters = std::min(history_, n);
    std::vector<MatF> q, k, attn(static_cast<std::size_t>(view.n_lanes));  // per lane
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      q.push_back(view.queries(lane, voters));
      k.emplace_back(n, view.head_dim);
      for (int i = 0; i < n; ++i) {
        k.back().row(i) = view.key(lane, i).transpose();
      }
    }
    constexpr int kAtOnce = 16;  // voters, for the memory's sake
    for (int begin = 0; begin < voters; begin += kAtOnce) {
      const int rows = std::min(kAtOnce, voters - begin) * view.n_heads;
      const Pos first = view.now + 1 - voters + begin;
      for (std::size_t lane = 0; lane < attn.size(); ++lane) {
        attn[lane] = q[lane].middleRows(begin * view.n_heads, rows) * k[lane].transpose();
        soft_cap(view.logit_softcap, attn[lane].array());
        for (int r = 0; r < rows; ++r) {
          auto past = attn[lane].row(r).head(first + r / view.n_heads + 1).array();
          past = (past - past.maxCoeff()).exp();
          past /= past.sum();
        }
      }
      const MatD reduced = reduce_voters(view, attn);  // (voters at once, prompt_len)
      for (Pos voter = first; voter < first + static_cast<Pos>(reduced.rows()); ++voter) {
        for (Pos p = 0; p <= voter; ++p) {
          note(p, voter, static_cast<float>(reduced(voter - first, p)));
        }
      }
    }
  }

  void observe(const View& view) override {
    attn_.resize(view.pos.size());
    view.attention(attn_);
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      note(view.pos[i], view.now, attn_[i]);
    }
  }

  int surplus(const View& view) const override {
    const int over = Selector::surplus(view);
    return over > 0 ? std::max(over, std::min(drop_, view.budget)) : 0;
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      const Pos pos = view.pos[i];
      out[i] = pos > view.now - window_ ? 0.0F : -static_cast<float>(count_[static_cast<std::size_t>(pos)]);
    }
  }

  void evicted(const View& view, std::span<const int> slots) override {
    for (int slot : slots) {
      low_[static_cast<std::size_t>(view.pos[static_cast<std::size_t>(slot)])] = {};
    }
  }

 private:
  void note(Pos pos, Pos voter, float attn) {
    std::vector<bool>& low = low_[static_cast<std::size_t>(pos)];
    low.resize(static_cast<std::size_t>(history_));
    const auto slot = static_cast<std::size_t>(voter % history_);
    const bool is_low = attn < 1.0F / static_cast<float>(voter + 1);
    count_[static_cast<std::size_t>(pos)] += int{is_low} - int{low[slot]};
    low[slot] = is_low;
  }

  int window_, history_, drop_;
  std::vector<std::vector<bool>> low_;  // per position, empty when gone: (history), a ring over queries
  std::vector<int> count_;              // (n_tokens) of those set
  std::vector<float> attn_;             // (n_slots)
};

}  // namespace

extern const PartInfo scissorhands;
constinit const PartInfo scissorhands = describe<Scissorhands>();

}  // namespace kvreplay
