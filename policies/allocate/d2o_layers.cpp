// D2O's layer level: layers whose heads spread their attention get more tokens than those where it is dense on a few.
#include <algorithm>
#include <cmath>

#include "policies/part.hpp"
#include "policies/shares.hpp"

namespace kvreplay {
namespace {

class D2oLayers final : public Allocator {
 public:
  struct Config {
    int first = 2, last = 1;
    double least = 0.01;
  };
  static constexpr std::string_view kName = "d2o_layers";
  static constexpr std::string_view kSummary =
      "layers get more the less the attention that their tokens receive varies; the first and last keep all";
  static constexpr std::string_view kPaper = "arXiv:2406.13035";
  static constexpr std::string_view kDeviation =
      "as the authors' code, but the prompt is cut at its end. The total is not kept, as there: whole layers and "
      "the least of a layer come on top, what a layer would get beyond the prompt lapses; compare at measured "
      "residency. The softmax runs over the layers of the run, whole ones included; a layer whose heads are all alike "
      "counts as 0 (the code divides by 0)";
  static constexpr std::array kParams{
      number<&Config::first>("first", 0, kUnbounded, "first layers of the model that keep everything"),
      number<&Config::last>("last", 0, kUnbounded, "last layers of the model that keep everything"),
      number<&Config::least>("least", 0, 1, "share of the prompt that every layer keeps at least"),
  };
  static Needs needs(const Config&) { return {.prompt_queries = Needs::kAll}; }

  explicit D2oLayers(const Config& config) : config_(config) {}
  bool measures() const override { return true; }

  // F: the variance over tokens of the attention received, min-max normalised over the query heads, its mean over them.
  std::vector<double> measure(const Prompt& prompt) const override {
    std::vector<double> variance;
    for (const MatD& mass : prompt.column_mass) {
      for (Eigen::Index h = 0; h < mass.rows(); ++h) {
        const Eigen::ArrayXd head = mass.row(h).transpose();  // (prompt_len)
        variance.push_back((head - head.mean()).square().mean());
      }
    }
    const auto [low, high] = std::minmax_element(variance.begin(), variance.end());
    double f = 0;
    for (const double v : variance) {
      f += *high > *low ? (v - *low) / (*high - *low) / static_cast<double>(variance.size()) : 0;
    }
    return {f};
  }

  std::vector<int> over_layers(const Layers& l) const override {
    if (l.budget >= l.n_tokens) {
      return Allocator::over_layers(l);  // nobody has to do without
    }
    KVREPLAY_CHECK(l.measured.rows() == std::ssize(l.index));
    const Eigen::ArrayXd weight = (l.measured.col(0).minCoeff() - l.measured.col(0).array()).exp();
    const double total = l.budget * static_cast<double>(l.index.size());
    std::vector<int> budgets;
    for (std::size_t i = 0; i < l.index.size(); ++i) {
      const bool whole = l.index[i] < config_.first || l.index[i] >= l.n_layers - config_.last;
      const double share = weight[static_cast<Eigen::Index>(i)] / weight.sum() * total;
      const double most = room(l), least = std::min(most, std::max(1.0, config_.least * l.prompt_len));
      budgets.push_back(whole ? l.n_tokens : static_cast<int>(std::rint(std::clamp(share, least, most))));
    }
    return budgets;
  }

 private:
  Config config_;
};

}  // namespace

extern const PartInfo d2o_layers;
constinit const PartInfo d2o_layers = describe<D2oLayers>();

}  // namespace kvreplay
