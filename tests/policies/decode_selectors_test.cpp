// Selectors that work while decoding: published examples, examples by hand, and what must always hold.
#include <catch2/catch.hpp>

#include "policies/catalogue.hpp"
#include "policies/method.hpp"
#include "policies/redundancy.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Positions = std::vector<Pos>;

std::unique_ptr<Selector> make(const std::string& method, FakeView& view) {
  const Method m = parse_method(method);
  view.group = m.traits.group;
  return m.select.info->select(m.select.config().get(), view.shape());
}

std::vector<float> scores(Selector& selector, const FakeView& view) {
  std::vector<float> s(view.pos.size());
  selector.score(view, s);
  return s;
}

Positions kept(const FakeView& view) { return {view.pos.begin(), view.pos.end()}; }

Positions step(Selector& selector, FakeView& view) {
  view.append();
  selector.observe(view);
  return view.evict(selector);
}

void check_scores(const std::vector<float>& found, const std::vector<double>& expected, double margin = 5e-6) {
  REQUIRE(found.size() >= expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    INFO("slot " << i);
    CHECK(static_cast<double>(found[i]) == Approx(expected[i]).margin(margin));
  }
}

void set_keys(FakeView& view, const std::vector<std::pair<double, double>>& keys) {
  for (std::size_t i = 0; i < keys.size(); ++i) {
    view.lanes[0].k.row(static_cast<Eigen::Index>(i)) << static_cast<float>(keys[i].first),
        static_cast<float>(keys[i].second);
  }
}

// Two evictions of a budget of four whose window is one token: logits are logarithms of the attention wanted.
struct TwoEvents {
  FakeView view{7, 5, 2};
  TwoEvents() {
    const auto ln = [](double x) { return std::log(x); };
    set_keys(
        view,
        {{ln(.20), ln(.02)}, {ln(.05), 0}, {ln(.10), ln(.30)}, {ln(.40), ln(.05)}, {0, ln(.10)}, {0, ln(.15)}, {0, 0}});
    view.lanes[0].q.col(0).setOnes();
    view.lanes[0].q.col(1).setZero();
    view.lanes[0].q.row(6) << 0, 1;
    view.budget = 4;
    view.whole_prompt();
  }
};

}  // namespace

TEST_CASE("gkv remembers the best score of a token, its mean or its decayed sum") {
  const std::vector<std::pair<std::string, std::vector<double>>> cases = {{"max", {.4, 1, .8, .33333, .5}},
                                                                          {"mean", {.41333, .4, .83333, .33333, .5}},
                                                                          {"sum", {.46667, 1.2, .96667, .33333, .5}},
                                                                          {"none", {.06667, 1, .16667, .33333, .5}}};
  for (const auto& [smooth, second] : cases) {
    INFO(smooth);
    TwoEvents t;
    auto gkv = make("gkv:obs_window=1,lambda=1,smooth=" + smooth, t.view);
    check_scores(scores(*gkv, t.view), {.5, .125, .25, 1});
    CHECK(t.view.evict(*gkv) == Positions{1});
    CHECK(kept(t.view) == Positions{0, 2, 3, 4});
    t.view.append();
    t.view.append();
    check_scores(scores(*gkv, t.view), second);
    check_scores(scores(*gkv, t.view), second);  // asking changes nothing
    CHECK(scores(*gkv, t.view).back() == kInf);
  }
}

TEST_CASE("gkv without normalisation scores by attention; gamma adds deviations over the window") {
  TwoEvents t;
  check_scores(scores(*make("gkv:obs_window=1,lambda=1,normalise=false", t.view), t.view),
               {.2 / 1.75, .05 / 1.75, .1 / 1.75, .4 / 1.75});
  // Voters 3 and 4 give slot 0 the shares .2 / .75 and .2 / 1.75.
  const double a = .2 / .75, b = .2 / 1.75;
  check_scores(scores(*make("gkv:obs_window=2,lambda=1,normalise=false,gamma=3", t.view), t.view),
               {(a + b) / 2 + 3 * (a - b) / std::sqrt(2.0)});
  check_scores(scores(*make("gkv:obs_window=1,lambda=1,normalise=false,pooling=max,kernel=3", t.view), t.view),
               {.2 / 1.75, .2 / 1.75, .4 / 1.75, .4 / 1.75});
}

