#include "tests/support/reference_encoding.hpp"

#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>
#include <numeric>

#include "policies/counter_rng.hpp"

namespace kvreplay::testing {
namespace {

constexpr double kPi = std::numbers::pi;
std::size_t at(Eigen::Index i) { return static_cast<std::size_t>(i); }
double half(double x) { return round_to(x, Element::f16); }

EncodedCache copy_of(const ToyLayer& layer) {
  EncodedCache c;
  c.k = layer.k;
  c.v = layer.v;
  return c;
}

// ---- levels ----

// Means of the density between the midpoints of neighbours, until nothing moves. cumulated(a, b): mass, first moment.
template <class Cumulated>
std::vector<double> best_levels(std::vector<double> level, double lo, double hi, Cumulated cumulated) {
  for (int round = 0; round < 20000; ++round) {
    std::vector<double> next;
    for (std::size_t i = 0; i < level.size(); ++i) {
      const double a = i == 0 ? lo : (level[i - 1] + level[i]) / 2;
      const double b = i + 1 == level.size() ? hi : (level[i] + level[i + 1]) / 2;
      const auto [mass, moment] = cumulated(a, b);
      next.push_back(moment / mass);
    }
    double moved = 0;
    for (std::size_t i = 0; i < level.size(); ++i) {
      moved = std::max(moved, std::abs(next[i] - level[i]));
    }
    level = next;
    if (moved < 1e-11) {
      break;
    }
  }
  return level;
}

std::vector<double> normal_levels(int bits) {
  std::vector<double> start;
  for (int i = 0; i < 1 << bits; ++i) {
    start.push_back(3.0 * ((i + 0.5) / (1 << bits) * 2 - 1));
  }
  constexpr double kFar = 30;
  return best_levels(start, -kFar, kFar, [](double a, double b) {
    const auto density = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * kPi); };
    // On the side where the tail is small nothing cancels.
    const double mass = a >= 0 ? (std::erfc(a / std::sqrt(2.0)) - std::erfc(b / std::sqrt(2.0))) / 2
                               : (std::erfc(-b / std::sqrt(2.0)) - std::erfc(-a / std::sqrt(2.0))) / 2;
    return std::pair(mass, density(a) - density(b));
  });
}

std::vector<double> angle_levels(int level, int bits) {
  std::vector<double> start;
  const int n = 1 << bits;
  for (int i = 0; i < n; ++i) {
    start.push_back((i + 0.5) / n * (level == 0 ? 2 * kPi : kPi / 2));
  }
  if (level == 0) {
    return start;
  }
  return best_levels(start, 0, kPi / 2, [level](double a, double b) {
    double mass = 0, moment = 0;
    constexpr int kPoints = 400;
    for (int i = 0; i < kPoints; ++i) {
      // Two Gauss points per piece.
      for (const double side : {-1.0, 1.0}) {
        const double x = a + (b - a) * (i + 0.5 + side / (2 * std::sqrt(3.0))) / kPoints;
        const double w = std::pow(std::sin(2 * x), (1 << level) - 1);
        mass += w;
        moment += w * x;
      }
    }
    return std::pair(mass, moment);
  });
}

std::size_t nearest(const std::vector<double>& levels, double x, bool circle = false) {
  std::size_t best = 0;
  double least = 1e300;
  for (std::size_t i = 0; i < levels.size(); ++i) {
    const double off = std::abs(x - levels[i]), d = circle ? std::min(off, 2 * kPi - off) : off;
    if (d < least) {
      least = d;
      best = i;
    }
  }
  return best;
}

// ---- random matrices: the numbers are given by their keys, what is made of them is not ----

MatD normals(int dim, unsigned seed, int stream) {
  MatD g(dim, dim);
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j) {
      g(i, j) = std::sqrt(-2 * std::log(1 - uniform_at(seed, stream, dim, i, j, 0))) *
                std::cos(2 * kPi * uniform_at(seed, stream, dim, i, j, 1));
    }
  }
  return g;
}

// Gram and Schmidt, twice.
MatD orthonormal(MatD m) {
  for (int round = 0; round < 2; ++round) {
    for (Eigen::Index c = 0; c < m.cols(); ++c) {
      for (Eigen::Index before = 0; before < c; ++before) {
        m.col(c) -= m.col(before).dot(m.col(c)) * m.col(before);
      }
      m.col(c).normalize();
    }
  }
  return m;
}

