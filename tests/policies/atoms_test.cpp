// What atoms and the linear state must hold exactly, in the limit, or on average.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>

#include "policies/moments.hpp"
#include "policies/part.hpp"
#include "tests/support/evicted_tokens.hpp"
#include "tests/support/part_settings.hpp"

namespace kvreplay {

extern const PartInfo atoms, linear, clusters, moments, gaussian;

namespace {

using namespace test;
enum Assign { one, blocks, nearest };
enum Second { none, first, lowrank };  // kappa: first is diagonal; tilt: first is full

std::unique_ptr<Compensator> make(const PartInfo& part, int head_dim, int v_head_dim, const Settings& settings,
                                  Pos n_tokens = 0) {
  SetShape shape;
  shape.head_dim = head_dim;
  shape.v_head_dim = v_head_dim;
  shape.n_tokens = n_tokens;
  return part.compensate(configured(part, settings).get(), shape);
}

// Blocks of one compensator; `at`: the step, counted from the first, from which each token is missing.
struct Run {
  std::unique_ptr<Compensator> compensator;
  MomentTrack track;
  Run(const PartInfo& part, const MatF& k, const MatF& v, const Settings& settings, Pos n_tokens = 0)
      : compensator(make(part, static_cast<int>(k.cols()), static_cast<int>(v.cols()), settings, n_tokens)),
        track(static_cast<int>(k.cols()), static_cast<int>(v.cols()), compensator->needs()) {}
  Estimate block(const MatF& q, int n_heads, const std::vector<Loss>& losses) {
    Estimate out;
    compensator->estimate({q, n_heads, losses, track.block(q, n_heads, losses)}, out);
    return out;
  }
};

// All tokens are missing from the start: one step, one row per query.
Estimate estimate(const PartInfo& part, const MatF& q, const MatF& k, const MatF& v, const Settings& settings = {}) {
  std::vector<Loss> losses;
  for (Eigen::Index i = 0; i < k.rows(); ++i) {
    losses.push_back({0, k.row(i).data(), v.row(i).data(), static_cast<Pos>(i)});
  }
  return Run(part, k, v, settings, static_cast<Pos>(k.rows())).block(q, static_cast<int>(q.rows()), losses);
}

struct Variant {
  const PartInfo* part;
  Settings settings;
};
const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
      {&atoms, {}},
      {&atoms, {{"assign", one}, {"kappa", none}, {"tilt", first}}},
      {&atoms, {{"assign", blocks}, {"kappa", lowrank}, {"tilt", lowrank}, {"rank", 3}, {"atoms", 4}}},
      {&atoms, {{"assign", nearest}, {"kappa", lowrank}, {"tilt", first}, {"freeze", 0}, {"clip", 0}, {"atoms", 3}}},
      {&linear, {}}};
  return all;
}

void check_same(const Estimate& a, const Estimate& b, double tolerance) {
  CHECK((a.log_mass - b.log_mass).abs().maxCoeff() <= tolerance * (1 + b.log_mass.abs().maxCoeff()));
  CHECK((a.value - b.value).cwiseAbs().maxCoeff() <= tolerance * (1 + b.value.cwiseAbs().maxCoeff()));
}

TEST_CASE("atoms are exact for one token, equal keys, and as many atoms as tokens") {
  const Variant& x = variants()[GENERATE(range(0U, 4U))];
  std::mt19937 gen(1);
  const MatF q = normal(4, 12, 1, gen);
  const MatF one_k = normal(1, 12, 3, gen), one_v = normal(1, 8, 2, gen);
  const MatF same_k = one_k.replicate(9, 1), many_v = normal(9, 8, 2, gen), many_k = normal(9, 12, 3, gen);
  const auto check = [&](const MatF& k, const MatF& v, const Settings& settings) {
    const Estimate got = estimate(*x.part, q, k, v, settings);
    const Exact want(q, k, v);
    CHECK((got.log_mass - want.log_mass).abs().maxCoeff() <= 1e-6 * (1 + want.log_mass.abs().maxCoeff()));
    CHECK((got.value - want.value).cwiseAbs().maxCoeff() <= 1e-6 * want.value.cwiseAbs().maxCoeff());
  };
  check(one_k, one_v, x.settings);
  check(same_k, many_v, x.settings);
  Settings own = x.settings;
  own.emplace_back("assign", nearest);
  own.emplace_back("atoms", 9);
  check(many_k, many_v, own);
}

