// LazyEviction: tokens come back; one that rested longer than it ever did before will hardly be needed again.
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

enum class Formula { code, paper };
constexpr std::string_view kFormulas[] = {"code", "paper"};
enum class Gap { closed, open };
constexpr std::string_view kGaps[] = {"closed", "open"};

class LazyEviction final : public Selector {
 public:
  struct Config {
    Tokens window{52, false};
    double alpha_thr = 5e-4;
    Formula score = Formula::code;
    Gap gap = Gap::closed;
  };
  static constexpr std::string_view kName = "lazyeviction";
  static constexpr std::string_view kSummary =
      "time since a token was last attended, against the longest that it ever rested";
  static constexpr std::string_view kPaper = "arXiv:2506.15969";
  static constexpr std::string_view kDeviation =
      "the authors' code, window and alpha_thr of its Llama-8B runs on MATH (window 27 on GSM8K, 95 on AIME; Qwen: "
      "101, "
      "175, 363 and alpha_thr=1e-4); a prompt above the budget, which the code leaves until the first eviction, is cut "
      "at its end by the attention of its last query; gap=open is this project's, no source has it";
  static constexpr std::array kParams{
      number<&Config::window>("window", 1, kUnbounded,
                              "W: latest tokens, never evicted, and the default of interval; a number of tokens",
                              Scale::log),
      number<&Config::alpha_thr>("alpha_thr", 0, 1, "attention from which a token counts as needed", Scale::log),
      choice<&Config::score>("score", kFormulas,
                             "of the rest r and the longest rest m; code: 2 / (1 + exp(1 + r / (m + 1e-5))), paper: "
                             "2 / (1 + exp(r / m)); both plus 2 / (1 + exp(m - 1)) where m > 0"),
      choice<&Config::gap>("gap", kGaps,
                           "open: the second term counts the rest that still lasts, else a token needed at birth alone "
                           "outranks all others for ever"),
  };
  static Traits traits(const Config& c) {
    return {.scope = Scope::query_head, .interval = c.window.percent ? 1 : c.window.of(0)};
  }
  static Needs needs(const Config&) { return {.prompt_queries = 1}; }
  static void check(const Config& c, int) {
    if (c.window.percent) {
      throw ConfigError(
          "lazyeviction: window is also the interval, so it must be a number of tokens, not a percentage");
    }
  }

  LazyEviction(const Config& config, const SetShape& shape)
      : config_(config),
        window_(config.window.of(shape.budget)),
        last_(static_cast<std::size_t>(shape.n_tokens), 0),
        longest_(last_.size(), 0) {
    for (Pos p = shape.prompt_len; p < shape.n_tokens; ++p) {
      last_[static_cast<std::size_t>(p)] = p - shape.prompt_len;  // the step before its own
    }
  }

  void observe(const View& view) override {
    attn_.resize(view.pos.size());
    view.attention(attn_);
    const int step = view.now - view.prompt_len + 1;
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      if (static_cast<double>(attn_[i]) >= config_.alpha_thr) {
        const auto p = static_cast<std::size_t>(view.pos[i]);
        longest_[p] = std::max(longest_[p], step - last_[p]);
        last_[p] = step;
      }
    }
  }

  void score(const View& view, std::span<float> out) override {
    if (view.at_prefill()) {
      view.attention(out);
    } else {
      const int step = view.now - view.prompt_len + 1;
      for (std::size_t i = 0; i < out.size(); ++i) {
        const auto p = static_cast<std::size_t>(view.pos[i]);
        out[i] = static_cast<float>(importance(step - last_[p], longest_[p]));
      }
    }
    protect(view, 0, window_, out);
  }

 private:
  double importance(int rest, int longest) const {
    double recency = 0;
    if (config_.score == Formula::code) {
      recency = 2 / (1 + std::exp(1 + rest / (longest + 1e-5)));
    } else if (longest > 0 || rest == 0) {
      recency = 2 / (1 + std::exp(static_cast<double>(rest) / std::max(longest, 1)));
    }
    const int counted = config_.gap == Gap::open ? std::max(longest, rest) : longest;
    return recency + (longest > 0 ? 2 / (1 + std::exp(counted - 1.0)) : 0);
  }

  Config config_;
  int window_;
  std::vector<int> last_;     // (n_tokens) TS: step that last needed the token
  std::vector<int> longest_;  // (n_tokens) MRI: longest rest between two such steps; 0: never needed
  std::vector<float> attn_;   // (n_slots)
};

}  // namespace

extern const PartInfo lazyeviction;
constinit const PartInfo lazyeviction = describe<LazyEviction>();

}  // namespace kvreplay
