// PyramidKV: budgets fall linearly from the first layer to the last.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class Version { kvpress, official };
constexpr std::string_view kVersions[] = {"kvpress", "official"};

class Pyramid final : public Allocator {
 public:
  struct Config {
    Version version = Version::kvpress;
    int window = 64;
    double beta = 20;
  };
  static constexpr std::string_view kName = "pyramid";
  static constexpr std::string_view kSummary = "more tokens for the first layers of the model, fewer for the last";
  static constexpr std::string_view kPaper = "arXiv:2406.02069";
  static constexpr std::string_view kDeviation =
      "as kvpress, whose pyramid is off (all layers alike) when the last layer would get less than "
      "window: with these "
      "defaults for every budget below 1280";
  static constexpr std::array kParams{
      choice<&Config::version>("version", kVersions,
                               "kvpress: the window is within the budgets; official: integers, the window on top"),
      number<&Config::window>("window", 0, kUnbounded, "the selector's obs_window", Scale::log),
      number<&Config::beta>("beta", 1, 1e6, "the last layer gets budget / beta", Scale::log),
  };

  explicit Pyramid(const Config& config) : config_(config) {}

  bool per_layer() const override { return true; }  // by the model's own layer numbers
  std::vector<int> over_layers(const Layers& l) const override {
    const bool kvpress = config_.version == Version::kvpress;
    const double w = config_.window;
    const double base = kvpress ? l.budget : l.budget - w;
    double low = base / config_.beta;
    if (!kvpress) {
      low = std::floor(low);
    }
    double high = 2 * base - low;
    if (high >= l.prompt_len - w) {
      high = l.prompt_len - w;
      low = 2 * base - high;
    }
    const bool off =
        kvpress ? !(l.prompt_len >= high && high >= low && low >= w) : base < 1 || l.prompt_len < 2 * base || low < 0;
    if (off || l.n_layers < 2) {
      return Allocator::over_layers(l);
    }
    double step = (high - low) / (l.n_layers - 1);
    if (!kvpress) {
      step = std::floor(step);
    }
    std::vector<int> budgets;
    for (int layer : l.index) {
      const double budget = std::rint(high - layer * step) + (kvpress ? 0 : w);
      budgets.push_back(std::max(1, static_cast<int>(budget)));
    }
    return budgets;
  }

 private:
  Config config_;
};

}  // namespace

extern const PartInfo pyramid;
constinit const PartInfo pyramid = describe<Pyramid>();

}  // namespace kvreplay
