// Fair eviction: every span keeps the same fraction of its tokens, the best of each by score.
#include <algorithm>
#include <limits>
#include <numeric>

#include "policies/part.hpp"
#include "policies/shares.hpp"
#include "policies/spans.hpp"

namespace kvreplay {
namespace {

constexpr std::string_view kLeftovers[] = {"remainder", "last"};

class Fair final : public Allocator {
 public:
  struct Config {
    std::string spans;
    double strength = 1;
    Leftover rounding = Leftover::remainder;
  };
  static constexpr std::string_view kName = "fair";
  static constexpr std::string_view kSummary = "every span keeps the same fraction of its tokens";
  static constexpr std::string_view kPaper = "arXiv:2510.00231";
  static constexpr std::string_view kDeviation =
      "quotas only: the scores of the authors' code change too, per span (SnapKV's window is split, "
      "TOVA has an anchor in each). More than two spans, the largest remainder (their code: "
      "rounding=last) and strength between 0 and 1 are ours: the paper mentions an interpolation "
      "without a formula. Quotas hold at every eviction, decode tokens being one more span; a "
      "selector's protected tokens are the best of their span and count within its quota";
  static constexpr std::array kParams{
      text<&Config::spans>("spans",
                           "names of the spans, as system:question; none: all of the trace. Tokens between two are one "
                           "more span, those before the first and after the last belong to it"),
      number<&Config::strength>("strength", 0, 1, "0: as many of each span as scores alone keep; 1: equal fractions"),
      choice<&Config::rounding>("rounding", kLeftovers,
                                "what rounding down leaves: one each to the largest remainders, or all to the last"),
  };
  static Needs needs(const Config&) { return {.spans = true}; }

  explicit Fair(const Config& config) : config_(config), names_(span_names(config.spans)) {}
  bool per_layer() const override { return true; }
  bool ranks_tokens() const override { return true; }

  void check_spans(std::span<const TokenSpan> spans, Pos, int) const override {
    check_span_names("fair", spans, names_);
  }

  void over_tokens(const View& view, std::span<const TokenSpan> spans, int n_drop,
                   std::span<float> scores) const override {
    const std::vector<Pos> begins = regions(view, spans);
    const auto n_kept = static_cast<int>(scores.size()) - n_drop;
    std::vector<int> order(scores.size());  // of slots, the next to leave first
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[at(a)] < scores[at(b)]; });
    std::vector<std::size_t> region(scores.size());
    std::vector<int> n_here(begins.size(), 0), n_default(begins.size(), 0);
    for (int i = 0; i < std::ssize(order); ++i) {
      const auto slot = at(order[at(i)]);
      region[slot] = at(std::upper_bound(begins.begin(), begins.end(), view.pos[slot]) - begins.begin() - 1);
      ++n_here[region[slot]];
      n_default[region[slot]] += i >= n_drop;
    }
    std::vector<double> wanted;
    for (std::size_t r = 0; r < begins.size(); ++r) {
      const Pos end = r + 1 < begins.size() ? begins[r + 1] : view.now + 1;
      const double equal = static_cast<double>(n_kept) * (end - begins[r]) / (view.now + 1);
      wanted.push_back((1 - config_.strength) * n_default[r] + config_.strength * equal);
    }
    const std::vector<int> quotas = split(n_kept, wanted, n_here, config_.rounding);
    std::vector<int> left(begins.size());
    std::transform(n_here.begin(), n_here.end(), quotas.begin(), left.begin(), std::minus<>());
    for (int slot : order) {
      if (left[region[at(slot)]]-- > 0) {
        scores[at(slot)] = -std::numeric_limits<float>::infinity();
      }
    }
  }

 private:
  static std::size_t at(std::ptrdiff_t i) { return static_cast<std::size_t>(i); }

  // Where the spans begin that together are all tokens up to now; the decode tokens are the last of them.
  std::vector<Pos> regions(const View& view, std::span<const TokenSpan> spans) const {
    std::vector<TokenRange> chosen;
    for (const TokenSpan& s : spans) {
      const bool wanted = names_.empty() || std::find(names_.begin(), names_.end(), s.name) != names_.end();
      if (wanted && s.begin < view.prompt_len) {
        chosen.push_back({s.begin, s.end});
      }
    }
    std::sort(chosen.begin(), chosen.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
    std::vector<Pos> begins{0};
    for (std::size_t i = 1; i < chosen.size(); ++i) {
      for (const Pos border : {chosen[i - 1].end, chosen[i].begin}) {  // what lies between two is one more
        if (border > begins.back() && border <= chosen[i].begin) {
          begins.push_back(border);
        }
      }
    }
    if (!view.at_prefill()) {
      begins.push_back(view.prompt_len);
    }
    return begins;
  }

  Config config_;
  std::vector<std::string> names_;
};

}  // namespace

extern const PartInfo fair;
constinit const PartInfo fair = describe<Fair>();

}  // namespace kvreplay
