#include "policies/moments.hpp"

#include <algorithm>
#include <catch2/catch.hpp>
#include <random>

namespace kvreplay {
namespace {

MatF random(int rows, int cols, float mean, float std, std::mt19937& gen) {
  std::normal_distribution<float> normal(mean, std);
  MatF m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) {
    m.data()[i] = normal(gen);
  }
  return m;
}

// Two passes in float64.
struct Exact {
  double n;
  Eigen::RowVectorXd k_mean, v_mean;
  MatD k, v;  // centred
  MatD scatter;
  Exact(const MatF& keys, const MatF& values)
      : n(static_cast<double>(keys.rows())),
        k_mean(keys.cast<double>().colwise().mean()),
        v_mean(values.cast<double>().colwise().mean()),
        k(keys.cast<double>().rowwise() - k_mean),
        v(values.cast<double>().rowwise() - v_mean),
        scatter(v.transpose() * k) {}
};

void check_close(const Moments& m, const Exact& e, double tolerance) {
  CHECK(m.n == e.n);
  CHECK((m.k_mean.transpose().cast<double>() - e.k_mean).norm() <= tolerance * e.k_mean.norm());
  CHECK((m.v_mean.transpose().cast<double>() - e.v_mean).norm() <= tolerance * (1 + e.v_mean.norm()));
  CHECK((m.scatter.cast<double>() - e.scatter).norm() <= tolerance * e.scatter.norm());
}

}  // namespace

TEST_CASE("moments added one by one, in two passes or merged are those of float64") {
  struct Case {
    int head_dim, v_head_dim, n;
    float key_mean;
  };
  const auto c = GENERATE(Case{8, 8, 1, 0}, Case{8, 4, 2, 3}, Case{16, 24, 100, -2}, Case{32, 16, 2000, 50});
  std::mt19937 gen(7);
  const MatF k = random(c.n, c.head_dim, c.key_mean, 1, gen);
  const MatF v = random(c.n, c.v_head_dim, 0.5F, 1, gen);
  const Exact exact(k, v);
  CAPTURE(c.n, c.key_mean);

  Moments one_by_one(c.head_dim, c.v_head_dim), backwards = one_by_one;
  for (int i = 0; i < c.n; ++i) {
    one_by_one.add(k.row(i), v.row(i));
    backwards.add(k.row(c.n - 1 - i), v.row(c.n - 1 - i));
  }
  Moments halves = Moments::of(k.topRows(c.n / 2), v.topRows(c.n / 2));
  halves.merge(Moments::of(k.bottomRows(c.n - c.n / 2), v.bottomRows(c.n - c.n / 2)));
  check_close(one_by_one, exact, 5e-5);
  check_close(backwards, exact, 5e-5);
  check_close(Moments::of(k, v), exact, 5e-6);
  check_close(halves, exact, 5e-6);
}

TEST_CASE("removing a token from the moments undoes adding it") {
  std::mt19937 gen(8);
  const MatF k = random(40, 12, 2, 1, gen), v = random(40, 6, 0.5F, 1, gen);
  Moments m = Moments::of(k, v);
  for (int i = 39; i >= 30; --i) {
    m.remove(k.row(i), v.row(i));
  }
  check_close(m, Exact(k.topRows(30), v.topRows(30)), 1e-5);
  for (int i = 29; i >= 0; --i) {
    m.remove(k.row(i), v.row(i));
  }
  CHECK(m.n == 0);
  CHECK(m.scatter.norm() == 0);
  CHECK(m.k_mean.norm() == 0);
  CHECK_THROWS_AS(m.remove(k.row(0), v.row(0)), std::logic_error);
}

namespace {

struct Scenario {
  int head_dim = 16, v_head_dim = 16, n_heads = 1, steps = 70;
  float key_mean = 0;
  int first = 0;      // losses at the first step
  int burst = 0;      // losses at step 40
  int every = 1;      // one loss every so many steps
  float outlier = 1;  // factor on the first key and value lost
};

std::ostream& operator<<(std::ostream& out, const Scenario& s) {
  return out << "head_dim " << s.head_dim << '/' << s.v_head_dim << ", heads " << s.n_heads << ", key mean "
             << s.key_mean << ", first " << s.first << ", burst " << s.burst << ", every " << s.every << ", outlier "
             << s.outlier;
}

struct Lost {
  MatF q, k, v;
  std::vector<int> step;  // of each row of k and v

