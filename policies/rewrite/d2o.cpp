// D2O's token merging: evicted keys and values go into the survivor of most similar key, if they are more alike than
// evicted tokens lately were.
#include "policies/part.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

enum class Weights { code, paper };
constexpr std::string_view kWeights[] = {"code", "paper"};

class D2o final : public Rewriter {
 public:
  struct Config {
    Weights weights = Weights::code;
    double alpha = 0.5;
    double beta = 0.5;
  };
  static constexpr std::string_view kName = "d2o";
  static constexpr std::string_view kSummary =
      "evicted keys and values merged into the most similar survivor, behind a gate that follows their likeness";
  static constexpr std::string_view kPaper = "arXiv:2406.13035";
  static constexpr std::string_view kDeviation =
      "weights=code is the authors' code, weights=paper the convex form recalled from the paper; the gate averages "
      "over the lanes of a set (the code: all heads) and compares to six digits; their layer budgets are "
      "the allocator d2o_layers";
  static constexpr std::array kParams{
      choice<&Config::weights>("weights", kWeights,
                               "code: (k_c + sum u k_e) / (1 + n) with u the cosine, so that lengths shrink; paper: "
                               "shares e and exp(u)"),
      number<&Config::alpha>("alpha", 0, 1, "of the old threshold in the new one"),
      number<&Config::beta>("beta", 0, 1,
                            "of the mean cosine of those that leave (a comment in the code: 0.3 and 0.7)"),
  };

  D2o(const Config& config, const SetShape& shape) : config_(config), element_bytes_(shape.element_bytes) {}

  void evicted(Cache& cache, std::span<const int> leaving) override {
    const std::vector<int> staying = staying_slots(cache, leaving);
    if (staying.empty()) {
      return;
    }
    std::vector<std::vector<Nearest>> near;  // per lane, one for each that leaves
    std::vector<double> u(leaving.size());   // mean over the lanes
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      near.push_back(nearest_slots(cache, lane, leaving, staying));
      for (std::size_t i = 0; i < leaving.size(); ++i) {
        u[i] += near.back()[i].cosine / cache.n_lanes;
      }
    }
    double mean = 0;
    for (const double x : u) {
      mean += x / static_cast<double>(u.size());
    }
    threshold_ = first_ ? mean : config_.alpha * threshold_ + config_.beta * mean;
    first_ = false;
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      merge(cache, lane, leaving, near[static_cast<std::size_t>(lane)], u);
    }
  }

 private:
  void merge(Cache& cache, int lane, std::span<const int> leaving, const std::vector<Nearest>& near,
             const std::vector<double>& u) const {
    constexpr double kSame = 1e-6;  // equal cosines pass a threshold that is their mean
    struct Sum {
      Eigen::VectorXd k, v;  // weight times key, weight times value
      double all = 0;
    };
    std::map<int, Sum> sums;  // by target
    const bool convex = config_.weights == Weights::paper;
    const double self = convex ? std::exp(1.0) : 1;
    for (std::size_t i = 0; i < leaving.size(); ++i) {
      if (u[i] < threshold_ - kSame) {
        continue;
      }
      Sum& sum = sums[near[i].slot];
      if (sum.k.size() == 0) {
        sum.k.setZero(cache.head_dim);
        sum.v.setZero(cache.v_head_dim);
      }
      const double weight = convex ? std::exp(near[i].cosine) : near[i].cosine;
      sum.k += weight * cache.key(lane, leaving[i]).cast<double>();
      sum.v += weight * cache.value(lane, leaving[i]).cast<double>();
      sum.all += convex ? weight : 1;
    }
    for (const auto& [slot, sum] : sums) {
      const Eigen::VectorXd k = (self * cache.key(lane, slot).cast<double>() + sum.k) / (self + sum.all);
      const Eigen::VectorXd v = (self * cache.value(lane, slot).cast<double>() + sum.v) / (self + sum.all);
      store_merged(cache, lane, slot, k.cast<float>(), v.cast<float>(), cache.bias(lane, slot), element_bytes_);
    }
  }

  Config config_;
  int element_bytes_;
  bool first_ = true;
  double threshold_ = 0;
};

}  // namespace

extern const PartInfo d2o;
constinit const PartInfo d2o = describe<D2o>();

}  // namespace kvreplay
