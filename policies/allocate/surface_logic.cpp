// SurfaceLogic-like: layers, then the heads of a layer, get tokens by how much they copy from named spans of the prompt
// (surface) and how much else they attend there (logic).
#include <algorithm>
#include <numeric>

#include "policies/counter_rng.hpp"
#include "policies/part.hpp"
#include "policies/shares.hpp"

namespace kvreplay {
namespace {

class SurfaceLogic final : public Allocator {
 public:
  struct Config {
    double surface = 0, logic = 0;
    double w_surface = 1, w_logic = 1;
    double rho = 0.5;
    int b_min = 1;
    int placebo = 0;
  };
  static constexpr std::string_view kName = "surface_logic";
  static constexpr std::string_view kSummary =
      "SurfaceLogic-like: budgets for layers and heads by measured copying and use of spans";
  static constexpr std::string_view kPaper = "arXiv:2508.15806";
  static constexpr std::string_view kDeviation =
      "a reconstruction, not SurfaceLogicKV: the abstract is public, formulas and code are not. All "
      "formulas and defaults are ours: scores from `kvreplay headscores`, importance w_surface * "
      "surface + w_logic * logic, a layer's share (1 - rho) / layers + rho * its importance, a "
      "head's share b_min + the rest by importance. Totals refer to the layers of the run. Without "
      "tables all heads are alike; w_logic=0 is retrieval alone, as in HeadKV";
  static constexpr std::array kParams{
      number<&Config::surface>("surface", 0, 1e9, "copied attention of the KV head: @surface.json of headscores"),
      number<&Config::logic>("logic", 0, 1e9, "other attention to the spans: @logic.json of headscores"),
      number<&Config::w_surface>("w_surface", 0, 1e6, "weight of surface"),
      number<&Config::w_logic>("w_logic", 0, 1e6, "weight of logic"),
      number<&Config::rho>("rho", 0, 1, "share of the total that goes to layers by importance, the rest evenly"),
      number<&Config::b_min>("b_min", 1, kUnbounded, "tokens that every head has; no source gives a number"),
      number<&Config::placebo>("placebo", 0, kUnbounded,
                               "above 0: importances are shuffled over the heads of the run, a seed; 0: they are not"),
  };
  static void check(const Config& c, int budget) {
    if (c.b_min > budget) {
      throw ConfigError("surface_logic: b_min=" + std::to_string(c.b_min) + " is more than a layer's budget of " +
                        std::to_string(budget));
    }
  }

  explicit SurfaceLogic(const Config& config) : config_(config) {}
  bool over_sets() const override { return true; }
  double worth() const override { return config_.w_surface * config_.surface + config_.w_logic * config_.logic; }

  std::vector<int> over_layers(const Layers& l) const override {
    const auto n = l.index.size();
    const MatD worth = shuffled(l);
    const double sum = worth.sum();
    std::vector<double> share;
    for (std::size_t i = 0; i < n; ++i) {
      const double own = sum > 0 ? worth.row(static_cast<Eigen::Index>(i)).sum() / sum : 1.0 / static_cast<double>(n);
      share.push_back((1 - config_.rho) / static_cast<double>(n) + config_.rho * own);
    }
    return split_over_layers(l, share);
  }

  std::vector<int> over_heads(const Layers& l, std::size_t layer) const override {
    const Eigen::RowVectorXd row = shuffled(l).row(static_cast<Eigen::Index>(layer));
    const std::vector<double> worth(row.begin(), row.end());
    if (l.budget >= l.n_tokens) {
      return std::vector<int>(worth.size(), l.budget);
    }
    const int mean = over_layers(l)[layer], least = std::min(config_.b_min, mean);
    std::vector<int> budgets = split((mean - least) * static_cast<int>(worth.size()), worth,
                                     std::vector<int>(worth.size(), std::max(mean, room(l)) - least));
    for (int& b : budgets) {
      b += least;
    }
    return budgets;
  }

 private:
  MatD shuffled(const Layers& l) const {
    MatD worth = l.worth;
    for (Eigen::Index i = worth.size(); config_.placebo > 0 && i-- > 1;) {
      const auto j = static_cast<Eigen::Index>(uniform_at(config_.placebo, i) * static_cast<double>(i + 1));
      std::swap(worth.data()[i], worth.data()[j]);
    }
    return worth;
  }

  Config config_;
};

}  // namespace

extern const PartInfo surface_logic;
constinit const PartInfo surface_logic = describe<SurfaceLogic>();

}  // namespace kvreplay