  explicit Lost(const Scenario& s) {
    std::mt19937 gen(11);
    q = random(s.steps * s.n_heads, s.head_dim, 0, 0.3F, gen);
    for (int t = 0; t < s.steps; ++t) {
      const int n = (t == 0 ? s.first : 0) + (t == 40 ? s.burst : 0) + (t % s.every == 0 && t > 2 ? 1 : 0);
      step.insert(step.end(), static_cast<std::size_t>(n), t);
    }
    const int n = static_cast<int>(step.size());
    k = random(n, s.head_dim, s.key_mean, 1, gen);
    // Values that follow the keys, so that the tilt is not noise.
    v = random(n, s.v_head_dim, 0.5F, 0.5F, gen) +
        (k.array() - s.key_mean).matrix() * random(s.head_dim, s.v_head_dim, 0, 0.3F, gen);
    if (n > 0) {
      k.row(0) *= s.outlier;
      v.row(0) *= s.outlier;
    }
  }
};

constexpr MomentNeeds kAll{true, true, true, true};

// The whole run in blocks of `size` steps, rows stacked. ahead: a block also brings what its last step evicts after
// attention, which only the next block misses.
MomentRows in_blocks(const Scenario& s, const Lost& lost, int size, bool ahead = false) {
  MomentTrack track(s.head_dim, s.v_head_dim, kAll);
  const Eigen::Index rows = lost.q.rows();
  MomentRows all;
  for (auto* x : {&all.n, &all.mean_logit, &all.variance_diagonal, &all.variance_full, &all.radius_k, &all.radius_v}) {
    x->resize(rows);
  }
  all.v_mean.resize(rows, s.v_head_dim);
  all.tilt.resize(rows, s.v_head_dim);
  std::size_t taken = 0;
  for (int begin = 0; begin < s.steps; begin += size) {
    const int steps = std::min(size, s.steps - begin);
    std::vector<Loss> losses;
    for (; taken < lost.step.size() && lost.step[taken] < begin + steps + (ahead ? 1 : 0); ++taken) {
      const auto i = static_cast<Eigen::Index>(taken);
      losses.push_back({lost.step[taken] - begin, lost.k.row(i).data(), lost.v.row(i).data()});
    }
    const Eigen::Index r = begin * s.n_heads, n = steps * s.n_heads;
    const MomentRows& m = track.block(lost.q.middleRows(r, n), s.n_heads, losses);
    all.n.segment(r, n) = m.n;
    all.mean_logit.segment(r, n) = m.mean_logit;
    all.variance_diagonal.segment(r, n) = m.variance_diagonal;
    all.variance_full.segment(r, n) = m.variance_full;
    all.radius_k.segment(r, n) = m.radius_k;
    all.radius_v.segment(r, n) = m.radius_v;
    all.v_mean.middleRows(r, n) = m.v_mean;
    all.tilt.middleRows(r, n) = m.tilt;
  }
  return all;
}

}  // namespace

TEST_CASE("every row sees the float64 moments of what was lost up to its own step") {
  const auto s = GENERATE(Scenario{}, Scenario{.n_heads = 4, .first = 1}, Scenario{.key_mean = 50, .first = 300},
                          Scenario{.head_dim = 24, .v_head_dim = 10, .n_heads = 3, .first = 17, .every = 5},
                          Scenario{.head_dim = 10, .v_head_dim = 24, .key_mean = 50, .burst = 700},
                          Scenario{.head_dim = 128, .v_head_dim = 128, .n_heads = 2, .key_mean = 50, .first = 3000},
                          Scenario{.key_mean = 2, .first = 1, .outlier = 30}, Scenario{.steps = 5, .every = 100});
  CAPTURE(s);
  const Lost lost(s);
  const MomentRows rows = in_blocks(s, lost, 64);
  for (Eigen::Index r = 0; r < lost.q.rows(); r += (s.head_dim > 100 ? 7 : 1)) {
    const auto n =
        std::upper_bound(lost.step.begin(), lost.step.end(), static_cast<int>(r) / s.n_heads) - lost.step.begin();
    CAPTURE(r, n);
    REQUIRE(rows.n[r] == n);
    if (n == 0) {
      CHECK(rows.v_mean.row(r).norm() == 0);
      CHECK(rows.tilt.row(r).norm() == 0);
      CHECK(rows.mean_logit[r] == 0);
      CHECK(rows.variance_diagonal[r] == 0);
      CHECK(rows.variance_full[r] == 0);
      continue;
    }
    const Exact e(lost.k.topRows(n), lost.v.topRows(n));
    const Eigen::VectorXd q = lost.q.row(r).transpose().cast<double>();
    const double diagonal = (e.k.colwise().squaredNorm().transpose().array() * q.array().square()).sum() / e.n;
    const double full = (e.k * q).squaredNorm() / e.n;
    const Eigen::RowVectorXd tilt = (e.scatter * q).transpose() / e.n;
    // What rounding can do to the tilt is relative to its largest possible size.
    const double tilt_size = std::sqrt(full * e.v.squaredNorm() / e.n);
    CHECK(rows.mean_logit[r] == Approx(e.k_mean.dot(q)).epsilon(1e-6).margin(1e-6));
    CHECK((rows.v_mean.row(r) - e.v_mean).norm() <= 1e-6 * e.v_mean.norm());
    CHECK((rows.tilt.row(r) - tilt).norm() <= 1e-5 * tilt_size + 1e-6);
    CHECK(rows.variance_diagonal[r] == Approx(diagonal).epsilon(1e-5).margin(1e-9));
    CHECK(rows.variance_full[r] == Approx(full).epsilon(1e-4).margin(1e-9));
    // Bounds hold, and are not idle.
    const double far_k = e.k.rowwise().norm().maxCoeff(), far_v = e.v.rowwise().norm().maxCoeff();
    CHECK(rows.radius_k[r] >= far_k * (1 - 1e-6));
    CHECK(rows.radius_v[r] >= far_v * (1 - 1e-6));
    CHECK(rows.radius_k[r] <= 4 * far_k + 1e-4);
    CHECK(rows.radius_v[r] <= 4 * far_v + 1e-4);
  }
}

