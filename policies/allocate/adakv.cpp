// Ada-KV: rank the tokens of all heads of a layer together; a head's budget is how many it has at
// the top.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class Safeguard { kvpress, official };
constexpr std::string_view kSafeguards[] = {"kvpress", "official"};

class AdaKv final : public Allocator {
 public:
  struct Config {
    Safeguard safeguard = Safeguard::kvpress;
    double alpha = 0.2;
  };
  static constexpr std::string_view kName = "adakv";
  static constexpr std::string_view kSummary = "heads share a layer's budget by their counts among its top scores";
  static constexpr std::string_view kPaper = "arXiv:2407.11550";
  static constexpr std::string_view kDeviation =
      "kvpress' safeguard by default (the authors' with safeguard=official); a head keeps at least "
      "one token";
  static constexpr std::array kParams{
      choice<&Config::safeguard>("safeguard", kSafeguards,
                                 "kvpress: each head's own top alpha * budget is sure, the rest compete; official: "
                                 "all compete, then budgets move towards the mean by alpha"),
      number<&Config::alpha>("alpha", 0, 1, "share of the budget that is safe: 0 none, 1 uniform"),
  };

  explicit AdaKv(const Config& config) : config_(config) {}
  bool per_layer() const override { return true; }
  bool over_sets() const override { return true; }

  std::vector<int> assign(const std::vector<std::vector<float>>& scores, int mean_budget) const override {
    return config_.safeguard == Safeguard::kvpress ? with_floor(scores, mean_budget)
                                                   : interpolated(scores, mean_budget);
  }

 private:
  using Scores = std::vector<std::vector<float>>;

  // How many of the `n` highest of all scores each set has, once its own `skip` highest are set
  // aside.
  static std::vector<int> counts(const Scores& scores, const std::vector<int>& skip, std::size_t n) {
    std::vector<std::pair<float, int>> rest;  // (score, set)
    for (std::size_t s = 0; s < scores.size(); ++s) {
      std::vector<float> sorted = scores[s];
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (auto i = static_cast<std::size_t>(skip[s]); i < sorted.size(); ++i) {
        rest.emplace_back(sorted[i], static_cast<int>(s));
      }
    }
    n = std::min(n, rest.size());
    std::partial_sort(
        rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(n), rest.end(),
        [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
    std::vector<int> count(scores.size(), 0);
    for (std::size_t i = 0; i < n; ++i) {
      ++count[static_cast<std::size_t>(rest[i].second)];
    }
    return count;
  }

  std::vector<int> with_floor(const Scores& scores, int mean_budget) const {
    const int safe = std::max(1, static_cast<int>(mean_budget * config_.alpha + kRound));
    const auto left = scores.size() * static_cast<std::size_t>(mean_budget - safe);
    std::vector<int> budgets = counts(scores, std::vector<int>(scores.size(), safe), left);
    for (int& b : budgets) {
      b += safe;
    }
    return budgets;
  }

  // Protected tokens (infinite scores) lie beside the competition, as the window does in the
  // authors' code.
  std::vector<int> interpolated(const Scores& scores, int mean_budget) const {
    std::vector<int> held;
    for (const auto& s : scores) {
      const auto n = std::count(s.begin(), s.end(), std::numeric_limits<float>::infinity());
      held.push_back(std::min(mean_budget, static_cast<int>(n)));
    }
    std::size_t total = 0;
    for (int h : held) {
      total += static_cast<std::size_t>(mean_budget - h);
    }
    std::vector<int> budgets = counts(scores, held, total);
    for (std::size_t s = 0; s < budgets.size(); ++s) {
      const double floor = std::floor(config_.alpha * (mean_budget - held[s]) + kRound);
      budgets[s] = std::max(1, held[s] + static_cast<int>(std::rint(budgets[s] * (1 - config_.alpha) + floor)));
    }
    return budgets;
  }

  static constexpr double kRound = 1e-9;
  Config config_;
};

}  // namespace

extern const PartInfo adakv;
constinit const PartInfo adakv = describe<AdaKv>();

}  // namespace kvreplay