TEST_CASE("one atom is what moments and gaussian estimate") {
  std::mt19937 gen(2);
  const MatF q = normal(6, 12, 0.6F, gen), k = normal(50, 12, 1, gen), v = normal(50, 8, 1, gen);
  check_same(estimate(atoms, q, k, v, {{"assign", one}, {"kappa", none}, {"tilt", first}, {"clip", 0}}),
             estimate(moments, q, k, v), 1e-5);
  for (const double on : {0.0, 1.0}) {
    const Settings both = {{"freeze", on}, {"clip", on}, {"strength", 0.75}};
    Settings diagonal = both, full = both, g = both;
    diagonal.insert(diagonal.end(), {{"assign", one}, {"kappa", first}, {"tilt", first}});
    full.insert(full.end(), {{"assign", one}, {"kappa", lowrank}, {"tilt", lowrank}, {"rank", 12}});
    check_same(estimate(atoms, q, k, v, diagonal), estimate(gaussian, q, k, v, both), 1e-5);
    g.emplace_back("variance", 1);
    check_same(estimate(atoms, q, k, v, full), estimate(gaussian, q, k, v, g), 1e-5);
  }
}

TEST_CASE("an atom's state is the same whether tokens come at once, in turn or in blocks") {
  const Variant& x = variants()[GENERATE(range(0U, 5U))];
  CAPTURE(x.part->name, x.settings.size());
  std::mt19937 gen(3);
  const int n_heads = 2, steps = 12;
  const MatF q = normal(steps * n_heads, 6, 0.7F, gen), k = normal(30, 6, 1, gen), v = normal(30, 5, 1, gen);
  const auto losses = [&](int begin, int end) {  // 8 at the start, then two per step
    std::vector<Loss> out;
    for (int i = 0; i < 30; ++i) {
      const int at = std::max(0, (i - 8) / 2 + 1);
      if ((begin == 0 || at > begin) && at <= end) {
        out.push_back({i < 8 ? 0 : at - begin, k.row(i).data(), v.row(i).data(), i});
      }
    }
    return out;
  };
  Run whole(*x.part, k, v, x.settings, 30), stepwise(*x.part, k, v, x.settings, 30),
      halves(*x.part, k, v, x.settings, 30);
  const Estimate all = whole.block(q, n_heads, losses(0, steps));
  for (int s = 0; s < steps; ++s) {
    const Estimate part = stepwise.block(q.middleRows(s * n_heads, n_heads), n_heads, losses(s, s + 1));
    CHECK((part.log_mass - all.log_mass.segment(s * n_heads, n_heads)).abs().maxCoeff() < 1e-9);
    CHECK((part.value - all.value.middleRows(s * n_heads, n_heads)).cwiseAbs().maxCoeff() < 1e-9);
  }
  for (int s = 0; s < steps; s += 6) {
    const Estimate part = halves.block(q.middleRows(s * n_heads, 6 * n_heads), n_heads, losses(s, s + 6));
    CHECK((part.log_mass - all.log_mass.segment(s * n_heads, 6 * n_heads)).abs().maxCoeff() < 1e-9);
    CHECK((part.value - all.value.middleRows(s * n_heads, 6 * n_heads)).cwiseAbs().maxCoeff() < 1e-9);
  }
}

// Blocks of 32 normal keys in 16 dimensions: the RMS error of ln mass with first and second order, at three lengths of
// the query.
TEST_CASE("second-order mass helps until the logits spread too far") {
  struct Case {
    float scale;
    double first, second;
  };
  const auto c = GENERATE(Case{0.5F, 0.134, 0.009}, Case{1, 0.50, 0.07}, Case{2, 1.92, 0.50});
  std::mt19937 gen(4);
  double first_order = 0, second_order = 0;
  const int trials = 3000;
  for (int trial = 0; trial < trials; ++trial) {
    const MatF q = normal(1, 16, 1, gen), mu = normal(1, 16, 1, gen);
    const MatF a = c.scale / std::sqrt(16.0F) * q;
    const MatF k = normal(32, 16, 1, gen).rowwise() + mu.row(0);
    const double exact = Exact(a, k, k).log_mass[0];
    const Settings open = {{"assign", one}, {"freeze", 0}, {"clip", 0}, {"rank", 16}};
    Settings zero = open, full = open;
    zero.emplace_back("kappa", none);
    full.emplace_back("kappa", lowrank);
    first_order += std::pow(estimate(atoms, a, k, k, zero).log_mass[0] - exact, 2);
    second_order += std::pow(estimate(atoms, a, k, k, full).log_mass[0] - exact, 2);
  }
  CAPTURE(c.scale);
  CHECK(std::sqrt(first_order / trials) == Approx(c.first).epsilon(0.06));
  CHECK(std::sqrt(second_order / trials) == Approx(c.second).epsilon(0.15));
}

