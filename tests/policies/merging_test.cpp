// Merging rewriters on small caches: the numbers that formulas give, and what must hold whatever the cache.
#include <catch2/catch.hpp>

#include "policies/method.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

std::unique_ptr<Rewriter> make(const std::string& text, const FakeView& view) {
  const Method m = parse_method("full+" + text);
  m.check(std::numeric_limits<int>::max());
  return m.rewrite->info->rewrite(m.rewrite->config().get(), view.shape());
}

// Lets slots leave as the engine does.
void leave(FakeView& view, Rewriter& rewriter, const std::vector<int>& slots) {
  rewriter.evicted(view, slots);
  std::vector<Pos> kept;
  for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
    if (std::find(slots.begin(), slots.end(), i) == slots.end()) {
      kept.push_back(view.pos[static_cast<std::size_t>(i)]);
    }
  }
  view.set_slots(kept);
  rewriter.step(view);
}

double logit(const FakeView& view, int head, int slot) {
  return view.queries(0, 1).row(head).cast<double>().dot(view.key(0, slot).cast<double>()) +
         static_cast<double>(view.bias(0, slot));
}

// Attention of the current query of one head over what is resident.
Eigen::VectorXd output(const FakeView& view, int head) {
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(view.v_head_dim);
  double z = 0;
  for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
    const double w = std::exp(logit(view, head, i));
    z += w;
    sum += w * view.value(0, i).cast<double>();
  }
  return sum / z;
}

double largest_difference(const Eigen::VectorXd& a, const Eigen::VectorXd& b) { return (a - b).cwiseAbs().maxCoeff(); }

// Two prompt tokens whose logits for the last prompt query are given, values 1 and 0 in the first channel.
FakeView pair(double l_e, double l_c, double p_e, double p_c) {
  FakeView view(8, 2, 4);
  view.lanes[0].q.row(1) << 1, 0, 0, 0;
  view.lanes[0].k.row(0) << static_cast<float>(l_e), 1, 0, 0;
  view.lanes[0].k.row(1) << static_cast<float>(l_c), 1, 1, 0;
  view.lanes[0].v.row(0) << 1, 0, 0, 0;
  view.lanes[0].v.row(1) << 0, 1, 0, 0;
  view.whole_prompt();
  view.rewrite(0, 0, view.key(0, 0), view.value(0, 0), static_cast<float>(std::log(p_e)), 0);
  view.rewrite(0, 1, view.key(0, 1), view.value(0, 1), static_cast<float>(std::log(p_c)), 0);
  return view;
}

constexpr const char* kNow = ":alpha=0,threshold=-1,variant=";

}  // namespace

TEST_CASE("keepkv: golden values of one merge", "[merging]") {
  struct Golden {
    double l_e, l_c, p_e, p_c, pi_e, tau, mean, lambda, soft_bias;
  };
  const Golden g = GENERATE(Golden{1.2, -0.3, 1, 1, 0.817574, 0.708266, 0.926362, 0.764568, 1.701413},
                            Golden{2, 2, 1, 1, 0.5, 2, 2, 1, 0.693147},
                            Golden{2, 1, 1, 3, 0.475367, 1.357374, 1.475367, 0.920025, 1.743668},
                            Golden{-1, -2, 1, 1, 0.731059, -1.379885, -1.268941, 1.087430, 1.313262},
                            Golden{0.5, -0.824, 1, 1, 0.789846, 0.042770, 0.221757, 0.192867, 1.559917});
  INFO("logits " << g.l_e << " and " << g.l_c << ", votes " << g.p_e << " and " << g.p_c);
  const auto merged = [&](const std::string& variant) {
    FakeView view = pair(g.l_e, g.l_c, g.p_e, g.p_c);
    auto keepkv = make("keepkv" + (kNow + variant), view);
    keepkv->evicted(view, std::vector<int>{0});
    return view;
  };
  const FakeView zip = merged("paper_zip"), convex = merged("official_convex_votes"), soft = merged("soft_votes");
  CHECK(zip.value(0, 1)[0] == Approx(g.pi_e).epsilon(2e-6));
  CHECK(zip.value(0, 1)[1] == Approx(1 - g.pi_e).epsilon(4e-6));
  CHECK(zip.bias(0, 1) == Approx(std::log(g.p_e + g.p_c)).epsilon(1e-6));
  CHECK(zip.key(0, 1)[0] == Approx(g.tau).margin(2e-6));      // the query's logit is the key's first channel
  CHECK(zip.key(0, 1)[1] == Approx(g.lambda).epsilon(1e-5));  // both keys have 1 there
  CHECK(convex.key(0, 1)[0] == Approx(g.mean).epsilon(2e-6));
  CHECK(convex.key(0, 1)[1] == Approx(1).epsilon(1e-6));
  CHECK(convex.bias(0, 1) == zip.bias(0, 1));
  CHECK(convex.value(0, 1) == zip.value(0, 1));
  CHECK(soft.key(0, 1) == pair(g.l_e, g.l_c, g.p_e, g.p_c).key(0, 1));
  // The table's bias has one vote each; votes of the target come on top of the ratio of the masses.
  CHECK(soft.bias(0, 1) == Approx(g.soft_bias).epsilon(2e-6));
  // lambda = 1 - KL / mean, and the convex key with added votes weighs exp(KL) too much.
  const double pi_c = 1 - g.pi_e, p = g.p_e + g.p_c;
  const double kl = g.pi_e * std::log(g.pi_e * p / g.p_e) + pi_c * std::log(pi_c * p / g.p_c);
  CHECK(zip.key(0, 1)[1] == Approx(1 - kl / g.mean).epsilon(1e-4));
  CHECK(logit(convex, 0, 1) - logit(zip, 0, 1) == Approx(kl).margin(2e-6));
}

