// What the mean, moments and gaussian compensators must hold exactly, in the limit, or as a bound.
#include <catch2/catch.hpp>
#include <numeric>
#include <random>

#include "policies/moments.hpp"
#include "policies/part.hpp"
#include "tests/support/evicted_tokens.hpp"
#include "tests/support/part_settings.hpp"

namespace kvreplay {

extern const PartInfo mean, moments, gaussian;

namespace {

using namespace test;

std::unique_ptr<Compensator> make(const PartInfo& part, int head_dim, int v_head_dim, const Settings& settings = {}) {
  SetShape shape;
  shape.head_dim = head_dim;
  shape.v_head_dim = v_head_dim;
  return part.compensate(configured(part, settings).get(), shape);
}

// The estimate of one compensator for queries that miss all of k and v: one step, one row per
// query.
Estimate estimate(const PartInfo& part, const MatF& q, const MatF& k, const MatF& v, const Settings& settings = {}) {
  const int head_dim = static_cast<int>(k.cols()), v_head_dim = static_cast<int>(v.cols());
  const auto compensator = make(part, head_dim, v_head_dim, settings);
  MomentTrack track(head_dim, v_head_dim, compensator->needs());
  std::vector<Loss> losses;
  for (Eigen::Index i = 0; i < k.rows(); ++i) {
    losses.push_back({0, k.row(i).data(), v.row(i).data()});
  }
  const int n_heads = static_cast<int>(q.rows());
  Estimate out;
  compensator->estimate({q, n_heads, losses, track.block(q, n_heads, losses)}, out);
  REQUIRE(out.log_mass.size() == q.rows());
  REQUIRE(out.value.rows() == q.rows());
  REQUIRE(out.value.cols() == v.cols());
  return out;
}

struct Variant {
  const PartInfo* part;
  Settings settings;
};
const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {{&mean, {}},
                                           {&moments, {}},
                                           {&gaussian, {}},
                                           {&gaussian, {{"variance", 1}}},
                                           {&gaussian, {{"variance", 1}, {"freeze", 0}, {"clip", 0}}}};
  return all;
}

}  // namespace

TEST_CASE("one evicted token, equal keys and a zero query are estimated exactly") {
  const Variant& x = variants()[GENERATE(range(0U, 5U))];
  CAPTURE(x.part->name, x.settings.size());
  std::mt19937 gen(1);
  const MatF q = normal(4, 12, 1, gen);
  const MatF one_k = normal(1, 12, 3, gen), one_v = normal(1, 8, 2, gen);
  const MatF same_k = one_k.replicate(9, 1), many_k = normal(9, 12, 3, gen), many_v = normal(9, 8, 2, gen);
  struct Case {
    MatF q, k, v;
  };
  for (const Case& c : {Case{q, one_k, one_v}, Case{q, same_k, many_v}, Case{0 * q, many_k, many_v}}) {
    const Estimate got = estimate(*x.part, c.q, c.k, c.v, x.settings);
    const Exact want(c.q, c.k, c.v);
    CHECK((got.log_mass - want.log_mass).abs().maxCoeff() <= 1e-6 * (1 + want.log_mass.abs().maxCoeff()));
    CHECK((got.value - want.value).cwiseAbs().maxCoeff() <= 1e-6 * want.value.cwiseAbs().maxCoeff());
  }
}

TEST_CASE("nothing evicted is nothing to add") {
  const Variant& x = variants()[GENERATE(range(0U, 5U))];
  const Estimate got = estimate(*x.part, MatF::Ones(3, 4), MatF(0, 4), MatF(0, 6), x.settings);
  CHECK((got.log_mass == -std::numeric_limits<double>::infinity()).all());
  CHECK(got.value == MatD::Zero(3, 6));
}

