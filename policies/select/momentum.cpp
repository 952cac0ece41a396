// Moment-KV: a decayed sum of attention, one set for the layer, the prompt pinned. Not MomentKV
// (preset momentkv).
#include <optional>

#include "policies/part.hpp"
#include "policies/value_norms.hpp"

namespace kvreplay {
namespace {

class Momentum final : public Selector {
 public:
  struct Config {
    double alpha = 0.97;
    bool value_norm = false;
  };
  static constexpr std::string_view kName = "momentum";
  static constexpr std::string_view kSummary = "decayed sum of the attention that decode tokens receive";
  static constexpr std::string_view kPaper = "arXiv:2605.29873";
  static constexpr std::string_view kDeviation =
      "alpha is one value (the paper searches it per model, task and budget: 0.2 to 0.98; behind a "
      "prompt cut to 2048 tokens by SnapKV or PyramidKV 0.97); with pool=all the prompt is cut by "
      "the attention of its last query; a pass of several tokens is that many steps, as the trace "
      "has them; interval=n evicts with a lag, which the paper does not";
  static constexpr std::array kParams{
      number<&Config::alpha>("alpha", 0, 1, "decay of the sum per step: 0 is TOVA, 1 is H2O without a window",
                             Scale::one_minus),
      flag<&Config::value_norm>("value_norm",
                                "attention counts times the norm of the token's value, mean over the KV heads, as in "
                                "VATP: an ablation, not the paper"),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer, .pool = Pool::decode}; }
  static Needs needs(const Config&) { return {.prompt_queries = 1}; }

  Momentum(const Config& config, const SetShape& shape)
      : alpha_(config.alpha), importance_(static_cast<std::size_t>(shape.n_tokens), 0.0) {
    if (config.value_norm) {
      norms_.emplace(shape, Norm::l2);
    }
  }

  void prefill(const View& view) override {
    if (!view.pos.empty()) {
      observe(view);
    }  // the prompt is not pinned
  }

  void observe(const View& view) override {
    attn_.resize(view.pos.size());
    view.attention(attn_);
    if (norms_) {
      norms_->meet(view);
    }
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      const auto pos = static_cast<std::size_t>(view.pos[i]);
      const double attention =
          static_cast<double>(attn_[i]) * (norms_ ? static_cast<double>(norms_->mean(view.pos[i])) : 1);
      importance_[pos] = alpha_ * importance_[pos] + attention;  // Eq. 5: no factor 1 - alpha
    }
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(importance_[static_cast<std::size_t>(view.pos[i])]);
    }
  }

 private:
  double alpha_;
  std::vector<double> importance_;   // (n_tokens)
  std::optional<ValueNorms> norms_;  // with value_norm
  std::vector<float> attn_;          // (n_slots)
};

}  // namespace

extern const PartInfo momentum;
constinit const PartInfo momentum = describe<Momentum>();

}  // namespace kvreplay
