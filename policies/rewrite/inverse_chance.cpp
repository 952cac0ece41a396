// Hajek's ratio: a token that was kept by chance counts for all that it had a chance to stand for, as a bias of
// -ln(chance) on its logit.
#include "policies/part.hpp"
#include "policies/sampling.hpp"
#include "policies/staying.hpp"

namespace kvreplay {
namespace {

class InverseChance final : public Rewriter {
 public:
  using Config = SamplingConfig;
  static constexpr std::string_view kName = "inverse_chance";
  static constexpr bool kCorrects = true;
  static constexpr std::string_view kSummary = "sampled tokens weigh one over their chance to be kept";
  static constexpr std::string_view kPaper = "arXiv:2607.21475";
  static constexpr std::string_view kDeviation =
      "goes with the selector sample and must be given the same values as it; refused where a token left that was "
      "certain "
      "to stay. The bias is one more number per sampled slot.";
  static constexpr auto kParams = sampling_params<Config>();
  static Needs needs(const Config& c) { return {.prompt_queries = c.obs_window}; }

  InverseChance(const Config& config, const SetShape& shape)
      : sampler_(config, shape), element_bytes_(shape.element_bytes) {}

  void evicted(Cache& cache, std::span<const int> slots) override {
    const std::vector<double> chance = sampler_.chances(cache);
    for (const int i : slots) {
      if (chance[static_cast<std::size_t>(i)] == 1) {
        throw ConfigError("inverse_chance: the token at position " +
                          std::to_string(cache.pos[static_cast<std::size_t>(i)]) +
                          " left although its chance to stay was 1; it goes with the selector 'sample' and takes the "
                          "same sink, window and obs_window as it");
      }
    }
    for (const int i : staying_slots(cache, slots)) {
      const auto at = static_cast<std::size_t>(i);
      if (chance[at] == 1) {
        continue;
      }
      const auto bias = static_cast<float>(sampler_.survive(cache.pos[at], chance[at]));
      for (int lane = 0; lane < cache.n_lanes; ++lane) {
        const double more = cache.bias(lane, i) == 0 ? element_bytes_ : 0;
        cache.rewrite(lane, i, cache.key(lane, i), cache.value(lane, i), bias, cache.bytes(lane, i) + more);
      }
    }
  }

 private:
  Sampler sampler_;
  int element_bytes_;
};

}  // namespace

extern const PartInfo inverse_chance;
constinit const PartInfo inverse_chance = describe<InverseChance>();

}  // namespace kvreplay