TEST_CASE("two evicted tokens follow the closed forms: tanh for the value, log cosh for the mass") {
  std::mt19937 gen(2);
  for (int trial = 0; trial < 20; ++trial) {
    const MatF q = normal(1, 6, 0.5F, gen), k = normal(2, 6, 1, gen), v = normal(2, 5, 1, gen);
    const double delta = q.row(0).cast<double>().dot(k.row(0).cast<double>() - k.row(1).cast<double>()) / 2;
    const Eigen::RowVectorXd half = (v.row(0).cast<double>() - v.row(1).cast<double>()) / 2;
    const Eigen::RowVectorXd v_mean = (v.row(0).cast<double>() + v.row(1).cast<double>()) / 2;
    const Exact exact(q, k, v);
    const Estimate first = estimate(moments, q, k, v), zeroth = estimate(mean, q, k, v);
    CHECK((exact.value.row(0) - v_mean - std::tanh(delta) * half).norm() <= 1e-12);
    CHECK((first.value.row(0) - v_mean - delta * half).norm() <= 1e-5);
    CHECK((zeroth.value.row(0) - v_mean).norm() <= 1e-6);
    for (const Estimate* e : {&first, &zeroth}) {
      CHECK(exact.log_mass[0] - e->log_mass[0] == Approx(std::log(std::cosh(delta))).margin(1e-6));
    }
  }
}

TEST_CASE("the mass of mean and moments never exceeds the true mass") {
  std::mt19937 gen(3);
  for (int trial = 0; trial < 50; ++trial) {
    const int n = 1 + trial * 3;
    const MatF q = normal(4, 8, 0.1F * static_cast<float>(trial), gen), k = normal(n, 8, 1, gen),
               v = normal(n, 8, 1, gen);
    const Exact exact(q, k, v);
    for (const PartInfo* part : {&mean, &moments}) {
      const Estimate got = estimate(*part, q, k, v);
      CHECK((exact.log_mass - got.log_mass).minCoeff() >= -1e-5);
    }
  }
}

TEST_CASE("halving a small query quarters the first-order error and the mass gap") {
  std::mt19937 gen(4);
  const MatF q = normal(1, 16, 0.04F, gen), k = normal(60, 16, 1, gen), v = normal(60, 16, 1, gen);
  double last_value = 0, last_mass = 0;
  for (int i = 0; i < 4; ++i) {
    const MatF shorter = q / std::pow(2.0F, static_cast<float>(i));
    const Exact exact(shorter, k, v);
    const Estimate got = estimate(moments, shorter, k, v);
    const double value = (exact.value - got.value).norm(), mass = exact.log_mass[0] - got.log_mass[0];
    if (i > 0) {
      CHECK(last_value / value == Approx(4).epsilon(0.1));
      CHECK(last_mass / mass == Approx(4).epsilon(0.1));
    }
    last_value = value;
    last_mass = mass;
  }
}

TEST_CASE("the tilt is the derivative of the evicted output at a zero query") {
  std::mt19937 gen(5);
  const MatF k = normal(30, 5, 1, gen), v = normal(30, 4, 1, gen);
  const MatF q = 1e-3F * MatF::Identity(5, 5);
  const MatD central = Exact(q, k, v).value - Exact(-q, k, v).value;
  const MatD tilt = estimate(moments, q, k, v).value - estimate(moments, -q, k, v).value;
  CHECK((central - tilt).cwiseAbs().maxCoeff() <= 1e-3 * tilt.cwiseAbs().maxCoeff());
}

