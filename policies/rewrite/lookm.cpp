// LOOK-M's three ways to merge evicted keys and values into the survivor whose key is most alike.
#include "policies/part.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

enum class Weights { pivot, weighted, average };
constexpr std::string_view kWeights[] = {"pivot", "weighted", "average"};

class LookM final : public Rewriter {
 public:
  struct Config {
    Weights weights = Weights::pivot;
    MergeAt at = MergeAt::prompt;
  };
  static constexpr std::string_view kName = "lookm";
  static constexpr std::string_view kSummary = "evicted keys and values averaged into the survivor of most similar key";
  static constexpr std::string_view kPaper = "arXiv:2406.18139";
  static constexpr std::string_view kDeviation =
      "pivot and weighted as KVCache-Factory merges, average as the plain mean of all; the paper's text-first "
      "selection "
      "is the selector's affair and needs to know which tokens are text; at=always is ours";
  static constexpr std::array kParams{
      choice<&Config::weights>(
          "weights", kWeights,
          "of k_c and n evicted: pivot (k_c + sum (k_c + k_e) / 2) / (1 + n); weighted by "
          "w = (cosine + 1) / 2, (k_c + sum w k_e) / (1 + sum w); average (k_c + sum k_e) / (1 + n)"),
      choice<&Config::at>("at", kMergeAts, "prompt: at the prompt's cut alone; always: at every eviction"),
  };

  LookM(const Config& config, const SetShape& shape) : config_(config), element_bytes_(shape.element_bytes) {}

  void evicted(Cache& cache, std::span<const int> leaving) override {
    if (config_.at == MergeAt::prompt && !cache.at_prefill()) {
      return;
    }
    const std::vector<int> staying = staying_slots(cache, leaving);
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      const std::vector<Nearest> near = nearest_slots(cache, lane, leaving, staying);
      struct Sum {
        Eigen::VectorXd k, v;  // weight times key, weight times value
        double self = 1, all = 1;
      };
      std::map<int, Sum> sums;  // by target
      for (std::size_t i = 0; i < leaving.size(); ++i) {
        if (near[i].slot < 0) {
          continue;
        }
        Sum& sum = sums[near[i].slot];
        if (sum.k.size() == 0) {
          sum.k.setZero(cache.head_dim);
          sum.v.setZero(cache.v_head_dim);
        }
        const double weight = weight_of(near[i].cosine);
        sum.k += weight * cache.key(lane, leaving[i]).cast<double>();
        sum.v += weight * cache.value(lane, leaving[i]).cast<double>();
        sum.self += config_.weights == Weights::pivot ? 0.5 : 0;
        sum.all += config_.weights == Weights::pivot ? 1 : weight;
      }
      for (const auto& [slot, sum] : sums) {
        const Eigen::VectorXd k = (sum.self * cache.key(lane, slot).cast<double>() + sum.k) / sum.all;
        const Eigen::VectorXd v = (sum.self * cache.value(lane, slot).cast<double>() + sum.v) / sum.all;
        store_merged(cache, lane, slot, k.cast<float>(), v.cast<float>(), cache.bias(lane, slot), element_bytes_);
      }
    }
  }

 private:
  double weight_of(double cosine) const {
    switch (config_.weights) {
      case Weights::pivot:
        return 0.5;
      case Weights::weighted:
        return std::max((cosine + 1) / 2, 1e-6);
      case Weights::average:
        break;
    }
    return 1;
  }

  Config config_;
  int element_bytes_;
};

}  // namespace

extern const PartInfo lookm;
constinit const PartInfo lookm = describe<LookM>();

}  // namespace kvreplay
