#include "policies/atoms.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <unordered_map>

#include "policies/errors.hpp"
#include "policies/lost_rows.hpp"
#include "policies/weights.hpp"

namespace kvreplay {
namespace {

using Solver = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>;

MatD stacked(const MatD& a, const MatD& b) {
  if (a.rows() == 0) {
    return b;
  }
  MatD all(a.rows() + b.rows(), b.cols());
  all << a, b;
  return all;
}

// (rank, cols) F with F^T F the leading part of x^T x, from whichever Gram matrix is smaller.
MatD leading(const MatD& x, Eigen::Index rank) {
  if (x.rows() <= rank) {
    return x;
  }
  if (x.rows() <= x.cols()) {
    const Solver solver(x * x.transpose());
    return solver.eigenvectors().rightCols(rank).transpose() * x;
  }
  rank = std::min(rank, x.cols());
  const Solver solver(x.transpose() * x);
  const Eigen::VectorXd length = solver.eigenvalues().tail(rank).cwiseMax(0).cwiseSqrt();
  return length.asDiagonal() * solver.eigenvectors().rightCols(rank).transpose();
}

// Makes a^T b, of (rows, .) each, its own leading part of that rank.
void lead(MatD& a, MatD& b, Eigen::Index rank) {
  if (a.rows() <= rank) {
    return;
  }
  if (a.rows() > a.cols()) {
    const MatD product = a.transpose() * b;
    const Solver solver(product * product.transpose());
    a = solver.eigenvectors().rightCols(std::min(rank, a.cols())).transpose();
    b = a * product;
    return;
  }
  // a^T (b b^T) a has rank at most a.rows(): its eigenvectors lie in the span of a's rows.
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(a.transpose());
  const Eigen::MatrixXd basis = qr.householderQ() * Eigen::MatrixXd::Identity(a.cols(), a.rows());
  const Eigen::MatrixXd inner = (basis.transpose() * a.transpose()) * b;  // (rows, v_head_dim)
  const Solver solver(inner * inner.transpose());
  const Eigen::MatrixXd axes = solver.eigenvectors().rightCols(rank);
  a = (basis * axes).transpose();
  b = axes.transpose() * inner;
}

// Row of `centres` nearest to each row of `keys`; ties go to the first.
std::vector<std::size_t> nearest(const Eigen::Ref<const MatD>& keys, const MatD& centres) {
  MatD distance = -2 * keys * centres.transpose();  // + |key|^2, the same for all centres
  distance.rowwise() += centres.rowwise().squaredNorm().transpose();
  std::vector<std::size_t> labels;
  for (Eigen::Index i = 0; i < keys.rows(); ++i) {
    Eigen::Index best = 0;
    distance.row(i).minCoeff(&best);
    labels.push_back(static_cast<std::size_t>(best));
  }
  return labels;
}

// Rows whose products add up to what a scatter gains: those of new tokens about their own mean, and one for the
// distance of that mean from the one that was known, if any.
MatD gained(const Eigen::Ref<const MatD>& x, const Eigen::RowVectorXd& mean, bool known,
            const Eigen::RowVectorXd& distance) {
  MatD rows(x.rows() + known, x.cols());
  rows.topRows(x.rows()) = x.rowwise() - mean;
  if (known) {
    rows.bottomRows(1) = distance;
  }
  return rows;
}

}  // namespace

void Atom::join(const AtomForm& form, const Eigen::Ref<const MatD>& keys, const Eigen::Ref<const MatD>& values) {
  const double m = static_cast<double>(keys.rows()), after = n + m;
  const Eigen::RowVectorXd k_new = keys.colwise().mean(), v_new = values.colwise().mean();
  const Eigen::RowVectorXd k_shift = n > 0 ? Eigen::RowVectorXd(k_new - k) : Eigen::RowVectorXd::Zero(keys.cols());
  const Eigen::RowVectorXd v_shift = n > 0 ? Eigen::RowVectorXd(v_new - v) : Eigen::RowVectorXd::Zero(values.cols());
  const bool known = n > 0, tilts = form.tilt != AtomForm::Tilt::none;
  const double share = std::sqrt(n * m / after);
  MatD dk, dv;
  if (tilts || form.kappa != AtomForm::Kappa::none) {
    dk = gained(keys, k_new, known, share * k_shift);
  }
  if (tilts) {
    dv = gained(values, v_new, known, share * v_shift);
  }
  if (form.kappa == AtomForm::Kappa::diagonal) {
    squares = known ? Eigen::RowVectorXd(squares + dk.cwiseAbs2().colwise().sum()) : dk.cwiseAbs2().colwise().sum();
  } else if (form.kappa == AtomForm::Kappa::lowrank) {
    factors = leading(stacked(factors, dk), form.rank);
  }
  if (form.tilt == AtomForm::Tilt::full) {
    if (!known) {
      scatter.setZero(keys.cols(), values.cols());
    }
    scatter.noalias() += dk.transpose() * dv;
  } else if (form.tilt == AtomForm::Tilt::lowrank) {
    left = stacked(left, dk);
    right = stacked(right, dv);
    lead(left, right, form.rank);
  }
  k = known ? Eigen::RowVectorXd(k + m / after * k_shift) : k_new;
  v = known ? Eigen::RowVectorXd(v + m / after * v_shift) : v_new;
  n = after;
  if (form.clip) {
    radius_k = std::max(radius_k + m / after * k_shift.norm(), (keys.rowwise() - k).rowwise().norm().maxCoeff());
    radius_v = std::max(radius_v + m / after * v_shift.norm(), (values.rowwise() - v).rowwise().norm().maxCoeff());
  }
}

AtomTrack::AtomTrack(const AtomForm& form, const AtomRule& rule, int head_dim, int v_head_dim)
    : form_(form), rule_(rule), head_dim_(head_dim), v_head_dim_(v_head_dim) {
  KVREPLAY_CHECK(rule.most >= 0 && rule.width >= 1 && rule.iterations >= 1);
}

double AtomTrack::numbers(const AtomForm& form, int head_dim, int v_head_dim) {
  const double both = head_dim + v_head_dim;
  double n = both + 1;
  n += form.kappa == AtomForm::Kappa::diagonal  ? head_dim
       : form.kappa == AtomForm::Kappa::lowrank ? static_cast<double>(form.rank) * head_dim
                                                : 0;
  n += form.tilt == AtomForm::Tilt::full      ? static_cast<double>(head_dim) * v_head_dim
       : form.tilt == AtomForm::Tilt::lowrank ? form.rank * both
                                              : 0;
  return n + (form.clip ? 2 : 0);
}

void AtomTrack::estimate(const EvictedBlock& block, Estimate& out) {
  q_ = block.q.cast<double>();
  if (form_.kappa == AtomForm::Kappa::diagonal) {
    squares_ = q_.cwiseAbs2();
  }
  if (form_.clip) {
    lengths_ = q_.rowwise().norm();
  }
  n_heads_ = block.n_heads;
  const int steps = static_cast<int>(q_.rows()) / n_heads_;
  versions_.clear();
  open_.assign(atoms_.size(), 0);
  for (std::size_t c = 0; c < atoms_.size(); ++c) {
    if (atoms_[c].n > 0) {
      open(c, 0);
    }
  }
  std::span<const Loss> losses = block.losses;
  for (int step = 0; step <= steps; ++step) {  // the last: what only the next block misses
    std::size_t n = 0;
    while (n < losses.size() && (losses[n].step <= step || step == steps)) {
      ++n;
    }
    join(losses.first(n), step, step < steps);
    losses = losses.subspan(n);
  }
  for (std::size_t c = 0; c < atoms_.size(); ++c) {
    close(c, steps);
  }
  merge(out);
  now_ += steps;
}

void AtomTrack::open(std::size_t atom, int step) {
  const Atom& a = atoms_[atom];
  open_[atom] = versions_.size();
  const auto at = static_cast<Eigen::Index>(versions_.size());
  if (at == version_k_.rows()) {
    version_k_.conservativeResize(2 * at + 16, head_dim_);
    version_v_.conservativeResize(2 * at + 16, v_head_dim_);
  }
  version_k_.row(at) = a.k;
  version_v_.row(at) = a.v;
  versions_.push_back({step, step, std::log(a.n) + (now_ - a.time) * std::log(rule_.decay), {}, {}});
}

void AtomTrack::close(std::size_t atom, int step) {
  if (atoms_[atom].n == 0) {
    return;
  }
  Version& version = versions_[open_[atom]];
  if (step <= version.begin) {
    return;
  }
  version.end = step;
  const Eigen::Index from = Eigen::Index{version.begin} * n_heads_;
  terms(atoms_[atom], from, Eigen::Index{step} * n_heads_ - from, version);
}

// The losses of one step, at once. seen: rows of this block are at the step, so that clusters may be made anew for
// them.
void AtomTrack::join(std::span<const Loss> losses, int step, bool seen) {
  const bool again = rule_.every > 0 && seen && now_ + step > 0 && (now_ + step) % rule_.every == 0 && !seen_.empty();
  if (rule_.every > 0) {
    seen_.insert(seen_.end(), losses.begin(), losses.end());
  }
  if (again) {
    losses = seen_;
    for (std::size_t c = 0; c < atoms_.size(); ++c) {
      close(c, step);
    }
    atoms_.clear();
    open_.clear();
  }
  if (losses.empty() || rule_.most == 0) {
    return;
  }
  const MatD keys = lost_rows(losses, &Loss::k, head_dim_), values = lost_rows(losses, &Loss::v, v_head_dim_);
  std::map<std::size_t, std::vector<Eigen::Index>> members;
  const std::vector<std::size_t> labels = again ? cluster(losses, keys, true) : assign(losses, keys);
  for (std::size_t i = 0; i < labels.size(); ++i) {
    members[labels[i]].push_back(static_cast<Eigen::Index>(i));
  }
  for (const auto& [c, rows] : members) {
    if (c >= atoms_.size()) {
      atoms_.resize(c + 1);
      open_.resize(c + 1, 0);
    }
    Atom& atom = atoms_[c];
    close(c, step);
    if (atom.n > 0 && rule_.decay < 1) {
      const double left = std::pow(rule_.decay, now_ + step - atom.time);
      atom.n *= left;
      atom.squares *= left;
      atom.factors *= std::sqrt(left);
      atom.scatter *= left;
      atom.left *= left;
    }
    atom.join(form_, keys(rows, Eigen::all), values(rows, Eigen::all));
    atom.time = now_ + step;
    open(c, step);
  }
}

std::vector<std::size_t> AtomTrack::assign(std::span<const Loss> losses, const Eigen::Ref<const MatD>& keys) {
  const auto most = static_cast<std::size_t>(rule_.most);
  std::vector<std::size_t> labels(losses.size(), 0);
  if (rule_.assign == AtomRule::Assign::one || most == 1) {
    return labels;
  }
  if (rule_.assign == AtomRule::Assign::blocks) {
    for (std::size_t i = 0; i < losses.size(); ++i) {
      labels[i] = std::min(most - 1, static_cast<std::size_t>(losses[i].pos / rule_.width));
    }
    return labels;
  }
  if (atoms_.empty() && losses.size() > most) {
    return cluster(losses, keys, false);
  }
  // While there is room a token is an atom of its own.
  const std::size_t known = atoms_.size(), founders = std::min(most - known, losses.size());
  MatD centres(static_cast<Eigen::Index>(known + founders), head_dim_);
  for (std::size_t c = 0; c < known; ++c) {
    centres.row(static_cast<Eigen::Index>(c)) = atoms_[c].k;
  }
  centres.bottomRows(static_cast<Eigen::Index>(founders)) = keys.topRows(static_cast<Eigen::Index>(founders));
  const auto rest = nearest(keys.bottomRows(keys.rows() - static_cast<Eigen::Index>(founders)), centres);
  for (std::size_t i = 0; i < founders; ++i) {
    labels[i] = known + i;
  }
  std::copy(rest.begin(), rest.end(), labels.begin() + static_cast<std::ptrdiff_t>(founders));
  return labels;
}

// Lloyd's algorithm on keys. A cluster that no key is nearest to keeps its centre, and is gone if that stays so.
std::vector<std::size_t> AtomTrack::cluster(std::span<const Loss> losses, const Eigen::Ref<const MatD>& keys,
                                            bool anew) const {
  const auto n = static_cast<Eigen::Index>(losses.size()), most = std::min<Eigen::Index>(rule_.most, n);
  std::vector<Eigen::Index> starts;
  if (!anew && !starts_.empty()) {
    std::unordered_map<Pos, Eigen::Index> at;
    for (Eigen::Index i = 0; i < n; ++i) {
      at[losses[static_cast<std::size_t>(i)].pos] = i;
    }
    for (const Pos p : starts_) {
      if (const auto it = at.find(p); it != at.end() && static_cast<Eigen::Index>(starts.size()) < most) {
        starts.push_back(it->second);
      }
    }
  }
  if (starts.empty()) {
    for (Eigen::Index c = 0; c < most; ++c) {
      starts.push_back((2 * c + 1) * n / (2 * most));
    }
  }
  MatD centres = keys(starts, Eigen::all);
  std::vector<std::size_t> labels;
  for (int i = 0; i < rule_.iterations; ++i) {
    labels = nearest(keys, centres);
    MatD sums = MatD::Zero(centres.rows(), centres.cols());
    Eigen::ArrayXd counts = Eigen::ArrayXd::Zero(centres.rows());
    for (Eigen::Index r = 0; r < n; ++r) {
      const auto c = static_cast<Eigen::Index>(labels[static_cast<std::size_t>(r)]);
      sums.row(c) += keys.row(r);
      counts[c] += 1;
    }
    for (Eigen::Index c = 0; c < centres.rows(); ++c) {
      if (counts[c] > 0) {
        centres.row(c) = sums.row(c) / counts[c];
      }
    }
  }
  std::map<std::size_t, std::size_t> names;  // of the clusters that are left, in order
  for (const std::size_t c : labels) {
    names[c] = 0;
  }
  std::size_t next = 0;
  for (auto& [c, name] : names) {
    name = next++;
  }
  for (std::size_t& c : labels) {
    c = names[c];
  }
  return labels;
}

void AtomTrack::terms(const Atom& atom, Eigen::Index from, Eigen::Index n_rows, Version& version) const {
  const auto q = q_.middleRows(from, n_rows);
  Eigen::ArrayXd stop;  // (rows) what freezing leaves of the tilt
  if (form_.kappa != AtomForm::Kappa::none) {
    Eigen::ArrayXd variance;
    if (form_.kappa == AtomForm::Kappa::diagonal) {
      variance = (squares_.middleRows(from, n_rows) * atom.squares.transpose()).array() / atom.n;
    } else {
      variance = (q * atom.factors.transpose()).rowwise().squaredNorm().array() / atom.n;
    }
    version.kappa = variance / 2;
    if (form_.freeze) {  // the largest of n Gaussians lies at sqrt(2 ln n)
      const double log_n = std::max(0.0, std::log(atom.n)), limit = std::sqrt(2 * log_n);
      const Eigen::ArrayXd spread = variance.sqrt();
      version.kappa = (spread > limit).select(spread * limit - log_n, version.kappa);
      stop = (spread > limit).select(limit / spread.max(std::numeric_limits<double>::min()), 1.0);
    }
    version.kappa *= form_.strength;
    if (form_.clip) {
      version.kappa = version.kappa.min(lengths_.segment(from, n_rows) * atom.radius_k);
    }
  }
  if (form_.tilt == AtomForm::Tilt::none) {
    return;
  }
  if (form_.tilt == AtomForm::Tilt::full) {
    version.tilt.noalias() = q * atom.scatter / atom.n;
  } else {
    version.tilt.noalias() = (q * atom.left.transpose()) * atom.right / atom.n;
  }
  if (stop.size() > 0) {
    version.tilt.array().colwise() *= stop;
  }
  if (form_.clip) {
    const Eigen::ArrayXd length = version.tilt.rowwise().norm().array();
    version.tilt.array().colwise() *=
        (length > atom.radius_v).select(atom.radius_v / length.max(std::numeric_limits<double>::min()), 1.0);
  }
}

void AtomTrack::merge(Estimate& out) const {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const auto n = static_cast<Eigen::Index>(versions_.size()), rows = q_.rows();
  out.log_mass = Eigen::ArrayXd::Constant(rows, kNothing);
  out.value = MatD::Zero(rows, v_head_dim_);
  if (n == 0) {
    return;
  }
  const double log_decay = std::log(rule_.decay);
  // (versions, rows) logits first; a version's rows lie side by side.
  MatD weights = version_k_.topRows(n) * q_.transpose();
  Eigen::ArrayXd top = Eigen::ArrayXd::Constant(rows, kNothing), mass = Eigen::ArrayXd::Zero(rows);
  for (Eigen::Index c = 0; c < n; ++c) {
    const Version& version = versions_[static_cast<std::size_t>(c)];
    const Eigen::Index from = Eigen::Index{version.begin} * n_heads_, end = Eigen::Index{version.end} * n_heads_;
    auto logits = weights.row(c).transpose().array().segment(from, end - from);
    logits += version.log_n;
    if (version.kappa.size() > 0) {
      logits += version.kappa;
    }
    if (rule_.decay < 1) {
      for (Eigen::Index r = from; r < end; ++r) {
        const Eigen::Index step = r / n_heads_;
        logits[r - from] += static_cast<double>(step) * log_decay;
      }
    }
    top.segment(from, end - from) = top.segment(from, end - from).max(logits);
  }
  for (Eigen::Index c = 0; c < n; ++c) {
    const Version& version = versions_[static_cast<std::size_t>(c)];
    const Eigen::Index from = Eigen::Index{version.begin} * n_heads_, end = Eigen::Index{version.end} * n_heads_;
    auto all = weights.row(c).transpose().array();
    all.head(from) = 0;
    all.tail(rows - end) = 0;
    auto own = all.segment(from, end - from);
    own -= top.segment(from, end - from);
    own = weight_of(own);
    mass += all;
  }
  out.value.noalias() = weights.transpose() * version_v_.topRows(n);
  for (Eigen::Index c = 0; c < n; ++c) {
    const Version& version = versions_[static_cast<std::size_t>(c)];
    if (version.tilt.size() > 0) {
      const Eigen::Index from = Eigen::Index{version.begin} * n_heads_, seen = version.tilt.rows();
      out.value.middleRows(from, seen) += weights.row(c).transpose().segment(from, seen).asDiagonal() * version.tilt;
    }
  }
  for (Eigen::Index r = 0; r < rows; ++r) {
    if (mass[r] > 0) {
      out.value.row(r) /= mass[r];
      out.log_mass[r] = top[r] + std::log(mass[r]);
    }
  }
}

}  // namespace kvreplay