TEST_CASE("gkv grows its budget with the text where a ratio says so") {
  FakeView view(40, 20, 4);
  view.budget = 4;
  view.whole_prompt();
  auto gkv = make("gkv:ratio=0.5,obs_window=2", view);
  CHECK(gkv->surplus(view) == 10);
  view.now = 7;
  CHECK(gkv->surplus(view) == 16);
  CHECK(make("gkv", view)->surplus(view) == 16);
}

TEST_CASE("redundancy of a key is its likeness to others, the newest of near-duplicates forgiven") {
  FakeView view(5, 5, 2);
  set_keys(view, {{1, 0}, {.9, .1}, {0, 1}, {.8, .6}, {.1, .9}});
  view.whole_prompt();
  for (const NoNeighbour rule : {NoNeighbour::skip, NoNeighbour::first}) {
    const Eigen::VectorXd r = mean_likeness(view, 0, {.5, rule});
    check_scores({r.cast<float>().begin(), r.cast<float>().end()}, {.38086, .43704, .34086, .12000, .06599});
    const Eigen::VectorXd rd = redundancy(view, {.5, rule});
    const std::vector<double> expected = {.2213, .23408, .21262, .17048, .16152};
    const std::vector<double> normalised = {.94537, 1, .9083, .7283, .69001};
    for (Eigen::Index i = 0; i < 5; ++i) {
      CHECK(rd[i] == Approx(expected[static_cast<std::size_t>(i)]).margin(5e-6));
      CHECK(rd[i] / rd.maxCoeff() == Approx(normalised[static_cast<std::size_t>(i)]).margin(5e-6));
    }
  }
}

TEST_CASE("a key without a neighbour forgives nobody, or the first slot in the reference code") {
  FakeView view(3, 3, 2);
  set_keys(view, {{1, 0}, {0, 1}, {-2, 0}});
  view.whole_prompt();
  const Eigen::VectorXd skip = mean_likeness(view, 0, {.5, NoNeighbour::skip});
  CHECK(skip.isApprox(Eigen::Vector3d(-1. / 3, 0, -1. / 3)));
  const Eigen::VectorXd first = mean_likeness(view, 0, {.5, NoNeighbour::first});
  CHECK(first.isApprox(Eigen::Vector3d(0, 0, -1. / 3)));
}

TEST_CASE("redundancy of many keys, of equal keys and of zeros") {
  FakeView view(300, 300, 4);
  view.whole_prompt();
  const Eigen::VectorXd r = mean_likeness(view, 0, {});
  // From the definition, entry by entry.
  const MatD k = view.lanes[0].k.cast<double>();
  Eigen::VectorXd expected = Eigen::VectorXd::Zero(300);
  for (Eigen::Index i = 0; i < 300; ++i) {
    Eigen::Index newest = -1;
    for (Eigen::Index j = 0; j < 300; ++j) {
      const double c = k.row(i).dot(k.row(j)) / (k.row(i).norm() * k.row(j).norm());
      expected[j] += i == j ? 0 : c / 300;
      newest = i != j && c > .5 ? j : newest;
    }
    if (newest >= 0) {
      expected[newest] -= k.row(i).dot(k.row(newest)) / (k.row(i).norm() * k.row(newest).norm()) / 300;
    }
  }
  CHECK((r - expected).cwiseAbs().maxCoeff() < 1e-6);
  view.lanes[0].k.setConstant(3);
  const Eigen::VectorXd equal = mean_likeness(view, 0, {});
  // All forgive the newest, and the newest the one before it.
  CHECK(equal[0] == Approx(299. / 300));
  CHECK(equal[298] == Approx(298. / 300));
  CHECK(equal[299] == Approx(0).margin(1e-6));
  view.lanes[0].k.setZero();
  CHECK(mean_likeness(view, 0, {}).isZero(0));
  CHECK(redundancy(view, {})[7] == Approx(1. / 300));
}

