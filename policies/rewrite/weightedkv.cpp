// WeightedKV: the key of a token that leaves is dropped, its value averaged into the next kept one by mean attention.
#include "policies/part.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

enum class After { keep, sum };
constexpr std::string_view kAfters[] = {"keep", "sum"};

class WeightedKv final : public Rewriter {
 public:
  struct Config {
    After after = After::keep;
    bool votes = false;
  };
  static constexpr std::string_view kName = "weightedkv";
  static constexpr std::string_view kSummary = "evicted values averaged into the next kept value by mean attention";
  static constexpr std::string_view kPaper = "arXiv:2503.01330";
  static constexpr std::string_view kDeviation =
      "formula of an independent port, which the abstract agrees with; what the mean attention becomes after a merge "
      "nobody says (after=keep, after=sum); several that leave at once go in order of position; votes=true is ours";
  static constexpr std::array kParams{
      choice<&Config::after>("after", kAfters,
                             "mean attention of the kept token after a merge: keep its own, or the sum of both"),
      flag<&Config::votes>("votes",
                           "add ln of the ratio of summed to own attention to the logit, so that the mass stays too"),
  };
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  WeightedKv(const Config& config, const SetShape& shape)
      : config_(config), element_bytes_(shape.element_bytes), received_(shape, true) {}

  void step(Cache& cache) override { received_.meet(cache); }

  void evicted(Cache& cache, std::span<const int> leaving) override {
    received_.meet(cache);
    const std::vector<int> staying = staying_slots(cache, leaving);
    if (staying.empty()) {
      return;
    }
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      const auto mean_of = [&](int slot) {
        const Pos pos = cache.pos[static_cast<std::size_t>(slot)];
        return received_.of(lane, pos) / (cache.now - pos + 1);
      };
      struct Merged {
        Eigen::VectorXd v;  // (v_head_dim)
        double mean, log_votes;
      };
      std::map<int, Merged> merged;  // by target
      for (const int slot : leaving) {
        auto next = std::upper_bound(staying.begin(), staying.end(), slot);
        const int target = next == staying.end() ? staying.back() : *next;
        const auto it =
            merged.try_emplace(target, Merged{cache.value(lane, target).cast<double>(), mean_of(target), 0}).first;
        Merged& to = it->second;
        const double own = mean_of(slot), both = own + to.mean;
        if (both <= 0) {
          continue;
        }
        to.v += own / both * (cache.value(lane, slot).cast<double>() - to.v);
        to.log_votes += to.mean > 0 ? std::log(both) - std::log(to.mean) : 0;
        to.mean = config_.after == After::sum ? both : to.mean;
      }
      for (const auto& [slot, to] : merged) {
        const Pos pos = cache.pos[static_cast<std::size_t>(slot)];
        received_.of(lane, pos) = to.mean * (cache.now - pos + 1);
        const float more = config_.votes ? static_cast<float>(to.log_votes) : 0;
        store_merged(cache, lane, slot, cache.key(lane, slot), to.v.cast<float>(), cache.bias(lane, slot) + more,
                     element_bytes_);
      }
    }
  }

 private:
  Config config_;
  int element_bytes_;
  ReceivedAttention received_;
};

}  // namespace

extern const PartInfo weightedkv;
constinit const PartInfo weightedkv = describe<WeightedKv>();

}  // namespace kvreplay
