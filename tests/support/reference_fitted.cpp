#include "tests/support/reference_fitted.hpp"

#include <cmath>
#include <limits>

namespace kvreplay::testing {
namespace {

using Matrix = Eigen::MatrixXd;

// The last queries of the prompt's cut, each over its own past: logits of all prompt tokens, -infinity for later ones.
struct Window {
  Matrix q, logits;
};
Window window_of(const ToyLayer& layer, int kv_head, const std::vector<int>& q_heads, Pos now, int queries,
                 const std::vector<Pos>& tokens, bool must_see_one) {
  std::vector<Eigen::VectorXd> q, logits;
  for (Pos t = std::max<Pos>(0, now + 1 - queries); t <= now; ++t) {
    if (must_see_one && tokens.front() > t) {
      continue;
    }
    for (const int h : q_heads) {
      q.push_back(layer.scale * layer.q[static_cast<std::size_t>(h)].row(t).transpose());
      Eigen::VectorXd row = layer.k[static_cast<std::size_t>(kv_head)].topRows(now + 1) * q.back();
      row.tail(now - t).setConstant(-std::numeric_limits<double>::infinity());
      logits.push_back(row);
    }
  }
  Window w{Matrix(q.size(), layer.options.head_dim), Matrix(q.size(), now + 1)};
  for (std::size_t r = 0; r < q.size(); ++r) {
    w.q.row(static_cast<Eigen::Index>(r)) = q[r].transpose();
    w.logits.row(static_cast<Eigen::Index>(r)) = logits[r].transpose();
  }
  return w;
}

Matrix softmax(const Matrix& logits) {
  Matrix out = logits;
  for (Eigen::Index r = 0; r < out.rows(); ++r) {
    out.row(r) = (logits.row(r).array() - logits.row(r).maxCoeff()).exp();
    out.row(r) /= out.row(r).sum();
  }
  return out;
}

// x b = y with a ridge, through singular values.
Matrix ridge_solve(const Matrix& x, const Matrix& y, double relative) {
  const Eigen::JacobiSVD<Matrix> svd(x, Eigen::ComputeThinU | Eigen::ComputeThinV);
  const Eigen::VectorXd& s = svd.singularValues();
  const double ridge = relative * s[0] * s[0];
  return svd.matrixV() * (s.array() / (s.array().square() + ridge)).matrix().asDiagonal() * svd.matrixU().transpose() *
         y;
}

std::vector<Eigen::Index> indices(const std::vector<Pos>& tokens) { return {tokens.begin(), tokens.end()}; }

}  // namespace

Fit reference_grkv(const ReferenceGrkv& g) {
  return [g](const FittedCut& cut) {
    const ToyLayer& layer = *cut.layer;
    const auto kv = static_cast<std::size_t>(cut.kv_head);
    const Pos now = layer.options.prompt_len - 1;
    std::map<Pos, Stored> out;
    const Window w = window_of(layer, cut.kv_head, cut.q_heads, now, g.queries, cut.kept, true);
    if (w.q.rows() == 0) {
      return out;
    }
    const std::vector<Eigen::Index> kept = indices(cut.kept);
    const Matrix target = softmax(w.logits) * layer.v[kv].topRows(now + 1);
    Matrix k = layer.k[kv](kept, Eigen::all), v = layer.v[kv](kept, Eigen::all);
    const Matrix k0 = k, v0 = v, logits0 = w.logits(Eigen::all, kept);
    Matrix x = softmax(logits0);
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      order.emplace_back(-x.col(static_cast<Eigen::Index>(i)).sum(), i);
    }
    std::sort(order.begin(), order.end());
    std::vector<Eigen::Index> moving;
    for (std::size_t i = static_cast<std::size_t>(g.top * static_cast<double>(kept.size()) + 1e-9); i < order.size();
         ++i) {
      const Pos p = cut.kept[order[i].second];
      if (p >= g.sink && p <= now - g.window) {
        moving.push_back(static_cast<Eigen::Index>(order[i].second));
      }
    }
    if (moving.empty()) {
      return out;
    }
    const auto m = static_cast<Eigen::Index>(moving.size()), d = k.cols(), dv = v.cols(), rows = w.q.rows();
    for (int round = 0; round < g.rounds; ++round) {
      Matrix logits = w.q * k.transpose();
      for (Eigen::Index i = 0; i < logits.size(); ++i) {
        logits.data()[i] = std::isinf(logits0.data()[i]) ? logits0.data()[i] : logits.data()[i];
      }
      x = softmax(logits);
      if (g.values) {
        v = v0;
        const Matrix own = x(Eigen::all, moving);
        const Matrix gram = own.transpose() * own + g.ridge * Matrix::Identity(m, m);
        v(moving, Eigen::all) += Matrix(gram.ldlt().solve(own.transpose() * (target - x * v0)));
      }
      if (g.keys) {
        const Matrix f = x * v;
        Matrix slope = Matrix::Zero(rows * dv, m * d);
        Eigen::VectorXd e(rows * dv), moved(m * d);
        for (Eigen::Index r = 0; r < rows; ++r) {
          for (Eigen::Index c = 0; c < dv; ++c) {
            e[r * dv + c] = target(r, c) - f(r, c);
            for (Eigen::Index j = 0; j < m; ++j) {
              slope.row(r * dv + c).segment(j * d, d) = x(r, moving[static_cast<std::size_t>(j)]) *
                                                        (v(moving[static_cast<std::size_t>(j)], c) - f(r, c)) *
                                                        w.q.row(r);
            }
          }
        }
        for (Eigen::Index j = 0; j < m; ++j) {
          const Eigen::Index at = moving[static_cast<std::size_t>(j)];
          moved.segment(j * d, d) = (k.row(at) - k0.row(at)).transpose();
        }
        const Matrix gram = slope.transpose() * slope + g.ridge * Matrix::Identity(m * d, m * d);
        const Eigen::VectorXd change = gram.ldlt().solve(slope.transpose() * (e + slope * moved));
        for (Eigen::Index j = 0; j < m; ++j) {
          const Eigen::Index at = moving[static_cast<std::size_t>(j)];
          k.row(at) = k0.row(at) + change.segment(j * d, d).transpose();
        }
      }
    }
    for (const Eigen::Index i : moving) {
      out[cut.kept[static_cast<std::size_t>(i)]] = {k.row(i).transpose(), v.row(i).transpose(), 0};
    }
    return out;
  };
}