TEST_CASE("keepkv: nothing is lost for the query that scored, merge after merge", "[merging]") {
  const std::string variant = GENERATE("paper_zip", "soft_votes", "additive:ridge=0");
  INFO(variant);
  const auto colon = variant.find(':');
  const std::string keys =
      variant.substr(0, colon) + (colon == std::string::npos ? "" : "," + variant.substr(colon + 1));
  FakeView view(60, 40, 8, 1, 1, 5);
  view.lanes[0].q *= 0.5F;
  view.whole_prompt();
  auto keepkv = make("keepkv" + (kNow + keys), view);
  Eigen::VectorXd before = output(view, 0);
  leave(view, *keepkv, {1, 4, 9, 10, 11, 17});
  CHECK(largest_difference(output(view, 0), before) < 1e-5);
  for (int step = 0; step < 12; ++step) {
    view.append();
    before = output(view, 0);
    leave(view, *keepkv, {step % 7, 9});
    CHECK(largest_difference(output(view, 0), before) < 1e-5);
  }
}

TEST_CASE("keepkv: several query heads keep their masses under additive", "[merging]") {
  FakeView view(20, 12, 8, 3, 1, 3);
  view.lanes[0].q *= 0.5F;
  view.whole_prompt();
  const auto log_masses = [&] {
    Eigen::VectorXd out(3);
    for (int h = 0; h < 3; ++h) {
      double z = 0;
      for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
        z += std::exp(logit(view, h, i));
      }
      out[h] = std::log(z);
    }
    return out;
  };
  const Eigen::VectorXd before = log_masses();
  auto keepkv = make("keepkv:alpha=0,threshold=-1,variant=additive,ridge=0", view);
  leave(view, *keepkv, {0, 3, 7});
  CHECK(largest_difference(log_masses(), before) < 1e-5);
}

TEST_CASE("keepkv: a duplicate is merged without loss for every query", "[merging]") {
  const std::string variant = GENERATE("paper_zip", "official_convex_votes", "soft_votes");
  INFO(variant);
  FakeView view(30, 10, 8, 2, 1, 7);
  view.lanes[0].k.row(6) = view.lanes[0].k.row(2);
  view.lanes[0].v.row(6) = view.lanes[0].v.row(2);
  view.whole_prompt();
  auto keepkv = make("keepkv:alpha=0,variant=" + variant, view);  // an average would hold more queries of the older one
  std::vector<Eigen::VectorXd> before;
  for (Pos t = 9; t < 30; ++t) {
    view.now = t;
    before.push_back(output(view, 0));
    before.push_back(output(view, 1));
  }
  view.now = 9;
  leave(view, *keepkv, {6});
  CHECK(view.bias(0, 2) == Approx(std::log(2)).epsilon(1e-5));
  for (Pos t = 9; t < 30; ++t) {
    view.now = t;
    for (int h = 0; h < 2; ++h) {
      CHECK(largest_difference(output(view, h), before[static_cast<std::size_t>(2 * (t - 9) + h)]) < 2e-5);
    }
  }
}

