// G-KV: every so often the last queries score all that is resident; the best that a token was ever given decays slowly,
// and keys that others repeat count less.
#include "policies/last_queries.hpp"
#include "policies/part.hpp"
#include "policies/redundancy.hpp"

namespace kvreplay {
namespace {

enum class Smooth { max, mean, sum, none };
constexpr std::string_view kSmooths[] = {"max", "mean", "sum", "none"};

class Gkv final : public Selector {
 public:
  struct Config {
    Tokens obs_window{16, false};
    Smooth smooth = Smooth::max;
    double alpha = 0.8;
    double lambda = 0.5;
    bool normalise = true;
    Pooling pooling = Pooling::none;
    int kernel = 5;
    double threshold = 0.5;
    NoNeighbour no_neighbour = NoNeighbour::skip;
    double temperature = 1;
    double gamma = 0;
    double ratio = 0;
  };
  static constexpr std::string_view kName = "gkv";
  static constexpr std::string_view kSummary =
      "best score so far, decayed at each eviction, from the last queries, minus the redundancy of the key";
  static constexpr std::string_view kPaper = "arXiv:2512.00504";
  static constexpr std::string_view kDeviation =
      "the authors' code with its G-KV recipe (the paper's body was not at hand); the recipes of its baselines are "
      "presets snapkv-gkv and h2o-gkv; Zipage is lambda=0.2,temperature=0.4,pooling=max but for its likeness within "
      "blocks alone; with pool=decode the last queries see the decode tokens alone";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, kUnbounded, "last queries, which vote and whose tokens stay",
                                  Scale::log),
      choice<&Config::smooth>("smooth", kSmooths,
                              "with the score F of the last eviction and the new S: max(alpha F, S), alpha F + "
                              "(1 - alpha) S, alpha F + S, or S alone"),
      number<&Config::alpha>("alpha", 0, 1, "decay of old scores per eviction, not per step"),
      number<&Config::lambda>("lambda", 0, 1,
                              "weight of the score, the rest goes to the redundancy; 1: no redundancy is computed"),
      flag<&Config::normalise>("normalise", "scores and redundancies are divided by their maximum"),
      choice<&Config::pooling>("pooling", kPoolings, "of the smoothed score; what is remembered is not pooled"),
      number<&Config::kernel>("kernel", 1, 1023, "tokens pooled, an odd number"),
      number<&Config::threshold>("threshold", -1, 1, "cosine above which a key forgives its most recent neighbour"),
      choice<&Config::no_neighbour>("no_neighbour", kNoNeighbours,
                                    "a key without one forgives nobody (the kernel), or the first slot (the reference "
                                    "code, as R-KV's)"),
      number<&Config::temperature>("temperature", 1e-3, 1e3, "divides the mean cosines before their softmax",
                                   Scale::log),
      number<&Config::gamma>("gamma", 0, 1e6,
                             "adds so many standard deviations over the window's queries; 200 in the code where on"),
      number<&Config::ratio>("ratio", 0, 1,
                             "the budget grows to this share of all tokens so far; 0: it stays (the class has 0.2 for "
                             "its ratio mode)"),
  };
  static Traits traits(const Config&) { return {.group = Reduce::max, .interval = 128}; }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.obs_window.percent ? Needs::kAll : c.obs_window.of(0)};
  }
  static void check(const Config& c, int) { check_kernel(kName, c.kernel); }

  Gkv(const Config& config, const SetShape& shape)
      : config_(config),
        obs_window_(std::max(1, config.obs_window.of(shape.budget))),
        history_(static_cast<std::size_t>(shape.n_tokens), kNone) {}

  int surplus(const View& view) const override {
    const int share = static_cast<int>(config_.ratio * (view.now + 1) + 1e-9);
    return static_cast<int>(view.pos.size()) - std::max(view.budget, share);
  }

  void score(const View& view, std::span<float> out) override {
    const int window = std::min(obs_window_, view.budget);
    const Eigen::Index n = slots_before(view, window);
    smoothed_ = local(view, window, n);
    for (Eigen::Index i = 0; i < n; ++i) {
      smoothed_[i] = smooth(history_[at(view, i)], smoothed_[i]);
    }
    Eigen::RowVectorXd s = pool_neighbours(smoothed_, config_.pooling, config_.kernel);
    if (config_.lambda < 1 && n > 0) {
      s = config_.lambda * s - (1 - config_.lambda) * repeated(view, n);
    }
    score_before_window(view, s, window, out);
  }

  void evicted(const View& view, std::span<const int>) override {
    if (config_.smooth != Smooth::none) {
      for (Eigen::Index i = 0; i < smoothed_.size(); ++i) {
        history_[at(view, i)] = smoothed_[i];
      }
    }
  }

 private:
  static constexpr double kNone = -1;
  static std::size_t at(const View& view, Eigen::Index slot) {
    return static_cast<std::size_t>(view.pos[static_cast<std::size_t>(slot)]);
  }

  // Attention that the first n slots get from the window, as one number per slot.
  Eigen::RowVectorXd local(const View& view, int window, Eigen::Index n) const {
    std::vector<MatD> lanes;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      lanes.emplace_back(last_attention(view, lane, window).leftCols(n));
    }
    const MatD by_voter = reduce_voters(view, lanes);
    Eigen::RowVectorXd s = by_voter.colwise().mean();
    if (config_.gamma > 0 && by_voter.rows() > 1) {
      const Eigen::RowVectorXd away = (by_voter.rowwise() - s).array().square().colwise().sum();
      s += config_.gamma * (away / static_cast<double>(by_voter.rows() - 1)).cwiseSqrt();
    }
    return divided(s);
  }

  Eigen::RowVectorXd repeated(const View& view, Eigen::Index n) const {
    return divided(
        redundancy(view, {config_.threshold, config_.no_neighbour}, config_.temperature).head(n).transpose());
  }

  Eigen::RowVectorXd divided(const Eigen::RowVectorXd& x) const {
    const double top = config_.normalise && x.size() > 0 ? x.maxCoeff() : 1;
    return top > 0 ? x / top : x;
  }

  double smooth(double before, double now) const {
    if (before == kNone) {
      return now;
    }
    switch (config_.smooth) {
      case Smooth::max:
        return std::max(config_.alpha * before, now);
      case Smooth::mean:
        return config_.alpha * before + (1 - config_.alpha) * now;
      case Smooth::sum:
        return config_.alpha * before + now;
      case Smooth::none:
        break;
    }
    return now;
  }

  Config config_;
  int obs_window_;
  std::vector<double> history_;  // (n_tokens) F of the last eviction, kNone where there is none
  Eigen::RowVectorXd smoothed_;  // (slots before the window) F of the eviction at hand
};

}  // namespace

extern const PartInfo gkv;
constinit const PartInfo gkv = describe<Gkv>();

}  // namespace kvreplay