TEST_CASE("low-rank mass takes the largest eigenvectors of the keys' covariance, from a Gram matrix of the tokens") {
  std::mt19937 gen(5);
  const int n = 32, d = 20;
  const MatF q = normal(3, d, 0.5F, gen), k = normal(n, d, 1, gen), v = normal(n, 6, 1, gen);
  const MatD centred = k.cast<double>().rowwise() - k.cast<double>().colwise().mean();
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(centred.transpose() * centred / n);
  const Estimate bare = estimate(atoms, q, k, v, {{"assign", one}, {"kappa", none}});
  for (const int rank : {1, 2, 4, 8, 20}) {
    const Estimate got =
        estimate(atoms, q, k, v, {{"assign", one}, {"kappa", lowrank}, {"rank", rank}, {"freeze", 0}, {"clip", 0}});
    for (Eigen::Index r = 0; r < q.rows(); ++r) {
      double variance = 0;
      for (int i = 0; i < rank; ++i) {
        const double along = eigen.eigenvectors().col(d - 1 - i).dot(q.row(r).transpose().cast<double>());
        variance += eigen.eigenvalues()[d - 1 - i] * along * along;
      }
      CHECK(got.log_mass[r] - bare.log_mass[r] == Approx(variance / 2).epsilon(1e-8));
    }
  }
}

TEST_CASE("the low-rank tilt is the covariance's best approximation, and stays close when tokens come one by one") {
  std::mt19937 gen(6);
  const int n = 60, d = 10, dv = 7;
  MatF k = normal(n, 2, 1, gen) * normal(2, d, 1, gen) + normal(n, d, 0.05F, gen);
  const MatF v = k * normal(d, dv, 0.5F, gen) + normal(n, dv, 0.05F, gen);
  const MatF q = normal(4, d, 0.3F, gen);
  const MatD kc = k.cast<double>().rowwise() - k.cast<double>().colwise().mean();
  const MatD vc = v.cast<double>().rowwise() - v.cast<double>().colwise().mean();
  const Eigen::JacobiSVD<Eigen::MatrixXd> svd(kc.transpose() * vc / n, Eigen::ComputeThinU | Eigen::ComputeThinV);
  const MatD best =
      svd.matrixU().leftCols(2) * svd.singularValues().head(2).asDiagonal() * svd.matrixV().leftCols(2).transpose();
  const Settings settings = {{"assign", one}, {"kappa", none}, {"tilt", lowrank}, {"rank", 2}, {"clip", 0}};
  const MatD want = (q.cast<double>() * best).rowwise() + v.cast<double>().colwise().mean();
  const Estimate batch = estimate(atoms, q, k, v, settings);
  CHECK((batch.value - want).cwiseAbs().maxCoeff() < 1e-8);
  Run run(atoms, k, v, settings);
  Estimate in_turn;
  for (int i = 0; i < n; ++i) {
    in_turn = run.block(q, 4, {{0, k.row(i).data(), v.row(i).data(), i}});
  }
  CHECK((in_turn.value - want).norm() < 0.02 * want.norm());
}