TEST_CASE("keepkv: a convex key without votes never weighs as much as the two did", "[merging]") {
  for (unsigned seed = 0; seed < 200; ++seed) {
    FakeView view(4, 2, 8, 1, 1, 100 + seed);
    view.whole_prompt();
    const double z = std::exp(logit(view, 0, 0)) + std::exp(logit(view, 0, 1));
    auto keepkv = make("keepkv:alpha=0,threshold=-1,variant=official_convex_votes", view);
    keepkv->evicted(view, std::vector<int>{0});
    CHECK(std::exp(logit(view, 0, 1) - static_cast<double>(view.bias(0, 1))) <= z * (1 + 1e-5));
    CHECK(std::exp(logit(view, 0, 1)) >= z * (1 - 1e-5));  // with votes it weighs at least as much
  }
}

TEST_CASE("keepkv: beyond the guard a merge keeps its key", "[merging]") {
  FakeView view = pair(0.5, -0.824, 1, 1);  // lambda 0.19: inside any limit
  make("keepkv:alpha=0,threshold=-1,lambda_max=1", view)->evicted(view, std::vector<int>{0});
  CHECK(view.key(0, 1)[1] == Approx(0.192867).epsilon(1e-4));
  view = pair(-1, -2, 1, 1);  // lambda 1.087
  make("keepkv:alpha=0,threshold=-1,lambda_max=1", view)->evicted(view, std::vector<int>{0});
  CHECK(view.key(0, 1)[1] == 1);
  CHECK(view.bias(0, 1) == Approx(1.313262).epsilon(2e-6));
  view = pair(1, -1, 1, std::exp(2));  // equal masses, so that the mean logit is 0 and lambda is infinite
  make("keepkv:alpha=0,threshold=-1", view)->evicted(view, std::vector<int>{0});
  CHECK(view.key(0, 1).allFinite());
  CHECK(view.key(0, 1)[1] == 1);
}

TEST_CASE("keepkv: unlike keys are evicted, not merged; a threshold that no domain allows is refused", "[merging]") {
  FakeView view(20, 12, 8);
  view.whole_prompt();
  const FakeView before = view;
  make("keepkv:threshold=1", view)->evicted(view, std::vector<int>{0, 3});
  for (int i = 0; i < 12; ++i) {
    CHECK(view.key(0, i) == before.key(0, i));
    CHECK(view.bytes(0, i) == before.bytes(0, i));
  }
  CHECK_THROWS_AS(make("keepkv:ema_domain=attention_prob", view), ConfigError);
}

TEST_CASE("keepkv: the average of a token counts the queries that saw it", "[merging]") {
  // Two queries with logits 0 and ln 3 for token 0, ln 2 for token 1, which only the second query sees.
  FakeView view(4, 2, 2);
  view.lanes[0].q.row(0) << 0, 0;
  view.lanes[0].q.row(1) << 1, 0;
  view.lanes[0].k.row(0) << std::log(3.0F), 0.0F;
  view.lanes[0].k.row(1) << std::log(2.0F), 0.0F;
  view.lanes[0].v.row(0) << 1, 0;
  view.lanes[0].v.row(1) << 0, 0;
  view.whole_prompt();
  // Decay 0.5: token 0 has (0.25 * 1 + 0.5 * 3) / 0.75 = 7 / 3, token 1 has 2.
  make("keepkv:alpha=0.5,threshold=-1,variant=soft_votes", view)->evicted(view, std::vector<int>{0});
  CHECK(view.value(0, 1)[0] == Approx(7.0 / 13).epsilon(1e-5));
  CHECK(view.bias(0, 1) == Approx(std::log(1 + 7.0 / 6)).epsilon(1e-5));
}