// ---- turboquant ----

struct Turbo {
  int dim, level_bits;
  bool sketch;
  MatD rotation, gaussian;
  std::vector<double> levels;
  double shrunk = 1;  // E[x Q(x)] = E[Q(x)^2] of normal numbers

  Turbo(int the_dim, int bits, const TurboQuant& s, bool with_sketch)
      : dim(the_dim),
        level_bits(bits - (with_sketch ? 1 : 0)),
        sketch(with_sketch),
        rotation(orthonormal(normals(the_dim, s.seed, 0))),
        gaussian(normals(the_dim, s.seed, 1)),
        levels(normal_levels(level_bits)) {
    if (s.rescale && level_bits > 0) {
      shrunk = 0;
      for (std::size_t i = 0; i < levels.size(); ++i) {
        const double a = i == 0 ? -30 : (levels[i - 1] + levels[i]) / 2;
        const double b = i + 1 == levels.size() ? 30 : (levels[i] + levels[i + 1]) / 2;
        shrunk += levels[i] * levels[i] * (std::erf(b / std::sqrt(2.0)) - std::erf(a / std::sqrt(2.0))) / 2;
      }
    }
  }

  Eigen::VectorXd operator()(const Eigen::VectorXd& x) const {
    Eigen::VectorXd decoded = Eigen::VectorXd::Zero(dim);
    if (level_bits > 0 && x.norm() > 0) {
      Eigen::VectorXd y = rotation * x / x.norm();
      for (double& c : y) {
        c = levels[nearest(levels, c * std::sqrt(dim))] / std::sqrt(dim);
      }
      decoded = half(x.norm()) / shrunk * (rotation.transpose() * y);
    }
    if (sketch) {
      const Eigen::VectorXd rest = x - decoded, seen = gaussian * rest;
      Eigen::VectorXd sum = Eigen::VectorXd::Zero(dim);
      for (int i = 0; i < dim; ++i) {
        sum += (seen[i] < 0 ? -1 : 1) * gaussian.row(i).transpose();
      }
      decoded += half(rest.norm()) * std::sqrt(kPi / 2) / dim * sum;
    }
    return decoded;
  }
};

// The largest channels of the tokens that are encoded first.
std::vector<bool> largest_channels(const MatD& first, double share) {
  const int dim = static_cast<int>(first.cols()), n = static_cast<int>(std::lround(share * dim));
  std::vector<int> order(at(dim));
  std::iota(order.begin(), order.end(), 0);
  const auto power = [&](int c) { return first.col(c).squaredNorm(); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return power(a) > power(b); });
  std::vector<bool> large(at(dim), false);
  for (int i = 0; i < n; ++i) {
    large[at(order[at(i)])] = true;
  }
  return large;
}

void turbo_all(MatD& m, Pos n_first, const TurboQuant& s, bool sketch) {
  const std::vector<bool> large = largest_channels(m.topRows(n_first), s.outliers);
  for (const bool part : {false, true}) {
    std::vector<Eigen::Index> channels;
    for (Eigen::Index c = 0; c < m.cols(); ++c) {
      if (large[at(c)] == part) {
        channels.push_back(c);
      }
    }
    if (channels.empty()) {
      continue;
    }
    const Turbo turbo(static_cast<int>(channels.size()), s.bits + (part ? 1 : 0), s, sketch);
    for (Eigen::Index r = 0; r < m.rows(); ++r) {
      Eigen::VectorXd x(static_cast<Eigen::Index>(channels.size()));
      for (Eigen::Index i = 0; i < x.size(); ++i) {
        x[i] = m(r, channels[at(i)]);
      }
      x = turbo(x);
      for (Eigen::Index i = 0; i < x.size(); ++i) {
        m(r, channels[at(i)]) = x[i];
      }
    }
  }
}

// ---- polarquant ----

struct Polar {
  std::vector<double> radii;
  std::vector<std::vector<double>> angles;  // per level
};
Polar polar_of(const Eigen::VectorXd& y, int n_levels) {
  Polar p;
  p.radii.assign(y.begin(), y.end());
  for (int level = 0; level < n_levels && p.radii.size() % 2 == 0; ++level) {
    std::vector<double> radii, angles;
    for (std::size_t j = 0; j < p.radii.size(); j += 2) {
      const double a = std::atan2(p.radii[j + 1], p.radii[j]);
      angles.push_back(a < 0 ? a + 2 * kPi : a);
      radii.push_back(std::hypot(p.radii[j], p.radii[j + 1]));
    }
    p.radii = radii;
    p.angles.push_back(angles);
  }
  return p;
}

