// Merging as kvpress does it: an evicted value is blended into the survivor whose key is most alike, by likeness and by
// its share of the two values' lengths; keys stay.
#include "policies/part.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

class Merging final : public Rewriter {
 public:
  struct Config {
    double similarity_threshold = 0;
    double merge_fraction = 1;
    MergeAt at = MergeAt::prompt;
  };
  static constexpr std::string_view kName = "merging";
  static constexpr std::string_view kSummary =
      "evicted values blended into the survivor of most similar key, keys untouched, no mass given back";
  static constexpr std::string_view kPaper = "github.com/NVIDIA/kvpress, MergingPress (pull request 219)";
  static constexpr std::string_view kDeviation =
      "as kvpress' code, for the prompt's cut alone; at=always merges at every eviction, which kvpress does not; a "
      "quantile that falls between tokens below the threshold and others refuses none of the others";
  static constexpr std::array kParams{
      number<&Config::similarity_threshold>("similarity_threshold", -1, 1, "least cosine of the keys for a merge"),
      number<&Config::merge_fraction>("merge_fraction", 1e-6, 1,
                                      "share of the evicted that is merged, those of highest cosine"),
      choice<&Config::at>("at", kMergeAts, "prompt: at the prompt's cut alone; always: at every eviction"),
  };

  Merging(const Config& config, const SetShape& shape) : config_(config), element_bytes_(shape.element_bytes) {}

  void evicted(Cache& cache, std::span<const int> leaving) override {
    if (config_.at == MergeAt::prompt && !cache.at_prefill()) {
      return;
    }
    const std::vector<int> staying = staying_slots(cache, leaving);
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      const std::vector<Nearest> near = nearest_slots(cache, lane, leaving, staying);
      const double least = least_cosine(near);
      struct Sum {
        Eigen::VectorXd v;  // (v_head_dim) of weight times value
        double weight = 0;
      };
      std::map<int, Sum> sums;  // by target
      for (std::size_t i = 0; i < leaving.size(); ++i) {
        if (near[i].slot < 0 || near[i].cosine < least || near[i].cosine <= 0) {
          continue;
        }
        const Eigen::VectorXd v = cache.value(lane, leaving[i]).cast<double>();
        const double own = v.norm(), other = cache.value(lane, near[i].slot).cast<double>().norm();
        const double weight = near[i].cosine * own / (own + other + kEpsilon);
        Sum& sum = sums[near[i].slot];
        if (sum.v.size() == 0) {
          sum.v.setZero(v.size());
        }
        sum.v += weight * v;
        sum.weight += weight;
      }
      for (const auto& [slot, sum] : sums) {
        const Eigen::VectorXd v = (cache.value(lane, slot).cast<double>() + sum.v) / (1 + sum.weight);
        store_merged(cache, lane, slot, cache.key(lane, slot), v.cast<float>(), cache.bias(lane, slot), element_bytes_);
      }
    }
  }

 private:
  static constexpr double kEpsilon = 1e-6;

  // Quantile with linear interpolation, those below the threshold counting as minus infinity.
  double least_cosine(const std::vector<Nearest>& near) const {
    const double threshold = config_.similarity_threshold;
    if (config_.merge_fraction >= 1) {
      return threshold;
    }
    std::vector<double> u;
    for (const Nearest& n : near) {
      u.push_back(n.cosine);
    }
    std::sort(u.begin(), u.end());
    const double rank = (1 - config_.merge_fraction) * static_cast<double>(u.size() - 1);
    const auto low = static_cast<std::size_t>(rank);
    const double part = rank - static_cast<double>(low);
    const double above = part > 0 ? u[low + 1] : u[low];
    return u[low] < threshold ? threshold : u[low] + part * (above - u[low]);
  }

  Config config_;
  int element_bytes_;
};

}  // namespace

extern const PartInfo merging;
constinit const PartInfo merging = describe<Merging>();

}  // namespace kvreplay