TEST_CASE("jointly Gaussian keys and values: the direction is exact, the mass is the Gaussian one") {
  std::mt19937 gen(6);
  constexpr int n = 40000;
  const MatF mix = normal(8, 8, 0.3F, gen);
  const MatF z = normal(n, 8, 1, gen);
  MatF k = z * mix;
  k.rowwise() += normal(1, 8, 1, gen).row(0);
  const MatF v = z * normal(8, 6, 1, gen) + normal(n, 6, 0.5F, gen);
  const MatF q = normal(4, 8, 0.35F, gen);
  const Exact exact(q, k, v);
  const Estimate first = estimate(moments, q, k, v), second = estimate(gaussian, q, k, v, {{"variance", 1}});
  const MatD centred = k.cast<double>().rowwise() - k.cast<double>().colwise().mean();
  for (Eigen::Index r = 0; r < q.rows(); ++r) {
    const double variance = (centred * q.row(r).transpose().cast<double>()).squaredNorm() / n;
    CAPTURE(variance);
    REQUIRE(variance > 0.05);
    REQUIRE(variance < 4);
    CHECK((first.value.row(r) - exact.value.row(r)).norm() <= 0.05 * exact.value.row(r).norm() + 0.02);
    CHECK(exact.log_mass[r] - first.log_mass[r] == Approx(variance / 2).epsilon(0.06));
    CHECK(second.log_mass[r] == Approx(exact.log_mass[r]).margin(0.06));
  }
  // The diagonal is enough where key dimensions are independent.
  const Exact plain(q, z, v);
  const Estimate diagonal = estimate(gaussian, q, z, v);
  CHECK((diagonal.log_mass - plain.log_mass).abs().maxCoeff() <= 0.06);
}

TEST_CASE("freezing stops the Gaussian mass where no token is left to carry it") {
  std::mt19937 gen(7);
  constexpr int n = 2048;
  MatF k = normal(n, 1, 1, gen);
  const MatF v = k;
  const double log_n = std::log(n), limit = std::sqrt(2 * log_n);
  k.array() /= std::sqrt((k.array() - k.mean()).square().mean());
  for (const float spread : {1.0F, 2.0F, 6.0F, 10.0F}) {
    const MatF q = MatF::Constant(1, 1, spread);
    const Settings bare = {{"freeze", 0}, {"clip", 0}};
    const double exact = Exact(q, k, v).log_mass[0];
    const double first = estimate(moments, q, k, v).log_mass[0];
    const Estimate open = estimate(gaussian, q, k, v, bare);
    const Estimate frozen = estimate(gaussian, q, k, v, {{"clip", 0}});
    const double excess = frozen.log_mass[0] - first;
    CAPTURE(spread);
    CHECK(open.log_mass[0] - first == Approx(spread * spread / 2).epsilon(1e-5));
    if (spread <= limit) {
      CHECK(frozen.log_mass[0] == open.log_mass[0]);
      CHECK(frozen.value == open.value);
    } else {
      CHECK(excess == Approx(spread * limit - log_n).epsilon(1e-5));
      CHECK(std::abs(frozen.log_mass[0] - exact) < std::abs(open.log_mass[0] - exact) / 2);
      const double v_mean = v.cast<double>().mean();
      CHECK(frozen.value(0, 0) - v_mean == Approx((open.value(0, 0) - v_mean) * limit / spread).epsilon(1e-5));
    }
    const double half = estimate(gaussian, q, k, v, {{"clip", 0}, {"strength", 0.5}}).log_mass[0] - first;
    CHECK(half == Approx(excess / 2).epsilon(1e-5));
  }
}

TEST_CASE("clipping holds mass and value within the reach of the evicted tokens") {
  std::mt19937 gen(8);
  const MatF k = normal(20, 6, 1, gen), v = k * normal(6, 6, 1, gen), q = normal(5, 6, 40, gen);
  const Estimate got = estimate(gaussian, q, k, v, {{"freeze", 0}});
  const Estimate free = estimate(gaussian, q, k, v, {{"freeze", 0}, {"clip", 0}});
  const Estimate first = estimate(mean, q, k, v);
  const MatD k_far = k.cast<double>().rowwise() - k.cast<double>().colwise().mean();
  const MatD v_far = v.cast<double>().rowwise() - v.cast<double>().colwise().mean();
  const double r_k = k_far.rowwise().norm().maxCoeff(), r_v = v_far.rowwise().norm().maxCoeff();
  for (Eigen::Index r = 0; r < q.rows(); ++r) {
    const double bound = static_cast<double>(q.row(r).norm()) * r_k;
    CHECK(got.log_mass[r] - first.log_mass[r] <= bound * (1 + 1e-5));
    CHECK((got.value.row(r) - first.value.row(r)).norm() <= r_v * (1 + 1e-5));
    CHECK(free.log_mass[r] > got.log_mass[r]);
    CHECK((free.value.row(r) - first.value.row(r)).norm() > r_v);
  }
}

