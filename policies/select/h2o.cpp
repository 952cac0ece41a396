// H2O: heavy hitters, that is the tokens with most attention received so far, and the latest
// tokens.
#include "policies/column_mass.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

enum class Mass { sum, mean, current };
constexpr std::string_view kMasses[] = {"sum", "mean", "current"};

class H2o final : public Selector {
 public:
  struct Config {
    Tokens sink{0, false};
    Tokens window{50, true};
    Mass mass = Mass::sum;
  };
  static constexpr std::string_view kName = "h2o";
  static constexpr std::string_view kSummary = "attention received since birth, plus a recent window";
  static constexpr std::string_view kPaper = "arXiv:2306.14048";
  static constexpr std::string_view kDeviation =
      "one set per KV head with the group's mean attention (the paper has no grouped heads; scope=query_head gives one "
      "set per head); the authors' masks, with budgets as ratios of the prompt fixed at its end, are a budget such as "
      "20% "
      "with window=50%; MorphKV's H2O is scope=query_head with a budget and a window of one more than its own; presets "
      "h2o-kvpress, h2o-scope, h2o-longflow and h2o-gkv are what other codes call H2O";
  static constexpr std::array kParams{
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens, never evicted", Scale::log),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens, never evicted", Scale::log),
      choice<&Config::mass>("mass", kMasses,
                            "sum: as the authors' code; mean: divided by the number of queries since birth; current: "
                            "of the current query alone, at the prompt's end of all its queries"),
  };
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  H2o(const Config& config, const SetShape& shape)
      : sink_(config.sink.of(shape.budget)),
        window_(config.window.of(shape.budget)),
        kind_(config.mass),
        mass_(static_cast<std::size_t>(shape.n_tokens), 0.0) {}

  void prefill(const View& view) override {
    if (view.pos.empty()) {
      return;
    }  // the prompt is pinned
    const Eigen::RowVectorXd mass = reduce_heads(view.group, column_mass_of_set(view, Needs::kAll));
    std::copy(mass.begin(), mass.end(), mass_.begin());
  }

  void observe(const View& view) override {
    attn_.resize(view.pos.size());
    view.attention(attn_);
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      double& mass = mass_[at(view.pos[i])];
      mass = (kind_ == Mass::current ? 0 : mass) + static_cast<double>(attn_[i]);
    }
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      const Pos pos = view.pos[i];
      const double age = kind_ == Mass::mean ? view.now - pos + 1 : 1;
      out[i] = static_cast<float>(mass_[at(pos)] / age);
    }
    protect(view, sink_, window_, out);
  }

 private:
  static std::size_t at(Pos pos) { return static_cast<std::size_t>(pos); }
  int sink_, window_;
  Mass kind_;
  std::vector<double> mass_;  // (n_tokens)
  std::vector<float> attn_;   // (n_slots)
};

}  // namespace

extern const PartInfo h2o;
constinit const PartInfo h2o = describe<H2o>();

}  // namespace kvreplay