Fit reference_matching(const ReferenceMatching& m) {
  return [m](const FittedCut& cut) {
    const ToyLayer& layer = *cut.layer;
    const auto kv = static_cast<std::size_t>(cut.kv_head);
    const Pos now = layer.options.prompt_len - 1;
    std::map<Pos, Stored> out;
    const Window w = window_of(layer, cut.kv_head, cut.q_heads, now, m.queries, cut.kept, true);
    if (w.q.rows() == 0) {
      return out;
    }
    const std::vector<Eigen::Index> kept = indices(cut.kept);
    const Matrix logits = w.logits(Eigen::all, kept);
    Eigen::VectorXd bias = Eigen::VectorXd::Zero(logits.cols());
    if (m.bias) {
      Matrix columns = logits;
      Eigen::VectorXd mass(logits.rows());
      for (Eigen::Index r = 0; r < logits.rows(); ++r) {
        const double top = w.logits.row(r).maxCoeff();
        columns.row(r) = (logits.row(r).array() - top).exp();
        mass[r] = (w.logits.row(r).array() - top).exp().sum();
      }
      const auto clamp = [&](const Eigen::VectorXd& b) -> Eigen::VectorXd {
        return b.cwiseMax(std::exp(m.least)).cwiseMin(std::exp(m.most));
      };
      Eigen::VectorXd b = clamp(ridge_solve(columns, mass, 1e-10));
      const double steepest = std::pow(Eigen::JacobiSVD<Matrix>(columns).singularValues()[0], 2);
      for (int i = 0; i < m.steps; ++i) {
        b = clamp(b - columns.transpose() * (columns * b - mass) / steepest);
      }
      bias = b.array().log();
    }
    Matrix v = layer.v[kv](kept, Eigen::all);
    if (m.values) {
      v = ridge_solve(softmax(logits.rowwise() + bias.transpose()), softmax(w.logits) * layer.v[kv].topRows(now + 1),
                      std::max(1e-10, m.ridge));
    }
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const auto row = static_cast<Eigen::Index>(i);
      out[cut.kept[i]] = {layer.k[kv].row(kept[i]).transpose(), v.row(row).transpose(), bias[row]};
    }
    return out;
  };
}

