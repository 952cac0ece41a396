// GRKV: kept values, then kept keys, move as little as ridge regression asks so that the prompt's last queries get from
// them what they got from the whole prompt.
#include <cmath>
#include <numeric>

#include "policies/part.hpp"
#include "policies/prompt_fit.hpp"
#include "policies/staying.hpp"

namespace kvreplay {
namespace {

class Grkv final : public Rewriter {
 public:
  struct Config {
    int queries = 32;
    double ridge = 0.01;
    bool values = true;
    bool keys = true;
    int rounds = 1;
    int iterations = 50;
    int sink = 4;
    int window = 32;
    double top = 0.1;
  };
  static constexpr std::string_view kName = "grkv";
  static constexpr bool kCorrects = true;
  static constexpr std::string_view kSummary =
      "kept values and keys moved by ridge regression on the prompt's last queries";
  static constexpr std::string_view kPaper = "arXiv:2605.31105";
  static constexpr std::string_view kDeviation =
      "Once, at the prompt's cut; decode queries are the held-out test. With grouped heads the rows of all heads "
      "count. "
      "The paper gives one ridge, used for values and keys, and no number of sinks (sink=4 is ours). The key step's "
      "equations are solved by conjugate gradients, to 1e-9 or as far as iterations go; it follows a slope and can "
      "overshoot where attention is sharp (keys=false leaves it out).";
  static constexpr std::array kParams{
      number<&Config::queries>("queries", 1, kUnbounded, "last prompt queries that are fitted", Scale::log),
      number<&Config::ridge>("ridge", 1e-9, 1e6, "weight of the distance from the original", Scale::log),
      flag<&Config::values>("values", "values move"),
      flag<&Config::keys>("keys", "keys move, after the values, by the output's slope in them"),
      number<&Config::rounds>("rounds", 1, 100, "of values and keys in turn"),
      number<&Config::iterations>("iterations", 1, kUnbounded, "of conjugate gradients at most; not in the paper",
                                  Scale::log),
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens, which do not move", Scale::log),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens, which do not move", Scale::log),
      number<&Config::top>("top", 0, 1, "share of the kept tokens that do not move: those of most attention"),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = c.queries}; }

  Grkv(const Config& config, const SetShape&) : config_(config) {}

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
  // The kept slots of one lane; `moving`: those that may change, as rows of k and v.
  struct Kept {
    const MatD& q;                     // (rows, head_dim)
    MatD k, v;                         // (kept, .)
    std::vector<Eigen::Index> moving;  // of the kept
    MatD weights, output;              // (rows, kept) softmax; (rows, v_head_dim)
  };

  void fit(Cache& cache, int lane, const std::vector<int>& kept) const {
    std::vector<int> all(cache.pos.size());
    std::iota(all.begin(), all.end(), 0);
    const FitRows rows = fit_rows(cache, lane, config_.queries, kept);
    if (rows.q.rows() == 0) {
      return;
    }
    const MatD target = softmax_rows(rows.logits) * values_of(cache, lane, all);
    const MatD causal =
        (rows.logits(Eigen::all, kept).array().isFinite())
            .select(MatD::Zero(rows.q.rows(), static_cast<Eigen::Index>(kept.size())), rows.logits(Eigen::all, kept));
    Kept x{rows.q, MatD(static_cast<Eigen::Index>(kept.size()), cache.head_dim), values_of(cache, lane, kept), {}, {},
           {}};
    for (std::size_t i = 0; i < kept.size(); ++i) {
      x.k.row(static_cast<Eigen::Index>(i)) = cache.key(lane, kept[i]).cast<double>();
    }
    x.weights = softmax_rows(rows.logits(Eigen::all, kept));
    x.moving = free_to_move(cache, kept, x.weights.colwise().sum());
    if (x.moving.empty()) {
      return;
    }
    const MatD k = x.k(x.moving, Eigen::all), v = x.v(x.moving, Eigen::all);  // as they were
    for (int round = 0; round < config_.rounds; ++round) {
      x.weights = softmax_rows(x.q * x.k.transpose() + causal);
      if (config_.values) {
        move_values(x, v, target);
      }
      x.output = x.weights * x.v;
      if (config_.keys) {
        move_keys(x, k, target);
      }
    }
    for (const Eigen::Index i : x.moving) {
      const int slot = kept[static_cast<std::size_t>(i)];
      cache.rewrite(lane, slot, x.k.row(i).transpose().cast<float>(), x.v.row(i).transpose().cast<float>(),
                    cache.bias(lane, slot), cache.bytes(lane, slot));
    }
  }

