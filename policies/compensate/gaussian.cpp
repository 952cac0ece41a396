// The evicted tokens as one Gaussian of keys and values: first-order value, and the mass that the
// variance of the logits adds, ln n + q . k_mean + var / 2.
#include <algorithm>
#include <cmath>
#include <limits>

#include "policies/moments.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Gaussian final : public Compensator {
 public:
  enum class Variance { diagonal, full };
  struct Config {
    Variance variance = Variance::diagonal;
    bool freeze = true;
    bool clip = true;
    double strength = 1;
  };
  static constexpr std::string_view kVariances[] = {"diagonal", "full"};
  static constexpr std::string_view kName = "gaussian";
  static constexpr std::string_view kSummary = "moments with second-order mass, frozen and clipped where it runs away";
  static constexpr std::string_view kPaper =
      "second-order mass: COBS, arXiv:2607.09052; freezing and balls: TiltKV "
      "(github.com/TahirSher/KV-Project)";
  static constexpr std::string_view kDeviation =
      "Our combination: one Gaussian for all evicted tokens of a lane. COBS uses low-rank "
      "covariances per block to select, TiltKV several chunks; radii are bounds kept while tokens "
      "leave, not exact maxima.";
  static constexpr std::array kParams = {
      choice<&Config::variance>("variance", kVariances, "of the evicted logits: from key variances or covariance"),
      flag<&Config::freeze>("freeze", "beyond a spread of sqrt(2 ln n) the mass grows linearly and the tilt stops"),
      flag<&Config::clip>("clip", "never beyond what the distance of keys and values from their means allows"),
      number<&Config::strength>("strength", 0, 2, "factor on the second-order term; 0 leaves first order's mass"),
  };

  Gaussian(const Config& config, const SetShape& shape) : config_(config) {
    const double d = shape.head_dim, dv = shape.v_head_dim;
    const double second = config.variance == Variance::full ? d * d : d;
    state_bytes_ = 4 * (d * dv + d + dv + 1 + second + (config.clip ? 2 : 0));
  }

  MomentNeeds needs() const override {
    const bool full = config_.variance == Variance::full;
    return {.tilt = true, .diagonal = !full, .full = full, .radii = config_.clip};
  }
  void estimate(const EvictedBlock& block, Estimate& out) override {
    const MomentRows& m = block.moments;
    const Eigen::ArrayXd& variance = config_.variance == Variance::full ? m.variance_full : m.variance_diagonal;
    out.log_mass.resize(m.n.size());
    out.value.resize(m.v_mean.rows(), m.v_mean.cols());
    for (Eigen::Index r = 0; r < m.n.size(); ++r) {
      if (m.n[r] == 0) {
        out.log_mass[r] = -std::numeric_limits<double>::infinity();
        out.value.row(r).setZero();
        continue;
      }
      const double log_n = std::log(m.n[r]);
      double excess = variance[r] / 2;  // ln mean exp(centred logit)
      double tilt = 1;
      if (config_.freeze && variance[r] > 2 * log_n) {  // the largest of n Gaussians lies at sqrt(2 ln n)
        const double spread = std::sqrt(variance[r]), limit = std::sqrt(2 * log_n);
        excess = spread * limit - log_n;
        tilt = limit / spread;
      }
      excess *= config_.strength;
      if (config_.clip) {
        const double q_norm = static_cast<double>(block.q.row(r).norm());
        excess = std::min(excess, q_norm * m.radius_k[r]);
        const double length = tilt * m.tilt.row(r).norm();
        if (length > m.radius_v[r]) {
          tilt *= m.radius_v[r] / length;
        }
      }
      out.log_mass[r] = log_n + m.mean_logit[r] + excess;
      out.value.row(r) = m.v_mean.row(r) + tilt * m.tilt.row(r);
    }
  }
  double state_bytes() const override { return state_bytes_; }

 private:
  Config config_;
  double state_bytes_;
};

}  // namespace

extern const PartInfo gaussian;
constinit const PartInfo gaussian = describe<Gaussian>();

}  // namespace kvreplay
