// The keys of Attention Matching: those of most attention, or picked one by one so that their weights can stand for the
// mass of all (orthogonal matching pursuit).
#include <cmath>

#include "policies/part.hpp"
#include "policies/prompt_fit.hpp"

namespace kvreplay {
namespace {

class MatchKeys final : public Selector {
 public:
  enum class Choice { attention, omp };
  enum class Over { rms, mean, max };
  struct Config {
    Choice choice = Choice::attention;
    Over over = Over::rms;
    int queries = 256;
    double most = 7;
  };
  static constexpr std::string_view kChoices[] = {"attention", "omp"};
  static constexpr std::string_view kOvers[] = {"rms", "mean", "max"};
  static constexpr std::string_view kName = "match_keys";
  static constexpr std::string_view kSummary =
      "the keys that Attention Matching keeps: most attended, or greedy for the mass";
  static constexpr std::string_view kPaper = "arXiv:2602.16284";
  static constexpr std::string_view kDeviation =
      "Reference queries are the prompt's last, over their own past (queries=256 is ours; the paper makes its own "
      "queries "
      "from the context), one set per KV head. omp picks one key at a time, weights refitted by least squares and "
      "clamped; the code's faster schedules and its second picks for keys of tiny weight are left out.";
  static constexpr std::array kParams{
      choice<&Config::choice>("choice", kChoices, "attention: highest over the queries; omp: matching pursuit"),
      choice<&Config::over>("over", kOvers, "how attention of the queries becomes one number"),
      number<&Config::queries>("queries", 1, kUnbounded, "last queries to refer to", Scale::log),
      number<&Config::most>("most", 0, 50, "ln of the largest weight of a picked key, in omp"),
  };
  static Traits traits(const Config&) { return {.decode = Decode::grow}; }
  static Needs needs(const Config& c) { return {.prompt_queries = c.queries}; }

  MatchKeys(const Config& config, const SetShape&) : config_(config) {}

  void score(const View& view, std::span<float> out) override {
    const auto n = static_cast<Eigen::Index>(out.size());
    Eigen::ArrayXd total = Eigen::ArrayXd::Zero(n), most = Eigen::ArrayXd::Zero(n);
    double n_rows = 0;
    std::vector<MatD> lanes;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      const MatD logits = fit_rows(view, lane, config_.queries).logits;
      const MatD attn = softmax_rows(logits);
      total += (config_.over == Over::rms ? MatD(attn.cwiseAbs2()) : attn).colwise().sum().transpose().array();
      most = most.max(attn.colwise().maxCoeff().transpose().array());
      n_rows += static_cast<double>(attn.rows());
      if (config_.choice == Choice::omp) {
        lanes.push_back(logits);
        exp_rows(lanes.back(), Eigen::VectorXd(logits.rowwise().maxCoeff()));
      }
    }
    const Eigen::ArrayXd scores = config_.over == Over::max   ? most
                                  : config_.over == Over::rms ? Eigen::ArrayXd((total / n_rows).sqrt())
                                                              : total / n_rows;
    for (Eigen::Index i = 0; i < n; ++i) {
      out[static_cast<std::size_t>(i)] = static_cast<float>(scores[i]);
    }
    if (config_.choice == Choice::omp) {
      pick(lanes, static_cast<Eigen::Index>(n_rows), std::min<Eigen::Index>(view.budget, n), out);
    }
  }

 private:
  // Picks get scores above 1, the first the highest.
  void pick(const std::vector<MatD>& lanes, Eigen::Index n_rows, Eigen::Index n_picks, std::span<float> out) const {
    MatD columns(n_rows, static_cast<Eigen::Index>(out.size()));
    Eigen::Index from = 0;
    for (const MatD& lane : lanes) {
      columns.middleRows(from, lane.rows()) = lane;
      from += lane.rows();
    }
    const Eigen::VectorXd target = columns.rowwise().sum();
    const double floor = 1e-10 * columns.colwise().squaredNorm().maxCoeff();  // keeps equal keys solvable
    Eigen::VectorXd residual = target;
    Eigen::MatrixXd lower = Eigen::MatrixXd::Zero(n_picks, n_picks);  // Cholesky factor of the picks' Gram matrix
    Eigen::VectorXd moments(n_picks);                                 // of the picks with the target
    std::vector<Eigen::Index> picks;
    std::vector<bool> picked(out.size(), false);
    for (Eigen::Index i = 0; i < n_picks; ++i) {
      const Eigen::VectorXd correlation = columns.transpose() * residual;
      Eigen::Index best = -1;
      for (Eigen::Index j = 0; j < correlation.size(); ++j) {
        if (!picked[static_cast<std::size_t>(j)] && (best < 0 || correlation[j] > correlation[best])) {
          best = j;
        }
      }
      picked[static_cast<std::size_t>(best)] = true;
      out[static_cast<std::size_t>(best)] = static_cast<float>(n_picks - i + 1);
      const auto column = columns.col(best);
      const auto before = lower.topLeftCorner(i, i).triangularView<Eigen::Lower>();
      Eigen::VectorXd cross = columns(Eigen::all, picks).transpose() * column;
      before.solveInPlace(cross);
      lower.row(i).head(i) = cross;
      lower(i, i) = std::sqrt(std::max(floor, column.squaredNorm() + floor - cross.squaredNorm()));
      moments[i] = column.dot(target);
      picks.push_back(best);
      const auto factor = lower.topLeftCorner(i + 1, i + 1).triangularView<Eigen::Lower>();
      Eigen::VectorXd weights = moments.head(i + 1);
      factor.solveInPlace(weights);
      factor.transpose().solveInPlace(weights);
      weights = weights.cwiseMax(1e-12).cwiseMin(std::exp(config_.most));
      residual = target - columns(Eigen::all, picks) * weights;
    }
  }

  Config config_;
};

}  // namespace

extern const PartInfo match_keys;
constinit const PartInfo match_keys = describe<MatchKeys>();

}  // namespace kvreplay
