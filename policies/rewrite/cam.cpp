// CaM: the value of a token that leaves is spread over the next kept values, with a probability that gives back its
// attention on average.
#include "policies/counter_rng.hpp"
#include "policies/part.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

enum class Mode { bernoulli, expected, deterministic };
constexpr std::string_view kModes[] = {"bernoulli", "expected", "deterministic"};
enum class Attention { cumulative, decode, current };
constexpr std::string_view kAttentions[] = {"cumulative", "decode", "current"};
enum class Against { mean, max };
constexpr std::string_view kAgainsts[] = {"mean", "max"};

class Cam final : public Rewriter {
 public:
  struct Config {
    int window = 32;
    Mode mode = Mode::bernoulli;
    Attention attention = Attention::cumulative;
    Against against = Against::mean;
    bool prompt = false;
  };
  static constexpr std::string_view kName = "cam";
  static constexpr std::string_view kSummary =
      "evicted values added to the next kept ones, with a probability that keeps the numerator right on average";
  static constexpr std::string_view kPaper = "ICML 2024, openreview.net/forum?id=LCTmppB165";
  static constexpr std::string_view kDeviation =
      "the codes differ: cumulative attention against the mean of 32 (paper) is the default, attention=current the "
      "Llama "
      "helper, mode=deterministic the OPT helper, against=max KVCache-Factory, attention=decode kvpress (whose limit "
      "of "
      "merged tokens per compression is not built)";
  static constexpr std::array kParams{
      number<&Config::window>("window", 1, 65536, "kept tokens after it that share the value", Scale::log),
      choice<&Config::mode>("mode", kModes,
                            "with p the token's attention over the window's: bernoulli: a coin of probability p; "
                            "expected: p times the value, without a coin; deterministic: merged where p > 1"),
      choice<&Config::attention>("attention", kAttentions,
                                 "cumulative: received since birth; decode: from decode queries alone; current: from "
                                 "this step's queries"),
      choice<&Config::against>("against", kAgainsts, "what p divides by: mean or maximum of the window's attention"),
      flag<&Config::prompt>("prompt", "also at the prompt's cut, where so many merges at once were seen to diverge"),
  };
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.attention == Attention::cumulative ? Needs::kAll : c.prompt ? 1 : 0};
  }

  Cam(const Config& config, const SetShape& shape)
      : config_(config), shape_(shape), received_(shape, config.attention == Attention::cumulative) {}

  void step(Cache& cache) override { meet(cache); }

  void evicted(Cache& cache, std::span<const int> leaving) override {
    meet(cache);
    if (cache.at_prefill() && !config_.prompt) {
      return;
    }
    const std::vector<int> staying = staying_slots(cache, leaving);
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      if (config_.attention == Attention::current) {
        lane_attention(cache, lane, attn_);
      }
      std::map<int, Eigen::VectorXd> gains;  // by slot: (v_head_dim)
      for (const int slot : leaving) {
        const auto first = std::upper_bound(staying.begin(), staying.end(), slot);
        const auto n = std::min<std::ptrdiff_t>(config_.window, staying.end() - first);
        const double share = n > 0 ? share_of(cache, lane, slot, {first, first + n}) : 0;
        if (share == 0) {
          continue;
        }
        const Eigen::VectorXd gain = share / static_cast<double>(n) * cache.value(lane, slot).cast<double>();
        for (auto to = first; to != first + n; ++to) {
          const auto [it, is_new] = gains.try_emplace(*to, gain);
          if (!is_new) {
            it->second += gain;
          }
        }
      }
      for (const auto& [slot, gain] : gains) {
        const Eigen::VectorXd v = cache.value(lane, slot).cast<double>() + gain;
        store_merged(cache, lane, slot, cache.key(lane, slot), v.cast<float>(), cache.bias(lane, slot),
                     shape_.element_bytes);
      }
    }
  }

 private:
  void meet(const View& view) {
    if (config_.attention != Attention::current) {
      received_.meet(view);
    }
  }

  double attention_of(const View& view, int lane, int slot) {
    return config_.attention == Attention::current ? static_cast<double>(attn_[static_cast<std::size_t>(slot)])
                                                   : received_.of(lane, view.pos[static_cast<std::size_t>(slot)]);
  }

  static constexpr double kSame = 1e-6;  // of attention: as much as the others is not more

  // Of the value that is passed on.
  double share_of(const View& view, int lane, int slot, std::span<const int> window) {
    double sum = 0, most = 0;
    for (const int j : window) {
      const double a = attention_of(view, lane, j);
      sum += a;
      most = std::max(most, a);
    }
    const double own = attention_of(view, lane, slot);
    const double other = config_.against == Against::max ? most : sum / static_cast<double>(window.size());
    const double p = own > 0 ? own / other : 0;  // infinite where nobody looked at the window
    switch (config_.mode) {
      case Mode::deterministic:
        return p > 1 + kSame ? 1 : 0;
      case Mode::expected:
        return std::min(p, 1.0);
      case Mode::bernoulli:
        break;
    }
    const Pos pos = view.pos[static_cast<std::size_t>(slot)];
    return uniform_at(shape_.seed, shape_.layer, shape_.set, lane, view.now, pos) < p ? 1 : 0;
  }

  Config config_;
  SetShape shape_;
  ReceivedAttention received_;
  std::vector<float> attn_;  // (n_slots) of the current queries
};

}  // namespace

extern const PartInfo cam;
constinit const PartInfo cam = describe<Cam>();

}  // namespace kvreplay
