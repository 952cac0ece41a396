// Caches fitted at the prompt's cut: GRKV, Attention Matching, and sampling with Hajek's ratio.
#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "policies/catalogue.hpp"
#include "tests/support/fake_view.hpp"
#include "tests/support/part_settings.hpp"

namespace kvreplay::test {
namespace {

std::unique_ptr<Rewriter> rewriter(const std::string& name, const FakeView& view, const Settings& settings = {}) {
  const PartInfo& part = *find_part(name);
  return part.rewrite(configured(part, settings).get(), view.shape());
}
std::unique_ptr<Selector> selector(const std::string& name, const FakeView& view, const Settings& settings = {},
                                   std::uint64_t seed = 0) {
  const PartInfo& part = *find_part(name);
  SetShape shape = view.shape();
  shape.seed = seed;
  return part.select(configured(part, settings).get(), shape);
}

std::vector<int> all_but(const FakeView& view, const std::set<int>& kept) {
  std::vector<int> leaving;
  for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
    if (kept.count(i) == 0) {
      leaving.push_back(i);
    }
  }
  return leaving;
}

// Output of one head's query at a position over some slots as they are stored, in double.
Eigen::VectorXd output(const FakeView& view, Pos at, int head, const std::vector<int>& slots) {
  std::vector<double> logits;
  double top = -std::numeric_limits<double>::infinity();
  for (const int i : slots) {
    const double dot = view.lanes[0].q.row(at * view.n_heads + head).cast<double>().dot(view.key(0, i).cast<double>());
    logits.push_back(view.pos[static_cast<std::size_t>(i)] <= at ? dot + static_cast<double>(view.bias(0, i)) : -1e300);
    top = std::max(top, logits.back());
  }
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(view.v_head_dim);
  double mass = 0;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    mass += std::exp(logits[i] - top);
    sum += std::exp(logits[i] - top) * view.value(0, slots[i]).cast<double>();
  }
  return sum / mass;
}

}  // namespace

TEST_CASE("matching leaves a cache alone of which nothing left") {
  FakeView view(10, 10, 8, 3);
  view.whole_prompt();
  rewriter("matching", view)->evicted(view, {});
  for (int i = 0; i < 10; ++i) {
    CAPTURE(i);
    CHECK(view.bias(0, i) == Approx(0).margin(1e-3));
    CHECK((view.value(0, i) - view.lanes[0].v.row(i).transpose()).norm() < 1e-2);
  }
}

TEST_CASE("a key that stands for three equal ones gets a bias of ln 3") {
  FakeView view(40, 40, 32, 4);
  view.lanes[0].k.row(2) = view.lanes[0].k.row(1);
  view.lanes[0].k.row(3) = view.lanes[0].k.row(1);
  view.lanes[0].q *= 0.4F;
  view.whole_prompt();
  rewriter("matching", view, {{"queries", 30}, {"steps", 0}})->evicted(view, std::vector<int>{2, 3});
  for (int i = 0; i < 40; ++i) {
    if (i != 2 && i != 3) {
      CAPTURE(i);
      CHECK(view.bias(0, i) == Approx(i == 1 ? std::log(3) : 0).margin(0.02));
    }
  }
  CHECK(view.bytes(0, 1) == 2 * (32 + 32) + 2);
}

TEST_CASE("matching keeps biases within their bounds, and can leave them or the values as they are") {
  FakeView view(30, 30, 8, 2), values_only = view, biases_only = view;
  for (FakeView* v : {&view, &values_only, &biases_only}) {
    v->whole_prompt();
  }
  const std::vector<int> leaving = all_but(view, {0, 4, 11, 20, 29});
  rewriter("matching", view, {{"most", 0.5}, {"least", -0.25}})->evicted(view, leaving);
  rewriter("matching", values_only, {{"bias", 0}})->evicted(values_only, leaving);
  rewriter("matching", biases_only, {{"values", 0}})->evicted(biases_only, leaving);
  for (const int i : {0, 4, 11, 20, 29}) {
    CHECK(view.bias(0, i) <= 0.5F + 1e-6F);
    CHECK(view.bias(0, i) >= -0.25F - 1e-6F);
    CHECK(values_only.bias(0, i) == 0);
    CHECK(values_only.bytes(0, i) == 32);
    CHECK(biases_only.value(0, i) == biases_only.lanes[0].v.row(i).transpose());
    CHECK(view.key(0, i) == view.lanes[0].k.row(i).transpose());
  }
}