TEST_CASE("Lloyd's clusters are those that one would draw, and later tokens join the nearest") {
  MatF k(5, 1), v(5, 1);
  k << 0, 10, 1, 11, 9;
  v << 1, 2, 3, 4, 8;
  const Settings two = {{"atoms", 2}, {"kappa", none}};
  const MatF q = MatF::Constant(1, 1, 0.5F);
  Run run(atoms, k, v, two);
  std::vector<Loss> losses;
  for (int i = 0; i < 4; ++i) {
    losses.push_back({0, k.row(i).data(), v.row(i).data(), i});
  }
  const double low = 2 * std::exp(0.25), high = 2 * std::exp(5.25);
  const Estimate four = run.block(q, 1, losses);
  CHECK(four.log_mass[0] == Approx(std::log(low + high)));
  CHECK(four.value(0, 0) == Approx((low * 2 + high * 3) / (low + high)));
  const Estimate five = run.block(q, 1, {{0, k.row(4).data(), v.row(4).data(), 4}});
  const double three = 3 * std::exp(5);
  CHECK(five.log_mass[0] == Approx(std::log(low + three)));
  CHECK(five.value(0, 0) == Approx((low * 2 + three * 14 / 3) / (low + three)));
}

TEST_CASE("blocks are equal stretches of the text") {
  std::mt19937 gen(7);
  const MatF k = normal(10, 4, 1, gen), v = normal(10, 4, 1, gen), q = normal(2, 4, 0.5F, gen);
  const Estimate got = estimate(atoms, q, k, v, {{"assign", blocks}, {"atoms", 3}, {"kappa", none}});
  for (Eigen::Index r = 0; r < 2; ++r) {
    double mass = 0;
    for (const auto& [begin, n] : {std::pair{0, 4}, {4, 4}, {8, 2}}) {
      mass += n * std::exp(q.row(r).dot(k.middleRows(begin, n).colwise().mean()));
    }
    CHECK(got.log_mass[r] == Approx(std::log(mass)).epsilon(1e-5));
  }

  // The last stretch may lose a token before the others do.
  Run run(atoms, k, v, {{"assign", blocks}, {"atoms", 3}, {"kappa", none}}, 10);
  const auto loss = [&](Pos p) { return Loss{0, k.row(p).data(), v.row(p).data(), p}; };
  check_same(run.block(q, 2, {loss(9)}), estimate(atoms, q, k.row(9), v.row(9), {{"atoms", 1}}), 1e-6);
  std::vector<Loss> rest;
  for (Pos p = 0; p < 9; ++p) {
    rest.push_back(loss(p));
  }
  check_same(run.block(q, 2, rest), got, 1e-12);
}

TEST_CASE("decay takes its share of every weight at each step, from mass, mean and covariance alike") {
  std::mt19937 gen(8);
  const MatF k = normal(2, 3, 1, gen), v = normal(2, 3, 1, gen), q = normal(1, 3, 0.5F, gen);
  const double decay = 0.75, old = std::pow(decay, 3);
  Run run(atoms, k, v, {{"assign", one}, {"kappa", none}, {"tilt", first}, {"clip", 0}, {"decay", decay}});
  const MatF rows = q.replicate(6, 1);
  const Estimate got =
      run.block(rows, 1, {{1, k.row(0).data(), v.row(0).data(), 0}, {4, k.row(1).data(), v.row(1).data(), 1}});
  const double first_logit = static_cast<double>(q.row(0).dot(k.row(0)));
  CHECK(std::isinf(got.log_mass[0]));
  CHECK(got.log_mass[3] == Approx(2 * std::log(decay) + first_logit));
  const auto mean = [&](const MatF& x) -> Eigen::RowVectorXd {
    return (old * x.row(0).cast<double>() + x.row(1).cast<double>()) / (old + 1);
  };
  const Eigen::RowVectorXd q0 = q.row(0).cast<double>();
  CHECK(got.log_mass[4] == Approx(std::log(old + 1) + q0.dot(mean(k))));
  CHECK(got.log_mass[5] == Approx(std::log((old + 1) * decay) + q0.dot(mean(k))));
  Eigen::RowVectorXd tilt = Eigen::RowVectorXd::Zero(3);
  for (int i = 0; i < 2; ++i) {
    const double weight = i == 0 ? old : 1;
    tilt += weight / (old + 1) * q0.dot(k.row(i).cast<double>() - mean(k)) * (v.row(i).cast<double>() - mean(v));
  }
  CHECK((got.value.row(4) - mean(v) - tilt).norm() < 1e-6);
  CHECK((got.value.row(5) - mean(v) - tilt).norm() < 1e-6);
  const Run kept(atoms, k, v, {{"assign", one}, {"decay", 1}});
  CHECK(kept.compensator->state_bytes() == Run(atoms, k, v, {{"assign", one}}).compensator->state_bytes());
}

