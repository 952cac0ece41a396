// R-KV: what the last queries attend, minus what other keys repeat; nothing is remembered between evictions.
#include "policies/last_queries.hpp"
#include "policies/part.hpp"
#include "policies/redundancy.hpp"

namespace kvreplay {
namespace {

class Rkv final : public Selector {
 public:
  struct Config {
    Tokens obs_window{8, false};
    int buffer = 128;
    double lambda = 0.1;
    int kernel = 7;
    double threshold = 0.5;
    NoNeighbour no_neighbour = NoNeighbour::first;
  };
  static constexpr std::string_view kName = "rkv";
  static constexpr std::string_view kSummary =
      "pooled attention of the last queries over the past, minus the redundancy of the key";
  static constexpr std::string_view kPaper = "arXiv:2505.24133";
  static constexpr std::string_view kDeviation =
      "the authors' code (the paper's body was not at hand): the group's maximum is of logits, before the softmax; "
      "lambda of README and newer code (0.07 in the class); a prompt above the budget is cut at its end; evictions at "
      "newlines need the text and are not there, and of retain_direction only 'last', to which the code's last_percent "
      "comes too";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, kUnbounded, "last queries, which vote and whose tokens stay",
                                  Scale::log),
      number<&Config::buffer>("buffer", 0, kUnbounded,
                              "during decode evict only where so many tokens are above the budget, as the newer code; "
                              "it is also the default of interval; 0: wherever any is, every 128 steps (June 2025)"),
      number<&Config::lambda>("lambda", 0, 1,
                              "weight of the attention, the rest goes to the redundancy; 1: no redundancy is computed"),
      number<&Config::kernel>("kernel", 1, 1023, "tokens of the max pooling, an odd number; 1: none", Scale::log),
      number<&Config::threshold>("threshold", -1, 1, "cosine above which a key forgives its most recent neighbour"),
      choice<&Config::no_neighbour>("no_neighbour", kNoNeighbours,
                                    "a key without one forgives nobody, or the first slot as in the code"),
  };
  static Traits traits(const Config& c) {
    return {.group = Reduce::max, .interval = c.buffer > 0 ? c.buffer : Config().buffer};
  }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.obs_window.percent ? Needs::kAll : c.obs_window.of(0)};
  }
  static void check(const Config& c, int) { check_kernel(kName, c.kernel); }

  Rkv(const Config& config, const SetShape& shape)
      : config_(config), obs_window_(std::max(1, config.obs_window.of(shape.budget))) {}

  int surplus(const View& view) const override {
    const int above = Selector::surplus(view);
    return view.at_prefill() || above >= config_.buffer ? above : 0;
  }

  void score(const View& view, std::span<float> out) override {
    const int window = std::min(obs_window_, view.budget);
    const Eigen::Index n = slots_before(view, window);
    Eigen::RowVectorXd s = pool_neighbours(attended(view, window, n), Pooling::max, config_.kernel);
    if (config_.lambda < 1 && n > 0) {
      s = config_.lambda * s -
          (1 - config_.lambda) * redundancy(view, {config_.threshold, config_.no_neighbour}).head(n).transpose();
    }
    score_before_window(view, s, window, out);
  }

 private:
  // Logits reduced over the heads, then each voter's softmax over the first n slots alone, then the mean.
  static MatD attended(const View& view, int window, Eigen::Index n) {
    std::vector<MatF> lanes;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      lanes.push_back(last_logits(view, lane, window, n));
    }
    MatD attn = reduce_voters(view, lanes);  // (voters, n)
    for (Eigen::Index r = 0; r < attn.rows() && n > 0; ++r) {
      attn.row(r) = (attn.row(r).array() - attn.row(r).maxCoeff()).exp();
      attn.row(r) /= attn.row(r).sum();
    }
    return attn.colwise().mean();
  }

  Config config_;
  int obs_window_;
};

}  // namespace

extern const PartInfo rkv;
constinit const PartInfo rkv = describe<Rkv>();

}  // namespace kvreplay
