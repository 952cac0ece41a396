// Moment-KV: a decayed sum of attention, one set for the layer, the prompt pinned. Not MomentKV
// (preset momentkv).
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Momentum final : public Selector {
 public:
  struct Config {
    double alpha = 0.97;
  };
  static constexpr std::string_view kName = "momentum";
  static constexpr std::string_view kSummary = "decayed sum of the attention that decode tokens receive";
  static constexpr std::string_view kPaper = "arXiv:2605.29873";
  static constexpr std::string_view kDeviation =
      "alpha is one value (the paper searches it per model, task and budget: 0.2 to 0.98); with "
      "pool=all the "
      "prompt is cut by the attention of its last query";
  static constexpr std::array kParams{
      number<&Config::alpha>("alpha", 0, 1, "decay of the sum per step: 0 is TOVA, 1 is H2O without a window",
                             Scale::one_minus),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer, .pool = Pool::decode}; }
  static Needs needs(const Config&) { return {.prompt_queries = 1}; }

  Momentum(const Config& config, const SetShape& shape)
      : alpha_(config.alpha), importance_(static_cast<std::size_t>(shape.n_tokens), 0.0) {}

  void prefill(const View& view) override {
    if (!view.pos.empty()) {
      observe(view);
    }  // the prompt is not pinned
  }

  void observe(const View& view) override {
    attn_.resize(view.pos.size());
    view.attention(attn_);
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      double& importance = importance_[static_cast<std::size_t>(view.pos[i])];
      importance = alpha_ * importance + static_cast<double>(attn_[i]);  // Eq. 5: no factor 1 - alpha
    }
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(importance_[static_cast<std::size_t>(view.pos[i])]);
    }
  }

 private:
  double alpha_;
  std::vector<double> importance_;  // (n_tokens)
  std::vector<float> attn_;         // (n_slots)
};

}  // namespace

extern const PartInfo momentum;
constinit const PartInfo momentum = describe<Momentum>();

}  // namespace kvreplay
