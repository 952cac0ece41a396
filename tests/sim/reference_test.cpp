// The reference against what must hold whatever the numbers are: a wrong truth would condemn a
// right engine.
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/support/reference_selection.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

ToyLayer toy(int group_size = 3, ToyKind kind = ToyKind::structured) {
  ToyOptions o;
  o.group_size = group_size;
  o.kind = kind;
  o.n_tokens = 60;
  o.prompt_len = 20;
  o.v_head_dim = 12;
  o.hidden = 24;
  return make_toy_layer(o);
}

std::vector<ReferenceCompensator> three() {
  return {{"mean", Compensation::mean}, {"moments", Compensation::moments}, {"gaussian", Compensation::gaussian, true}};
}

SelectionRequest request(MakeSelector select, int budget, Traits traits = {}) {
  SelectionRequest r;
  r.select = std::move(select);
  r.budget = budget;
  r.traits = traits;
  return r;
}

// Calls check(x) for every number that counts.
template <class Check>
void each(const MatD& m, Check check) {
  int n = 0;
  for (Eigen::Index i = 0; i < m.size(); ++i) {
    if (!std::isnan(m.data()[i])) {
      check(i);
      ++n;
    }
  }
  REQUIRE(n > 0);
}

}  // namespace

TEST_CASE("rounding to an element type gives its numbers and halves to even") {
  CHECK(round_to(1 + std::ldexp(1.0, -8), Element::bf16) == 1);
  CHECK(round_to(1 + 3 * std::ldexp(1.0, -8), Element::bf16) == 1 + std::ldexp(1.0, -6));
  CHECK(round_to(1 + std::ldexp(1.0, -11), Element::f16) == 1);
  CHECK(round_to(1.5 * std::ldexp(1.0, -24), Element::f16) == std::ldexp(1.0, -23));  // subnormal
  CHECK(round_to(0.1, Element::f32) == static_cast<double>(0.1F));
  CHECK(round_to(-65504, Element::f16) == -65504);
}

TEST_CASE("toy layers hold numbers of their element type and reach what their kind says") {
  for (const Element element : {Element::f32, Element::f16, Element::bf16}) {
    ToyOptions o;
    o.element = element;
    const ToyLayer layer = make_toy_layer(o);
    for (const MatD& k : layer.k) {
      CHECK(k == k.unaryExpr([&](double x) { return round_to(x, element); }));
    }
  }
  ToyOptions huge;
  huge.kind = ToyKind::huge_logits;
  const ToyLayer layer = make_toy_layer(huge);
  double most = 0, least = 0;
  for (Pos pos = 0; pos < huge.n_tokens; ++pos) {
    most = std::max(most, logits_at(layer, 0, pos).maxCoeff());
    least = std::min(least, logits_at(layer, 0, pos).minCoeff());
  }
  CHECK(most > 5e3);
  CHECK(least < -5e3);
}

TEST_CASE("the exact output is the mass-weighted mean of retained and evicted outputs") {
  const ToyLayer layer = toy();
  for (const Pos now : {Pos{5}, Pos{59}}) {
    const Eigen::VectorXd logits = logits_at(layer, 1, now);
    std::vector<bool> all(static_cast<std::size_t>(now) + 1, true), kept(all.size()), lost(all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      kept[i] = i % 3 != 1;
      lost[i] = !kept[i];
    }
    const MatD& v = layer.v[0];
    const Softmax f = softmax_over(logits, v, all), r = softmax_over(logits, v, kept),
                  e = softmax_over(logits, v, lost);
    const double w = std::exp(e.log_mass - f.log_mass);
    CHECK(std::exp(r.log_mass - f.log_mass) + w == Approx(1).epsilon(1e-13));
    CHECK(((1 - w) * r.output + w * e.output - f.output).norm() < 1e-13);
  }
}

