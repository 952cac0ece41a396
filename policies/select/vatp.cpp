// VATP: a token matters as much as the attention it gets and the norm of its value, multiplied.
#include "policies/column_mass.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"
#include "policies/value_norms.hpp"

namespace kvreplay {
namespace {

enum class Mass { current, sum };
constexpr std::string_view kMasses[] = {"current", "sum"};

class Vatp final : public Selector {
 public:
  struct Config {
    Tokens sink{0, false}, window{50, true};
    Norm norm = Norm::l2;
    Mass mass = Mass::current;
  };
  static constexpr std::string_view kName = "vatp";
  static constexpr std::string_view kSummary = "attention times the norm of the value, plus a recent window";
  static constexpr std::string_view kPaper = "arXiv:2406.12335";
  static constexpr std::string_view kDeviation =
      "as released beside LongFlow: one set per layer, heads' means multiplied, the current pass alone, half of the "
      "budget recent; the paper, known from digests: norm=l1,mass=sum,scope=kv_head and sinks kept, of which they do "
      "not give the number";
  static constexpr std::array kParams{
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens, never evicted", Scale::log),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens, never evicted", Scale::log),
      choice<&Config::norm>("norm", kNorms, "of the value, the lanes' mean"),
      choice<&Config::mass>("mass", kMasses,
                            "current: attention of the current pass, the whole prompt being the first; sum: "
                            "attention received since birth, as h2o"),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer}; }
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  Vatp(const Config& config, const SetShape& shape)
      : sink_(config.sink.of(shape.budget)),
        window_(config.window.of(shape.budget)),
        sums_(config.mass == Mass::sum),
        norms_(shape, config.norm),
        mass_(static_cast<std::size_t>(shape.n_tokens), 0.0) {}

  void prefill(const View& view) override {
    const Eigen::RowVectorXd mass = reduce_heads(view.group, column_mass_of_set(view, Needs::kAll));
    std::copy(mass.begin(), mass.end(), mass_.begin());
    norms_.meet(view);
  }

  void observe(const View& view) override {
    norms_.meet(view);
    attn_.resize(view.pos.size());
    view.attention(attn_);
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      double& mass = mass_[static_cast<std::size_t>(view.pos[i])];
      mass = (sums_ ? mass : 0) + static_cast<double>(attn_[i]);
    }
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double mass = mass_[static_cast<std::size_t>(view.pos[i])];
      out[i] = static_cast<float>(mass * static_cast<double>(norms_.mean(view.pos[i])));
    }
    protect(view, sink_, window_, out);
  }

 private:
  int sink_, window_;
  bool sums_;
  ValueNorms norms_;
  std::vector<double> mass_;  // (n_tokens)
  std::vector<float> attn_;   // (n_slots)
};

}  // namespace

extern const PartInfo vatp;
constinit const PartInfo vatp = describe<Vatp>();

}  // namespace kvreplay