using Codebooks = std::vector<std::vector<double>>;

Eigen::VectorXd decoded(const Polar& p, const Codebooks& books) {
  std::vector<double> x = p.radii;
  for (double& r : x) {
    r = half(r);
  }
  for (std::size_t level = p.angles.size(); level-- > 0;) {
    std::vector<double> wider;
    for (std::size_t j = 0; j < x.size(); ++j) {
      const double angle = books[level][nearest(books[level], p.angles[level][j], level == 0)];
      wider.push_back(x[j] * std::cos(angle));
      wider.push_back(x[j] * std::sin(angle));
    }
    x = wider;
  }
  return Eigen::Map<Eigen::VectorXd>(x.data(), static_cast<Eigen::Index>(x.size()));
}

// Twenty rounds of k-means at most.
std::vector<double> fitted(std::vector<double> centre, const std::vector<double>& data, bool circle) {
  for (int round = 0; round < 20; ++round) {
    std::vector<std::vector<double>> member(centre.size());
    for (const double x : data) {
      const std::size_t i = nearest(centre, x, circle);
      double off = x - centre[i];
      off -= circle && off > kPi ? 2 * kPi : circle && off < -kPi ? -2 * kPi : 0;
      member[i].push_back(off);
    }
    for (std::size_t i = 0; i < centre.size(); ++i) {
      if (!member[i].empty()) {
        centre[i] += std::accumulate(member[i].begin(), member[i].end(), 0.0) / static_cast<double>(member[i].size());
      }
      centre[i] -= circle ? 2 * kPi * std::floor(centre[i] / (2 * kPi)) : 0;
    }
    std::sort(centre.begin(), centre.end());
  }
  return centre;
}

void polar_all(std::vector<MatD>& heads, Pos prompt_len, const PolarQuant& s, bool together) {
  const int dim = static_cast<int>(heads[0].cols());
  const MatD rotation = s.rotate ? orthonormal(normals(dim, s.seed, 0)) : MatD(MatD::Identity(dim, dim));
  const std::size_t depth = polar_of(heads[0].row(0), s.levels).angles.size();
  const std::vector<MatD> exact = heads;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    Codebooks books;
    for (std::size_t level = 0; level < depth; ++level) {
      books.push_back(angle_levels(static_cast<int>(level), level == 0 ? s.first_bits : s.bits));
    }
    std::vector<std::vector<double>> seen(depth);
    for (std::size_t other = 0; s.kmeans && other < heads.size(); ++other) {
      for (Pos t = 0; (together || other == h) && t < prompt_len; ++t) {
        const Polar p = polar_of((exact[other].row(t) * rotation).transpose(), s.levels);
        for (std::size_t level = 0; level < depth; ++level) {
          seen[level].insert(seen[level].end(), p.angles[level].begin(), p.angles[level].end());
        }
      }
    }
    for (std::size_t level = 0; s.kmeans && level < depth; ++level) {
      books[level] = fitted(books[level], seen[level], level == 0);
    }
    for (Eigen::Index t = 0; t < exact[h].rows(); ++t) {
      const Polar p = polar_of((exact[h].row(t) * rotation).transpose(), s.levels);
      heads[h].row(t) = decoded(p, books).transpose() * rotation.transpose();
    }
  }
}

// ---- groups in few bits ----

std::vector<double> symmetric(const std::vector<double>& x, int bits) {
  double most = 0, mean = 0;
  for (const double a : x) {
    most = std::max(most, std::abs(a));
    mean += std::abs(a) / static_cast<double>(x.size());
  }
  const double n = std::ldexp(1.0, bits - 1) - 1, step = half(bits == 1 ? mean : most / n);
  std::vector<double> out;
  for (const double a : x) {
    out.push_back(step == 0   ? 0
                  : bits == 1 ? (a < 0 ? -step : step)
                              : std::clamp(std::nearbyint(a / step), -n - 1, n) * step);
  }
  return out;
}

