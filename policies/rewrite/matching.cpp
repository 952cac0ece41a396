// Attention Matching: kept keys get a bias, so that their softmax mass is that of the whole prompt, and new values, so
// that their output is; both by least squares on reference queries.
#include <cmath>
#include <numeric>

#include "policies/part.hpp"
#include "policies/prompt_fit.hpp"
#include "policies/staying.hpp"

namespace kvreplay {
namespace {

class Matching final : public Rewriter {
 public:
  struct Config {
    int queries = 256;
    bool bias = true;
    bool values = true;
    double least = -3;
    double most = 3;
    int steps = 2;
    double ridge = 0;
  };
  static constexpr std::string_view kName = "matching";
  static constexpr bool kCorrects = true;
  static constexpr std::string_view kSummary =
      "biases and values of kept keys fitted to the mass and output of the prompt";
  static constexpr std::string_view kPaper = "arXiv:2602.16284";
  static constexpr std::string_view kDeviation =
      "Once, at the prompt's cut, on the prompt's last queries over their own past (queries=256 is ours; the paper "
      "makes "
      "its own queries from the context): with fewer than two queries per kept key the fit follows them alone. Biases "
      "within [e^-3, e^3] and 2 steps are the code's fast profile; its omp profile is least=-27.6,most=7,steps=0. "
      "Least "
      "squares carry a ridge of at least 1e-10 of the largest squared singular value. A bias is one more number per "
      "slot.";
  static constexpr std::array kParams{
      number<&Config::queries>("queries", 1, kUnbounded, "last prompt queries that are fitted", Scale::log),
      flag<&Config::bias>("bias", "biases are fitted"),
      flag<&Config::values>("values", "values are fitted"),
      number<&Config::least>("least", -50, 0, "smallest bias"),
      number<&Config::most>("most", 0, 50, "largest bias"),
      number<&Config::steps>("steps", 0, 10000, "projected gradient steps after least squares are clamped"),
      number<&Config::ridge>("ridge", 0, 1, "of the values, as a share of the largest squared singular value"),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = c.queries}; }

  Matching(const Config& config, const SetShape& shape) : config_(config), element_bytes_(shape.element_bytes) {}

  void evicted(Cache& cache, std::span<const int> slots) override {
    if (!cache.at_prefill()) {
      return;
    }
    const std::vector<int> kept = staying_slots(cache, slots);
    for (int lane = 0; lane < cache.n_lanes && !kept.empty(); ++lane) {
      fit(cache, lane, kept);
    }
  }

 private:
  void fit(Cache& cache, int lane, const std::vector<int>& kept) const {
    std::vector<int> all(cache.pos.size());
    std::iota(all.begin(), all.end(), 0);
    const FitRows rows = fit_rows(cache, lane, config_.queries, kept);
    if (rows.q.rows() == 0) {
      return;
    }
    MatD logits = rows.logits(Eigen::all, kept);
    MatD v = values_of(cache, lane, kept);
    Eigen::VectorXd bias = Eigen::VectorXd::Zero(logits.cols());
    if (config_.bias) {
      const Eigen::VectorXd top = rows.logits.rowwise().maxCoeff();
      MatD of_all = rows.logits, of_kept = logits;
      exp_rows(of_all, top);
      exp_rows(of_kept, top);
      bias = weights(of_kept, of_all.rowwise().sum()).array().log();
    }
    if (config_.values) {
      logits.rowwise() += bias.transpose();
      v = least_squares(softmax_rows(logits), softmax_rows(rows.logits) * values_of(cache, lane, all), config_.ridge);
    }
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const auto row = static_cast<Eigen::Index>(i);
      const int slot = kept[i];
      cache.rewrite(lane, slot, cache.key(lane, slot), v.row(row).transpose().cast<float>(),
                    cache.bias(lane, slot) + static_cast<float>(bias[row]),
                    cache.bytes(lane, slot) + (config_.bias ? element_bytes_ : 0));
    }
  }

  // Largest eigenvalue of a Gram matrix.
  static double largest(const Eigen::MatrixXd& gram) {
    Eigen::VectorXd x = Eigen::VectorXd::Ones(gram.rows()).normalized();
    double value = 0;
    for (int i = 0; i < 500; ++i) {
      Eigen::VectorXd next = gram * x;
      const double norm = next.norm();
      if (!(norm > 0)) {
        return 0;
      }
      x = next / norm;
      const bool settled = std::abs(norm - value) <= 1e-12 * norm;
      value = norm;
      if (settled) {
        break;
      }
    }
    return value;
  }

  // Solves x b = y with a ridge relative to x's largest squared singular value.
  static MatD least_squares(const MatD& x, const MatD& y, double ridge) {
    const bool wide = x.rows() < x.cols();
    Eigen::MatrixXd gram = wide ? Eigen::MatrixXd(x * x.transpose()) : Eigen::MatrixXd(x.transpose() * x);
    gram.diagonal().array() += std::max(std::max(ridge, 1e-10) * largest(gram), std::numeric_limits<double>::min());
    if (wide) {
      return x.transpose() * gram.llt().solve(y);
    }
    return gram.llt().solve(x.transpose() * y);
  }

  // Weights of the columns of x within the bounds, for x w = y.
  Eigen::VectorXd weights(const MatD& x, const Eigen::VectorXd& y) const {
    const double lo = std::exp(config_.least), hi = std::exp(config_.most);
    Eigen::VectorXd w = least_squares(x, y, 0).col(0).cwiseMax(lo).cwiseMin(hi);
    const double steepest = config_.steps > 0 ? largest(x.transpose() * x) : 0;
    for (int i = 0; i < config_.steps && steepest > 0; ++i) {
      w -= x.transpose() * (x * w - y) / steepest;
      w = w.cwiseMax(lo).cwiseMin(hi);
    }
    return w;
  }

  Config config_;
  int element_bytes_;
};

}  // namespace

extern const PartInfo matching;
constinit const PartInfo matching = describe<Matching>();

}  // namespace kvreplay