std::vector<double> reference_chances(const ToyLayer& layer, int kv_head, const std::vector<int>& q_heads, int budget,
                                      const ReferenceSampling& s) {
  const Pos n = layer.options.prompt_len;
  std::vector<double> chances(static_cast<std::size_t>(n), 1);
  const int sink = std::min(s.sink, budget), window = std::min(s.window, budget - sink);
  const Matrix attn = softmax(window_of(layer, kv_head, q_heads, n - 1, s.obs_window, {0}, false).logits);
  double sum = 0, others = 0;
  for (Pos p = sink; p < n - window; ++p) {
    sum += attn.col(p).sum();
    ++others;
  }
  for (Pos p = sink; p < n - window; ++p) {
    const double m = budget - (n - others);
    chances[static_cast<std::size_t>(p)] = std::min(1.0, std::max(1e-6, m * attn.col(p).sum() / sum));
  }
  return chances;
}

Fit reference_inverse_chance(int budget, const ReferenceSampling& settings) {
  return [budget, settings](const FittedCut& cut) {
    const std::vector<double> chances = reference_chances(*cut.layer, cut.kv_head, cut.q_heads, budget, settings);
    std::map<Pos, Stored> out;
    for (const Pos p : cut.kept) {
      const auto kv = static_cast<std::size_t>(cut.kv_head);
      out[p] = {cut.layer->k[kv].row(p).transpose(), cut.layer->v[kv].row(p).transpose(),
                -std::log(chances[static_cast<std::size_t>(p)])};
    }
    return out;
  };
}

Output fitted_output(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, const Fit& fit) {
  std::vector<std::map<Pos, Stored>> stored;  // per query head
  for (int h = 0; h < layer.n_heads(); ++h) {
    FittedCut cut{&layer, layer.kv_head(h), {}, {}};
    for (int other = 0; other < layer.n_heads(); ++other) {
      if (scope == Scope::query_head ? other == h : layer.kv_head(other) == cut.kv_head) {
        cut.q_heads.push_back(other);
      }
    }
    for (Pos p = 0; p < layer.options.prompt_len; ++p) {
      if (evicted_at(set_of(layer, scope, h), p) > 0) {
        cut.kept.push_back(p);
      }
    }
    const bool all = static_cast<Pos>(cut.kept.size()) == layer.options.prompt_len;
    stored.push_back(all || cut.kept.empty() ? std::map<Pos, Stored>() : fit(cut));
  }
  return [&layer, scope, evicted_at, stored](int q_head, int step) {
    const auto kv = static_cast<std::size_t>(layer.kv_head(q_head));
    const Pos now = layer.options.prompt_len + step;
    const Eigen::VectorXd q = layer.scale * layer.q[static_cast<std::size_t>(q_head)].row(now).transpose();
    std::vector<double> logits;
    std::vector<Eigen::VectorXd> values;
    for (Pos p = 0; p <= now; ++p) {
      if (evicted_at(set_of(layer, scope, q_head), p) <= step) {
        continue;
      }
      const auto& own = stored[static_cast<std::size_t>(q_head)];
      if (const auto it = own.find(p); it != own.end()) {
        logits.push_back(q.dot(it->second.k) + it->second.bias);
        values.push_back(it->second.v);
      } else {
        logits.push_back(q.dot(layer.k[kv].row(p)));
        values.push_back(layer.v[kv].row(p));
      }
    }
    const double top = *std::max_element(logits.begin(), logits.end());
    double mass = 0;
    Eigen::VectorXd sum = Eigen::VectorXd::Zero(layer.options.v_head_dim);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      mass += std::exp(logits[i] - top);
      sum += std::exp(logits[i] - top) * values[i];
    }
    return Eigen::VectorXd(sum / mass);
  };
}

