#include "policies/look_ahead.hpp"

#include <cmath>

namespace kvreplay {
namespace {

// ln of the sum of weights, and the mean of the values under them.
struct Attended {
  double log_mass;
  Eigen::RowVectorXd output;  // (v_head_dim)
};

Attended attend(const Eigen::ArrayXd& logits, const Eigen::Ref<const MatD>& values) {
  const double top = logits.maxCoeff();
  const Eigen::ArrayXd w = (logits - top).exp();
  const double sum = w.sum();
  return {top + std::log(sum), w.matrix().transpose() * values / sum};
}

double log_of_sum(double a, double b) { return std::max(a, b) + std::log1p(std::exp(-std::abs(a - b))); }

}  // namespace

Eigen::ArrayXd look_ahead(const Evicted64& evicted, const Eigen::Ref<const Eigen::VectorXd>& q,
                          const Eigen::Ref<const Eigen::ArrayXd>& logits, const Eigen::Ref<const MatD>& values) {
  const Eigen::Index n = logits.size();
  const double before = evicted.n, after = before + 1;
  const Attended retained = attend(logits, values);
  const double mean_logit = q.dot(evicted.k_mean);
  const Eigen::RowVectorXd v_mean = evicted.v_mean.transpose();
  const Eigen::RowVectorXd tilt = (evicted.scatter * q).transpose() / before;  // c in the formulas below
  const Eigen::RowVectorXd estimate = v_mean + tilt;
  const double log_evicted = std::log(before) + mean_logit, log_all = log_of_sum(retained.log_mass, log_evicted);
  const double share = std::exp(retained.log_mass - log_all);
  const Eigen::RowVectorXd apart = retained.output - estimate, out = estimate + share * apart;

  // With j among the evicted: Y' = (n + 1) exp(s + ds / (n + 1)), ds = logit - s, and their estimate is
  // v_mean + n c / (n + 1) + beta (v - v_mean). What is left of the retained has mass Z - w. Written out, out' - out is
  // a sum of these four vectors, whose coefficients are no larger than 2 as long as w is not most of Z.
  const Eigen::ArrayXd ds = logits - mean_logit;
  const Eigen::ArrayXd beta = 1 / after + before / (after * after) * ds;
  const Eigen::ArrayXd log_left =
      retained.log_mass + (-(logits - retained.log_mass).exp().min(1 - 1e-12)).log1p();  // ln(Z - w)
  const Eigen::ArrayXd log_joined = std::log(after) + mean_logit + ds / after;           // ln Y'
  const Eigen::ArrayXd log_total =
      log_left.max(log_joined) + (-(log_left - log_joined).abs()).exp().log1p();  // ln(Z - w + Y')
  const Eigen::ArrayXd joined = (log_joined - log_total).exp();                   // Y' / (Z - w + Y')
  const Eigen::ArrayXd both = (log_evicted + retained.log_mass - log_all - log_total).exp();
  MatD change = values.rowwise() - out;  // (n, v_head_dim)
  change.array().colwise() *= joined * beta - (logits - log_total).exp();
  change += (joined * beta).matrix() * (out - v_mean);
  change -= (joined * share - both).matrix() * apart;
  change -= (joined / after).matrix() * tilt;
  Eigen::ArrayXd cost = change.rowwise().norm();

  // The one token that can be most of Z: from what is left without it.
  Eigen::Index top = 0;
  logits.maxCoeff(&top);
  Eigen::RowVectorXd without = v_mean + before / after * tilt + beta[top] * (values.row(top) - v_mean);
  if (n > 1) {
    Eigen::ArrayXd others(n - 1);
    others << logits.head(top), logits.tail(n - 1 - top);
    MatD other_values(n - 1, values.cols());
    other_values << values.topRows(top), values.bottomRows(n - 1 - top);
    const Attended left = attend(others, other_values);
    without += std::exp(left.log_mass - log_of_sum(left.log_mass, log_joined[top])) * (left.output - without);
  }
  cost[top] = (without - out).norm();
  return cost;
}

}  // namespace kvreplay
