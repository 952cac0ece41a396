// Sampling: beside sinks and a window, each token is kept with a chance in proportion to its attention, on its own.
#include "policies/counter_rng.hpp"
#include "policies/part.hpp"
#include "policies/sampling.hpp"
#include "policies/staying.hpp"

namespace kvreplay {
namespace {

class Sample final : public Selector {
 public:
  using Config = SamplingConfig;
  static constexpr std::string_view kName = "sample";
  static constexpr std::string_view kSummary = "tokens drawn with chances in proportion to their attention";
  static constexpr std::string_view kPaper = "arXiv:2607.21475";
  static constexpr std::string_view kDeviation =
      "The number kept is random, about the budget and on average not above it. The chances' attention comes from the "
      "last queries (obs_window=32 is ours). Drawn once at the prompt's cut; with decode=evict at each eviction, "
      "chances "
      "multiplied. Alone it is a biased sample: inverse_chance makes up for the chances (preset hajek).";
  static constexpr auto kParams = sampling_params<Config>();
  static Traits traits(const Config&) { return {.decode = Decode::grow}; }
  static Needs needs(const Config& c) { return {.prompt_queries = c.obs_window}; }

  Sample(const Config& config, const SetShape& shape)
      : sampler_(config, shape), seed_(shape.seed), layer_(shape.layer), set_(shape.set) {}

  int surplus(const View& view) const override {
    if (static_cast<int>(view.pos.size()) <= view.budget) {
      return 0;
    }
    const std::vector<bool> kept = draw(view, sampler_.chances(view));
    return static_cast<int>(std::count(kept.begin(), kept.end(), false));
  }
  void score(const View& view, std::span<float> out) override {
    const std::vector<bool> kept = draw(view, sampler_.chances(view));
    std::copy(kept.begin(), kept.end(), out.begin());
  }
  void evicted(const View& view, std::span<const int> slots) override {
    const std::vector<double> chance = sampler_.chances(view);
    for (const int i : staying_slots(view, slots)) {
      sampler_.survive(view.pos[static_cast<std::size_t>(i)], chance[static_cast<std::size_t>(i)]);
    }
  }

 private:
  std::vector<bool> draw(const View& view, const std::vector<double>& chance) const {
    std::vector<bool> kept;
    for (std::size_t i = 0; i < chance.size(); ++i) {
      kept.push_back(uniform_at(seed_, layer_, set_, view.now, view.pos[i]) < chance[i]);
    }
    return kept;
  }

  Sampler sampler_;
  std::uint64_t seed_;
  int layer_, set_;
};

}  // namespace

extern const PartInfo sample;
constinit const PartInfo sample = describe<Sample>();

}  // namespace kvreplay
