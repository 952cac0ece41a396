// Given: scores or evictions that were made elsewhere, so that any code in any language can be
// measured here.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Given final : public Selector {
 public:
  struct Config {
    std::string scores, evicted_at;
  };
  static constexpr std::string_view kName = "given";
  static constexpr std::string_view kSummary = "scores stored in the trace, or recorded evictions";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array kParams{
      text<&Config::scores>("scores", "keep the highest of the trace's scores/NAME"),
      text<&Config::evicted_at>("evicted_at",
                                "replay a file of recorded evictions: per set and token the first decode step without "
                                "it; no budget applies"),
  };
  // Taken before the attention of the recorded step, that step is the first without the token.
  static Traits traits(const Config& c) {
    return {.evict = c.evicted_at.empty() ? Order::after_attention : Order::before_attention};
  }
  static bool budgeted(const Config& c) { return c.evicted_at.empty(); }
  static Needs needs(const Config& c) { return {.scores = c.scores, .evicted_at = c.evicted_at}; }
  static void check(const Config& c, int) {
    if (c.scores.empty() == c.evicted_at.empty()) {
      throw ConfigError("given takes either scores=NAME or evicted_at=FILE, and " +
                        std::string(c.scores.empty() ? "neither" : "both") + " is there");
    }
  }

  Given(const Config& config, const SetShape& shape)
      : replay_(!config.evicted_at.empty()), evicted_at_(shape.evicted_at), scores_(shape.scores) {
    const auto n = static_cast<std::size_t>(shape.n_tokens);
    if (replay_) {
      KVREPLAY_CHECK(evicted_at_.size() == n);
    }
    if (!replay_) {
      KVREPLAY_CHECK(scores_.size() == static_cast<std::size_t>(shape.n_lanes));
    }
    for (const auto& lane : scores_) {
      KVREPLAY_CHECK(lane.size() == n);
    }
  }

  int surplus(const View& view) const override {
    if (!replay_) {
      return Selector::surplus(view);
    }
    const Pos step = std::max(0, view.now - view.prompt_len);  // the prompt's cut is what step 0 misses
    return static_cast<int>(std::count_if(view.pos.begin(), view.pos.end(),
                                          [&](Pos p) { return evicted_at_[static_cast<std::size_t>(p)] <= step; }));
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      const auto p = static_cast<std::size_t>(view.pos[i]);
      out[i] = replay_ ? static_cast<float>(evicted_at_[p]) : 0;
      for (const auto& lane : scores_) {
        out[i] += lane[p];
      }
    }
  }

 private:
  bool replay_;
  std::vector<std::int32_t> evicted_at_;    // (n_tokens)
  std::vector<std::vector<float>> scores_;  // per lane (n_tokens)
};

}  // namespace

extern const PartInfo given;
constinit const PartInfo given = describe<Given>();

}  // namespace kvreplay