TEST_CASE("error squared is parallel squared plus orthogonal squared") {
  const ToyLayer layer = toy();
  const SelectionRequest h2o = request(reference_h2o(), 8);
  MetricsRequest m;
  m.attends = attends_from(layer, Scope::kv_head, reference_selection(layer, h2o).evicted_at);
  const NamedSeries s = reference_metrics(layer, m);
  each(s.at("error_parallel"), [&](Eigen::Index i) {
    const double parallel = s.at("error_parallel").data()[i], orthogonal = s.at("error_orthogonal").data()[i];
    CHECK(std::hypot(parallel, orthogonal) == Approx(s.at("error").data()[i]).epsilon(1e-10));
    CHECK(s.at("directional_mismatch").data()[i] == 1 - s.at("cos_retained_evicted").data()[i]);
    // error = w |f_E - f_R| / |f|, from the angle and the norms' ratio alone.
    const double ratio = std::exp(s.at("norm_ratio_evicted").data()[i]), cos = s.at("cos_retained_evicted").data()[i],
                 w = s.at("evicted_mass").data()[i];
    const double f = std::sqrt((1 - w) * (1 - w) + w * w * ratio * ratio + 2 * w * (1 - w) * ratio * cos);
    CHECK(w * std::sqrt(1 + ratio * ratio - 2 * ratio * cos) / f == Approx(s.at("error").data()[i]).epsilon(1e-9));
  });
}

TEST_CASE("one evicted token is given back exactly, by every compensator") {
  const ToyLayer layer = toy();
  MetricsRequest m;
  m.attends = [](int, int, Pos pos) { return pos != 7; };
  m.measured = three();
  const NamedSeries s = reference_metrics(layer, m);
  for (const char* name : {"mean", "moments", "gaussian"}) {
    each(s.at(std::string("error_corrected.") + name), [&](Eigen::Index i) {
      CHECK(s.at(std::string("error_corrected.") + name).data()[i] < 1e-13);
      CHECK(std::abs(s.at(std::string("log_mass_ratio.") + name).data()[i]) < 1e-12);
    });
  }
  each(s.at("error"), [&](Eigen::Index i) { CHECK(s.at("error").data()[i] > 0); });
}

TEST_CASE("equal keys are given back exactly") {
  const ToyLayer layer = toy(2, ToyKind::equal_keys);
  MetricsRequest m;
  m.attends = [](int, int, Pos pos) { return pos % 2 == 0; };
  m.measured = three();
  const NamedSeries s = reference_metrics(layer, m);
  for (const char* name : {"mean", "moments", "gaussian"}) {
    each(s.at(std::string("error_corrected.") + name),
         [&](Eigen::Index i) { CHECK(s.at(std::string("error_corrected.") + name).data()[i] < 1e-13); });
  }
}

TEST_CASE("two evicted tokens follow the closed form") {
  MatD k(2, 2), v(2, 3);
  k << 1, -0.5, 0.2, 0.7;
  v << 1, 2, 3, -1, 0.5, 2;
  const Eigen::Vector2d q(0.9, -1.3);
  const double scale = 0.7, delta = scale * q.dot(k.row(0) - k.row(1)) / 2;
  const EvictedStatistics s = statistics_of(k, v, {0, 1});
  const ReferenceEstimate e = estimate({"moments", Compensation::moments}, s, q, scale);
  const Eigen::VectorXd expected =
      (v.row(0) + v.row(1)).transpose() / 2 + delta * (v.row(0) - v.row(1)).transpose() / 2;
  CHECK((e.value - expected).norm() < 1e-14);
  const double mass = std::exp(scale * q.dot(k.row(0))) + std::exp(scale * q.dot(k.row(1)));
  CHECK(std::log(mass) - e.log_mass == Approx(std::log(std::cosh(delta))).epsilon(1e-12));
}

