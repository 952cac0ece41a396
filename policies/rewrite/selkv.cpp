// SelKV's merge: an evicted value goes to the kept token of its bucket that it attended to most, as far as their values
// agree, and a bias on the logit gives back part of the mass.
#include "policies/part.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

class SelKv final : public Rewriter {
 public:
  struct Config {
    int obs_window = 32;
    int bucket = 32;
    bool gate = true;
    double alpha = 0.5;
  };
  static constexpr std::string_view kName = "selkv";
  static constexpr std::string_view kSummary =
      "at the prompt's cut, values merged by window attention inside their bucket, part of the mass given back";
  static constexpr std::string_view kPaper = "arXiv:2607.16213";
  static constexpr std::string_view kDeviation =
      "after an independent port, there being no code; all kept tokens of the bucket may be targets (the paper: those "
      "that the head itself chose); attention inside a bucket is softmaxed over its kept tokens, which matters for "
      "several query heads alone";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, 65536, "last prompt queries, whose attention weighs", Scale::log),
      number<&Config::bucket>("bucket", 1, 65536, "positions of a bucket", Scale::log),
      flag<&Config::gate>("gate", "weight by the cosine of the values, none below 0; false: merge blindly"),
      number<&Config::alpha>("alpha", 0, 1, "of the logarithm of the mass gained, added to the logit; 0: none"),
  };
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  SelKv(const Config& config, const SetShape& shape) : config_(config), element_bytes_(shape.element_bytes) {}

  void evicted(Cache& cache, std::span<const int> leaving) override {
    if (!cache.at_prefill()) {
      return;
    }
    const std::vector<int> staying = staying_slots(cache, leaving);
    std::vector<std::map<int, Eigen::VectorXd>> values(static_cast<std::size_t>(cache.n_lanes));  // by target
    std::map<int, double> gained;  // by target: mass over its own, less 1, mean over the lanes
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      const Eigen::RowVectorXd mass = cache.column_mass(lane, config_.obs_window).colwise().sum();
      const MatF q = cache.queries(lane, cache.prompt_len);
      struct Sum {
        Eigen::VectorXd v;  // (v_head_dim)
        double weight = 0;
      };
      std::map<int, Sum> sums;  // by target
      for (const int slot : leaving) {
        const int target = target_of(cache, lane, slot, staying, q);
        if (target < 0) {
          continue;
        }
        const double likeness =
            config_.gate ? std::max(0.0, cosine(cache.value(lane, slot), cache.value(lane, target))) : 1;
        const double weight = likeness * mass[slot];
        Sum& sum = sums[target];
        if (sum.v.size() == 0) {
          sum.v.setZero(cache.v_head_dim);
        }
        sum.v += weight * cache.value(lane, slot).cast<double>();
        sum.weight += weight;
      }
      for (const auto& [target, sum] : sums) {
        if (sum.weight <= 0) {
          continue;
        }
        values[static_cast<std::size_t>(lane)][target] =
            (mass[target] * cache.value(lane, target).cast<double>() + sum.v) / (mass[target] + sum.weight);
        gained[target] += sum.weight / std::max(mass[target], kLeastMass) / cache.n_lanes;
      }
    }
    for (const auto& [target, gain] : gained) {
      for (int lane = 0; lane < cache.n_lanes; ++lane) {
        const auto& own = values[static_cast<std::size_t>(lane)];
        const auto it = own.find(target);
        const Eigen::VectorXf v =
            it != own.end() ? Eigen::VectorXf(it->second.cast<float>()) : Eigen::VectorXf(cache.value(lane, target));
        store_merged(cache, lane, target, cache.key(lane, target), v,
                     cache.bias(lane, target) + static_cast<float>(config_.alpha * std::log1p(gain)), element_bytes_);
      }
    }
  }

 private:
  static constexpr double kLeastMass = 1e-8;  // below it a target's own mass says nothing

  // The kept token of the bucket that this one's queries attended to most; -1 if there is none before it. At the
  // prompt's end a slot is its position.
  int target_of(const View& view, int lane, int slot, const std::vector<int>& staying, const MatF& q) const {
    const auto first = std::lower_bound(staying.begin(), staying.end(), slot / config_.bucket * config_.bucket);
    const auto last = std::lower_bound(first, staying.end(), slot);
    if (first == last) {
      return -1;
    }
    Eigen::ArrayXd sum = Eigen::ArrayXd::Zero(last - first);
    for (int head = 0; head < view.n_heads; ++head) {
      Eigen::ArrayXd a(sum.size());
      for (Eigen::Index i = 0; i < a.size(); ++i) {
        a[i] = q.row(slot * view.n_heads + head).cast<double>().dot(view.key(lane, first[i]).cast<double>());
      }
      a = (a - a.maxCoeff()).exp();
      sum += a / a.sum();
    }
    Eigen::Index best = 0;
    sum.maxCoeff(&best);
    return first[best];
  }

  Config config_;
  int element_bytes_;
};

}  // namespace

extern const PartInfo selkv;
constinit const PartInfo selkv = describe<SelKv>();

}  // namespace kvreplay