TEST_CASE("nothing evicted is no atom, and logits of ten thousand stay finite") {
  const Variant& x = variants()[GENERATE(range(0U, 5U))];
  const float size = GENERATE(1e4F, -1e4F);
  CAPTURE(x.part->name, x.settings.size(), size);
  const Estimate none_lost = estimate(*x.part, MatF::Ones(3, 4), MatF(0, 4), MatF(0, 6), x.settings);
  CHECK((none_lost.log_mass == -std::numeric_limits<double>::infinity()).all());
  CHECK(none_lost.value == MatD::Zero(3, 6));
  std::mt19937 gen(9);
  MatF k = normal(10, 4, 1, gen);
  k.col(0).array() += size;
  const Estimate got = estimate(*x.part, MatF::Ones(1, 4), k, normal(10, 4, 1, gen), x.settings);
  CHECK(got.log_mass.isFinite().all());
  CHECK(got.value.allFinite());
  const MatF same = MatF::Constant(10, 4, 3);
  CHECK(estimate(*x.part, MatF::Ones(1, 4), same, same, x.settings).value.allFinite());
}

TEST_CASE("an atom's numbers are counted") {
  const int d = 128, dv = 64;
  const auto bytes = [&](const PartInfo& part, const Settings& s) { return make(part, d, dv, s)->state_bytes(); };
  const double point = d + dv + 1;
  CHECK(bytes(atoms, {{"kappa", none}}) == 4 * 16 * point);
  CHECK(bytes(atoms, {}) == 4 * 16 * (point + d + 2));
  CHECK(bytes(atoms, {{"assign", one}, {"kappa", none}, {"tilt", first}, {"clip", 0}}) == 4 * (point + d * dv));
  CHECK(bytes(atoms, {{"atoms", 3}, {"kappa", lowrank}, {"tilt", lowrank}, {"clip", 0}, {"rank", 2}}) ==
        4 * 3 * (point + 2 * d + 2 * (d + dv)));
  CHECK(bytes(linear, {}) == 4 * (8 * dv + 8));
}

TEST_CASE("random features estimate short keys well on average and long ones not at all") {
  std::mt19937 gen(10);
  const MatF v = normal(40, 6, 1, gen), short_k = normal(40, 8, 0.4F, gen), q = normal(5, 8, 0.4F, gen);
  const Estimate close = estimate(linear, q, short_k, v, {{"features", 4096}});
  const Exact exact(q, short_k, v);
  CHECK((close.log_mass - exact.log_mass).abs().maxCoeff() < 0.2);
  CHECK((close.value - exact.value).norm() < 0.3 * exact.value.norm());
  const MatF long_k = 8 * short_k, long_q = 8 * q;
  const Estimate lost = estimate(linear, long_q, long_k, v, {{"features", 4096}});
  CHECK((lost.log_mass - Exact(long_q, long_k, v).log_mass).abs().maxCoeff() > 3);
}

TEST_CASE("the linear state takes a token of this block for what one from before is, its features near or far apart") {
  std::mt19937 gen(12);
  const MatF v = normal(1, 6, 1, gen);
  for (const float size : {0.4F, 300.0F}) {
    const MatF k = normal(1, 8, size, gen), q = normal(12, 8, size, gen);  // 2 steps of 6 heads
    const Estimate before = estimate(linear, q, k, v);
    const Estimate inside = Run(linear, k, v, {}, 1).block(q, 6, {{1, k.data(), v.data(), 0}});
    CHECK((inside.log_mass.head(6) == -std::numeric_limits<double>::infinity()).all());
    check_same({inside.log_mass.tail(6), inside.value.bottomRows(6)},
               {before.log_mass.tail(6), before.value.bottomRows(6)}, 1e-12);
  }
}

// Tokens that are missing from the start, beside retained ones of which each row's largest probability is known.
Estimate gated(const MatF& q, const MatF& k, const MatF& v, double largest, const Settings& settings) {
  const auto compensator = make(clusters, static_cast<int>(k.cols()), static_cast<int>(v.cols()), settings);
  std::vector<Loss> losses;
  for (Eigen::Index i = 0; i < k.rows(); ++i) {
    losses.push_back({0, k.row(i).data(), v.row(i).data(), static_cast<Pos>(i)});
  }
  const MomentRows unused{};
  const Eigen::ArrayXd mass = Eigen::ArrayXd::Constant(q.rows(), 5.0);
  Estimate out;
  compensator->estimate({q, static_cast<int>(q.rows()), losses, unused, mass, mass + std::log(largest)}, out);
  return out;
}