TEST_CASE("moving every key by one vector moves the mass by its logit and the value not at all") {
  const Variant& x = variants()[GENERATE(range(0U, 5U))];
  CAPTURE(x.part->name);
  std::mt19937 gen(9);
  const MatF q = normal(4, 16, 0.3F, gen), k = normal(50, 16, 1, gen), v = normal(50, 16, 1, gen);
  const MatF u = normal(1, 16, 20, gen);
  const Estimate here = estimate(*x.part, q, k, v, x.settings);
  const Estimate there = estimate(*x.part, q, k.rowwise() + u.row(0), v, x.settings);
  const Eigen::ArrayXd moved = (q.cast<double>() * u.row(0).transpose().cast<double>()).array();
  CHECK((there.log_mass - here.log_mass - moved).abs().maxCoeff() <= 2e-5);
  CHECK((there.value - here.value).cwiseAbs().maxCoeff() <= 2e-5);
}

TEST_CASE("shares of the mass stay in [0, 1] and finite for logits of ten thousand") {
  const Variant& x = variants()[GENERATE(range(0U, 5U))];
  const float size = GENERATE(1e4F, -1e4F);
  CAPTURE(x.part->name, size);
  std::mt19937 gen(10);
  const MatF q = MatF::Ones(1, 4), v = normal(10, 4, 1, gen);
  MatF k = normal(10, 4, 1, gen);
  k.col(0).array() += size;
  const Estimate got = estimate(*x.part, q, k, v, x.settings);
  REQUIRE(got.log_mass.isFinite().all());
  REQUIRE(got.value.allFinite());
  for (const double retained : {-1e4, 0.0, 1e4}) {
    const double share = 1 / (1 + std::exp(retained - got.log_mass[0]));
    CHECK(share >= 0);
    CHECK(share <= 1);
  }
}

// Recovers scatter / n from the answers to unit queries.
MatD covariance(const MatF& k, const MatF& v, const Settings& settings) {
  const Eigen::Index d = k.cols();
  MatF q = MatF::Zero(d + 1, d);
  q.topRows(d).setIdentity();
  const MatD value = estimate(moments, q, k, v, settings).value;
  return (value.topRows(d).rowwise() - value.row(d)).transpose();
}

TEST_CASE("the paper's 16-bit raw sums lose the scatter when keys have a mean; float32 does not") {
  struct Case {
    int n;
    double fp16_lo, fp16_hi, bf16_lo, bf16_hi;
  };
  // fp16 4, 7, 16 %; bf16 35, 534, 541 % for 256, 1024, 4096 tokens
  const auto c = GENERATE(Case{256, 0.01, 0.15, 0.1, 1.5}, Case{1024, 0.02, 0.3, 1, 20}, Case{4096, 0.04, 1, 1, 50});
  std::mt19937 gen(12);
  MatF k = normal(c.n, 16, 1, gen);
  const MatF v = (0.5F * k + normal(c.n, 16, 1, gen)).array() + 0.5F;
  k.array() += 2;
  const MatD kc = k.cast<double>().rowwise() - k.cast<double>().colwise().mean();
  const MatD vc = v.cast<double>().rowwise() - v.cast<double>().colwise().mean();
  const MatD exact = vc.transpose() * kc / c.n;
  const auto error = [&](const Settings& s) { return (covariance(k, v, s) - exact).norm() / exact.norm(); };
  const double float32 = error({}), fp16 = error({{"state", 1}}), bf16 = error({{"state", 2}});
  CAPTURE(c.n, float32, fp16, bf16);
  CHECK(float32 < 1e-5);
  CHECK(fp16 > c.fp16_lo);
  CHECK(fp16 < c.fp16_hi);
  CHECK(bf16 > c.bf16_lo);
  CHECK(bf16 < c.bf16_hi);
}