TEST_CASE(
    "the first-order mass never exceeds the true mass, and errors fall with the square of the "
    "query") {
  const ToyLayer layer = toy();
  MetricsRequest m;
  m.attends = [](int, int step, Pos pos) { return pos < 2 || pos > step + 10; };
  m.measured = three();
  const NamedSeries s = reference_metrics(layer, m);
  each(s.at("log_mass_ratio.moments"),
       [&](Eigen::Index i) { CHECK(s.at("log_mass_ratio.moments").data()[i] > -1e-12); });

  const Eigen::VectorXd q = layer.q[0].row(40);
  std::vector<Pos> evicted;
  for (Pos pos = 3; pos < 30; ++pos) {
    evicted.push_back(pos);
  }
  const EvictedStatistics st = statistics_of(layer.k[0], layer.v[0], evicted);
  const auto gap = [&](double t) {
    Eigen::VectorXd logits(30);
    std::vector<bool> keep(30, false);
    for (const Pos i : evicted) {
      keep[static_cast<std::size_t>(i)] = true;
    }
    for (Pos i = 0; i < 30; ++i) {
      logits[i] = t * layer.scale * q.dot(layer.k[0].row(i));
    }
    const Softmax e = softmax_over(logits, layer.v[0], keep);
    const ReferenceEstimate hat = estimate({"moments", Compensation::moments}, st, t * q, layer.scale);
    return std::pair{(e.output - hat.value).norm(), e.log_mass - hat.log_mass};
  };
  const auto [far, far_mass] = gap(0.02);
  const auto [near, near_mass] = gap(0.01);
  CHECK(far / near == Approx(4).epsilon(0.05));
  CHECK(far_mass / near_mass == Approx(4).epsilon(0.05));
}

TEST_CASE("the Gaussian mass adds half the variance, frozen where few tokens carry it") {
  MatD k(4, 1), v(4, 1);
  k << 1, 2, 3, 6;
  v << 0, 1, 0, 1;
  const EvictedStatistics s = statistics_of(k, v, {0, 1, 2, 3});
  const double variance = (4 + 1 + 0 + 9) / 4.0;  // of k about 3
  ReferenceCompensator gaussian{"gaussian", Compensation::gaussian};
  gaussian.clip = false;
  const Eigen::VectorXd one = Eigen::VectorXd::Constant(1, 1.0);
  // s_c = sqrt(2 ln 4) = 1.665 < s = 1.871: frozen.
  const double sc = std::sqrt(2 * std::log(4.0)), spread = std::sqrt(variance);
  CHECK(estimate(gaussian, s, one, 1).log_mass ==
        Approx(std::log(4.0) + 3 + spread * sc - std::log(4.0)).epsilon(1e-12));
  // At half the query, s = 0.935: not frozen.
  CHECK(estimate(gaussian, s, 0.5 * one, 1).log_mass == Approx(std::log(4.0) + 1.5 + variance / 8).epsilon(1e-12));
  gaussian.clip = true;
  const ReferenceEstimate clipped = estimate(gaussian, s, 10 * one, 1);
  CHECK(clipped.log_mass <= std::log(4.0) + 30 + 10 * s.radius_k + 1e-9);
}

TEST_CASE("nothing evicted is no error, and rows without usable retained mass are left out") {
  const ToyLayer layer = toy();
  MetricsRequest m;
  m.attends = [](int, int, Pos) { return true; };
  m.measured = three();
  const NamedSeries s = reference_metrics(layer, m);
  for (const char* name : {"evicted_mass", "error", "error_output", "error_corrected.moments"}) {
    CHECK(s.at(name).isZero(0));
  }
  CHECK(s.at("cos_retained_evicted").array().isNaN().all());
  CHECK(s.at("logit_variance").array().isNaN().all());

  const ToyLayer huge = toy(1, ToyKind::huge_logits);
  const SelectionRequest streaming = request(reference_streaming(), 6);
  m.attends = attends_from(huge, Scope::kv_head, reference_selection(huge, streaming).evicted_at);
  const NamedSeries of_huge = reference_metrics(huge, m);
  const auto left_out = of_huge.at("error").array().isNaN().count();
  CHECK(left_out > 10);
  CHECK(left_out < of_huge.at("error").size());
}