TEST_CASE("votes cost one number per merged slot, once; values and keys alone cost nothing", "[merging]") {
  FakeView view(20, 12, 8);
  view.whole_prompt();
  auto keepkv = make("keepkv:threshold=-1", view);
  leave(view, *keepkv, {0, 1});
  double bytes = 0;
  int biased = 0;
  for (int i = 0; i < 10; ++i) {
    bytes += view.bytes(0, i);
    biased += view.bias(0, i) != 0;
  }
  CHECK(biased > 0);
  CHECK(bytes == 10 * 2 * 16 + 2 * biased);
  for (const char* text : {"merging", "lookm", "d2o", "weightedkv", "cam:prompt=1,mode=expected"}) {
    FakeView other(20, 12, 8);
    other.whole_prompt();
    auto rewriter = make(text, other);
    leave(other, *rewriter, {0, 1});
    for (int i = 0; i < 10; ++i) {
      CHECK(other.bytes(0, i) == 2 * 16);
      CHECK(other.bias(0, i) == 0);
    }
  }
}

TEST_CASE("merging: keys stay, a survivor's own duplicate leaves its value", "[merging]") {
  FakeView view(20, 12, 8, 1, 1, 4);
  view.lanes[0].k.row(5) = view.lanes[0].k.row(2);
  view.lanes[0].v.row(5) = view.lanes[0].v.row(2);
  view.whole_prompt();
  const FakeView before = view;
  make("merging", view)->evicted(view, std::vector<int>{5});
  for (int i = 0; i < 12; ++i) {
    CHECK(view.key(0, i) == before.key(0, i));
    CHECK((view.value(0, i) - before.value(0, i)).cwiseAbs().maxCoeff() < 1e-6F);
  }
}

TEST_CASE("merging: likeness and lengths make the weight, a share of the evicted is merged", "[merging]") {
  FakeView view(8, 4, 2);
  view.lanes[0].k << 1, 0, 0.6F, 0.8F, 0, 1, -1, 0.2F, 0, 0, 0, 0, 0, 0, 0, 0;
  view.lanes[0].v << 2, 0, 0, 3, 4, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0;
  view.whole_prompt();
  make("merging", view)->evicted(view, std::vector<int>{0, 1});  // stay: (0, 1) and (-1, 0.2)
  // Token 0 is nearest to token 2 with cosine 0, weight 0; token 1 has cosine 0.8, lengths 3 and 4.
  const double w = 0.8 * 3 / 7;
  CHECK(view.value(0, 2)[0] == Approx(4 / (1 + w)).epsilon(1e-5));
  CHECK(view.value(0, 2)[1] == Approx(3 * w / (1 + w)).epsilon(1e-5));
  CHECK(view.value(0, 3)[1] == 1);
  FakeView none(8, 4, 2);
  none.lanes = view.lanes;
  none.whole_prompt();
  make("merging:similarity_threshold=0.9", none)->evicted(none, std::vector<int>{0, 1});
  CHECK(none.value(0, 2)[0] == 4);
  view.now = 4;  // a decode step
  const float old = view.value(0, 2)[0];
  make("merging", view)->evicted(view, std::vector<int>{1});
  CHECK(view.value(0, 2)[0] == old);
  make("merging:at=always", view)->evicted(view, std::vector<int>{1});
  CHECK(view.value(0, 2)[0] != old);
}

TEST_CASE("lookm: pivot, weighted and average of two that join one", "[merging]") {
  FakeView view(8, 3, 2);
  view.lanes[0].k.topRows(3) << 3, 4, 4, 3, 1, 1;
  view.lanes[0].v.topRows(3) << 6, 0, 0, 12, 3, 3;
  view.whole_prompt();
  const auto value = [&](const std::string& weights) {
    FakeView own = view;
    own.set_slots({0, 1, 2});
    make("lookm:weights=" + weights, own)->evicted(own, std::vector<int>{0, 1});
    return Eigen::VectorXf(own.value(0, 2));
  };
  CHECK(value("pivot")[0] == Approx((3 + 4.5 + 1.5) / 3));
  CHECK(value("pivot")[1] == Approx((3 + 1.5 + 7.5) / 3));
  CHECK(value("average")[0] == Approx(3));
  CHECK(value("average")[1] == Approx(5));
  const double w = (7 / (5 * std::sqrt(2.0)) + 1) / 2;
  CHECK(value("weighted")[0] == Approx((3 + 6 * w) / (1 + 2 * w)));
  CHECK(value("weighted")[1] == Approx((3 + 12 * w) / (1 + 2 * w)));
}