TEST_CASE("how the steps are cut into blocks does not matter") {
  const auto s = GENERATE(Scenario{.n_heads = 2, .key_mean = 2, .first = 1},
                          Scenario{.key_mean = 50, .first = 500, .burst = 300}, Scenario{.every = 9});
  CAPTURE(s);
  const Lost lost(s);
  const MomentRows whole = in_blocks(s, lost, 64);
  const bool ahead = GENERATE(false, true);
  for (const int size : {1, 7, 33}) {
    CAPTURE(size, ahead);
    const MomentRows cut = in_blocks(s, lost, size, ahead);
    const double tilt = whole.tilt.rowwise().norm().maxCoeff();
    CHECK((cut.n == whole.n).all());
    CHECK((cut.mean_logit - whole.mean_logit).abs().maxCoeff() <= 1e-6 * whole.mean_logit.abs().maxCoeff());
    CHECK((cut.v_mean - whole.v_mean).cwiseAbs().maxCoeff() <= 1e-6);
    CHECK((cut.tilt - whole.tilt).cwiseAbs().maxCoeff() <= 2e-6 * tilt);
    CHECK((cut.variance_diagonal - whole.variance_diagonal).abs().maxCoeff() <=
          2e-6 * whole.variance_diagonal.maxCoeff());
    CHECK((cut.variance_full - whole.variance_full).abs().maxCoeff() <= 4e-6 * whole.variance_full.maxCoeff());
    CHECK((cut.radius_k - whole.radius_k).abs().maxCoeff() <= 1e-6 * whole.radius_k.maxCoeff());
    CHECK((cut.radius_v - whole.radius_v).abs().maxCoeff() <= 1e-6 * whole.radius_v.maxCoeff());
  }
}

TEST_CASE("what a compensator needs does not depend on what others need") {
  const Scenario s{.n_heads = 2, .first = 200};
  const Lost lost(s);
  const MomentRows all = in_blocks(s, lost, s.steps);
  std::vector<Loss> losses;
  for (std::size_t i = 0; i < lost.step.size(); ++i) {
    const auto r = static_cast<Eigen::Index>(i);
    losses.push_back({lost.step[i], lost.k.row(r).data(), lost.v.row(r).data()});
  }
  MomentTrack means(s.head_dim, s.v_head_dim, {}), tilted(s.head_dim, s.v_head_dim, {.tilt = true}),
      spread(s.head_dim, s.v_head_dim, {.full = true});
  const MomentRows& a = means.block(lost.q, s.n_heads, losses);
  CHECK((a.mean_logit == all.mean_logit).all());
  CHECK(a.v_mean == all.v_mean);
  CHECK(a.tilt.size() == 0);
  CHECK(a.variance_full.size() == 0);
  CHECK(tilted.block(lost.q, s.n_heads, losses).tilt == all.tilt);
  CHECK((spread.block(lost.q, s.n_heads, losses).variance_full == all.variance_full).all());
}

}  // namespace kvreplay
