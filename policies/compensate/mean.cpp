// The evicted tokens as one token: their mean value, with the mass that their mean logit implies.
#include <limits>

#include "policies/moments.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Mean final : public Compensator {
 public:
  struct Config {};
  static constexpr std::string_view kName = "mean";
  static constexpr std::string_view kSummary = "mean value of the evicted, mass n exp(q . mean key)";
  static constexpr std::string_view kPaper = "arXiv:2606.01563";
  static constexpr std::string_view kDeviation =
      "Means are kept in float32. That the ablation keeps the first-order method's mass is our "
      "reading: the paper gives only its memory, which holds two vectors.";
  static constexpr std::span<const ParamInfo> kParams = {};

  Mean(const Config&, const SetShape& shape) : state_bytes_(4.0 * (shape.head_dim + shape.v_head_dim + 1)) {}

  MomentNeeds needs() const override { return {}; }
  void estimate(const EvictedBlock& block, Estimate& out) override {
    const MomentRows& m = block.moments;
    out.log_mass = (m.n > 0).select(m.n.max(1).log() + m.mean_logit, -std::numeric_limits<double>::infinity());
    out.value = m.v_mean;
  }
  double state_bytes() const override { return state_bytes_; }

 private:
  double state_bytes_;
};

}  // namespace

extern const PartInfo mean;
constinit const PartInfo mean = describe<Mean>();

}  // namespace kvreplay