TEST_CASE("rkv takes the best head's logits first and softmaxes over the past alone") {
  FakeView view(3, 3, 2, 2);
  set_keys(view, {{1, 0}, {0, 1}, {5, 5}});
  view.lanes[0].q.row(4) << 2, 0;
  view.lanes[0].q.row(5) << 0, 1;
  view.budget = 2;
  view.whole_prompt();
  const double p = std::exp(2.) / (std::exp(2.) + std::exp(1.));
  check_scores(scores(*make("rkv:obs_window=1,lambda=1,kernel=1", view), view), {p, 1 - p});
  const Eigen::VectorXd rd = redundancy(view, {.5, NoNeighbour::first});
  const std::vector<float> s = scores(*make("rkv:obs_window=1,lambda=0.1,kernel=1", view), view);
  check_scores(s, {.1 * p - .9 * rd[0], .1 * (1 - p) - .9 * rd[1]});
  CHECK(s[2] == kInf);
  check_scores(scores(*make("rkv:obs_window=1,lambda=1", view), view), {p, p});  // pooled over seven
}

TEST_CASE("rkv waits until a buffer of tokens lies above the budget") {
  FakeView view(60, 20, 4);
  view.budget = 10;
  view.whole_prompt();
  auto rkv = make("rkv:buffer=8", view);
  CHECK(parse_method("rkv:buffer=8").traits.interval == 8);
  CHECK(parse_method("rkv").traits.interval == 128);
  CHECK(parse_method("rkv:buffer=0").traits.interval == 128);
  CHECK(view.evict(*rkv).size() == 10);  // the prompt does not wait
  for (int t = 1; t <= 7; ++t) {
    CHECK(step(*rkv, view).empty());
  }
  CHECK(step(*rkv, view).size() == 8);
  CHECK(view.pos.size() == 10);
}

TEST_CASE("scope keeps its window and what the current query attends, or what was attended since birth") {
  for (const std::string mass : {"current", "cumulative"}) {
    FakeView view(20, 2, 4);
    view.set_slots({});
    view.budget = 3;
    auto scope = make("scope:window=2,mass=" + mass, view);
    const float rows[5][5] = {{.9F}, {.3F, .5F}, {.1F, .5F, .1F}, {.2F, .1F, .4F, .1F}, {.1F, .1F, .3F, .2F, .1F}};
    Positions gone;
    for (Pos t = 1; t <= 5; ++t) {
      view.script.clear();
      for (Pos p = 2; p <= t + 1; ++p) {
        view.script[p] = rows[t - 1][p - 2];
      }
      for (Pos p : step(*scope, view)) {
        gone.push_back(p);
      }
    }
    // Sums at the fourth step: 1.5 and 1.1; at the fifth 1.6 and 0.8.
    CHECK(gone == (mass == "current" ? Positions{3, 2} : Positions{3, 4}));
  }
}

TEST_CASE("scope spreads its budget over the length of the generation") {
  // Ten steps, a budget of five, a window of two: delta = 8 / 3 = 2.
  const std::vector<std::pair<std::string, std::vector<std::size_t>>> cases = {
      {"scope:window=2", {1, 2, 3, 4, 5, 5, 5, 5, 5, 5}},
      {"scope:window=2,mode=adaptive", {1, 2, 3, 3, 4, 4, 5, 5, 5, 5}},
      {"scope:window=2,mode=adaptive,growth=paper", {1, 2, 2, 2, 3, 3, 3, 4, 4, 5}},
      {"scope:window=2,mode=discontinuous", {1, 2, 3, 3, 4, 5, 5, 6, 7, 5}},
      {"scope:window=2,mode=adaptive,steps=4", {1, 2, 3, 4, 5, 5, 5, 5, 5, 5}},
      {"scope:window=2,mode=adaptive,steps=20", {1, 2, 2, 2, 2, 2, 3, 3, 3, 3}},
      {"scope:mode=adaptive", {1, 2, 3, 4, 5, 5, 5, 5, 5, 5}}};  // a window of 256 shrinks to the budget
  for (const auto& [text, sizes] : cases) {
    INFO(text);
    FakeView view(13, 3, 4);
    view.set_slots({});
    view.budget = 5;
    auto scope = make(text, view);
    std::vector<std::size_t> found;
    for (int t = 1; t <= 10; ++t) {
      step(*scope, view);
      found.push_back(view.pos.size());
    }
    CHECK(found == sizes);
  }
}

