// SCOPE: the prompt stays as it is; of the decode tokens the latest stay, and those that the current query attends
// most.
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

enum class Mode { slide, adaptive, discontinuous };
constexpr std::string_view kModes[] = {"slide", "adaptive", "discontinuous"};
enum class Growth { code, paper };
constexpr std::string_view kGrowths[] = {"code", "paper"};
enum class Mass { current, cumulative };
constexpr std::string_view kMasses[] = {"current", "cumulative"};

class ScopePool final : public Selector {
 public:
  struct Config {
    Mode mode = Mode::slide;
    Tokens window{256, false};
    Mass mass = Mass::current;
    Growth growth = Growth::code;
    int steps = 0;
  };
  static constexpr std::string_view kName = "scope";
  static constexpr std::string_view kSummary =
      "decode tokens of most attention and the latest ones, beside a pinned prompt";
  static constexpr std::string_view kPaper = "arXiv:2412.13649";
  static constexpr std::string_view kDeviation =
      "the released code: one set per query head, the current query's attention (the paper finds cumulative attention "
      "better: mass=cumulative); adaptive and discontinuous spread the budget over the length of the generation, which "
      "by default is read off the trace, and never exceed it where the code's floor division would; the whole prompt "
      "stays unless a selector before the '/' cuts it";
  static constexpr std::array kParams{
      choice<&Config::mode>("mode", kModes,
                            "slide: the budget from the first step; adaptive: it grows with the steps; discontinuous: "
                            "as adaptive, but delta steps pass between evictions"),
      number<&Config::window>("window", 0, kUnbounded,
                              "latest tokens, never evicted (beta2); a budget up to it keeps nothing else", Scale::log),
      choice<&Config::mass>("mass", kMasses, "attention of the current query, or summed since birth"),
      choice<&Config::growth>(
          "growth", kGrowths,
          "at step t = 1, 2, ...; code: window + (t - 1) / delta, delta = (T - window) / (budget - "
          "window), both rounded down; paper: window + (t - window) (budget - window) / (T - window)"),
      number<&Config::steps>("steps", 0, kUnbounded,
                             "T, how many tokens will be generated at most; 0: as many as the trace has, so that "
                             "adaptive and discontinuous know the length beforehand"),
  };
  static Traits traits(const Config&) { return {.scope = Scope::query_head, .pool = Pool::decode}; }
  static Needs needs(const Config&) { return {.prompt_queries = 1}; }

  ScopePool(const Config& config, const SetShape& shape)
      : config_(config),
        window_(config.window.of(shape.budget)),
        steps_(config.steps > 0 ? config.steps : shape.n_tokens - shape.prompt_len),
        mass_(static_cast<std::size_t>(shape.n_tokens), 0.0) {}

  void prefill(const View& view) override { add(view); }

  void observe(const View& view) override {
    if (config_.mass == Mass::cumulative) {
      add(view);
    }
    if (config_.mode == Mode::discontinuous) {
      const bool full = static_cast<int>(view.pos.size()) >= capacity(view);
      due_ = full && waited_ >= delta(view);
      waited_ = due_ ? 0 : waited_ + (full ? 1 : 0);
    }
  }

  int surplus(const View& view) const override {
    if (config_.mode == Mode::discontinuous && !due_ && !view.at_prefill()) {
      return 0;
    }
    return static_cast<int>(view.pos.size()) - capacity(view);
  }

  void score(const View& view, std::span<float> out) override {
    if (config_.mass == Mass::current) {
      view.attention(out);
    } else {
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = static_cast<float>(mass_[static_cast<std::size_t>(view.pos[i])]);
      }
    }
    protect(view, 0, window_, out);
  }

 private:
  int window(const View& view) const { return std::min(window_, view.budget); }

  // Steps in which the code's pool grows by one token; 0: the budget holds all that will come, or the window alone.
  int delta(const View& view) const {
    const int beta2 = window(view), beta1 = view.budget - beta2;
    return beta1 > 0 ? std::max(0, steps_ - beta2) / beta1 : 0;
  }

  int capacity(const View& view) const {
    const int beta2 = window(view), t = view.now - view.prompt_len + 1;
    if (config_.mode == Mode::slide || view.at_prefill() || delta(view) == 0) {
      return view.budget;
    }
    const std::int64_t grown = config_.growth == Growth::code
                                   ? (t - 1) / delta(view)
                                   : std::int64_t{std::max(0, t - beta2)} * (view.budget - beta2) / (steps_ - beta2);
    return static_cast<int>(std::min<std::int64_t>(view.budget, beta2 + grown));
  }

  void add(const View& view) {
    attn_.resize(view.pos.size());
    view.attention(attn_);
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      mass_[static_cast<std::size_t>(view.pos[i])] += static_cast<double>(attn_[i]);
    }
  }

  Config config_;
  int window_, steps_;
  int waited_ = 0;  // steps since the pool was full or cut
  bool due_ = false;
  std::vector<double> mass_;  // (n_tokens)
  std::vector<float> attn_;   // (n_slots)
};

}  // namespace

extern const PartInfo scope;
constinit const PartInfo scope = describe<ScopePool>();

}  // namespace kvreplay