Eigen::VectorXd in_groups(const Eigen::VectorXd& x, int group, int bits, bool sym) {
  Eigen::VectorXd out(x.size());
  for (Eigen::Index from = 0; from < x.size(); from += group) {
    const Eigen::Index n = std::min<Eigen::Index>(group, x.size() - from);
    const std::vector<double> one(x.begin() + from, x.begin() + from + n);
    const std::vector<double> q = sym ? symmetric(one, bits) : quantised(one, bits);
    for (Eigen::Index i = 0; i < n; ++i) {
      out[from + i] = q[at(i)];
    }
  }
  return out;
}

void tada_all(std::vector<MatD>& heads, const Tada& s) {
  const std::vector<MatD> exact = heads;
  for (Eigen::Index t = 0; t < exact[0].rows(); ++t) {
    for (std::size_t h = 0; h < heads.size(); ++h) {
      Eigen::RowVectorXd mean = Eigen::RowVectorXd::Zero(exact[0].cols());
      if (s.over_heads) {
        for (const MatD& other : exact) {
          mean += other.row(t) / static_cast<double>(exact.size());
        }
      } else {
        const Eigen::Index first = t / s.residual * s.residual;
        mean = exact[h].middleRows(first, std::min<Eigen::Index>(s.residual, exact[h].rows() - first)).colwise().mean();
      }
      mean = mean.unaryExpr(&half).eval();
      const Eigen::VectorXd deviation = (mean - exact[h].row(t)).transpose();
      heads[h].row(t) = mean - in_groups(deviation, s.group, s.bits, s.symmetric).transpose();
    }
  }
}

// ---- sals ----

// Pair i of a head's vector, as a complex number, turned by an angle for each position.
MatD turned(const ToyLayer& layer, const MatD& x, double direction) {
  const Eigen::Index n = x.cols() / 2;
  MatD out = x;
  for (Eigen::Index t = 0; t < x.rows(); ++t) {
    for (Eigen::Index i = 0; i < n; ++i) {
      const double angle = direction * static_cast<double>(t) *
                           std::pow(10000.0, -2.0 * static_cast<double>(i) / layer.options.head_dim);
      const std::complex<double> z = std::complex(x(t, i), x(t, i + n)) * std::polar(1.0, angle);
      out(t, i) = z.real();
      out(t, i + n) = z.imag();
    }
  }
  return out;
}

MatD joint_keys(const ToyLayer& layer, bool before_rope) {
  const int dim = layer.options.head_dim;
  MatD joint(layer.options.n_tokens, layer.options.n_kv_heads * dim);
  for (int h = 0; h < layer.options.n_kv_heads; ++h) {
    joint.middleCols(h * dim, dim) = before_rope ? turned(layer, layer.k[at(h)], -1) : layer.k[at(h)];
  }
  return joint;
}

MatD directions(const ToyLayer& layer, int rank) {
  const MatD prompt = joint_keys(layer, true).topRows(layer.options.prompt_len);
  const Eigen::JacobiSVD<MatD> svd(prompt, Eigen::ComputeThinV);
  const Eigen::VectorXd& s = svd.singularValues();
  Eigen::Index n = 0;
  while (n < std::min<Eigen::Index>(rank, s.size()) && s[n] * s[n] > 1e-9 * s[0] * s[0]) {
    ++n;
  }
  return svd.matrixV().leftCols(n);
}

int whole_rank(const ToyLayer& layer, const Sals& s) {
  const double dim = layer.options.n_kv_heads * layer.options.head_dim;
  return std::max(1, static_cast<int>(std::lround(s.rank * dim)));
}