TEST_CASE("d2o: the code shrinks lengths by the cosine, the paper's weights are convex", "[merging]") {
  FakeView view(12, 2, 2);
  view.lanes[0].k.topRows(2) << 3, 4, 1, 0;  // cosine 0.6
  view.lanes[0].v.topRows(2) << 10, 0, 0, 10;
  const auto value = [&](const std::string& weights) {
    FakeView own = view;
    own.whole_prompt();
    make("d2o:weights=" + weights, own)->evicted(own, std::vector<int>{0});
    return Eigen::VectorXf(own.value(0, 1));
  };
  CHECK(value("code")[0] == Approx(3));
  CHECK(value("code")[1] == Approx(5));
  const double e = std::exp(1.0), w = std::exp(0.6);
  CHECK(value("paper")[0] == Approx(10 * w / (e + w)));
  CHECK(value("paper")[1] == Approx(10 * e / (e + w)));
}

TEST_CASE("d2o: the gate starts at the mean cosine and then follows it", "[merging]") {
  FakeView view(12, 3, 2);
  view.lanes[0].k.topRows(5) << 1, 0, 0.6F, 0.8F, 0, 1, 0, 1, 0, 1;  // cosines to (0, 1): 0 and 0.8, mean 0.4
  view.lanes[0].v.setOnes();
  view.lanes[0].v.row(2) << 5, 5;
  view.whole_prompt();
  auto d2o = make("d2o", view);
  leave(view, *d2o, {0, 1});
  CHECK(view.value(0, 0)[0] == Approx((5 + 0.8) / 2));  // token 1 alone
  view.append();
  view.lanes[0].k.row(3) << 0.28F, 0.96F;  // threshold now 0.5 * 0.4 + 0.5 * 0.96 = 0.68
  const float before = view.value(0, 0)[0];
  leave(view, *d2o, {1});
  CHECK(view.value(0, 0)[0] != before);
  view.append();
  view.lanes[0].k.row(4) << -1, 0;  // cosine 0 < 0.34
  const float then = view.value(0, 0)[0];
  leave(view, *d2o, {1});
  CHECK(view.value(0, 0)[0] == then);
}

TEST_CASE("cam: the expected mode gives back the numerator that the token had", "[merging]") {
  FakeView view(40, 10, 4, 1, 1, 9);
  view.whole_prompt();
  auto cam = make("cam:mode=expected,window=3,attention=current", view);
  cam->step(view);
  for (int i = 0; i < 6; ++i) {
    view.append();
    std::vector<float> a(view.pos.size());
    view.attention(a);
    const int out = 2;
    const float window = a[3] + a[4] + a[5];
    Eigen::VectorXd gain = Eigen::VectorXd::Zero(4);
    const FakeView before = view;
    cam->evicted(view, std::vector<int>{out});
    for (int j = 3; j < 6; ++j) {
      gain +=
          static_cast<double>(a[static_cast<std::size_t>(j)]) * (view.value(0, j) - before.value(0, j)).cast<double>();
      CHECK(view.key(0, j) == before.key(0, j));
    }
    if (a[2] < window / 3) {
      CHECK(largest_difference(gain, static_cast<double>(a[2]) * before.value(0, out).cast<double>()) < 1e-6);
    }
    CHECK(view.value(0, 6) == before.value(0, 6));
    std::vector<Pos> kept(view.pos.begin(), view.pos.end());
    kept.erase(kept.begin() + out);
    view.set_slots(kept);
  }
}

TEST_CASE("cam: coins are merged values or none, and the same for the same seed", "[merging]") {
  int n_merged = 0, n_all = 0;
  for (unsigned seed = 0; seed < 40; ++seed) {
    FakeView view(20, 10, 4, 1, 1, seed);
    view.whole_prompt();
    view.append();
    const FakeView before = view;
    make("cam:window=4,attention=current", view)->evicted(view, std::vector<int>{3});
    const bool merged = view.value(0, 5) != before.value(0, 5);
    n_merged += merged;
    ++n_all;
    const Eigen::VectorXf gain = view.value(0, 5) - before.value(0, 5);
    if (merged) {
      CHECK((gain - before.value(0, 3) / 4).cwiseAbs().maxCoeff() < 1e-5F);
    }
    FakeView again = before;
    std::vector<Pos> slots(before.pos.begin(), before.pos.end());
    again.set_slots(slots);
    make("cam:window=4,attention=current", again)->evicted(again, std::vector<int>{3});
    CHECK(again.value(0, 5) == view.value(0, 5));
  }
  CHECK(n_merged > 5);
  CHECK(n_merged < n_all);
}