TEST_CASE("a 16-bit counter stops at 256 in bfloat16 and at 2048 in float16") {
  const MatF k = MatF::Zero(3000, 2), v = MatF::Zero(3000, 2), q = MatF::Zero(1, 2);
  const auto counted = [&](double state, double round_count) {
    const Settings settings = {{"state", state}, {"round_count", round_count}};
    return std::exp(estimate(moments, q, k, v, settings).log_mass[0]);
  };
  CHECK(counted(1, 0) == Approx(3000));
  CHECK(counted(2, 0) == Approx(3000));
  CHECK(counted(1, 1) == Approx(2048));
  CHECK(counted(2, 1) == Approx(256));
}

TEST_CASE("raw sums follow the steps of a block like the centred state") {
  std::mt19937 gen(13);
  const MatF k = normal(12, 4, 1, gen), v = normal(12, 3, 1, gen), q = normal(8, 4, 1, gen);
  const auto raw = make(moments, 4, 3, {{"state", 1}}), centred = make(moments, 4, 3);
  MomentTrack track(4, 3, centred->needs());
  std::size_t lost = 0;
  for (int block = 0; block < 2; ++block) {  // 4 steps of 2 heads; step 4 is the next block's first
    std::vector<Loss> losses;
    for (int step = 2; step <= 4; ++step) {
      for (int i = 0; i < 2; ++i, ++lost) {
        losses.push_back(
            {step, k.row(static_cast<Eigen::Index>(lost)).data(), v.row(static_cast<Eigen::Index>(lost)).data()});
      }
    }
    const MomentRows& rows = track.block(q, 2, losses);
    Estimate a, b;
    raw->estimate({q, 2, losses, rows}, a);
    centred->estimate({q, 2, losses, rows}, b);
    for (Eigen::Index r = 0; r < 8; ++r) {
      CAPTURE(block, r);
      if (block == 0 && r < 4) {
        CHECK(a.log_mass[r] == b.log_mass[r]);  // -inf
      } else {
        CHECK(a.log_mass[r] == Approx(b.log_mass[r]).margin(0.02));
      }
      CHECK((a.value.row(r) - b.value.row(r)).norm() <= 0.05);
    }
  }
}

TEST_CASE("the state that a compensator keeps is counted in bytes") {
  struct Case {
    const PartInfo* part;
    Settings settings;
    double bytes;
  };
  const int d = 128, dv = 64;
  const auto bytes = [&](const Case& c) { return make(*c.part, d, dv, c.settings)->state_bytes(); };
  const double first = d * dv + d + dv + 1;
  for (const Case& c :
       {Case{&mean, {}, 4.0 * (d + dv + 1)}, Case{&moments, {}, 4 * first}, Case{&moments, {{"state", 1}}, 2 * first},
        Case{&moments, {{"state", 2}}, 2 * first}, Case{&gaussian, {}, 4 * (first + d + 2)},
        Case{&gaussian, {{"clip", 0}}, 4 * (first + d)}, Case{&gaussian, {{"variance", 1}}, 4 * (first + d * d + 2)}}) {
    CHECK(bytes(c) == c.bytes);
  }
}

TEST_CASE("a rounded count without a 16-bit state is refused") {
  const std::shared_ptr<void> config = moments.config();
  moments.check(config.get(), 64);
  for (const ParamInfo& p : moments.params) {
    if (p.name == "round_count") {
      p.set(config.get(), {1, false, {}});
    }
  }
  CHECK_THROWS_AS(moments.check(config.get(), 64), ConfigError);
}

}  // namespace kvreplay