TEST_CASE("errors after the projection are those of the heads together") {
  ToyLayer layer = toy(1);
  layer.w_o = MatD::Identity(24, 24);  // two heads of 12 values
  MetricsRequest m;
  m.attends = [](int, int step, Pos pos) { return pos > step; };
  const NamedSeries s = reference_metrics(layer, m);
  for (int step = 0; step < layer.n_steps(); ++step) {
    double wrong = 0, size = 0;
    for (int h = 0; h < 2; ++h) {
      const Pos now = layer.options.prompt_len + step;
      const Softmax f = softmax_over(logits_at(layer, h, now), layer.v[static_cast<std::size_t>(h)],
                                     std::vector<bool>(static_cast<std::size_t>(now) + 1, true));
      wrong += std::pow(s.at("error")(h, step) * f.output.norm(), 2);
      size += f.output.squaredNorm();
    }
    CHECK(s.at("layer.error")(0, step) == Approx(std::sqrt(wrong / size)).epsilon(1e-10));
  }
}

TEST_CASE("a set never exceeds its budget and protected tokens stay") {
  const ToyLayer layer = toy();
  for (const int budget : {1, 7, 100}) {
    for (const MakeSelector& select :
         {reference_streaming(), reference_h2o(), reference_tova(), reference_snapkv({}), reference_knorm(),
          reference_keydiff(), reference_residual(), reference_oracle_mass()}) {
      const SelectionResult r = reference_selection(layer, request(select, budget));
      const MatD resident = reference_resident(layer, Scope::kv_head, r.evicted_at);
      CHECK(resident.maxCoeff() <= budget + 1);
      CHECK(resident.minCoeff() == std::min(budget + 1, layer.options.prompt_len + 1));
    }
  }
  Traits pinned;
  pinned.pool = Pool::decode;
  const SelectionResult r = reference_selection(layer, request(reference_momentum(), 5, pinned));
  CHECK((r.evicted_at.leftCols(layer.options.prompt_len).array() == layer.n_steps()).all());
  CHECK(reference_resident(layer, Scope::kv_head, r.evicted_at).maxCoeff() == layer.options.prompt_len + 6);
}

TEST_CASE(
    "momentum without memory is tova, with full memory h2o without a window, on the decode "
    "tokens") {
  const ToyLayer layer = toy();
  for (const Scope scope : {Scope::kv_head, Scope::layer, Scope::query_head}) {
    Traits t;
    t.pool = Pool::decode;
    t.scope = scope;
    const auto of = [&](MakeSelector select) {
      return reference_selection(layer, request(std::move(select), 6, t)).evicted_at;
    };
    CHECK(of(reference_momentum(0)) == of(reference_tova()));
    CHECK(of(reference_momentum(1)) == of(reference_h2o({0, false})));
    CHECK(of(reference_momentum(0.9)) != of(reference_tova()));
  }
}

TEST_CASE("a forced replay of the reference's own evictions finds no excess, and of wrong ones does") {
  const ToyLayer layer = toy();
  for (const MakeSelector& select : {reference_h2o(), reference_tova(), reference_residual()}) {
    const SelectionRequest r = request(select, 9);
    SelectionResult own = reference_selection(layer, r);
    CHECK(own.margin > 0);
    CHECK(check_selection(layer, r, own.evicted_at).excess == 0);
    // Exchange the fates of two tokens that leave at different times.
    Pos first = -1, second = -1;
    for (Pos pos = 0; pos < layer.options.prompt_len; ++pos) {
      const Pos at = own.evicted_at(0, pos);
      if (at == 0 && first < 0) {
        first = pos;
      }
      if (at > 0 && second < 0) {
        second = pos;
      }
    }
    REQUIRE(first >= 0);
    REQUIRE(second >= 0);
    std::swap(own.evicted_at(0, first), own.evicted_at(0, second));
    CHECK(check_selection(layer, r, own.evicted_at).excess > 1e-3);
  }
}