TEST_CASE("weightedkv: the next value by mean attention, the last one's goes left", "[merging]") {
  FakeView view(8, 3, 2);
  view.lanes[0].k.setZero();  // the prompt's queries look at all alike: sums 1 + 1/2 + 1/3, 1/2 + 1/3, 1/3
  view.lanes[0].v.topRows(3) << 18, 0, 0, 18, 1, 1;
  view.whole_prompt();
  const double a = (11.0 / 6) / 3, b = (5.0 / 6) / 2, c = 1.0 / 3;
  const auto merged = [&](const std::string& keys, const std::vector<int>& gone) {
    FakeView own = view;
    own.whole_prompt();
    make("weightedkv" + keys, own)->evicted(own, gone);
    return own;
  };
  const FakeView one = merged("", {0});
  CHECK(one.value(0, 1)[0] == Approx(18 * a / (a + b)));
  CHECK(one.value(0, 1)[1] == Approx(18 * b / (a + b)));
  CHECK(one.value(0, 2)[0] == 1);
  const FakeView left = merged("", {2});
  CHECK(left.value(0, 1)[0] == Approx(c / (b + c)));
  const FakeView votes = merged(":votes=1", {0});
  CHECK(votes.bias(0, 1) == Approx(std::log(1 + a / b)));
  const FakeView keep = merged("", {0, 1}), sum = merged(":after=sum", {0, 1});
  CHECK(sum.value(0, 2)[0] == Approx((18 * a + c) / (a + b + c)));
  const double first = (18 * a + c) / (a + c);
  CHECK(keep.value(0, 2)[0] == Approx(first * c / (b + c)));
}

TEST_CASE("merging methods stand equal keys, huge logits and an empty rest", "[merging]") {
  for (const char* text : {"keepkv:threshold=-1", "keepkv:threshold=-1,variant=soft_votes", "keepkv:variant=additive",
                           "keepkv:threshold=-1,variant=official_convex_votes", "merging:at=always", "cam:prompt=1",
                           "d2o", "d2o:weights=paper", "weightedkv:votes=1", "lookm:at=always"}) {
    INFO(text);
    for (const float size : {0.0F, 1e4F}) {
      FakeView view(30, 20, 8, 2, 1, 3);
      view.lanes[0].q *= size;
      if (size == 0) {
        view.lanes[0].k.setConstant(0.5F);
      }
      view.whole_prompt();
      auto rewriter = make(text, view);
      leave(view, *rewriter, {0, 2, 3, 7, 8, 15});
      for (int step = 0; step < 8; ++step) {
        view.append();
        leave(view, *rewriter, {step});
      }
      for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
        CHECK(view.key(0, i).allFinite());
        CHECK(view.value(0, i).allFinite());
        CHECK(std::isfinite(view.bias(0, i)));
      }
      std::vector<int> all(view.pos.size());
      std::iota(all.begin(), all.end(), 0);
      leave(view, *rewriter, all);
      CHECK(view.pos.empty());
    }
  }
}

TEST_CASE("selkv: values go to the bucket's most attended kept token, by agreement and window attention", "[merging]") {
  // Four tokens, one bucket; token 2 leaves, having looked at token 1 more than at token 0.
  FakeView view(8, 4, 2);
  view.lanes[0].q.topRows(4) << 0, 0, 0, 0, 0, 1, 0, 0;
  view.lanes[0].k.topRows(4) << 1, 0, 0, 1, 1, 1, 0, 0;
  view.lanes[0].v.topRows(4) << 5, 0, 3, 4, 0, 10, 1, 1;
  view.whole_prompt();
  const auto merged = [&](const std::string& keys) {
    FakeView own = view;
    own.whole_prompt();
    make("selkv:obs_window=1" + keys, own)->evicted(own, std::vector<int>{2});
    return own;
  };
  const FakeView gated = merged(""), blind = merged(",gate=0,alpha=1"), off = merged(",alpha=0");
  // The last query looks at all four alike, so masses are equal; cosine of (3, 4) and (0, 10) is 0.8.
  CHECK(gated.value(0, 1)[0] == Approx(3 / 1.8));
  CHECK(gated.value(0, 1)[1] == Approx((4 + 8) / 1.8));
  CHECK(gated.bias(0, 1) == Approx(0.5 * std::log(1.8)));
  CHECK(gated.value(0, 0)[0] == 5);
  CHECK(gated.bias(0, 0) == 0);
  CHECK(gated.key(0, 1) == view.key(0, 1));
  CHECK(blind.value(0, 1)[1] == Approx(7));
  CHECK(blind.bias(0, 1) == Approx(std::log(2)));
  CHECK(off.bias(0, 1) == 0);
  FakeView apart = view;  // nothing kept before it in its bucket
  apart.whole_prompt();
  make("selkv:obs_window=1,bucket=2", apart)->evicted(apart, std::vector<int>{2});
  CHECK(apart.value(0, 1)[0] == 3);
  view.append();  // and nothing at a decode step
  make("selkv:obs_window=1", view)->evicted(view, std::vector<int>{2});
  CHECK(view.value(0, 1)[0] == 3);
}