namespace {

class MatchKeys final : public ReferenceSelector {
 public:
  MatchKeys(bool omp, MatchOver over, int queries, double most)
      : omp_(omp), over_(over), queries_(queries), most_(most) {}
  std::vector<double> score(const SetState& s) override {
    std::vector<Matrix> lanes;
    for (const int kv : s.kv_heads) {
      std::vector<int> heads;
      for (const int h : s.q_heads) {
        if (s.layer->kv_head(h) == kv) {
          heads.push_back(h);
        }
      }
      const Window w = window_of(*s.layer, kv, heads, s.now, queries_, {0}, false);
      lanes.push_back(w.logits(Eigen::all, indices(s.slots)));
    }
    Eigen::Index rows = 0;
    for (const Matrix& lane : lanes) {
      rows += lane.rows();
    }
    Matrix all(rows, static_cast<Eigen::Index>(s.slots.size()));
    rows = 0;
    for (const Matrix& lane : lanes) {
      all.middleRows(rows, lane.rows()) = lane;
      rows += lane.rows();
    }
    return omp_ ? pursuit(all, s.budget) : attention(softmax(all));
  }

 private:
  std::vector<double> attention(const Matrix& attn) const {
    std::vector<double> out;
    for (Eigen::Index j = 0; j < attn.cols(); ++j) {
      const auto column = attn.col(j);
      out.push_back(over_ == MatchOver::max    ? column.maxCoeff()
                    : over_ == MatchOver::mean ? column.mean()
                                               : std::sqrt(column.squaredNorm() / static_cast<double>(attn.rows())));
    }
    return out;
  }
  std::vector<double> pursuit(const Matrix& logits, int n_picks) const {
    Matrix columns = logits;
    for (Eigen::Index r = 0; r < columns.rows(); ++r) {
      columns.row(r) = (logits.row(r).array() - logits.row(r).maxCoeff()).exp();
    }
    const Eigen::VectorXd target = columns.rowwise().sum();
    const double floor = 1e-10 * columns.colwise().squaredNorm().maxCoeff();
    std::vector<double> out = attention(softmax(logits));
    Eigen::VectorXd residual = target;
    std::vector<Eigen::Index> picks;
    while (static_cast<int>(picks.size()) < std::min<int>(n_picks, static_cast<int>(out.size()))) {
      Eigen::Index best = -1;
      for (Eigen::Index j = 0; j < columns.cols(); ++j) {
        const bool taken = std::find(picks.begin(), picks.end(), j) != picks.end();
        if (!taken && (best < 0 || columns.col(j).dot(residual) > columns.col(best).dot(residual))) {
          best = j;
        }
      }
      out[static_cast<std::size_t>(best)] = n_picks - static_cast<double>(picks.size()) + 1;
      picks.push_back(best);
      const Matrix own = columns(Eigen::all, picks);
      const Matrix gram = own.transpose() * own + floor * Matrix::Identity(own.cols(), own.cols());
      const Eigen::VectorXd weights =
          gram.ldlt().solve(own.transpose() * target).cwiseMax(1e-12).cwiseMin(std::exp(most_));
      residual = target - own * weights;
    }
    return out;
  }
  bool omp_;
  MatchOver over_;
  int queries_;
  double most_;
};

}  // namespace

MakeSelector reference_match_keys(bool omp, MatchOver over, int queries, double most) {
  return [=](const ToyLayer&) { return std::make_unique<MatchKeys>(omp, over, queries, most); };
}

}  // namespace kvreplay::testing