  std::vector<Eigen::Index> free_to_move(const View& view, const std::vector<int>& kept,
                                         const Eigen::RowVectorXd& attention) const {
    std::vector<std::size_t> order(kept.size());
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return attention[static_cast<Eigen::Index>(a)] > attention[static_cast<Eigen::Index>(b)];
    });
    const auto n_top = static_cast<std::size_t>(config_.top * static_cast<double>(kept.size()) + 1e-9);
    std::vector<Eigen::Index> moving;
    for (std::size_t i = n_top; i < order.size(); ++i) {
      const Pos pos = view.pos[static_cast<std::size_t>(kept[order[i]])];
      if (pos >= config_.sink && pos <= view.now - config_.window) {
        moving.push_back(static_cast<Eigen::Index>(order[i]));
      }
    }
    std::sort(moving.begin(), moving.end());
    return moving;
  }

  // V = V0 + X^T (X X^T + ridge)^-1 (Y - X V0): as many equations as queries.
  void move_values(Kept& x, const MatD& v0, const MatD& target) const {
    x.v(x.moving, Eigen::all) = v0;
    const MatD weights = x.weights(Eigen::all, x.moving);
    Eigen::MatrixXd gram = weights * weights.transpose();
    gram.diagonal().array() += config_.ridge;
    x.v(x.moving, Eigen::all) += weights.transpose() * gram.llt().solve(target - x.weights * x.v);
  }

  // The output's slope in the keys: d out_r / d k_j = p_rj (v_j - out_r) q_r^T, applied to a change of the moving keys
  // (moving, head_dim) and, transposed, to a change of the outputs (rows, v_head_dim).
  static MatD slope(const Kept& x, const MatD& weights, const MatD& v, const MatD& change) {
    const MatD share = weights.cwiseProduct(x.q * change.transpose());  // (rows, moving)
    return share * v - (share.rowwise().sum().asDiagonal() * x.output);
  }
  static MatD slope_transposed(const Kept& x, const MatD& weights, const MatD& v, const MatD& change) {
    MatD along = change * v.transpose();  // (rows, moving)
    along.colwise() -= change.cwiseProduct(x.output).rowwise().sum();
    return weights.cwiseProduct(along).transpose() * x.q;
  }

  // K = K0 + J^T (J J^T + ridge)^-1 (Y - out + J (K - K0)).
  void move_keys(Kept& x, const MatD& k0, const MatD& target) const {
    const MatD weights = x.weights(Eigen::all, x.moving), v = x.v(x.moving, Eigen::all);
    const MatD moved = x.k(x.moving, Eigen::all) - k0;
    MatD residual = target - x.output + slope(x, weights, v, moved);
    MatD solution = MatD::Zero(residual.rows(), residual.cols()), direction = residual;
    double size = residual.squaredNorm();
    const double enough = size * 1e-18;
    for (int i = 0; i < config_.iterations && size > enough; ++i) {
      const MatD image = slope(x, weights, v, slope_transposed(x, weights, v, direction)) + config_.ridge * direction;
      const double step = size / direction.cwiseProduct(image).sum();
      solution += step * direction;
      residual -= step * image;
      const double next = residual.squaredNorm();
      direction = residual + next / size * direction;
      size = next;
    }
    x.k(x.moving, Eigen::all) = k0 + slope_transposed(x, weights, v, solution);
  }

  Config config_;
};

}  // namespace

extern const PartInfo grkv;
constinit const PartInfo grkv = describe<Grkv>();

}  // namespace kvreplay