TEST_CASE("momentum follows the worked example of its specification") {
  // Attention that decode tokens 1..5 receive at each step; where one has gone, 0.
  const std::vector<std::vector<double>> rows = {
      {.50}, {.05, .20}, {.05, .05, .60}, {.02, 0, .10, .30}, {.01, 0, .30, .05, .02}};
  // As a layer: keys are unit vectors, the query's channels hold ln(attention), and a prompt token
  // takes what the row leaves over, so that the softmax over prompt and decode tokens returns the
  // row.
  ToyLayer layer;
  layer.options.n_kv_heads = 1;
  layer.options.head_dim = 6;
  layer.options.v_head_dim = 1;
  layer.options.n_tokens = 6;
  layer.options.prompt_len = 1;
  layer.k = {MatD::Identity(6, 6)};
  layer.v = {MatD::Ones(6, 1)};
  MatD q = MatD::Zero(6, 6);
  for (std::size_t t = 0; t < rows.size(); ++t) {
    const auto now = static_cast<Eigen::Index>(t) + 1;
    double rest = 1;
    for (std::size_t i = 0; i < rows[t].size(); ++i) {
      q(now, static_cast<Eigen::Index>(i) + 1) = rows[t][i] > 0 ? std::log(rows[t][i]) : -1e3;
      rest -= rows[t][i];
    }
    q(now, 0) = std::log(rest);
  }
  layer.q = {q};
  Traits pinned;
  pinned.pool = Pool::decode;
  // Two decode tokens stay: 2 leaves at the third step, 4 at the fourth, 5 at the fifth and last.
  Evicted expected(1, 6);
  expected << 5, 5, 3, 5, 4, 5;
  for (const double alpha : {0.9, 1.0}) {
    CHECK(reference_selection(layer, request(reference_momentum(alpha), 2, pinned)).evicted_at == expected);
  }
}

TEST_CASE("h2o keeps the heavy hitters and the window") {
  const ToyLayer layer = toy(1);
  const SelectionResult r = reference_selection(layer, request(reference_h2o({4, false}), 10));
  // No token of the last four is ever gone.
  for (int step = 0; step < layer.n_steps(); ++step) {
    const Pos now = layer.options.prompt_len + step;
    for (Pos pos = now - 3; pos <= now; ++pos) {
      CHECK(r.evicted_at(0, pos) > step);
    }
  }
}

TEST_CASE("the mass oracle keeps at least the attention of any other method in the long run") {
  const ToyLayer layer = toy();
  const auto mean_mass = [&](const MakeSelector& select) {
    Traits t;
    t.scope = Scope::query_head;
    MetricsRequest m;
    m.attends = attends_from(layer, t.scope, reference_selection(layer, request(select, 8, t)).evicted_at);
    return reference_metrics(layer, m).at("evicted_mass").mean();
  };
  const double oracle = mean_mass(reference_oracle_mass());
  for (const MakeSelector& select : {reference_streaming(), reference_h2o(), reference_tova(), reference_knorm()}) {
    CHECK(oracle < mean_mass(select));
  }
}

TEST_CASE("the greedy oracle with one step ahead picks the eviction that a search would pick") {
  const ToyLayer layer = toy(2);
  const SelectionResult greedy = reference_selection(layer, request(reference_oracle_greedy(1), 12));
  // At the first step's eviction: the error at the next step, of every choice.
  for (int kv = 0; kv < 2; ++kv) {
    Pos victim = -1, best = -1;
    double least = 1e300;
    for (Pos pos = 0; pos <= layer.options.prompt_len; ++pos) {
      if (greedy.evicted_at(kv, pos) == 0) {
        continue;
      }
      victim = greedy.evicted_at(kv, pos) == 1 ? pos : victim;
      MetricsRequest m;
      m.attends = [&](int, int, Pos i) {
        return i > layer.options.prompt_len || (greedy.evicted_at(kv, i) > 0 && i != pos);
      };
      const NamedSeries s = reference_metrics(layer, m);
      double harm = 0;
      for (int h = 2 * kv; h < 2 * kv + 2; ++h) {
        const Pos now = layer.options.prompt_len + 1;
        const Softmax f = softmax_over(logits_at(layer, h, now), layer.v[static_cast<std::size_t>(kv)],
                                       std::vector<bool>(static_cast<std::size_t>(now) + 1, true));
        harm += std::pow(s.at("error")(h, 1) * f.output.norm(), 2);
      }
      if (harm < least) {
        least = harm;
        best = pos;
      }
    }
    CHECK(victim == best);
  }
}

