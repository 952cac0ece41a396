// A linear-attention state: exp(q . k) as a product of few positive features, so that evicted tokens are one matrix
// and one vector (LESS without its trained features, arXiv:2402.09398).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "policies/counter_rng.hpp"
#include "policies/lost_rows.hpp"
#include "policies/moments.hpp"
#include "policies/part.hpp"
#include "policies/weights.hpp"

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
    for (auto before = block.losses.first(first); !before.empty();) {
      const auto part = before.first(std::min<std::size_t>(before.size(), kPart));
      join(log_features(keys(part)), values(part));
      before = before.subspan(part.size());
    }
    const std::span<const Loss> fresh = block.losses.subspan(first);
    const auto n_fresh = static_cast<Eigen::Index>(fresh.size());

    // The scale is split evenly: logit = x_q . x_k with x_q = q / sqrt(scale), as q has it folded in.
    const MatD q_log = log_features(block.q.cast<double>() / root_scale_);
    const MatD k_log = log_features(keys(fresh)), v = values(fresh);
    MatD logits(rows, n_features + n_fresh), entries(n_features + n_fresh, value_.cols());
    logits << q_log.rowwise() + log_z_.matrix().transpose(), log_products(q_log, k_log);
    entries << value_, v;
    for (Eigen::Index i = 0; i < n_fresh; ++i) {
      const int step = std::min(fresh[static_cast<std::size_t>(i)].step, steps);
      logits.col(n_features + i).head(Eigen::Index{step} * block.n_heads).setConstant(kNothing);
    }
    const Eigen::ArrayXd top = logits.rowwise().maxCoeff();
    exp_rows(logits, Eigen::ArrayXd((top == kNothing).select(0.0, top)));
    const Eigen::ArrayXd mass = logits.rowwise().sum();
    out.log_mass = top + (top == kNothing).select(0.0, mass.log()) - std::log(static_cast<double>(n_features));
    out.value = logits * entries;
    out.value.array().colwise() /= (top == kNothing).select(1.0, mass);
    join(k_log, v);
  }
  double state_bytes() const override { return 4.0 * static_cast<double>(value_.size() + log_z_.size()); }

 private:
  static constexpr double kNothing = -std::numeric_limits<double>::infinity();
  static constexpr std::size_t kPart = 512;  // losses at once

  // (losses, head_dim), with their half of the scale.
  MatD keys(std::span<const Loss> losses) const { return root_scale_ * lost_rows(losses, &Loss::k, w_.cols()); }
  MatD values(std::span<const Loss> losses) const { return lost_rows(losses, &Loss::v, value_.cols()); }

  // (rows, features) w . x - |x|^2 / 2
  MatD log_features(const MatD& x) const {
    MatD f = x * w_.transpose();
    f.colwise() -= x.rowwise().squaredNorm() / 2;
    return f;
  }

  // (rows, losses) ln of the sum over features of exp(q_log + k_log).
  static MatD log_products(const MatD& q_log, const MatD& k_log) {
    constexpr double kLeast = 1e-280;  // below it the product has lost what it is a sum of
    const Eigen::ArrayXd q_top = q_log.rowwise().maxCoeff(), k_top = k_log.rowwise().maxCoeff();
    MatD q = q_log, k = k_log;
    exp_rows(q, q_top);
    exp_rows(k, k_top);
    const MatD sums = q * k.transpose();
    MatD logs = sums.array().log();
    for (Eigen::Index r = 0; r < logs.rows(); ++r) {
      logs.row(r).array() += k_top.transpose() + q_top[r];
      for (Eigen::Index i = 0; i < logs.cols(); ++i) {
        if (sums(r, i) < kLeast) {
          const Eigen::ArrayXd both = (q_log.row(r) + k_log.row(i)).transpose();
          logs(r, i) = both.maxCoeff() + std::log((both - both.maxCoeff()).exp().sum());
        }
      }
    }
    return logs;
  }

  // k_log: (losses, features), v: (losses, v_head_dim)
  void join(const MatD& k_log, const MatD& v) {
    if (k_log.rows() == 0) {
      return;
    }
    const Eigen::ArrayXd top = log_z_.max(k_log.colwise().maxCoeff().transpose().array());
    MatD weights = k_log.transpose();  // (features, losses)
    exp_rows(weights, top);
    const Eigen::ArrayXd known = weight_of(Eigen::ArrayXd(log_z_ - top));
    const Eigen::ArrayXd sum = known + weights.rowwise().sum().array();
    value_.array().colwise() *= known;
    value_ += weights * v;
    value_.array().colwise() /= sum;
    log_z_ = top + sum.log();
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