TEST_CASE("kvmerger: the most similar neighbours join, the most attended of each set stays", "[merging]") {
  // Directions in degrees; neighbours differ by 5, 40, 10, 60, 5.
  const double angle[] = {0, 5, 45, 55, 115, 120};
  FakeView view(10, 6, 2);
  for (int i = 0; i < 6; ++i) {
    view.lanes[0].k.row(i) << static_cast<float>(std::cos(angle[i] * M_PI / 180)),
        static_cast<float>(std::sin(angle[i] * M_PI / 180));
  }
  view.lanes[0].q.setZero();  // all alike: the older a token, the more it received
  view.whole_prompt();
  const auto kept = [&](const std::string& keys, int budget) {
    FakeView own = view;
    own.budget = budget;
    own.whole_prompt();
    const Method m = parse_method("kvmerger_sets:" + keys);
    auto selector = m.select.info->select(m.select.config().get(), own.shape());
    selector->prefill(own);
    own.evict(*selector);
    return std::vector<Pos>(own.pos.begin(), own.pos.end());
  };
  CHECK(kept("heavy=0,recent=0", 4) == std::vector<Pos>{0, 2, 3, 4});  // two joins of 5 degrees
  CHECK(kept("heavy=0,recent=0", 3) == std::vector<Pos>{0, 2, 4});
  CHECK(kept("heavy=0,recent=0", 2) == std::vector<Pos>{0, 4});
  CHECK(kept("heavy=0,recent=0", 1) == std::vector<Pos>{0});
  CHECK(kept("heavy=0,recent=0,fit=delta,delta=0.75", 6) == std::vector<Pos>{0, 4});  // 40 degrees have 0.766
  CHECK(kept("heavy=0,recent=0,fit=delta,delta=0.9", 6) == std::vector<Pos>{0, 2, 4});
  CHECK(kept("heavy=0,recent=0,fit=delta,delta=0.9", 2) == std::vector<Pos>{0, 2});  // then by attention
  CHECK(kept("heavy=1,recent=1", 4) == std::vector<Pos>{0, 1, 4, 5});  // 1-2-3 and 4 are free: 2-3 join, then 1-2
}

TEST_CASE("kvmerger: Gaussian weights around the survivor", "[merging]") {
  FakeView view(8, 3, 2);
  view.lanes[0].k.topRows(3) << 1, 0, 1, 0.5F, 1, 1;  // squared distances from token 0: 0.25 and 1
  view.lanes[0].v.topRows(3) << 1, 0, 0, 1, 0, 4;
  view.lanes[0].q.setZero();
  const auto merged = [&](const std::string& keys) {
    FakeView own = view;
    own.whole_prompt();
    make("kvmerger:heavy=0,recent=0" + keys, own)->evicted(own, std::vector<int>{1, 2});
    return own;
  };
  const auto expect = [](const FakeView& own, double variance, double scale) {
    const double a = std::exp(-0.25 / (2 * variance)), b = std::exp(-1 / (2 * variance)), sum = 1 + a + b;
    CHECK(own.key(0, 0)[0] == Approx(1));
    CHECK(own.key(0, 0)[1] == Approx((0.5 * a + b) / sum));
    CHECK(own.value(0, 0)[0] == Approx(scale / sum));
    CHECK(own.value(0, 0)[1] == Approx(scale * (a + 4 * b) / sum));
    CHECK(own.bias(0, 0) == 0);
  };
  const double rms = 1.25 / 3;
  expect(merged(""), rms, 1);
  expect(merged(",value_scale=size"), rms, 3);
  expect(merged(",sigma=mean_dist"), 0.25, 1);
  const double sigma = (1 + std::exp(-0.25 / (2 * rms)) + std::exp(-1 / (2 * rms))) / (std::sqrt(2.0) * 3);
  expect(merged(",sigma=two_pass"), sigma * sigma, 1);
  CHECK(merged(",delta=0.99").value(0, 0)[0] == 1);  // neighbours have 0.894 and 0.949
}

