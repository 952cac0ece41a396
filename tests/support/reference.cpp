#include "tests/support/reference.hpp"

#include <cmath>
#include <limits>

namespace kvreplay::testing {
namespace {

constexpr double kLeftOut = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Metrics = std::map<std::string, double>;

// The outputs of one row before and after projection: what the layer-level errors are made of.
struct RowOutputs {
  bool usable = false;
  Eigen::VectorXd full, retained, method;            // (v_head_dim)
  std::map<std::string, Eigen::VectorXd> corrected;  // per compensator (v_head_dim)
};

// 1 / (1 + exp(-x)) for any x.
double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

double cosine(const Eigen::VectorXd& a, const Eigen::VectorXd& b) { return a.dot(b) / (a.norm() * b.norm()); }

// What the method returns when `c` stands in for the evicted tokens.
Eigen::VectorXd merged(const Softmax& retained, double log_mass, const Eigen::VectorXd& value) {
  const double w = sigmoid(log_mass - retained.log_mass);
  return (1 - w) * retained.output + w * value;
}

struct RowInput {
  const ToyLayer* layer;
  const MetricsRequest* request;
  int q_head, step;
  const EvictedStatistics* statistics;  // of E, as the set sees it
};

Metrics one_row(const RowInput& in, RowOutputs& outputs) {
  const ToyLayer& layer = *in.layer;
  const Pos now = layer.options.prompt_len + in.step;
  const MatD& v = layer.v[static_cast<std::size_t>(layer.kv_head(in.q_head))];
  const Eigen::VectorXd logits = logits_at(layer, in.q_head, now);

  std::vector<bool> all(static_cast<std::size_t>(now) + 1, true), kept(all.size()), lost(all.size());
  int n_lost = 0;
  for (Pos pos = 0; pos <= now; ++pos) {
    const auto i = static_cast<std::size_t>(pos);
    kept[i] = in.request->attends(in.q_head, in.step, pos);
    lost[i] = !kept[i];
    n_lost += lost[i] ? 1 : 0;
  }
  const Softmax full = softmax_over(logits, v, all);
  const Softmax retained = softmax_over(logits, v, kept);
  const Softmax evicted = softmax_over(logits, v, lost);

  Metrics m;
  const char* of_evicted[] = {"cos_retained_evicted", "directional_mismatch", "norm_ratio_evicted", "error_parallel",
                              "error_orthogonal",     "logit_variance",       "logit_spread"};
  for (const char* name : of_evicted) {
    m[name] = kLeftOut;
  }
  for (const char* name : {"evicted_mass", "error", "error_output"}) {
    m[name] = kLeftOut;
  }
  for (const ReferenceCompensator& c : in.request->measured) {
    for (const char* name :
         {"error_corrected", "cos_estimate", "log_mass_ratio", "error_exact_mass", "error_exact_direction"}) {
      m[name + ("." + c.name)] = kLeftOut;
    }
  }
  outputs.full = full.output;
  outputs.retained = retained.output;

  const double size = full.output.norm();
  const double w = n_lost == 0 ? 0 : sigmoid(evicted.log_mass - retained.log_mass);
  m["evicted_mass"] = w;  // needs no f_R
  if (!(retained.log_mass >= logits.maxCoeff() + kLeastLogMass)) {
    return m;
  }
  outputs.usable = true;
  m["error"] = n_lost == 0 ? 0 : (full.output - retained.output).norm() / size;

  if (n_lost > 0) {
    double mean = 0, spread = 0, variance = 0;
    for (Pos pos = 0; pos <= now; ++pos) {
      mean += lost[static_cast<std::size_t>(pos)] ? logits[pos] / n_lost : 0;
    }
    for (Pos pos = 0; pos <= now; ++pos) {
      if (lost[static_cast<std::size_t>(pos)]) {
        const double delta = logits[pos] - mean;
        variance += delta * delta / n_lost;
        spread = std::max(spread, std::abs(delta));
      }
    }
    m["logit_variance"] = variance;
    m["logit_spread"] = spread;
  }
  const bool has_direction = n_lost > 0 && w >= kLeastEvictedMass;
  if (has_direction) {
    const double cos = cosine(retained.output, evicted.output);
    const double sin = (evicted.output / evicted.output.norm() - cos * retained.output / retained.output.norm()).norm();
    m["cos_retained_evicted"] = cos;
    m["directional_mismatch"] = 1 - cos;
    m["norm_ratio_evicted"] = std::log(evicted.output.norm() / retained.output.norm());
    m["error_parallel"] = w * std::abs(evicted.output.norm() * cos - retained.output.norm()) / size;
    m["error_orthogonal"] = w * evicted.output.norm() * sin / size;
  }

  const Eigen::VectorXd q = layer.q[static_cast<std::size_t>(in.q_head)].row(now);
  const auto corrected = [&](const ReferenceCompensator& c) -> Eigen::VectorXd {
    if (n_lost == 0 || c.kind == Compensation::none) {
      return retained.output;
    }
    const ReferenceEstimate e = estimate(c, *in.statistics, q, layer.scale);
    return merged(retained, e.log_mass, e.value);
  };
  for (const ReferenceCompensator& c : in.request->measured) {
    const Eigen::VectorXd out = corrected(c);
    outputs.corrected[c.name] = out;
    m["error_corrected." + c.name] = n_lost == 0 ? 0 : (full.output - out).norm() / size;
    if (n_lost == 0 || c.kind == Compensation::none) {
      continue;
    }
    const ReferenceEstimate e = estimate(c, *in.statistics, q, layer.scale);
    if (evicted.log_mass >= logits.maxCoeff() + kLeastLogMass) {
      m["log_mass_ratio." + c.name] = evicted.log_mass - e.log_mass;
    }
    m["error_exact_mass." + c.name] = (full.output - merged(retained, evicted.log_mass, e.value)).norm() / size;
    if (has_direction) {
      m["cos_estimate." + c.name] = cosine(evicted.output, e.value);
      m["error_exact_direction." + c.name] = (full.output - merged(retained, e.log_mass, evicted.output)).norm() / size;
    }
  }

  outputs.method = retained.output;
  if (in.request->rewritten) {
    outputs.method = (*in.request->rewritten)(in.q_head, in.step);
    m["error_output"] = (full.output - outputs.method).norm() / size;
  } else if (in.request->acting) {
    outputs.method = corrected(*in.request->acting);
    m["error_output"] = n_lost == 0 ? 0 : (full.output - outputs.method).norm() / size;
  } else {
    m["error_output"] = m["error"];
  }
  return m;
}

// Heads side by side, through w_o: relative distance of what `pick` names from the exact output.
template <class Pick>
double projected_error(const ToyLayer& layer, const std::vector<RowOutputs>& rows, Pick pick) {
  Eigen::VectorXd exact = Eigen::VectorXd::Zero(layer.options.hidden), other = exact;
  for (std::size_t h = 0; h < rows.size(); ++h) {
    if (!rows[h].usable) {
      return kLeftOut;
    }
    const Eigen::Index width = layer.options.v_head_dim;
    const auto w_o = layer.w_o.middleCols(static_cast<Eigen::Index>(h) * width, width);
    exact += w_o * rows[h].full;
    other += w_o * pick(rows[h]);
  }
  return (exact - other).norm() / exact.norm();
}

}  // namespace

int n_sets(const ToyLayer& layer, Scope scope) {
  switch (scope) {
    case Scope::kv_head:
      return layer.options.n_kv_heads;
    case Scope::layer:
      return 1;
    case Scope::query_head:
      return layer.n_heads();
  }
  return 0;
}

int set_of(const ToyLayer& layer, Scope scope, int q_head) {
  switch (scope) {
    case Scope::kv_head:
      return layer.kv_head(q_head);
    case Scope::layer:
      return 0;
    case Scope::query_head:
      return q_head;
  }
  return 0;
}

Attends attends_from(const ToyLayer& layer, Scope scope, const Evicted& evicted_at) {
  return [&layer, scope, evicted_at](int q_head, int step, Pos pos) {
    return step < evicted_at(set_of(layer, scope, q_head), pos);
  };
}

Eigen::VectorXd logits_at(const ToyLayer& layer, int q_head, Pos pos) {
  const MatD& k = layer.k[static_cast<std::size_t>(layer.kv_head(q_head))];
  const Eigen::VectorXd q = layer.q[static_cast<std::size_t>(q_head)].row(pos);
  Eigen::VectorXd logits(pos + 1);
  for (Pos i = 0; i <= pos; ++i) {
    logits[i] = layer.scale * q.dot(k.row(i));
    if (layer.options.softcap > 0) {
      logits[i] = layer.options.softcap * std::tanh(logits[i] / layer.options.softcap);
    }
  }
  return logits;
}

Softmax softmax_over(const Eigen::VectorXd& logits, const MatD& v, const std::vector<bool>& keep) {
  Softmax s;
  s.weight = Eigen::VectorXd::Zero(logits.size());
  s.output = Eigen::VectorXd::Zero(v.cols());
  double largest = -kInfinity;
  for (Eigen::Index i = 0; i < logits.size(); ++i) {
    if (keep[static_cast<std::size_t>(i)]) {
      largest = std::max(largest, logits[i]);
    }
  }
  if (largest == -kInfinity) {
    s.log_mass = -kInfinity;
    return s;
  }
  double mass = 0;
  for (Eigen::Index i = 0; i < logits.size(); ++i) {
    if (keep[static_cast<std::size_t>(i)]) {
      s.weight[i] = std::exp(logits[i] - largest);
      mass += s.weight[i];
    }
  }
  s.weight /= mass;
  for (Eigen::Index i = 0; i < logits.size(); ++i) {
    s.output += s.weight[i] * v.row(i).transpose();
  }
  s.log_mass = largest + std::log(mass);
  return s;
}

EvictedStatistics statistics_of(const MatD& k, const MatD& v, const std::vector<Pos>& evicted) {
  EvictedStatistics s;
  s.n = static_cast<int>(evicted.size());
  s.k_mean = Eigen::VectorXd::Zero(k.cols());
  s.v_mean = Eigen::VectorXd::Zero(v.cols());
  s.scatter = MatD::Zero(v.cols(), k.cols());
  s.key_scatter = MatD::Zero(k.cols(), k.cols());
  for (const Pos i : evicted) {
    s.k_mean += k.row(i).transpose() / s.n;
    s.v_mean += v.row(i).transpose() / s.n;
  }
  for (const Pos i : evicted) {
    const Eigen::VectorXd dk = k.row(i).transpose() - s.k_mean;
    const Eigen::VectorXd dv = v.row(i).transpose() - s.v_mean;
    s.scatter += dv * dk.transpose();
    s.key_scatter += dk * dk.transpose();
    s.radius_k = std::max(s.radius_k, dk.norm());
    s.radius_v = std::max(s.radius_v, dv.norm());
  }
  return s;
}

ReferenceEstimate estimate(const ReferenceCompensator& c, const EvictedStatistics& s, const Eigen::VectorXd& q,
                           double scale) {
  ReferenceEstimate e;
  e.log_mass = std::log(s.n) + scale * q.dot(s.k_mean);
  e.value = s.v_mean;
  if (c.kind == Compensation::none) {
    e.log_mass = -kInfinity;
  }
  if (c.kind != Compensation::moments && c.kind != Compensation::gaussian) {
    return e;
  }
  Eigen::VectorXd tilt = scale * (s.scatter * q) / s.n;
  if (c.kind == Compensation::gaussian) {
    double variance = 0;
    if (c.full) {
      variance = scale * scale * q.dot(s.key_scatter * q) / s.n;
    } else {
      for (Eigen::Index a = 0; a < q.size(); ++a) {
        variance += scale * scale * q[a] * q[a] * s.key_scatter(a, a) / s.n;
      }
    }
    // Beyond a spread of sqrt(2 ln n) the sum of n exponentials is its largest term: growth becomes
    // linear.
    const double spread = std::sqrt(variance), most = std::sqrt(2 * std::log(s.n));
    double kappa = variance / 2;
    if (c.freeze && spread > most) {
      kappa = spread * most - std::log(s.n);
      tilt *= most / spread;
    }
    kappa *= c.strength;
    const double bound = scale * q.norm() * s.radius_k;
    if (c.clip && kappa > bound) {
      kappa = bound;
      e.clipped = true;
    }
    if (c.clip && tilt.norm() > s.radius_v) {
      tilt *= s.radius_v / tilt.norm();
      e.clipped = true;
    }
    e.log_mass += kappa;
  }
  e.value += tilt;
  return e;
}

NamedSeries reference_metrics(const ToyLayer& layer, const MetricsRequest& request) {
  NamedSeries series;
  const auto put = [&](const std::string& name, Eigen::Index row, Eigen::Index rows, int step, double x) {
    MatD& m = series[name];
    if (m.size() == 0) {
      m = MatD::Constant(rows, layer.n_steps(), kLeftOut);
    }
    m(row, step) = x;
  };
  for (int step = 0; step < layer.n_steps(); ++step) {
    const Pos now = layer.options.prompt_len + step;
    std::vector<RowOutputs> rows(static_cast<std::size_t>(layer.n_heads()));
    for (int h = 0; h < layer.n_heads(); ++h) {
      const auto kv = static_cast<std::size_t>(layer.kv_head(h));
      std::vector<Pos> evicted;
      for (Pos pos = 0; pos <= now; ++pos) {
        if (!request.attends(h, step, pos)) {
          evicted.push_back(pos);
        }
      }
      const EvictedStatistics statistics = statistics_of(layer.k[kv], layer.v[kv], evicted);
      const RowInput input{&layer, &request, h, step, &statistics};
      for (const auto& [name, x] : one_row(input, rows[static_cast<std::size_t>(h)])) {
        put(name, h, layer.n_heads(), step, x);
      }
    }
    if (layer.options.hidden > 0) {
      put("layer.error", 0, 1, step, projected_error(layer, rows, [](const RowOutputs& r) { return r.retained; }));
      put("layer.error_output", 0, 1, step, projected_error(layer, rows, [](const RowOutputs& r) { return r.method; }));
      for (const ReferenceCompensator& c : request.measured) {
        put("layer.error_corrected." + c.name, 0, 1, step,
            projected_error(layer, rows, [&](const RowOutputs& r) { return r.corrected.at(c.name); }));
      }
    }
  }
  return series;
}

MatD reference_resident(const ToyLayer& layer, Scope scope, const Evicted& evicted_at) {
  MatD resident = MatD::Zero(layer.options.n_kv_heads, layer.n_steps());
  // In query_head scope every head of the group is a set of its own; otherwise the group shares
  // one.
  const int stride = scope == Scope::query_head ? 1 : layer.options.group_size;
  for (int h = 0; h < layer.n_heads(); h += stride) {
    for (int step = 0; step < layer.n_steps(); ++step) {
      for (Pos pos = 0; pos <= layer.options.prompt_len + step; ++pos) {
        resident(layer.kv_head(h), step) += step < evicted_at(set_of(layer, scope, h), pos) ? 1 : 0;
      }
    }
  }
  return resident;
}

MatD reference_retention(const ToyLayer& layer, Scope scope, const Evicted& evicted_at, Pos begin, Pos end) {
  MatD share = MatD::Zero(layer.options.n_kv_heads, layer.n_steps());
  for (int h = 0; h < layer.n_heads(); ++h) {
    for (int step = 0; step < layer.n_steps(); ++step) {
      for (Pos pos = begin; pos < end; ++pos) {
        const bool stays = step < evicted_at(set_of(layer, scope, h), pos);
        share(layer.kv_head(h), step) += stays ? 1.0 / ((end - begin) * layer.options.group_size) : 0.0;
      }
    }
  }
  return share;
}

namespace {

// Orthonormal columns that span the leading subspace with 90 % of the rows' energy.
MatD leading_subspace(const MatD& rows) {
  const Eigen::JacobiSVD<Eigen::MatrixXd> svd(rows, Eigen::ComputeThinV);
  const Eigen::VectorXd energy = svd.singularValues().cwiseAbs2();
  Eigen::Index rank = 0;
  double held = 0;
  while (rank < energy.size() && held < 0.9 * energy.sum()) {
    held += energy[rank++];
  }
  return svd.matrixV().leftCols(rank);
}

}  // namespace

Subspaces reference_subspaces(const MatD& retained, const MatD& evicted) {
  Subspaces s;
  const Eigen::RowVectorXd r_mean = retained.colwise().mean(), e_mean = evicted.colwise().mean();
  s.centroid_cos = cosine(r_mean, e_mean);
  const double n = static_cast<double>(retained.rows() + evicted.rows());
  const Eigen::RowVectorXd centre = (retained.colwise().sum() + evicted.colwise().sum()) / n;
  const MatD r = retained.rowwise() - centre, e = evicted.rowwise() - centre;
  const MatD r_axes = leading_subspace(r), e_axes = leading_subspace(e);
  s.outside_energy = (e - e * r_axes * r_axes.transpose()).squaredNorm() / e.squaredNorm();
  const Eigen::JacobiSVD<Eigen::MatrixXd> angles(r_axes.transpose() * e_axes);
  s.subspace_cos = angles.singularValues().mean();  // min(r_R, r_E) of them
  return s;
}

}  // namespace kvreplay::testing