TEST_CASE("clusters are exact for one token each and for equal keys; the gate weighs them down to nothing") {
  std::mt19937 gen(11);
  const MatF q = normal(4, 12, 0.5F, gen), k = normal(9, 12, 1, gen), v = normal(9, 8, 1, gen);
  const MatF same = k.row(0).replicate(9, 1);
  const auto settings = [](double entries, Settings more) {
    more.insert(more.end(), {{"entries", entries}, {"validate", 0}});
    return more;
  };
  const Exact exact(q, k, v), equal(q, same, v);
  const Estimate own = gated(q, k, v, 0.9, settings(9, {{"gate", 0}}));
  CHECK((own.log_mass - exact.log_mass).abs().maxCoeff() < 1e-9);
  CHECK((own.value - exact.value).cwiseAbs().maxCoeff() < 1e-9);
  const Estimate one_entry = gated(q, same, v, 0.9, settings(1, {{"gate", 0}}));
  CHECK((one_entry.log_mass - equal.log_mass).abs().maxCoeff() < 1e-9);
  CHECK((one_entry.value - equal.value).cwiseAbs().maxCoeff() < 1e-9);
  const auto log_gate = [&](double largest, const Settings& more) {
    return (gated(q, k, v, largest, settings(9, more)).log_mass - exact.log_mass).maxCoeff();
  };
  CHECK(log_gate(0.25, {}) == Approx(std::log(0.5)).margin(1e-9));
  CHECK(log_gate(0.9, {}) == Approx(-std::log(1 + std::exp(12 * 0.65))).margin(1e-9));
  CHECK(log_gate(0.9, {{"least_gate", 0.2}}) == Approx(std::log(0.2)).margin(1e-9));
  CHECK(log_gate(0.5, {{"threshold", 0}, {"sharpness", 1e6}}) < -1e5);
  CHECK((gated(q, k, v, 0.9, settings(0, {})).log_mass == -std::numeric_limits<double>::infinity()).all());
}

TEST_CASE("held-out queries decide how many entries there are, and whether any") {
  std::mt19937 gen(12);
  const int d = 8;
  const auto numbers = [&](const PromptCut& cut) {
    const auto compensator = make(clusters, d, d, {{"entries", 8}});
    compensator->prompt(cut);
    return compensator->state_bytes() / 4 / (2 * d + 1);
  };
  PromptCut cut{normal(128, d, 0.3F, gen), 1, normal(6, d, 1, gen), {}, normal(6, d, 1, gen), {}};
  const MatF centres = normal(4, d, 2, gen), values = normal(4, d, 3, gen);
  cut.evicted_k = centres.replicate(10, 1);
  cut.evicted_v = values.replicate(10, 1);
  for (Pos p = 0; p < 40; ++p) {
    cut.evicted.push_back(p);
  }
  // Four kinds of token: four clusters leave no error, and no larger number lowers it further.
  PromptCut four = cut;
  four.evicted_k += normal(40, d, 1e-4F, gen);
  CHECK(numbers(four) >= 4);
  // Every token has the same value: plain eviction is right, and whatever helps nothing is off.
  PromptCut same = cut;
  same.evicted_v.setOnes();
  same.retained_v.setOnes();
  CHECK(numbers(same) == 0);
  // Nothing to judge by.
  PromptCut nothing = cut;
  nothing.evicted_k.resize(0, d);
  nothing.evicted_v.resize(0, d);
  nothing.evicted.clear();
  CHECK(numbers(nothing) == 8);
}

TEST_CASE("entries are a share of the budget, and cost two vectors and a count each") {
  const std::shared_ptr<void> config = clusters.config();
  SetShape shape;
  shape.head_dim = 128;
  shape.v_head_dim = 64;
  for (const int budget : {1, 100, 1024}) {
    shape.budget = budget;
    const int entries = budget / 5;
    CHECK(clusters.compensate(config.get(), shape)->state_bytes() == 4.0 * entries * (128 + 64 + 1));
  }
}

}  // namespace
}  // namespace kvreplay