TEST_CASE("kvmerger: what lies between two survivors is divided at its weakest link", "[merging]") {
  const double angle[] = {0, 10, 20, 60, 70};
  FakeView view(8, 5, 2);
  for (int i = 0; i < 5; ++i) {
    view.lanes[0].k.row(i) << static_cast<float>(std::cos(angle[i] * M_PI / 180)),
        static_cast<float>(std::sin(angle[i] * M_PI / 180));
    view.lanes[0].v.row(i) << static_cast<float>(std::pow(10, i)), 0;
  }
  view.lanes[0].q.setZero();
  view.whole_prompt();
  make("kvmerger:heavy=0,recent=0", view)->evicted(view, std::vector<int>{1, 2, 3});
  const double near = 2 - 2 * std::cos(M_PI / 18), far = 2 - 2 * std::cos(M_PI / 9), variance = (near + far) / 3;
  const double a = std::exp(-near / (2 * variance)), b = std::exp(-far / (2 * variance));
  CHECK(view.value(0, 0)[0] == Approx((1 + 10 * a + 100 * b) / (1 + a + b)));  // took in 10 and 100
  CHECK(view.value(0, 4)[0] ==
        Approx((10000 + 1000 * std::exp(-1)) / (1 + std::exp(-1))));  // rms of one: half its square
}

TEST_CASE("zsmerge: runs of the prompt become residual slots, later tokens join by product", "[merging]") {
  FakeView view(12, 6, 2);
  view.budget = 3;
  view.lanes[0].q.setZero();  // all alike: older tokens received more, token 0 most
  view.lanes[0].k.topRows(7) << 1, 0, 0, 1, 0, 3, 2, 0, 4, 0, 1, 1, 0, 5;
  for (int i = 0; i < 12; ++i) {
    view.lanes[0].v.row(i) << static_cast<float>(i), 1;
  }
  view.whole_prompt();
  const std::string keys = ":residual=2,tail=0,decay=1";
  const Method m = parse_method("zsmerge_slots" + keys);
  auto selector = m.select.info->select(m.select.config().get(), view.shape());
  auto rewriter = make("zsmerge" + keys, view);
  const auto evict = [&] {
    std::vector<float> scores(view.pos.size());
    selector->score(view, scores);
    std::vector<int> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return scores[static_cast<std::size_t>(a)] < scores[static_cast<std::size_t>(b)];
    });
    order.resize(view.pos.size() - 3);
    std::sort(order.begin(), order.end());
    leave(view, *rewriter, order);
  };
  selector->prefill(view);
  evict();  // top: token 0; runs 1 2 3 and 4 5, lent by 1 and 4
  REQUIRE(std::vector<Pos>(view.pos.begin(), view.pos.end()) == std::vector<Pos>{0, 1, 4});
  CHECK(view.value(0, 1)[0] == Approx(2));
  CHECK(view.value(0, 2)[0] == Approx(4.5));
  CHECK(view.bias(0, 0) == 0);
  CHECK(view.bias(0, 1) == Approx(std::log(3)));
  CHECK(view.bias(0, 2) == Approx(std::log(2)));
  CHECK(view.key(0, 1)[0] == Approx(2.0 / 3));
  CHECK(view.key(0, 1)[1] == Approx(4.0 / 3));
  view.append();
  selector->observe(view);
  evict();  // the new token (0, 5) has received least; the first residual key is nearest
  CHECK(std::vector<Pos>(view.pos.begin(), view.pos.end()) == std::vector<Pos>{0, 1, 4});
  CHECK(view.value(0, 1)[0] == Approx((3 * 2 + 6) / 4.0));
  CHECK(view.bias(0, 1) == Approx(std::log(4)));
  CHECK(view.bytes(0, 1) == 2 * 4 + 2);
  CHECK(view.bytes(0, 0) == 2 * 4);
}