// Scores with positions: keys projected frequency by frequency, then plain inner products with the turned queries.
MatD keys_by_frequency(const ToyLayer& layer, int n_directions) {
  const int heads = layer.options.n_kv_heads, pairs = layer.options.head_dim / 2;
  struct Found {
    double energy;
    int pair;
    Eigen::VectorXcd v;
  };
  std::vector<Found> all;
  const auto pair_of = [&](int i) {  // (n_tokens, heads)
    Eigen::MatrixXcd z(layer.options.n_tokens, heads);
    for (int h = 0; h < heads; ++h) {
      z.col(h).real() = layer.k[at(h)].col(i);
      z.col(h).imag() = layer.k[at(h)].col(i + pairs);
    }
    return z;
  };
  for (int i = 0; i < pairs; ++i) {
    // Tokens are rows: right singular vectors are conjugate to the directions of z itself.
    const Eigen::JacobiSVD<Eigen::MatrixXcd> svd(pair_of(i).topRows(layer.options.prompt_len), Eigen::ComputeThinV);
    for (Eigen::Index j = 0; j < svd.singularValues().size(); ++j) {
      all.push_back({std::pow(svd.singularValues()[j], 2), i, svd.matrixV().col(j).conjugate()});
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Found& a, const Found& b) { return a.energy > b.energy; });
  MatD k = MatD::Zero(layer.options.n_tokens, heads * layer.options.head_dim);
  for (int n = 0; n < std::min(n_directions, static_cast<int>(all.size())); ++n) {
    const Found& d = all[at(n)];
    if (d.energy <= 1e-9 * all[0].energy) {
      break;
    }
    const Eigen::MatrixXcd z = pair_of(d.pair);
    for (Eigen::Index t = 0; t < z.rows(); ++t) {
      const Eigen::VectorXcd back = d.v * (d.v.adjoint() * z.row(t).transpose())(0, 0);
      for (int h = 0; h < heads; ++h) {
        k(t, h * layer.options.head_dim + d.pair) += back[h].real();
        k(t, h * layer.options.head_dim + d.pair + pairs) += back[h].imag();
      }
    }
  }
  return k;
}

}  // namespace

Eigen::VectorXd encoded_output(const ToyLayer& layer, const EncodedCache& cache, int q_head, int step,
                               const std::vector<bool>& keep) {
  const std::size_t kv = at(layer.kv_head(q_head));
  const Pos now = layer.options.prompt_len + step;  // as many tokens were there a step before
  ToyLayer stored = layer;
  const Pos n_keys = cache.keys_until(now), n_values = cache.values_until(now);
  stored.k[kv].topRows(n_keys) = cache.k[kv].topRows(n_keys);
  stored.v[kv].topRows(n_values) = cache.v[kv].topRows(n_values);
  Eigen::VectorXd logits = logits_at(stored, q_head, now);
  if (!cache.bias.empty()) {
    logits.head(n_keys) += cache.bias[kv].head(n_keys);
  }
  return softmax_over(logits, stored.v[kv], keep.empty() ? std::vector<bool>(at(now) + 1, true) : keep).output;
}

EncodedCache reference_kivi_debiased(const ToyLayer& layer, const Kivi& s, int n_queries) {
  EncodedCache c = copy_of(layer);
  c.keys_until = [=](Pos n) { return n - n % s.residual; };
  c.values_until = [=](Pos n) { return std::max(0, n - s.residual); };
  for (std::size_t kv = 0; kv < c.k.size(); ++kv) {
    c.bias.push_back(Eigen::VectorXd::Zero(layer.options.n_tokens));
    for (Pos first = 0; first + s.group <= layer.options.n_tokens; first += s.group) {
      // The whole batch is encoded when its last token has arrived; the prompt arrives at once.
      const Pos when = std::max(layer.options.prompt_len - 1, first / s.residual * s.residual + s.residual - 1);
      const Pos oldest = std::max(0, when + 1 - n_queries);
      double noise = 0;
      for (Eigen::Index channel = 0; channel < c.k[kv].cols(); ++channel) {
        const Eigen::VectorXd x = layer.k[kv].col(channel).segment(first, s.group);
        c.k[kv].col(channel).segment(first, s.group) = in_groups(x, s.group, s.bits, false);
        const double step = half((x.maxCoeff() - x.minCoeff()) / (std::ldexp(1.0, s.bits) - 1));
        for (Pos t = oldest; t <= std::min(when, layer.options.n_tokens - 1); ++t) {
          for (int g = 0; g < layer.options.group_size; ++g) {
            const double q = layer.q[kv * at(layer.options.group_size) + at(g)](t, channel);
            const double a = std::abs(layer.scale * q * step / 2);
            noise += a < 1e-3 ? a * a / 6 : std::log(std::sinh(a) / a);
          }
        }
      }
      c.bias[kv].segment(first, s.group).setConstant(-noise / ((when + 1 - oldest) * layer.options.group_size));
    }
    for (Eigen::Index t = 0; t < c.v[kv].rows(); ++t) {
      c.v[kv].row(t) = in_groups(layer.v[kv].row(t).transpose(), s.group, s.bits, false);
    }
  }
  return c;
}

