// Uniform: every set gets the same budget; what happens without an allocator, by name.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Uniform final : public Allocator {
 public:
  struct Config {};
  static constexpr std::string_view kName = "uniform";
  static constexpr std::string_view kSummary = "the same budget for every layer and head";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  static constexpr bool kIsDefault = true;

  explicit Uniform(const Config&) {}
  bool per_layer() const override { return true; }
};

}  // namespace

extern const PartInfo uniform;
constinit const PartInfo uniform = describe<Uniform>();

}  // namespace kvreplay
