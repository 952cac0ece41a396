// MyPolicy: tokens that were attended most stay, and so do the first and the latest ones.
#include "policies/column_mass.hpp"
#include "policies/plugin.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

class MyPolicy final : public Selector {
 public:
  struct Config {
    Tokens sink{0, false};
    Tokens window{50, true};
    double decay = 1;
  };
  static constexpr std::string_view kName = "my_policy";
  static constexpr std::string_view kSummary = "attention received since birth, older attention counting less";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array kParams{
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens, never evicted", Scale::log),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens, never evicted", Scale::log),
      number<&Config::decay>("decay", 0, 1, "what a step leaves of older attention"),
  };
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  MyPolicy(const Config& config, const SetShape& shape)
      : sink_(config.sink.of(shape.budget)),
        window_(config.window.of(shape.budget)),
        decay_(config.decay),
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
      mass = decay_ * mass + static_cast<double>(attn_[i]);
    }
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(mass_[at(view.pos[i])]);
    }
    protect(view, sink_, window_, out);
  }

 private:
  static std::size_t at(Pos pos) { return static_cast<std::size_t>(pos); }
  int sink_, window_;
  double decay_;
  std::vector<double> mass_;  // (n_tokens) by position, so that eviction moves nothing
  std::vector<float> attn_;   // (n_slots)
};

}  // namespace
}  // namespace kvreplay

KVREPLAY_PLUGIN(kvreplay::MyPolicy);
