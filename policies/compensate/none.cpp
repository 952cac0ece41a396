// None: nothing is remembered and nothing added; what happens without a compensator, by name.
#include <limits>

#include "policies/moments.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class None final : public Compensator {
 public:
  struct Config {};
  static constexpr std::string_view kName = "none";
  static constexpr std::string_view kSummary = "nothing is remembered of the evicted";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  static constexpr bool kIsDefault = true;

  None(const Config&, const SetShape& shape) : v_head_dim_(shape.v_head_dim) {}

  MomentNeeds needs() const override { return {}; }
  void estimate(const EvictedBlock& block, Estimate& out) override {
    out.log_mass.setConstant(block.q.rows(), -std::numeric_limits<double>::infinity());
    out.value.setZero(block.q.rows(), v_head_dim_);
  }
  double state_bytes() const override { return 0; }

 private:
  int v_head_dim_;
};

}  // namespace

extern const PartInfo none;
constinit const PartInfo none = describe<None>();

}  // namespace kvreplay
