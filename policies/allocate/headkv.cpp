// HeadKV: every head gives most of its budget to a pool, which all heads of the model share by their retrieval scores.
#include <algorithm>
#include <cmath>

#include "policies/part.hpp"

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
    const double shared = l.budget - config_.window, sum = l.worth.sum();
    std::vector<int> budgets;
    for (const double x : l.worth.row(static_cast<Eigen::Index>(layer))) {
      if (shared < 1 || sum <= 0 || l.budget >= l.n_tokens) {
        budgets.push_back(l.budget);
        continue;
      }
      const double given = std::floor(shared / config_.beta);
      const double pool = given * static_cast<double>(l.worth.size());
      budgets.push_back(std::max(1, static_cast<int>(std::rint(x / sum * pool + shared - given)) + config_.window));
    }
    return budgets;
  }

 private:
  Config config_;
};

}  // namespace

extern const PartInfo headkv;
constinit const PartInfo headkv = describe<HeadKv>();

}  // namespace kvreplay
