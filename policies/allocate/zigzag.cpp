// ZigZagKV: a layer gets tokens by how many it takes to hold most of its attention.
#include <algorithm>
#include <numeric>

#include "policies/part.hpp"
#include "policies/shares.hpp"

namespace kvreplay {
namespace {

class ZigZag final : public Allocator {
 public:
  struct Config {
    double share = 0.9;
    int obs_window = 32;
  };
  static constexpr std::string_view kName = "zigzag";
  static constexpr std::string_view kSummary =
      "layers get tokens in proportion to how few hold most of their attention; many where it is spread";
  static constexpr std::string_view kPaper = "arXiv:2412.09036";
  static constexpr std::string_view kDeviation =
      "from descriptions of two proposals to kvpress: budgets in proportion to the smallest number of tokens that "
      "holds "
      "a share of the attention, the total kept. Which attention, which share and how heads are joined they do not "
      "say: that received from the last queries of the prompt, and the mean over query heads, are ours, like the "
      "defaults";
  static constexpr std::array kParams{
      number<&Config::share>("share", 0, 1, "of the attention that these tokens hold"),
      number<&Config::obs_window>("obs_window", 1, kUnbounded, "last queries of the prompt whose attention counts",
                                  Scale::log),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = c.obs_window}; }

  explicit ZigZag(const Config& config) : config_(config) {}
  bool measures() const override { return true; }

  // The smallest number of tokens that holds the share, mean over the query heads.
  std::vector<double> measure(const Prompt& prompt) const override {
    double sum = 0, n_heads = 0;
    for (const MatD& mass : prompt.column_mass) {
      for (const auto& head : mass.rowwise()) {
        sum += tokens_that_hold({head.begin(), head.end()});
        ++n_heads;
      }
    }
    return {sum / n_heads};
  }

  std::vector<int> over_layers(const Layers& l) const override {
    KVREPLAY_CHECK(l.measured.rows() == std::ssize(l.index));
    const Eigen::VectorXd tokens = l.measured.col(0);
    return split_over_layers(l, {tokens.data(), l.index.size()});
  }

 private:
  int tokens_that_hold(std::vector<double> mass) const {
    std::sort(mass.begin(), mass.end(), std::greater<>());
    constexpr double kRound = 1e-9;  // nine tenths of ten equal tokens are nine of them
    const double wanted = (config_.share - kRound) * std::accumulate(mass.begin(), mass.end(), 0.0);
    double held = 0;
    int n = 0;
    while (n < std::ssize(mass) && (n == 0 || held < wanted)) {
      held += mass[static_cast<std::size_t>(n++)];
    }
    return n;
  }

  Config config_;
};

}  // namespace

extern const PartInfo zigzag;
constinit const PartInfo zigzag = describe<ZigZag>();

}  // namespace kvreplay