TEST_CASE("lazyeviction tracks when a token was last needed and how long it ever rested") {
  const std::vector<std::vector<float>> rows = {
      {.5F, 0, .1F}, {0, 0, .2F, .3F}, {0, .2F, 0, 0, .4F}, {.3F, 0, 0, 0, 0, .2F}};
  const std::vector<std::pair<std::string, std::vector<double>>> cases = {
      {"score=code", {.77629, .65562, 1.09485, 1.09485, 1.23841, 1.53788}},
      {"score=paper", {1.23841, 1.07327, 1.23841, 1.23841, 1.53788, 2.0}},
      // Slots 1 to 4 rest for 1, 2, 2 and 1 steps; where that is more than before, the second term falls.
      {"score=paper,gap=open", {1.23841, 1.07327, .23841 + .53788, .23841 + .53788, 1.53788, 2.0}}};
  for (const auto& [keys, expected] : cases) {
    INFO(keys);
    FakeView view(6, 2, 4);
    view.budget = 6;
    view.whole_prompt();
    auto lazy = make("lazyeviction:window=1,alpha_thr=0.05," + keys, view);
    for (const std::vector<float>& row : rows) {
      view.append();
      for (std::size_t i = 0; i < row.size(); ++i) {
        view.script[static_cast<Pos>(i)] = row[i];
      }
      lazy->observe(view);
    }
    CHECK(scores(*lazy, view).back() == kInf);
    view.budget = 0;  // so that nothing is protected
    check_scores(scores(*lazy, view), expected);
  }
}

TEST_CASE("lazyeviction evicts once a window, and a token needed at birth alone stays unless the gap is open") {
  CHECK(parse_method("lazyeviction").traits.interval == 52);
  CHECK(parse_method("lazyeviction:window=7").traits.interval == 7);
  CHECK(parse_method("lazyeviction:window=7,interval=3").traits.interval == 3);
  CHECK_THROWS_WITH(parse_method("lazyeviction:window=50%"), Catch::Contains("not a percentage"));
  // Position 0 comes back every 50 steps, the last time 3 steps ago; position 1 was needed when it was born.
  for (const bool open : {false, true}) {
    FakeView view(110, 1, 4);
    view.budget = 200;
    view.set_slots({0});
    auto lazy = make(std::string("lazyeviction:window=1,alpha_thr=0.5") + (open ? ",gap=open" : ""), view);
    for (Pos t = 1; t <= 103; ++t) {
      view.append();
      view.script[t] = t == 1 ? 1 : 0;
      view.script[0] = t == 50 || t == 100 ? 1 : 0;
      lazy->observe(view);
      view.script[1] = 0;
    }
    const std::vector<float> s = scores(*lazy, view);
    CHECK(s[0] == Approx(.51).margin(.005));
    CHECK((s[1] > s[0]) == !open);
    CHECK(s[2] == Approx(0).margin(1e-6));
  }
}

TEST_CASE("raas evicts the page that was attended well longest ago") {
  FakeView view(12, 1, 4);
  view.set_slots({});
  view.budget = 6;
  auto raas = make("raas:page=2,fraction=0.5", view);
  // Pages (1, 2), (3, 4), (5, 6); the first is attended best at all steps but the last two.
  for (Pos t = 1; t <= 6; ++t) {
    view.script[t] = t <= 2 ? 0.3F : 0.1F;
    CHECK(step(*raas, view).empty());
  }
  // A step with four pages: two get its time, (5, 6) and the newest with 7, which has it anyway.
  view.script = {{1, .1F}, {2, .1F}, {3, 0}, {4, 0}, {5, .2F}, {6, .2F}, {7, .3F}};
  CHECK(step(*raas, view) == Positions{3, 4});
  CHECK(kept(view) == Positions{1, 2, 5, 6, 7});
  view.script[8] = .3F;
  CHECK(step(*raas, view).empty());
  view.script[9] = .3F;
  CHECK(step(*raas, view) == Positions{1, 2});
}

TEST_CASE("raas by a threshold, token by token, ties to the older") {
  FakeView view(12, 1, 4);
  view.set_slots({});
  view.budget = 3;
  auto raas = make("raas:page=1,by=threshold,threshold=0.2", view);
  for (Pos t = 1; t <= 3; ++t) {
    view.script[t] = 0.1F;
    step(*raas, view);
  }
  view.script = {{1, .2F}, {2, .1F}, {3, .1F}, {4, .1F}};
  CHECK(step(*raas, view) == Positions{2});
  view.script = {{1, .5F}, {3, .2F}, {4, .2F}, {5, .5F}};
  CHECK(step(*raas, view) == Positions{1});  // all of this step: the oldest
  view.budget = 1;
  view.script[6] = 0;
  CHECK(step(*raas, view) == Positions{3, 4, 5});
}

