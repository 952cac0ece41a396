// Clairvoyant by output: drop the token whose loss moves the attention output of the next steps
// least.
//
// With weights w, values v, exact output f, and over all that would be attended Z = sum w, N = sum
// w v, D = N - Z f: without token j the output is off by f' - f = (D - w_j (v_j - f)) / (Z - w_j),
// whose square needs products alone.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class OracleGreedy final : public OracleSelector {
 public:
  struct Config {
    int horizon = 64;
  };
  static constexpr std::string_view kName = "oracle_greedy";
  static constexpr std::string_view kSummary =
      "squared output error that the loss of a token adds over the next steps, known from the "
      "trace";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation =
      "for small traces: an eviction costs horizon x group_size x slots x head_dim operations, the "
      "prompt's cut "
      "horizon x group_size x prompt x evicted tokens";
  static constexpr Foresight kForesight = Foresight::oracle;
  static constexpr std::array kParams{
      number<&Config::horizon>("horizon", 1, kUnbounded, "decode steps that count", Scale::log),
  };

  static Needs needs(const Config&) { return {.future_outputs = true}; }

  OracleGreedy(const Config& config, const SetShape&) : horizon_(config.horizon) {}
  void reveal(const Future& future) override { future_ = &future; }

  // One eviction: the loss itself. Several: greedily one by one, the first to go scores lowest,
  // those that stay 0.
  void score(const View& view, std::span<float> out) override {
    const int n = static_cast<int>(out.size()), n_over = std::max(1, surplus(view));
    std::vector<Lane> lanes;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      lanes.push_back(at(view, lane));
    }
    Eigen::ArrayXd gone = Eigen::ArrayXd::Zero(n);
    if (n_over > 1) {
      std::fill(out.begin(), out.end(), 0.0F);
    }
    for (int k = 0; k < n_over && k < n; ++k) {
      Eigen::ArrayXd loss = gone;
      for (const Lane& lane : lanes) {
        loss += lane.losses();
      }
      if (n_over == 1) {
        Eigen::ArrayXf::Map(out.data(), n) = loss.cast<float>();
        return;
      }
      Eigen::Index victim = 0;
      loss.minCoeff(&victim);
      out[static_cast<std::size_t>(victim)] = static_cast<float>(k - n_over);
      gone[victim] = std::numeric_limits<double>::infinity();
      for (Lane& lane : lanes) {
        lane.drop(victim);
      }
    }
  }

 private:
  // Rows are (step, head), columns the slots.
  struct Lane {
    MatD w, v;                     // (rows, n_slots), (n_slots, v_head_dim)
    MatD dv, fv;                   // (rows, n_slots) D . v_j and f . v_j
    Eigen::ArrayXd z, dd, df, ff;  // (rows) Z, D . D, D . f, f . f
    Eigen::ArrayXd vv;             // (n_slots) v_j . v_j

    Eigen::ArrayXd losses() const {
      Eigen::ArrayXd sum = Eigen::ArrayXd::Zero(v.rows());
      for (Eigen::Index r = 0; r < w.rows(); ++r) {
        const auto wj = w.row(r).transpose().array();
        // A token that holds all of Z leaves nothing behind: its loss is huge, not infinite.
        const Eigen::ArrayXd rest = (z[r] - wj).max(1e-9 * z[r]);
        const Eigen::ArrayXd distance = vv - 2 * fv.row(r).transpose().array() + ff[r];
        const Eigen::ArrayXd without =
            dd[r] - 2 * wj * (dv.row(r).transpose().array() - df[r]) + wj.square() * distance;
        sum += without / rest.square() - dd[r] / (z[r] * z[r]);
      }
      return sum;
    }
    void drop(Eigen::Index j) {
      const Eigen::VectorXd vj = v * v.row(j).transpose();  // (n_slots) v_j . v_i
      for (Eigen::Index r = 0; r < w.rows(); ++r) {
        const double wj = w(r, j), distance = vv[j] - 2 * fv(r, j) + ff[r];
        dd[r] += -2 * wj * (dv(r, j) - df[r]) + wj * wj * distance;
        df[r] -= wj * (fv(r, j) - ff[r]);
        dv.row(r) -= wj * (vj.transpose() - fv.row(r));
        z[r] -= wj;
        w(r, j) = 0;
      }
    }
  };

  Lane at(const View& view, int lane) const {
    const int n = static_cast<int>(view.pos.size());
    const Future::Horizon h = future_->horizon(view, lane, horizon_);
    Lane l;
    l.v.resize(n, view.v_head_dim);
    for (int i = 0; i < n; ++i) {
      l.v.row(i) = view.value(lane, i).cast<double>();
    }
    l.w = h.weights.leftCols(n).cast<double>();
    const MatD arriving = h.weights.rightCols(h.steps).cast<double>();
    MatD d = l.w * l.v + arriving * h.arrivals.cast<double>();
    l.z = l.w.rowwise().sum() + arriving.rowwise().sum();
    if (h.pinned_mass.size() > 0) {
      d += h.pinned_sum;
      l.z += h.pinned_mass;
    }
    d.array() -= h.full.array().colwise() * l.z;
    l.dv = d * l.v.transpose();
    l.fv = h.full * l.v.transpose();
    l.dd = d.rowwise().squaredNorm();
    l.df = (d.array() * h.full.array()).rowwise().sum();
    l.ff = h.full.rowwise().squaredNorm();
    l.vv = l.v.rowwise().squaredNorm();
    return l;
  }

  int horizon_;
  const Future* future_ = nullptr;
};

}  // namespace

extern const PartInfo oracle_greedy;
constinit const PartInfo oracle_greedy = describe<OracleGreedy>();

}  // namespace kvreplay
