// KVMerger's selection: neighbours with similar keys join to sets, the most similar first, and each set keeps the token
// that was attended most.
#include "policies/part.hpp"
#include "policies/rewrite/kvmerger.hpp"

namespace kvreplay {
namespace {

enum class Fit { budget, delta };
constexpr std::string_view kFits[] = {"budget", "delta"};

class KvMergerSets final : public Selector {
 public:
  struct Config {
    Fit fit = Fit::budget;
    double delta = 0.75;
    Tokens heavy{10, true};
    Tokens recent{10, true};
  };
  static constexpr std::string_view kName = "kvmerger_sets";
  static constexpr std::string_view kSummary = "one token for each run of neighbours with similar keys";
  static constexpr std::string_view kPaper = "arXiv:2407.08454";
  static constexpr std::string_view kDeviation =
      "after two independent ports, there being no code; fit=budget joins the most similar neighbours until the budget "
      "is "
      "met, which is the limit of the ports' bisection on delta; how many tokens are protected no source read here "
      "says";
  static constexpr std::array kParams{
      choice<&Config::fit>("fit", kFits,
                           "budget: as many joins as the budget asks; delta: all neighbours above delta join, and what "
                           "is still too much leaves by attention"),
      number<&Config::delta>("delta", -1, 1, "fit=delta: cosine of the keys above which neighbours join"),
      number<&Config::heavy>("heavy", 0, kUnbounded, "tokens of most attention that join nothing (the share is ours)",
                             Scale::log),
      number<&Config::recent>("recent", 0, kUnbounded, "latest tokens, which join nothing (the share is ours)",
                              Scale::log),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer, .decode = Decode::grow}; }
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  KvMergerSets(const Config& config, const SetShape& shape)
      : config_(config), links_(shape, config.heavy, config.recent) {}

  void prefill(const View& view) override { links_.meet(view); }
  void observe(const View& view) override { links_.meet(view); }

  int surplus(const View& view) const override {
    const int over = Selector::surplus(view);
    return config_.fit == Fit::delta && view.at_prefill() ? std::max(over, n_above_delta(view)) : over;
  }

  void score(const View& view, std::span<float> out) override {
    const std::vector<double> cosines = links_.links(view);
    const std::vector<char> kept = links_.protected_slots(view);
    std::vector<double> attention(out.size());
    std::vector<int> pivot(out.size());  // towards the set's own, by slot
    std::iota(pivot.begin(), pivot.end(), 0);
    for (int i = 0; i < static_cast<int>(out.size()); ++i) {
      const double a = attention[static_cast<std::size_t>(i)] = links_.attention(view, i);
      // Whoever leads a set leaves after all who do not.
      out[static_cast<std::size_t>(i)] = kept[static_cast<std::size_t>(i)] ? std::numeric_limits<float>::infinity()
                                                                           : static_cast<float>(2 + a / (1 + a));
    }
    const double least = config_.fit == Fit::delta ? config_.delta : KvMergerLinks::kNone;
    std::vector<int> order;
    for (int i = 0; i < static_cast<int>(cosines.size()); ++i) {
      if (cosines[static_cast<std::size_t>(i)] > least) {
        order.push_back(i);
      }
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return cosines[static_cast<std::size_t>(a)] > cosines[static_cast<std::size_t>(b)];
    });
    const auto find = [&](int i) {
      while (pivot[static_cast<std::size_t>(i)] != i) {
        int& up = pivot[static_cast<std::size_t>(i)];
        i = up = pivot[static_cast<std::size_t>(up)];
      }
      return i;
    };
    for (const int link : order) {
      const int a = find(link), b = find(link + 1);
      const bool older = attention[static_cast<std::size_t>(a)] >= attention[static_cast<std::size_t>(b)];
      const int winner = older ? a : b, loser = older ? b : a;
      pivot[static_cast<std::size_t>(loser)] = winner;
      out[static_cast<std::size_t>(loser)] = static_cast<float>(-cosines[static_cast<std::size_t>(link)]);
    }
  }

 private:
  int n_above_delta(const View& view) const {
    const std::vector<double> cosines = links_.links(view);
    return static_cast<int>(std::count_if(cosines.begin(), cosines.end(), [&](double u) { return u > config_.delta; }));
  }

  Config config_;
  mutable KvMergerLinks links_;
};

}  // namespace

extern const PartInfo kvmerger_sets;
constinit const PartInfo kvmerger_sets = describe<KvMergerSets>();

}  // namespace kvreplay
