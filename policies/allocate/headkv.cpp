// HeadKV: every head gives most of its budget to a pool, which all heads of the model share by their retrieval scores.
#include <algorithm>
#include <cmath>

#include "policies/part.hpp"
#include "policies/shares.hpp"

namespace kvreplay {
namespace {

class HeadKv final : public Allocator {
 public:
  struct Config {
    double scores = 0;
    double beta = 1.01;
    double temp = 1;
    int window = 32;
  };
  static constexpr std::string_view kName = "headkv";
  static constexpr std::string_view kSummary = "heads share a pool of the whole model by measured retrieval scores";
  static constexpr std::string_view kPaper = "arXiv:2410.19258";
  static constexpr std::string_view kDeviation =
      "one budget per KV head where the authors' code has one per query head; heads of the run's "
      "layers instead of the model's. beta is KVCache-Factory's, which leaves nearly all to the pool. "
      "What a head has no room for goes to the others, where the code lets it lapse. "
      "Scores come from `kvreplay headscores` (--hard: the head's top token is the next one), on this "
      "trace. Without a table all heads are alike";
  static constexpr std::array kParams{
      number<&Config::scores>("scores", 0, 1e9, "retrieval score of the KV head: @surface.json of headscores"),
      number<&Config::beta>("beta", 1, 1e6, "floor(budget / beta) of each head goes to the pool", Scale::log),
      number<&Config::temp>("temp", 0.01, 100, "scores are raised to it", Scale::log),
      number<&Config::window>("window", 0, kUnbounded, "the selector's obs_window, on top of what is shared"),
  };

  explicit HeadKv(const Config& config) : config_(config) {}
  bool over_sets() const override { return true; }
  double worth() const override { return std::pow(config_.scores, config_.temp); }

  std::vector<int> over_layers(const Layers& l) const override {
    std::vector<int> mean;
    for (std::size_t i = 0; i < l.index.size(); ++i) {
      double sum = 0;
      const std::vector<int> heads = over_heads(l, i);
      for (int b : heads) {
        sum += b;
      }
      mean.push_back(heads.empty() ? l.budget : static_cast<int>(std::rint(sum / static_cast<double>(heads.size()))));
    }
    return mean;
  }

  std::vector<int> over_heads(const Layers& l, std::size_t layer) const override {
    const auto n = static_cast<std::size_t>(l.worth.cols());
    if (l.budget - config_.window < 1 || l.worth.sum() <= 0 || l.budget >= l.n_tokens) {
      return std::vector<int>(n, l.budget);
    }
    const Eigen::ArrayXXd all = shares(l);
    std::vector<int> budgets;
    for (const double x : all.row(static_cast<Eigen::Index>(layer))) {
      budgets.push_back(std::max(1, static_cast<int>(std::rint(x)) + config_.window));
    }
    return budgets;
  }

 private:
  // Of all heads, the window aside: (layers, KV heads). What a head has no room for goes to the others by their scores.
  Eigen::ArrayXXd shares(const Layers& l) const {
    const double shared = l.budget - config_.window, given = std::floor(shared / config_.beta), own = shared - given;
    const double most = room(l) - config_.window;
    double pool = given * static_cast<double>(l.worth.size());
    Eigen::ArrayXXd open = Eigen::ArrayXXd::Ones(l.worth.rows(), l.worth.cols());  // 1: not full; 0: full
    Eigen::ArrayXXd out = open;
    for (bool filled = true; filled && open.sum() > 0;) {
      const Eigen::ArrayXXd worth = (l.worth.array() * open).sum() > 0 ? l.worth.array() * open : open;
      out = (open > 0).select(own + worth / worth.sum() * pool, most);
      filled = (out > most).any();
      pool -= (out > most).select(most - own, 0.0 * out).sum();
      open = (out > most).select(0.0, open);
    }
    return out.min(most);
  }

  Config config_;
};

}  // namespace

extern const PartInfo headkv;
constinit const PartInfo headkv = describe<HeadKv>();

}  // namespace kvreplay
