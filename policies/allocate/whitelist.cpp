// Whitelist: the tokens of named spans of the prompt stay in every set, the rest of the budget goes by score.
#include <limits>

#include "policies/part.hpp"
#include "policies/spans.hpp"

namespace kvreplay {
namespace {

class Whitelist final : public Allocator {
 public:
  struct Config {
    std::string spans;
  };
  static constexpr std::string_view kName = "whitelist";
  static constexpr std::string_view kSummary = "named spans of the prompt always stay, the others compete for the rest";
  static constexpr std::string_view kPaper = "arXiv:2510.00231";
  static constexpr std::string_view kDeviation =
      "as the authors' code at the prompt's cut; at decode steps the spans stay protected. The same "
      "budget for every set, since a method has one allocator: none is raised to hold the spans, a "
      "budget below them is refused. A selector's own protected tokens give way to the spans";
  static constexpr std::array kParams{
      text<&Config::spans>("spans", "names of the spans that stay, as system or system:question"),
  };
  static Needs needs(const Config&) { return {.spans = true}; }
  static void check(const Config& c, int) {
    if (c.spans.empty()) {
      throw ConfigError("whitelist needs spans=NAME, the span of the trace that stays; several as spans=A:B");
    }
  }

  explicit Whitelist(const Config& config) : text_(config.spans), names_(span_names(config.spans)) {}
  bool per_layer() const override { return true; }
  bool ranks_tokens() const override { return true; }

  void check_spans(std::span<const TokenSpan> spans, Pos prompt_len, int budget) const override {
    check_span_names("whitelist", spans, names_);
    int n = 0;
    for (const TokenRange& r : ranges_of(spans, names_, prompt_len)) {
      n += r.end - r.begin;
    }
    if (n > budget) {
      throw ConfigError("whitelist: spans=" + text_ + " holds " + std::to_string(n) +
                        " tokens of the prompt, more than the budget of " + std::to_string(budget));
    }
  }

  void over_tokens(const View& view, std::span<const TokenSpan> spans, int n_drop,
                   std::span<float> scores) const override {
    for (float& s : scores) {
      s = std::min(s, std::numeric_limits<float>::max());
    }
    int n = 0;
    for (const TokenRange& r : ranges_of(spans, names_, view.prompt_len)) {
      const auto from = std::lower_bound(view.pos.begin(), view.pos.end(), r.begin) - view.pos.begin();
      for (auto i = static_cast<std::size_t>(from); i < scores.size() && view.pos[i] < r.end; ++i, ++n) {
        scores[i] = std::numeric_limits<float>::infinity();
      }
    }
    if (n > static_cast<int>(scores.size()) - n_drop) {
      throw ConfigError("whitelist: spans=" + text_ + " holds " + std::to_string(n) + " tokens, but only " +
                        std::to_string(static_cast<int>(scores.size()) - n_drop) + " may stay");
    }
  }

 private:
  std::string text_;
  std::vector<std::string> names_;
};

}  // namespace

extern const PartInfo whitelist;
constinit const PartInfo whitelist = describe<Whitelist>();

}  // namespace kvreplay