TEST_CASE("quest's bound holds and its newest page is read; topk keeps the largest logits") {
  const ToyLayer layer = toy();
  const Pos now = 50;
  const std::vector<bool> quest = reference_quest(layer, 1, now, 8, 3);
  CHECK(quest[50]);
  CHECK(std::count(quest.begin(), quest.end(), true) == 8 + 8 + 3);
  const std::vector<bool> top = reference_topk(layer, 1, now, 5, false);
  CHECK(std::count(top.begin(), top.end(), true) == 5);
  const Eigen::VectorXd logits = logits_at(layer, 1, now);
  double least_kept = 1e300, most_lost = -1e300;
  for (Pos i = 0; i <= now; ++i) {
    double& side = top[static_cast<std::size_t>(i)] ? least_kept : most_lost;
    side = top[static_cast<std::size_t>(i)] ? std::min(side, logits[i]) : std::max(side, logits[i]);
  }
  CHECK(least_kept > most_lost);
}

TEST_CASE("quantisation keeps its ends, and kivi leaves the latest tokens exact") {
  const std::vector<double> x = {0, 1, 1.4, 1.6, 3};
  CHECK(quantised(x, 2) == std::vector<double>{0, 1, 1, 2, 3});
  CHECK(quantised({5, 5, 5}, 2) == std::vector<double>{5, 5, 5});
  const ToyLayer layer = toy();
  const auto exact = [&](int step) {
    const Pos now = layer.options.prompt_len + step;
    return softmax_over(logits_at(layer, 0, now), layer.v[0],
                        std::vector<bool>(static_cast<std::size_t>(now) + 1, true))
        .output;
  };
  // 32 exact tokens: nothing is encoded until the 33rd has been seen by a step.
  const Kivi kivi{2, 8, 32};
  CHECK((reference_kivi(layer, kivi, 0, 11) - exact(11)).norm() == 0);
  CHECK((reference_kivi(layer, kivi, 0, 12) - exact(12)).norm() > 1e-3);  // 32 keys went at the end of step 11
  CHECK((reference_kivi(layer, {12, 8, 32}, 0, 30) - exact(30)).norm() < 1e-2);
}

TEST_CASE("subspaces: E inside R's plane has no energy outside it, across it has all") {
  MatD r(4, 4), e(4, 4);
  r << 1, 0, 0, 0, -1, 0, 0, 0, 0, 1, 0, 0, 0, -1, 0, 0;
  e << 2, 1, 0, 0, -2, -1, 0, 0, 1, 2, 0, 0, -1, -2, 0, 0;
  const Subspaces inside = reference_subspaces(r, e);
  CHECK(inside.outside_energy < 1e-14);
  CHECK(inside.subspace_cos == Approx(1).epsilon(1e-12));
  MatD across = MatD::Zero(4, 4);
  across.rightCols(2) = r.leftCols(2);
  const Subspaces outside = reference_subspaces(r, across);
  CHECK(outside.outside_energy == Approx(1).epsilon(1e-12));
  CHECK(std::abs(outside.subspace_cos) < 1e-12);
}

TEST_CASE("snapkv pools a lone vote over its neighbours") {
  // One token of the middle takes all attention of the window.
  ToyLayer layer = toy(1);
  for (MatD& k : layer.k) {
    k.setZero();
    k.row(6).setConstant(20);
  }
  for (MatD& q : layer.q) {
    q.setOnes();
  }
  Traits t;
  t.decode = Decode::grow;
  // 20 prompt tokens: 4 in the window, and of the rest the five about token 6 stay.
  const SnapKv average{4, 5, false, false};
  const Evicted at = reference_selection(layer, request(reference_snapkv(average), 9, t)).evicted_at;
  for (Pos pos = 0; pos < 20; ++pos) {
    CHECK((at(0, pos) != 0) == ((pos >= 4 && pos <= 8) || pos >= 16));
  }
  CHECK((at.rightCols(40).array() == layer.n_steps()).all());
}