TEST_CASE("matching pursuit picks the keys whose weights can stand for the mass of all") {
  FakeView view(12, 12, 6, 1);
  // Three kinds of key: one of each is enough for the whole mass.
  for (int i = 0; i < 9; ++i) {
    view.lanes[0].k.row(i) = view.lanes[0].k.row(i % 3);
  }
  view.whole_prompt();
  view.budget = 3;
  view.now = 11;
  std::vector<float> scores(12);
  selector("match_keys", view, {{"choice", 1}, {"queries", 2}})->score(view, scores);
  std::set<int> kinds;
  int picks = 0;
  for (int i = 0; i < 12; ++i) {
    if (scores[static_cast<std::size_t>(i)] > 1) {
      ++picks;
      kinds.insert(i < 9 ? i % 3 : i);
    }
  }
  CHECK(picks == 3);
  CHECK(kinds.size() == 3);
}

TEST_CASE("GRKV's values are those of ridge regression, with as many unknowns as kept tokens") {
  FakeView view(40, 40, 6, 2);
  view.whole_prompt();
  std::set<int> kept = {0, 3, 8, 14, 15, 21, 27, 30, 36, 39};
  const std::vector<int> slots(kept.begin(), kept.end());
  const Settings all_free = {{"keys", 0}, {"sink", 0}, {"window", 0}, {"top", 0}, {"queries", 5}, {"ridge", 0.05}};
  MatD x(10, 10), target(10, 6), v(10, 6);
  std::vector<int> everything(40);
  std::iota(everything.begin(), everything.end(), 0);
  for (int r = 0; r < 10; ++r) {
    const Pos at = 35 + r / 2;
    target.row(r) = output(view, at, r % 2, everything).transpose();
    v.row(r) = view.value(0, slots[static_cast<std::size_t>(r)]).transpose().cast<double>();
    for (int j = 0; j < 10; ++j) {
      const int slot = slots[static_cast<std::size_t>(j)];
      const double dot = view.lanes[0].q.row(at * 2 + r % 2).cast<double>().dot(view.key(0, slot).cast<double>());
      x(r, j) = slot <= at ? std::exp(dot) : 0;
    }
    x.row(r) /= x.row(r).sum();
  }
  const MatD gram = x.transpose() * x + 0.05 * MatD::Identity(10, 10);
  const MatD want = v + gram.ldlt().solve(x.transpose() * (target - x * v));
  rewriter("grkv", view, all_free)->evicted(view, all_but(view, kept));
  for (int j = 0; j < 10; ++j) {
    CHECK((view.value(0, slots[static_cast<std::size_t>(j)]).transpose().cast<double>() - want.row(j)).norm() < 1e-5);
    CHECK(view.bytes(0, slots[static_cast<std::size_t>(j)]) == 24);
  }
}

TEST_CASE("GRKV fits the last queries better with each step, and leaves what is protected") {
  FakeView plain(60, 60, 8, 2);
  plain.lanes[0].q *= 0.3F;  // the slope in the keys holds while attention is mild
  plain.whole_prompt();
  FakeView values = plain, both = plain;
  values.whole_prompt();
  both.whole_prompt();
  std::set<int> kept;
  for (int i = 0; i < 60; i += 3) {
    kept.insert(i);
  }
  const std::vector<int> slots(kept.begin(), kept.end()), leaving = all_but(plain, kept);
  const Settings few = {{"sink", 4}, {"window", 6}, {"queries", 12}};
  Settings no_keys = few;
  no_keys.emplace_back("keys", 0);
  rewriter("grkv", values, no_keys)->evicted(values, leaving);
  rewriter("grkv", both, few)->evicted(both, leaving);
  std::vector<int> everything(60);
  std::iota(everything.begin(), everything.end(), 0);
  const auto error = [&](const FakeView& view) {
    double sum = 0;
    for (Pos at = 48; at < 60; ++at) {
      for (int head = 0; head < 2; ++head) {
        sum += (output(view, at, head, slots) - output(plain, at, head, everything)).squaredNorm();
      }
    }
    return sum;
  };
  CHECK(error(values) < 0.5 * error(plain));
  CHECK(error(both) < 0.9 * error(values));
  int moved = 0;
  for (const int i : slots) {
    const bool same = both.key(0, i) == plain.key(0, i) && both.value(0, i) == plain.value(0, i);
    moved += same ? 0 : 1;
    if (i < 4 || i > 53) {
      CHECK(same);
    }
  }
  // Of 20 kept tokens two are sinks, two lie in the window and two are those of most attention.
  CHECK(moved >= 14);
  CHECK(moved <= 16);
}