TEST_CASE("h2o of the current query alone forgets what was before") {
  FakeView view(30, 1, 4);
  view.set_slots({});
  view.budget = 2;
  auto h2o = make("h2o:mass=current,window=1,pool=decode", view);
  view.script = {{1, .9F}, {2, .1F}, {3, .1F}};
  step(*h2o, view);
  step(*h2o, view);
  view.script = {{1, .1F}, {2, .3F}, {3, .1F}};
  CHECK(step(*h2o, view) == Positions{1});
}

TEST_CASE("streaming with a window keeps the first tokens of the pool") {
  FakeView view(30, 10, 4);
  view.budget = 6;
  view.whole_prompt();
  view.evict(*make("streaming:window=2,sink=1", view));
  CHECK(kept(view) == Positions{0, 1, 2, 3, 8, 9});
  view.set_slots({10, 11, 12, 13, 14});
  view.now = 14;
  view.budget = 3;
  view.evict(*make("streaming:sink=0,window=2,pool=decode", view));
  CHECK(kept(view) == Positions{10, 13, 14});
}

TEST_CASE("selectors of the decode keep their windows, hold their budgets and ask no head for its number") {
  const std::vector<std::pair<std::string, int>> methods = {{"gkv:obs_window=4", 4},
                                                            {"gkv:obs_window=4,group=mean,no_neighbour=first", 4},
                                                            {"rkv:obs_window=4,buffer=0", 4},
                                                            {"scope:window=3,scope=kv_head", 3},
                                                            {"scope:window=3,scope=kv_head,mass=cumulative", 3},
                                                            {"lazyeviction:window=3,scope=kv_head", 3},
                                                            {"raas:page=3", 1},
                                                            {"h2o:mass=current", 4}};
  for (const auto& [text, window] : methods) {
    INFO(text);
    FakeView view(60, 20, 6, 3, 1), swapped(60, 20, 6, 3, 1);
    for (Eigen::Index t = 0; t < 60; ++t) {
      swapped.lanes[0].q.row(3 * t).swap(swapped.lanes[0].q.row(3 * t + 2));
    }
    std::vector<Positions> gone;
    for (FakeView* v : {&view, &swapped}) {
      v->budget = 8;
      v->whole_prompt();
      const auto selector = make(text, *v);
      selector->prefill(*v);
      Positions left = v->evict(*selector);
      for (int t = 0; t < 40; ++t) {
        for (const Pos p : step(*selector, *v)) {
          CHECK(p <= v->now - window);
          left.push_back(p);
        }
        CHECK(v->pos.size() <= 8);
      }
      gone.push_back(left);
    }
    CHECK(gone[0] == gone[1]);
  }
}

TEST_CASE("a constant factor on the attention changes no decision of its ranks") {
  for (const std::string text : {"h2o:mass=current,pool=decode", "h2o:pool=decode", "scope:window=2",
                                 "scope:window=2,mass=cumulative", "raas:page=2", "momentum", "tova:pool=decode"}) {
    INFO(text);
    std::vector<Positions> gone(2);
    for (const int run : {0, 1}) {
      FakeView view(40, 1, 4);
      view.set_slots({});
      view.budget = 6;
      const auto selector = make(text, view);
      for (int t = 1; t <= 30; ++t) {
        view.script.clear();
        for (Pos p = 1; p <= t; ++p) {
          view.script[p] = (run == 0 ? 1.0F : 0.25F) * static_cast<float>((p * 37 + t * p * 11) % 64) / 4096;
        }
        for (const Pos p : step(*selector, view)) {
          gone[static_cast<std::size_t>(run)].push_back(p);
        }
      }
    }
    CHECK(gone[0].size() >= 24);
    CHECK(gone[0] == gone[1]);
  }
}

TEST_CASE("names of other codes' variants come to what their presets say") {
  for (const std::string name : {"h2o-kvpress", "h2o-scope", "h2o-longflow", "h2o-gkv", "streaming-scope",
                                 "streaming-longflow", "streaming-gkv", "snapkv-kvpress", "snapkv-rkv", "snapkv-gkv"}) {
    const Preset* preset = find_preset(name);
    REQUIRE(preset != nullptr);
    CHECK(parse_method(name).name == preset->expansion);
  }
}
