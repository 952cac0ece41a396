// A linear-attention state: exp(q . k) as a product of few positive features, so that evicted tokens are one matrix
// and one vector (LESS without its trained features, arXiv:2402.09398).
#include <cmath>
#include <limits>
#include <numbers>

#include "policies/counter_rng.hpp"
#include "policies/moments.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Linear final : public Compensator {
 public:
  struct Config {
    int features = 8;
  };
  static constexpr std::string_view kName = "linear";
  static constexpr std::string_view kSummary = "linear-attention state of positive random features, a negative control";
  static constexpr std::string_view kPaper = "arXiv:2402.09398";
  static constexpr std::string_view kDeviation =
      "LESS trains its features; here they are random, exp(w . x - |x|^2 / 2) with w normal: unbiased for exp(q . k), "
      "but "
      "of a variance that explodes with the size of keys and queries. features=8 is the paper's size.";
  static constexpr std::array kParams = {
      number<&Config::features>("features", 1, 4096, "of a key or a query", Scale::log),
  };

  Linear(const Config& config, const SetShape& shape)
      : root_scale_(std::sqrt(static_cast<double>(shape.scale))),
        w_(config.features, shape.head_dim),
        log_z_(Eigen::ArrayXd::Constant(config.features, kNothing)),
        value_(MatD::Zero(config.features, shape.v_head_dim)) {
    for (Eigen::Index r = 0; r < w_.rows(); ++r) {
      for (Eigen::Index i = 0; i < w_.cols(); ++i) {
        const auto draw = [&](int of) { return uniform_at(shape.seed, shape.layer, shape.kv_head, r, i, of); };
        w_(r, i) = std::sqrt(-2 * std::log(1 - draw(0))) * std::cos(2 * std::numbers::pi * draw(1));
      }
    }
  }

  MomentNeeds needs() const override { return {}; }
  // The state at the block's start is one softmax entry per feature; a token lost inside the block is one of its own,
  // whose logit is what the features say of exp(q . k).
  void estimate(const EvictedBlock& block, Estimate& out) override {
    const Eigen::Index rows = block.q.rows(), n_features = w_.rows();
    const int steps = static_cast<int>(rows) / block.n_heads;
    std::size_t first = 0;
    while (first < block.losses.size() && block.losses[first].step <= 0) {
      ++first;
    }
    join(block.losses.first(first));
    const std::span<const Loss> fresh = block.losses.subspan(first);
    const auto n_fresh = static_cast<Eigen::Index>(fresh.size());

    // The scale is split evenly: logit = x_q . x_k with x_q = q / sqrt(scale), as q has it folded in.
    const MatD q_log = log_features(block.q.cast<double>() / root_scale_);
    MatD logits(rows, n_features + n_fresh), values(n_features + n_fresh, value_.cols());
    logits.leftCols(n_features) = q_log.rowwise() + log_z_.matrix().transpose();
    values.topRows(n_features) = value_;
    for (Eigen::Index i = 0; i < n_fresh; ++i) {
      const Loss& loss = fresh[static_cast<std::size_t>(i)];
      const MatD k_log = log_features(key(loss).cast<double>() * root_scale_);
      const Eigen::Index from = std::min<Eigen::Index>(rows, Eigen::Index{std::min(loss.step, steps)} * block.n_heads);
      logits.col(n_features + i).head(from).setConstant(kNothing);
      for (Eigen::Index r = from; r < rows; ++r) {
        const Eigen::ArrayXd both = (q_log.row(r) + k_log.row(0)).transpose();
        logits(r, n_features + i) = both.maxCoeff() + std::log((both - both.maxCoeff()).exp().sum());
      }
      values.row(n_features + i) = Eigen::Map<const Eigen::RowVectorXf>(loss.v, value_.cols()).cast<double>();
    }
    out.log_mass.resize(rows);
    out.value = MatD::Zero(rows, value_.cols());
    const Eigen::ArrayXd top = logits.rowwise().maxCoeff();
    logits = (logits.array().colwise() - (top == kNothing).select(0.0, top)).exp();
    const Eigen::ArrayXd mass = logits.rowwise().sum();
    out.log_mass = top + (top == kNothing).select(0.0, mass.log()) - std::log(static_cast<double>(n_features));
    out.value.noalias() = logits * values;
    out.value.array().colwise() /= (top == kNothing).select(1.0, mass);
    join(fresh);
  }
  double state_bytes() const override { return 4.0 * static_cast<double>(value_.size() + log_z_.size()); }

 private:
  static constexpr double kNothing = -std::numeric_limits<double>::infinity();

  Eigen::Map<const Eigen::RowVectorXf> key(const Loss& loss) const { return {loss.k, w_.cols()}; }

  // (rows, features) w . x - |x|^2 / 2
  MatD log_features(const MatD& x) const {
    MatD f = x * w_.transpose();
    f.colwise() -= x.rowwise().squaredNorm() / 2;
    return f;
  }

  void join(std::span<const Loss> losses) {
    for (const Loss& loss : losses) {
      const Eigen::ArrayXd more = log_features(key(loss).cast<double>() * root_scale_).row(0).transpose();
      const Eigen::RowVectorXd v = Eigen::Map<const Eigen::RowVectorXf>(loss.v, value_.cols()).cast<double>();
      for (Eigen::Index r = 0; r < w_.rows(); ++r) {
        const double top = std::max(log_z_[r], more[r]);
        log_z_[r] = top + std::log(std::exp(log_z_[r] - top) + std::exp(more[r] - top));
        value_.row(r) += std::exp(more[r] - log_z_[r]) * (v - value_.row(r));
      }
    }
  }

  double root_scale_;
  MatD w_;                // (features, head_dim)
  Eigen::ArrayXd log_z_;  // (features) ln of the sum over tokens of the features
  MatD value_;            // (features, v_head_dim) mean values under them
};

}  // namespace

extern const PartInfo linear;
constinit const PartInfo linear = describe<Linear>();

}  // namespace kvreplay
