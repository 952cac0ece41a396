// Full: nothing is evicted; what every method is measured against, and the base of readers and
// encoders.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Full final : public Selector {
 public:
  struct Config {};
  static constexpr std::string_view kName = "full";
  static constexpr std::string_view kSummary = "keeps every token";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  static bool budgeted(const Config&) { return false; }

  Full(const Config&, const SetShape&) {}
  int surplus(const View&) const override { return 0; }
  void score(const View&, std::span<float> out) override { std::fill(out.begin(), out.end(), 0.0F); }
};

}  // namespace

extern const PartInfo full;
constinit const PartInfo full = describe<Full>();

}  // namespace kvreplay