EncodedCache reference_turboquant(const ToyLayer& layer, const TurboQuant& s) {
  EncodedCache c = copy_of(layer);
  c.keys_until = c.values_until = [=](Pos n) { return std::max(0, n - s.residual); };
  const Pos n_first = std::max(1, layer.options.prompt_len - s.residual);
  for (std::size_t kv = 0; kv < c.k.size(); ++kv) {
    turbo_all(c.k[kv], n_first, s, s.sketch);
    turbo_all(c.v[kv], n_first, s, false);
  }
  return c;
}

EncodedCache reference_polarquant(const ToyLayer& layer, const PolarQuant& s, bool together) {
  EncodedCache c = copy_of(layer);
  const Pos prompt_len = layer.options.prompt_len;
  c.keys_until = c.values_until = [=](Pos n) { return s.generated ? n : std::min(n, prompt_len); };
  polar_all(c.k, prompt_len, s, together);
  polar_all(c.v, prompt_len, s, together);
  return c;
}

EncodedCache reference_tada(const ToyLayer& layer, const Tada& s) {
  EncodedCache c = copy_of(layer);
  c.keys_until = c.values_until = [=](Pos n) { return n - n % s.residual; };
  tada_all(c.k, s);
  tada_all(c.v, s);
  return c;
}

EncodedCache reference_sals_store(const ToyLayer& layer, const Sals& s) {
  EncodedCache c = copy_of(layer);
  c.keys_until = c.values_until = [=](Pos n) {
    const Pos due = std::max(0, n - s.residual);
    return s.along_tokens ? due - due % s.group : due;
  };
  const MatD u = directions(layer, whole_rank(layer, s));
  const MatD rebuilt = joint_keys(layer, true) * u * u.transpose();
  const int dim = layer.options.head_dim;
  for (int h = 0; h < layer.options.n_kv_heads; ++h) {
    c.k[at(h)] = turned(layer, rebuilt.middleCols(h * dim, dim), 1);
    MatD& v = c.v[at(h)];
    if (s.along_tokens) {
      for (Eigen::Index channel = 0; channel < v.cols(); ++channel) {
        v.col(channel) = in_groups(v.col(channel), s.group, s.bits, false);
      }
    } else {
      for (Eigen::Index t = 0; t < v.rows(); ++t) {
        v.row(t) = in_groups(v.row(t).transpose(), s.group, s.bits, false);
      }
    }
  }
  return c;
}

std::vector<bool> reference_sals_choice(const ToyLayer& layer, const Sals& s, Pos now, int n) {
  const int dim = layer.options.head_dim, group = layer.options.group_size;
  const int sink = std::min(s.sink, n), window = std::min(s.window, n - sink);
  const int rank = std::max(1, static_cast<int>(std::lround(s.scoring_rank * whole_rank(layer, s))));
  std::vector<bool> chosen(at(now) + 1, true);
  if (now + 1 <= n) {
    return chosen;
  }
  MatD k;
  if (s.exact) {
    k = keys_by_frequency(layer, std::max(1, rank / 2));
  } else {
    const MatD u = directions(layer, rank);
    k = joint_keys(layer, true) * u * u.transpose();
  }
  Eigen::VectorXd score = Eigen::VectorXd::Zero(now + 1);
  for (int h = 0; h < layer.n_heads(); ++h) {
    const MatD q = s.exact ? layer.q[at(h)] : turned(layer, layer.q[at(h)], -1);
    score += k.topRows(now + 1).middleCols(layer.kv_head(h) * dim, dim) * q.row(now).transpose() / group;
  }
  std::vector<Pos> order;
  int n_left = n;
  for (Pos t = 0; t <= now; ++t) {
    const bool kept = t < sink || t > now - window;
    chosen[at(t)] = kept;
    n_left -= kept ? 1 : 0;
    if (!kept) {
      order.push_back(t);
    }
  }
  std::sort(order.begin(), order.end(),
            [&](Pos a, Pos b) { return score[a] != score[b] ? score[a] > score[b] : a > b; });
  for (int i = 0; i < n_left; ++i) {
    chosen[at(order[at(i)])] = true;
  }
  return chosen;
}

}  // namespace kvreplay::testing