TEST_CASE("sampled sums are right on average, and the certificate says how far each draw may be off") {
  FakeView view(400, 400, 8, 1);
  view.lanes[0].q *= 0.5F;
  view.whole_prompt();
  view.budget = 100;
  const Settings settings = {{"sink", 4}, {"window", 8}, {"obs_window", 8}};
  Eigen::VectorXd weight(400);
  for (int i = 0; i < 400; ++i) {
    weight[i] = std::exp(view.lanes[0].q.row(399).cast<double>().dot(view.lanes[0].k.row(i).cast<double>()));
  }
  const MatD v = view.lanes[0].v.cast<double>();
  const Eigen::RowVectorXd exact = weight.transpose() * v / weight.sum();
  double mass = 0, error = 0, variance = 0, n_kept = 0;
  Eigen::RowVectorXd numerator = Eigen::RowVectorXd::Zero(8);
  const int draws = 3000;
  for (int draw = 0; draw < draws; ++draw) {
    FakeView own = view;
    own.whole_prompt();
    const auto sample = selector("sample", own, settings, static_cast<std::uint64_t>(draw));
    const auto votes = rewriter("inverse_chance", own, settings);
    std::vector<float> scores(400);
    sample->score(own, scores);
    std::vector<int> leaving, kept;
    for (int i = 0; i < 400; ++i) {
      (scores[static_cast<std::size_t>(i)] > 0 ? kept : leaving).push_back(i);
    }
    REQUIRE(sample->surplus(own) == static_cast<int>(leaving.size()));
    votes->evicted(own, leaving);
    double z = 0;
    Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(8);
    for (const int i : kept) {
      const double w = weight[i] * std::exp(static_cast<double>(own.bias(0, i)));
      z += w;
      sum += w * v.row(i);
    }
    const Eigen::RowVectorXd out = sum / z;
    for (const int i : kept) {
      const double chance = std::exp(-static_cast<double>(own.bias(0, i)));
      variance += (1 - chance) / (chance * chance) * std::pow(weight[i], 2) * (v.row(i) - out).squaredNorm() / (z * z);
    }
    mass += z;
    numerator += sum;
    error += (out - exact).squaredNorm();
    n_kept += static_cast<double>(kept.size());
  }
  CHECK(mass / draws / weight.sum() == Approx(1).epsilon(0.01));
  CHECK((numerator / draws / weight.sum() - exact).norm() < 0.02 * exact.norm() + 0.01);
  CHECK(variance / error == Approx(1).epsilon(0.15));
  CHECK(n_kept / draws <= 100.5);
  CHECK(n_kept / draws > 85);
}

TEST_CASE("certain tokens are never sampled away, at any budget, and chances multiply over draws") {
  for (const int budget : {1, 3, 10, 60}) {
    FakeView view(80, 60, 6, 2);
    view.whole_prompt();
    view.budget = budget;
    const auto sample = selector("sample", view, {}, 7);
    const auto votes = rewriter("inverse_chance", view);
    std::vector<float> scores(60);
    sample->score(view, scores);
    const int sink = std::min(4, budget), window = std::min(32, budget - sink);
    for (int i = 0; i < 60; ++i) {
      if (i < sink || i >= 60 - window) {
        CHECK(scores[static_cast<std::size_t>(i)] == 1);
      }
    }
    CHECK((budget < 60 || sample->surplus(view) == 0));
  }
  FakeView view(60, 40, 6, 1);
  view.whole_prompt();
  view.budget = 20;
  const Settings settings = {{"sink", 1}, {"window", 2}};
  const auto sample = selector("sample", view, settings, 3);
  const auto votes = rewriter("inverse_chance", view, settings);
  double before = 0;
  for (int round = 0; round < 2; ++round) {
    std::vector<float> scores(view.pos.size());
    sample->score(view, scores);
    std::vector<int> leaving;
    std::vector<Pos> kept;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      if (scores[i] > 0) {
        kept.push_back(view.pos[i]);
      } else {
        leaving.push_back(static_cast<int>(i));
      }
    }
    sample->evicted(view, leaving);
    votes->evicted(view, leaving);
    view.set_slots(kept);
    double total = 0;
    for (int i = 0; i < static_cast<int>(kept.size()); ++i) {
      CHECK(view.bias(0, i) >= 0);
      total += static_cast<double>(view.bias(0, i));
    }
    CHECK(total > before);
    before = round == 0 ? 0 : total;
    view.budget = 8;
  }
}

TEST_CASE("chances of another selector are refused") {
  FakeView view(60, 60, 6, 1);
  view.whole_prompt();
  view.budget = 50;
  CHECK_THROWS_AS(rewriter("inverse_chance", view)->evicted(view, std::vector<int>{0}), ConfigError);
}

}  // namespace kvreplay::test
