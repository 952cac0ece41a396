// ZSMerge: what leaves is averaged by votes into a residual slot, whose logit gets the logarithm of its votes.
#include "policies/rewrite/zsmerge.hpp"

#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class Metric { dot_product, l2 };
constexpr std::string_view kMetrics[] = {"dot_product", "l2"};

class ZsMerge final : public Rewriter {
 public:
  struct Config {
    Metric metric = Metric::dot_product;
    double scale_factor = 1;
    Tokens residual{1, false};
    Tokens tail{10, true};
    double decay = 0.98;
  };
  static constexpr std::string_view kName = "zsmerge";
  static constexpr std::string_view kSummary =
      "what leaves is averaged into residual slots by votes, which bias logits";
  static constexpr std::string_view kPaper = "arXiv:2503.10714";
  static constexpr std::string_view kDeviation =
      "defaults of the authors' code; the first cut averages runs of neighbours, later tokens go to the residual slot "
      "of "
      "largest product with their key; with another selector than zsmerge_slots the residual slots are the oldest that "
      "stay";
  static constexpr std::array kParams{
      choice<&Config::metric>("metric", kMetrics, "which residual slot: largest product of keys, or least distance"),
      number<&Config::scale_factor>("scale_factor", 0, 2, "of ln votes on the logit; 0: no mass is given back"),
      number<&Config::residual>("residual", 1, kUnbounded, "as zsmerge_slots has it", Scale::log),
      number<&Config::tail>("tail", 0, kUnbounded, "as zsmerge_slots has it", Scale::log),
      number<&Config::decay>("decay", 0.5, 1, "as zsmerge_slots has it", Scale::one_minus),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = ZsMergeCache::n_queries(c.decay)}; }

  ZsMerge(const Config& config, const SetShape& shape)
      : config_(config),
        element_bytes_(shape.element_bytes),
        cache_(shape, config.residual, config.tail, config.decay),
        votes_(static_cast<std::size_t>(shape.n_lanes),
               std::vector<double>(static_cast<std::size_t>(shape.n_tokens), 1)) {}

  void evicted(Cache& cache, std::span<const int> leaving) override {
    const std::vector<int> staying = staying_slots(cache, leaving);
    if (staying.empty()) {
      return;
    }
    if (cache.at_prefill()) {
      cache_.meet(cache);
      if (cut(cache, leaving, staying)) {
        return;
      }
    }
    const std::vector<int> targets = residual_slots(cache, staying);
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      std::map<int, std::vector<int>> merges;
      for (const int slot : leaving) {
        merges[nearest_of(cache, lane, slot, targets)].push_back(slot);
      }
      for (const auto& [target, slots] : merges) {
        merge(cache, lane, target, slots);
      }
    }
  }

 private:
  // The first cut, run by run; false where its hosts are not among those that stay.
  bool cut(Cache& cache, std::span<const int> leaving, const std::vector<int>& staying) {
    const std::vector<ZsMergeCache::Run> runs = cache_.runs(cache);
    std::vector<int> covered;
    for (const ZsMergeCache::Run& run : runs) {
      if (!std::binary_search(staying.begin(), staying.end(), run.host)) {
        return false;
      }
      for (const int slot : run.slots) {
        if (slot != run.host) {
          covered.push_back(slot);
        }
      }
    }
    if (!std::equal(covered.begin(), covered.end(), leaving.begin(), leaving.end())) {
      return false;
    }
    for (const ZsMergeCache::Run& run : runs) {
      residual_.push_back(cache.pos[static_cast<std::size_t>(run.host)]);
      std::vector<int> others = run.slots;
      std::erase(others, run.host);
      for (int lane = 0; lane < cache.n_lanes && !others.empty(); ++lane) {
        merge(cache, lane, run.host, others);
      }
    }
    return true;
  }

  std::vector<int> residual_slots(const View& view, const std::vector<int>& staying) {
    std::vector<int> out;
    for (const int slot : staying) {
      if (std::find(residual_.begin(), residual_.end(), view.pos[static_cast<std::size_t>(slot)]) != residual_.end()) {
        out.push_back(slot);
      }
    }
    if (out.empty()) {  // none yet, or none left
      const auto n = std::min(staying.size(), static_cast<std::size_t>(cache_.n_residual(view)));
      out.assign(staying.begin(), staying.begin() + static_cast<std::ptrdiff_t>(n));
      residual_.clear();
      for (const int slot : out) {
        residual_.push_back(view.pos[static_cast<std::size_t>(slot)]);
      }
    }
    return out;
  }

  int nearest_of(const View& view, int lane, int slot, const std::vector<int>& targets) const {
    const Eigen::VectorXd key = view.key(lane, slot).cast<double>();
    int best = targets[0];
    double most = -std::numeric_limits<double>::infinity();
    for (const int target : targets) {
      const Eigen::VectorXd other = view.key(lane, target).cast<double>();
      const double close = config_.metric == Metric::l2 ? -(key - other).squaredNorm() : key.dot(other);
      if (close > most) {
        most = close;
        best = target;
      }
    }
    return best;
  }

  void merge(Cache& cache, int lane, int target, const std::vector<int>& slots) {
    std::vector<double>& votes = votes_[static_cast<std::size_t>(lane)];
    const auto votes_of = [&](int slot) -> double& {
      return votes[static_cast<std::size_t>(cache.pos[static_cast<std::size_t>(slot)])];
    };
    double sum = votes_of(target);
    Eigen::VectorXd k = sum * cache.key(lane, target).cast<double>(),
                    v = sum * cache.value(lane, target).cast<double>();
    for (const int slot : slots) {
      k += votes_of(slot) * cache.key(lane, slot).cast<double>();
      v += votes_of(slot) * cache.value(lane, slot).cast<double>();
      sum += votes_of(slot);
    }
    votes_of(target) = sum;
    store_merged(cache, lane, target, (k / sum).cast<float>(), (v / sum).cast<float>(),
                 static_cast<float>(config_.scale_factor * std::log(sum)), element_bytes_);
  }

  Config config_;
  int element_bytes_;
  ZsMergeCache cache_;
  std::vector<Pos> residual_;
  std::vector<std::vector<double>> votes_;  // per lane (n_tokens)
};

}  // namespace

extern const PartInfo zsmerge;
constinit const PartInfo zsmerge = describe<ZsMerge>();

}  // namespace kvreplay
