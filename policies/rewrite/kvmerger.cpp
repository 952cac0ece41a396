// KVMerger: runs of neighbours with similar keys become one slot, weighted by a Gaussian around the token that stays.
#include "policies/rewrite/kvmerger.hpp"

#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class Sigma { rms, two_pass, mean_dist };
constexpr std::string_view kSigmas[] = {"rms", "two_pass", "mean_dist"};
enum class ValueScale { one, size };
constexpr std::string_view kValueScales[] = {"one", "size"};

class KvMerger final : public Rewriter {
 public:
  struct Config {
    double delta = -1;
    Sigma sigma = Sigma::rms;
    ValueScale value_scale = ValueScale::one;
    Tokens heavy{10, true};
    Tokens recent{10, true};
    MergeAt at = MergeAt::prompt;
  };
  static constexpr std::string_view kName = "kvmerger";
  static constexpr std::string_view kSummary =
      "evicted neighbours merged around the survivor of their set, keys and values";
  static constexpr std::string_view kPaper = "arXiv:2407.08454";
  static constexpr std::string_view kDeviation =
      "after two independent ports; the paper's sigma refers to itself, sigma says how to start (rms and two_pass are "
      "the ports'); a factor on values that one port mentions and cancels is value_scale=size; what lies between two "
      "survivors is divided at its least similar neighbours";
  static constexpr std::array kParams{
      number<&Config::delta>("delta", -1, 1,
                             "least cosine of neighbours in a set (the paper's 0.75 under other selectors; with "
                             "kvmerger_sets those that left have joined already)"),
      choice<&Config::sigma>("sigma", kSigmas,
                             "width of the Gaussian: root mean square distance of the set to its survivor; from the "
                             "weights that this gives, as quoted from the paper; mean distance"),
      choice<&Config::value_scale>("value_scale", kValueScales, "factor on merged values: 1 or the size of the set"),
      number<&Config::heavy>("heavy", 0, kUnbounded, "as kvmerger_sets has it", Scale::log),
      number<&Config::recent>("recent", 0, kUnbounded, "as kvmerger_sets has it", Scale::log),
      choice<&Config::at>("at", kMergeAts, "prompt: at the prompt's cut alone; always: at every eviction"),
  };
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  KvMerger(const Config& config, const SetShape& shape)
      : config_(config), element_bytes_(shape.element_bytes), links_(shape, config.heavy, config.recent) {}

  void step(Cache& cache) override { links_.meet(cache); }

  void evicted(Cache& cache, std::span<const int> leaving) override {
    links_.meet(cache);
    if (config_.at == MergeAt::prompt && !cache.at_prefill()) {
      return;
    }
    const std::map<int, std::vector<int>> sets =
        members(links_.links(cache), leaving, static_cast<int>(cache.pos.size()));
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      for (const auto& [pivot, others] : sets) {
        merge(cache, lane, pivot, others);
      }
    }
  }

 private:
  // Of each survivor, who goes into it: from each run of leaving slots what is linked to it, up to the weakest link.
  std::map<int, std::vector<int>> members(const std::vector<double>& links, std::span<const int> leaving, int n) const {
    std::map<int, std::vector<int>> sets;
    const auto link = [&](int i) { return links[static_cast<std::size_t>(i)]; };  // between slots i and i + 1
    const auto joins = [&](int i) { return link(i) > KvMergerLinks::kNone && link(i) >= config_.delta; };
    for (std::size_t i = 0; i < leaving.size();) {
      const int begin = leaving[i];
      int end = begin;  // of the run
      for (; i < leaving.size() && leaving[i] == end; ++i) {
        ++end;
      }
      int cut = begin == 0 ? -1 : n - 1;  // a run at an end of the cache has one side only
      if (begin > 0 && end < n) {
        const auto weakest = std::min_element(links.begin() + begin - 1, links.begin() + end);
        cut = static_cast<int>(weakest - links.begin());
      }
      if (begin > 0) {
        for (int j = begin - 1; j < std::min(cut, end - 1) && joins(j); ++j) {
          sets[begin - 1].push_back(j + 1);
        }
      }
      if (end < n) {
        for (int j = end - 1; j > cut && j >= begin && joins(j); --j) {
          sets[end].push_back(j);
        }
      }
    }
    return sets;
  }

  void merge(Cache& cache, int lane, int pivot, const std::vector<int>& others) const {
    constexpr double kLeastSquare = 1e-6;  // equal keys all weigh 1
    const double size = static_cast<double>(others.size()) + 1;
    const Eigen::VectorXd key = cache.key(lane, pivot).cast<double>();
    Eigen::ArrayXd square(static_cast<Eigen::Index>(others.size()));  // distances from the pivot's key
    for (Eigen::Index i = 0; i < square.size(); ++i) {
      square[i] = (cache.key(lane, others[static_cast<std::size_t>(i)]).cast<double>() - key).squaredNorm();
    }
    const auto gaussian = [&](double variance) -> Eigen::ArrayXd {
      return (-square / (2 * std::max(variance, kLeastSquare))).exp();
    };
    const double mean_square = square.sum() / size, mean = square.sqrt().sum() / size;
    Eigen::ArrayXd g = gaussian(config_.sigma == Sigma::mean_dist ? mean * mean : mean_square);
    if (config_.sigma == Sigma::two_pass) {
      const double sigma = (1 + g.sum()) / (std::sqrt(2.0) * size);
      g = gaussian(sigma * sigma);
    }
    Eigen::VectorXd k = key, v = cache.value(lane, pivot).cast<double>();
    for (Eigen::Index i = 0; i < g.size(); ++i) {
      k += g[i] * cache.key(lane, others[static_cast<std::size_t>(i)]).cast<double>();
      v += g[i] * cache.value(lane, others[static_cast<std::size_t>(i)]).cast<double>();
    }
    k /= 1 + g.sum();
    v *= (config_.value_scale == ValueScale::size ? size : 1) / (1 + g.sum());
    store_merged(cache, lane, pivot, k.cast<float>(), v.cast<float>(), cache.bias(lane, pivot), element_bytes_);
  }

  Config config_;
  int element_bytes_;
  KvMergerLinks links_;
};

}  // namespace

extern const PartInfo kvmerger;
constinit const PartInfo kvmerger = describe<KvMerger>();

}  // namespace kvreplay
