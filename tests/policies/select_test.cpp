#include <catch2/catch.hpp>
#include <set>

#include "policies/catalogue.hpp"
#include "policies/counter_rng.hpp"
#include "policies/method.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Positions = std::vector<Pos>;

std::unique_ptr<Selector> make(const std::string& method, FakeView& view, const SetShape* shape = nullptr) {
  const Method m = parse_method(method);
  view.group = m.traits.group;
  return m.select.info->select(m.select.config().get(), shape != nullptr ? *shape : view.shape());
}

std::vector<float> scores(Selector& selector, const FakeView& view) {
  std::vector<float> s(view.pos.size());
  selector.score(view, s);
  return s;
}

Positions kept(const FakeView& view) { return {view.pos.begin(), view.pos.end()}; }

// One decode step, evicting after attention.
Positions step(Selector& selector, FakeView& view) {
  view.append();
  selector.observe(view);
  return view.evict(selector);
}

// Exact sums over the tokens of a FakeView, as the engine hands them to oracles.
class FakeFuture final : public Future {
 public:
  explicit FakeFuture(const FakeView& view) : view_(view) {}
  void attention_to_come(const View& view, std::span<float> out) const override {
    std::fill(out.begin(), out.end(), 0.0F);
    for (int l = 0; l < view.n_lanes; ++l) {
      const Horizon h = horizon(view, l, 1 << 20);
      const int n_heads = view.n_heads;
      for (Eigen::Index r = 0; r < h.weights.rows(); ++r) {
        const double z = all(l, view.now + 1 + static_cast<Pos>(r) / n_heads, static_cast<int>(r) % n_heads).sum();
        for (std::size_t i = 0; i < out.size(); ++i) {
          out[i] += static_cast<float>(static_cast<double>(h.weights(r, static_cast<Eigen::Index>(i))) / z);
        }
      }
    }
  }
  Horizon horizon(const View& view, int lane, int steps) const override {
    const auto& data = view_.lanes[static_cast<std::size_t>(lane)];
    const int n = static_cast<int>(view.pos.size());
    Horizon h;
    h.steps = std::min(steps, static_cast<int>(data.k.rows()) - 1 - view.now);
    h.weights = MatF::Zero(h.steps * view.n_heads, n + h.steps);
    h.arrivals = data.v.middleRows(view.now + 1, h.steps);
    h.full.resize(h.steps * view.n_heads, data.v.cols());
    for (int s = 0; s < h.steps; ++s) {
      for (int g = 0; g < view.n_heads; ++g) {
        const Pos t = view.now + 1 + s;
        const Eigen::VectorXd w = all(lane, t, g);
        const int r = s * view.n_heads + g;
        for (int i = 0; i < n; ++i) {
          h.weights(r, i) = static_cast<float>(w[view.pos[static_cast<std::size_t>(i)]]);
        }
        for (int a = 0; a <= s; ++a) {
          h.weights(r, n + a) = static_cast<float>(w[view.now + 1 + a]);
        }
        h.full.row(r) = w.transpose() * data.v.topRows(t + 1).cast<double>() / w.sum();
      }
    }
    return h;
  }

 private:
  Eigen::VectorXd all(int lane, Pos t, int head) const {  // exp(logit) of the whole past
    const auto& data = view_.lanes[static_cast<std::size_t>(lane)];
    const Eigen::RowVectorXd q = data.q.row(t * view_.n_heads + head).cast<double>();
    return (data.k.topRows(t + 1).cast<double>() * q.transpose()).array().exp();
  }
  const FakeView& view_;
};

// What dropping slot j costs over the horizon, from the definition.
double added_loss(const FakeView& view, const Future& future, int steps, const Positions& slots, std::size_t j) {
  double sum = 0;
  for (int lane = 0; lane < view.n_lanes; ++lane) {
    const auto h = future.horizon(view, lane, steps);
    const auto error = [&](Eigen::Index r, std::ptrdiff_t without) {
      Eigen::RowVectorXd n = Eigen::RowVectorXd::Zero(view.v_head_dim);
      double z = 0;
      const auto add = [&](float w, const auto& v) {
        n += static_cast<double>(w) * v.template cast<double>();
        z += static_cast<double>(w);
      };
      for (std::size_t i = 0; i < slots.size(); ++i) {
        const auto at = std::lower_bound(view.pos.begin(), view.pos.end(), slots[i]) - view.pos.begin();
        if (static_cast<std::ptrdiff_t>(i) != without) {
          add(h.weights(r, at), view.lanes[static_cast<std::size_t>(lane)].v.row(slots[i]));
        }
      }
      const auto n_slots = static_cast<Eigen::Index>(view.pos.size());
      for (Eigen::Index a = 0; a < h.steps; ++a) {
        add(h.weights(r, n_slots + a), h.arrivals.row(a));
      }
      return (n / z - h.full.row(r)).squaredNorm();
    };
    for (Eigen::Index r = 0; r < h.weights.rows(); ++r) {
      sum += error(r, static_cast<std::ptrdiff_t>(j)) - error(r, -1);
    }
  }
  return sum;
}

}  // namespace

TEST_CASE("no selector exceeds its budget, scores NaN, or evicts when all fits") {
  for (const PartInfo* part : all_parts()) {
    if (part->role != Role::select || part->name == "given" || part->name == "full" ||
        part->name == "rpc") {  // no fixed budget: rpc's grows
      continue;
    }
    for (int budget : {1, 2, 7, 1000}) {
      for (int prompt : {1, 5, 30}) {
        FakeView view(prompt + 20, prompt, 8, 2, 2);
        view.budget = budget;
        const std::string keys = part->name == "snapkv" ? ":decode=evict" : part->name == "rkv" ? ":buffer=0" : "";
        const auto selector = make(std::string(part->name) + keys, view);
        const FakeFuture future(view);
        if (auto* oracle = dynamic_cast<OracleSelector*>(selector.get())) {
          oracle->reveal(future);
        }
        INFO(part->name << " at budget " << budget << ", prompt " << prompt);
        view.whole_prompt();
        selector->prefill(view);
        for (int t = 0; t < 20; ++t) {
          for (float s : scores(*selector, view)) {
            CHECK_FALSE(std::isnan(s));
          }
          const Positions gone = view.evict(*selector);
          CHECK(static_cast<int>(view.pos.size()) <= budget);
          if (budget == 1000) {
            CHECK(gone.empty());
          }
          view.append();
          selector->observe(view);
        }
      }
    }
  }
}

TEST_CASE("full keeps every token and has no budget") {
  FakeView view(20, 10, 4);
  view.budget = 1;
  view.whole_prompt();
  CHECK(make("full", view)->surplus(view) == 0);
  CHECK_FALSE(parse_method("full").budgeted());
  CHECK(parse_method("full+quest").budgeted());
}

TEST_CASE("streaming keeps the first four and the latest tokens") {
  FakeView view(30, 20, 4);
  view.budget = 6;
  view.whole_prompt();
  auto streaming = make("streaming", view);
  view.evict(*streaming);
  CHECK(kept(view) == Positions{0, 1, 2, 3, 18, 19});
  step(*streaming, view);
  CHECK(kept(view) == Positions{0, 1, 2, 3, 19, 20});
  view.budget = 3;
  view.evict(*make("streaming", view));
  CHECK(kept(view) == Positions{0, 1, 2});
}

TEST_CASE("h2o keeps heavy hitters and its window; attention adds up over the decode") {
  FakeView view(30, 1, 4);
  view.set_slots({});
  view.budget = 4;  // window 50%: the latest two
  auto h2o = make("h2o:pool=decode", view);
  h2o->prefill(view);
  const float rows[] = {0.5F, 0.1F, 0.3F, 0.2F, 0.01F};
  for (int t = 1; t <= 4; ++t) {
    for (Pos p = 1; p <= t; ++p) {
      view.script[p] = rows[p - 1];
    }
    CHECK(step(*h2o, view).empty());
  }
  view.script[5] = 0.01F;  // sums: 1: 2.5, 2: 0.4, 3: 0.9; 4 and 5 are the window
  CHECK(step(*h2o, view) == Positions{2});
  CHECK(kept(view) == Positions{1, 3, 4, 5});
}

TEST_CASE("h2o cuts the prompt by the attention that all prompt queries paid, the group's mean") {
  FakeView view(40, 40, 8, 4);
  view.budget = 10;
  view.whole_prompt();
  auto h2o = make("h2o:window=3", view);
  h2o->prefill(view);
  const std::vector<float> s = scores(*h2o, view);
  const Eigen::RowVectorXd mass = view.column_mass(0, Needs::kAll).colwise().mean();
  for (std::size_t i = 0; i < 37; ++i) {
    CHECK(s[i] == Approx(mass[static_cast<Eigen::Index>(i)]));
  }
  for (std::size_t i = 37; i < 40; ++i) {
    CHECK(s[i] == kInf);
  }
  CHECK(mass.sum() == Approx(40));
  auto by_age = make("h2o:window=0,mass=mean", view);
  by_age->prefill(view);
  const std::vector<float> m = scores(*by_age, view);
  for (std::size_t i = 0; i < 40; ++i) {
    CHECK(m[i] == Approx(mass[static_cast<Eigen::Index>(i)] / (40 - static_cast<double>(i))));
  }
}

TEST_CASE("tova drops what the current query attends least, the newest token included") {
  FakeView view(10, 4, 4);
  view.budget = 3;
  view.whole_prompt();
  auto tova = make("tova", view);
  view.script = {{0, 0.4F}, {1, 0.05F}, {2, 0.45F}, {3, 0.1F}};
  CHECK(view.evict(*tova) == Positions{1});
  view.script = {{0, 0.3F}, {2, 0.5F}, {3, 0.15F}, {4, 0.05F}};
  CHECK(step(*tova, view) == Positions{4});
  auto pinned = make("tova:pin_newest=true", view);
  view.script = {{0, 0.3F}, {2, 0.5F}, {3, 0.15F}, {5, 0.05F}};
  CHECK(step(*pinned, view) == Positions{3});
}

TEST_CASE("tova scores by the mean over all heads of the layer") {
  FakeView view(20, 20, 8, 2, 3);
  view.budget = 5;
  view.whole_prompt();
  auto tova = make("tova", view);
  const std::vector<float> s = scores(*tova, view);
  std::vector<float> expected(20), one(20);
  for (int lane = 0; lane < 3; ++lane) {
    for (int head = 0; head < 2; ++head) {
      view.head_attention(lane, head, one);
      for (std::size_t i = 0; i < 20; ++i) {
        expected[i] += one[i] / 6;
      }
    }
  }
  for (std::size_t i = 0; i < 20; ++i) {
    CHECK(s[i] == Approx(expected[i]));
  }
}

TEST_CASE("Moment-KV's golden vectors") {
  struct Case {
    const char* alpha;
    Positions evicted;                           // at t = 3, 4, 5
    std::vector<std::vector<float>> importance;  // before eviction at t = 2 to 5
  };
  const Case c = GENERATE(values<Case>({
      {"0.9", {2, 4, 5}, {{0.5F, 0.2F}, {0.5F, 0.23F, 0.6F}, {0.47F, 0.64F, 0.3F}, {0.433F, 0.876F, 0.02F}}},
      {"1", {2, 4, 5}, {{0.55F, 0.2F}, {0.6F, 0.25F, 0.6F}, {0.62F, 0.7F, 0.3F}, {0.63F, 1.0F, 0.02F}}},
      {"0", {1, 2, 5}, {{0.05F, 0.2F}, {0.05F, 0.05F, 0.6F}, {0, 0.1F, 0.3F}, {0.3F, 0.05F, 0.02F}}},
  }));
  const std::vector<std::map<Pos, float>> rows{{{1, 0.5F}},
                                               {{1, 0.05F}, {2, 0.2F}},
                                               {{1, 0.05F}, {2, 0.05F}, {3, 0.6F}},
                                               {{1, 0.02F}, {2, 0.0F}, {3, 0.1F}, {4, 0.3F}},
                                               {{1, 0.01F}, {3, 0.3F}, {4, 0.05F}, {5, 0.02F}}};
  FakeView view(6, 1, 4);
  view.set_slots({});
  view.budget = 2;
  auto momentum = make(std::string("momentum:alpha=") + c.alpha, view);
  Positions evicted;
  for (std::size_t t = 1; t <= 5; ++t) {
    view.append();
    view.script = rows[t - 1];
    momentum->observe(view);
    INFO("alpha " << c.alpha << ", t " << t);
    if (t >= 2) {
      const std::vector<float> s = scores(*momentum, view);
      REQUIRE(s.size() == c.importance[t - 2].size());
      for (std::size_t i = 0; i < s.size(); ++i) {
        CHECK(s[i] == Approx(c.importance[t - 2][i]).margin(1e-7));
      }
    }
    for (Pos p : view.evict(*momentum)) {
      evicted.push_back(p);
    }
  }
  CHECK(evicted == c.evicted);
}

TEST_CASE("momentum is TOVA at alpha 0 and H2O without a window at alpha 1, on the decode pool") {
  const auto pair = GENERATE(values<std::pair<const char*, const char*>>(
      {{"momentum:alpha=0", "tova:pool=decode"}, {"momentum:alpha=1", "h2o:scope=layer,pool=decode,window=0"}}));
  FakeView a(70, 10, 8, 2, 2), b(70, 10, 8, 2, 2);
  a.budget = b.budget = 6;
  a.set_slots({});
  b.set_slots({});
  auto first = make(pair.first, a), second = make(pair.second, b);
  int evictions = 0;
  for (int t = 0; t < 60; ++t) {
    const Positions gone = step(*first, a);
    CHECK(gone == step(*second, b));
    evictions += static_cast<int>(gone.size());
  }
  CHECK(evictions == 54);
}

TEST_CASE("Moment-KV's importance stays below 1 / (1 - alpha)") {
  FakeView view(60, 10, 8, 2, 2);
  view.set_slots({});
  view.budget = 8;
  auto momentum = make("momentum:alpha=0.9", view);
  for (int t = 0; t < 50; ++t) {
    step(*momentum, view);
    float sum = 0;
    for (float s : scores(*momentum, view)) {
      CHECK(s >= 0);
      sum += s;
    }
    CHECK(sum <= 10.0001F);
  }
}

TEST_CASE("snapkv pools votes over neighbours: a single hit spreads to five tokens") {
  FakeView view(40, 40, 4);
  view.budget = 12;
  view.lanes[0].k.setZero();
  view.lanes[0].q.setZero();
  view.lanes[0].q.col(0).setConstant(100);
  const auto hit = GENERATE(20, 0, 1, 35);
  view.lanes[0].k(hit, 0) = 1;
  view.whole_prompt();
  const auto average = scores(*make("snapkv:obs_window=4", view), view);
  const auto maximum = scores(*make("snapkv:obs_window=4,pooling=max,kernel=3", view), view);
  for (int i = 0; i < 40; ++i) {
    INFO("hit " << hit << ", token " << i);
    const auto at = static_cast<std::size_t>(i);
    CHECK(average[at] == (i >= 36 ? Approx(kInf) : std::abs(i - hit) <= 2 ? Approx(0.2F) : Approx(0).margin(1e-6)));
    CHECK(maximum[at] == (i >= 36 ? Approx(kInf) : std::abs(i - hit) <= 1 ? Approx(1) : Approx(0).margin(1e-6)));
  }
}

TEST_CASE("snapkv at decode scores resident keys by the last queries, as it did at the prompt's end") {
  const auto keys = GENERATE("", ",pooling=max,kernel=7", ",group=max", ",scope=layer");
  FakeView prompt(50, 40, 8, 2, 2), decode(50, 10, 8, 2, 2);
  prompt.budget = decode.budget = 20;
  const std::string method = std::string("snapkv:decode=evict,obs_window=6") + keys;
  auto at_prompt = make(method, prompt), at_decode = make(method, decode);
  prompt.whole_prompt();
  Positions all(40);
  std::iota(all.begin(), all.end(), 0);
  decode.set_slots(all);
  decode.now = 39;
  const auto a = scores(*at_prompt, prompt), b = scores(*at_decode, decode);
  for (std::size_t i = 0; i < 40; ++i) {
    CHECK(a[i] == Approx(b[i]).epsilon(1e-4));
  }
}

TEST_CASE("snapkv keeps the newest tokens of a window larger than the budget, and copes with a short prompt") {
  FakeView view(80, 80, 4);
  view.budget = 3;
  view.whole_prompt();
  view.evict(*make("snapkv", view));
  CHECK(kept(view) == Positions{77, 78, 79});
  FakeView brief(5, 5, 4);
  brief.budget = 2;
  brief.whole_prompt();
  brief.evict(*make("snapkv", brief));
  CHECK(kept(brief) == Positions{3, 4});
  CHECK(parse_method("snapkv").traits.decode == Decode::grow);
}

TEST_CASE("knorm ranks by the norm of the key, whatever the scale") {
  FakeView view(20, 20, 8);
  view.budget = 5;
  view.whole_prompt();
  const auto s = scores(*make("knorm", view), view);
  for (std::size_t i = 0; i < 20; ++i) {
    CHECK(s[i] == Approx(-view.lanes[0].k.row(static_cast<Eigen::Index>(i)).norm()));
  }
  FakeView scaled = view;
  scaled.whole_prompt();
  scaled.lanes[0].k *= 3;
  auto large = make("knorm", scaled);
  auto small = make("knorm", view);
  CHECK(scaled.evict(*large) == view.evict(*small));
}

TEST_CASE("keydiff: equal keys all score -1, an antipodal outlier scores highest") {
  FakeView view(12, 12, 4);
  view.budget = 4;
  view.lanes[0].k.rowwise() = Eigen::RowVector4f(1, 2, 0, -1);
  view.whole_prompt();
  for (float s : scores(*make("keydiff", view), view)) {
    CHECK(s == Approx(-1));
  }
  view.lanes[0].k.row(5) *= -2;
  const auto s = scores(*make("keydiff", view), view);
  CHECK(s[5] == Approx(1));
  CHECK(std::max_element(s.begin(), s.end()) - s.begin() == 5);
}

TEST_CASE("keydiff's anchor follows arrivals, evictions and rewritten keys") {
  FakeView view(60, 20, 8, 1, 2);
  view.budget = 12;
  view.whole_prompt();
  auto keydiff = make("keydiff", view);
  keydiff->prefill(view);
  view.evict(*keydiff);
  for (int t = 0; t < 30; ++t) {
    Positions rewritten;
    if (t % 7 == 3) {
      rewritten.push_back(view.pos[4]);
      const Eigen::VectorXf k = test::random_matrix(8, 1, 100U + static_cast<unsigned>(t));
      for (int lane = 0; lane < 2; ++lane) {
        view.rewrite(lane, 4, k, k, 0, 0);
      }
    }
    view.rewritten = rewritten;
    view.append();
    keydiff->observe(view);
    const auto s = scores(*keydiff, view);
    std::vector<double> expected(view.pos.size());
    for (int lane = 0; lane < 2; ++lane) {
      Eigen::VectorXd anchor = Eigen::VectorXd::Zero(8);
      const int n = static_cast<int>(view.pos.size());
      for (int i = 0; i < n; ++i) {
        anchor += view.key(lane, i).cast<double>().normalized();
      }
      for (int i = 0; i < n; ++i) {
        expected[static_cast<std::size_t>(i)] -= view.key(lane, i).cast<double>().normalized().dot(anchor.normalized());
      }
    }
    for (std::size_t i = 0; i < s.size(); ++i) {
      CHECK(s[i] == Approx(expected[i]).margin(1e-5));
    }
    view.evict(*keydiff);
  }
}

TEST_CASE("random numbers depend on their key alone") {
  CHECK(uniform_at(1, 2, 3) == uniform_at(1, 2, 3));
  CHECK(uniform_at(1, 2, 3) != uniform_at(1, 3, 2));
  double sum = 0, square = 0;
  for (int i = 0; i < 100000; ++i) {
    const double x = uniform_at(7, i);
    REQUIRE(x >= 0);
    REQUIRE(x < 1);
    sum += x;
    square += x * x;
  }
  CHECK(sum / 100000 == Approx(0.5).epsilon(0.01));
  CHECK(square / 100000 == Approx(1.0 / 3).epsilon(0.01));
  CHECK(mix_bits(0) == 0xe220a8397b1dcdafU);  // SplitMix64's published first output for seed 0
}

TEST_CASE("random differs between sets and seeds, and draw=once keeps a token's number") {
  FakeView view(30, 20, 4);
  view.budget = 5;
  view.whole_prompt();
  SetShape shape = view.shape();
  const auto base = scores(*make("random", view, &shape), view);
  CHECK(base == scores(*make("random", view, &shape), view));
  shape.set = 1;
  CHECK(base != scores(*make("random", view, &shape), view));
  shape.set = 0;
  shape.seed = 1;
  CHECK(base != scores(*make("random", view, &shape), view));
  auto once = make("random:draw=once", view);
  auto each = make("random", view);
  const auto before = scores(*once, view), other = scores(*each, view);
  view.append();
  auto after = scores(*once, view), again = scores(*each, view);
  after.pop_back();
  again.pop_back();
  CHECK(before == after);
  CHECK(other != again);
}

TEST_CASE("given ranks by stored scores, summed over a set's lanes") {
  FakeView view(10, 8, 4, 1, 2);
  view.budget = 3;
  view.whole_prompt();
  SetShape shape = view.shape();
  shape.scores = {{5, 0, 9, 1, 0, 0, 0, 3, 4, 0}, {0, 7, 0, 0, 0, 0, 0, 0, 1, 0}};
  auto given = make("given:scores=mine", view, &shape);
  view.evict(*given);
  CHECK(kept(view) == Positions{0, 1, 2});
  CHECK(step(*given, view) == Positions{0});  // ties of 5 drop the older
  CHECK(parse_method("given:scores=mine").needs().scores == "mine");
  CHECK(parse_method("given:scores=mine").budgeted());
}

TEST_CASE("given replays recorded evictions: a token is missing from the recorded step on") {
  const Method m = parse_method("given:evicted_at=a.h5");
  CHECK_FALSE(m.budgeted());
  CHECK(m.needs().evicted_at == "a.h5");
  CHECK(m.traits.evict == Order::before_attention);
  FakeView view(8, 4, 4);
  view.whole_prompt();
  SetShape shape = view.shape();
  shape.evicted_at = {0, 4, 2, 1, 0, 4, 2, 4};  // position 4 is token of step 0 and never attended
  auto given = make("given:evicted_at=a.h5", view, &shape);
  CHECK(view.evict(*given) == Positions{0});
  const std::vector<Positions> attended{{1, 2, 3}, {1, 2, 5}, {1, 5}, {1, 5, 7}};
  for (int s = 0; s < 4; ++s) {
    view.append();
    view.evict(*given);  // before attention
    given->observe(view);
    CHECK(kept(view) == attended[static_cast<std::size_t>(s)]);
  }
}

TEST_CASE("oracle_mass keeps what later queries attend") {
  FakeView view(40, 20, 8, 2);
  view.budget = 6;
  view.whole_prompt();
  const FakeFuture future(view);
  auto oracle = make("oracle_mass", view);
  dynamic_cast<OracleSelector&>(*oracle).reveal(future);
  std::vector<float> to_come(20);
  future.attention_to_come(view, to_come);
  CHECK(scores(*oracle, view) == to_come);
  CHECK(parse_method("oracle_mass").foresight() == Foresight::oracle);
  CHECK(parse_method("h2o").foresight() == Foresight::none);
  CHECK(parse_method("full+topk").foresight() == Foresight::oracle);
}

TEST_CASE("oracle_greedy's closed form is the loss by definition") {
  FakeView view(40, 20, 6, 2, 2);
  view.budget = 12;
  Positions slots{0, 2, 3, 5, 6, 8, 9, 11, 13, 14, 16, 18, 19};
  view.set_slots(slots);
  const FakeFuture future(view);
  auto oracle = make("oracle_greedy:horizon=8", view);
  dynamic_cast<OracleSelector&>(*oracle).reveal(future);
  const auto s = scores(*oracle, view);
  for (std::size_t j = 0; j < slots.size(); ++j) {
    CHECK(s[j] == Approx(added_loss(view, future, 8, slots, j)).epsilon(1e-3).margin(1e-6));
  }
}

TEST_CASE("oracle_greedy cuts the prompt one token at a time") {
  FakeView view(40, 16, 6, 2, 2);
  view.budget = 5;
  view.whole_prompt();
  const FakeFuture future(view);
  auto oracle = make("oracle_greedy:horizon=10", view);
  dynamic_cast<OracleSelector&>(*oracle).reveal(future);
  Positions left = kept(view), order;
  while (left.size() > 5) {
    std::vector<double> loss;
    for (std::size_t j = 0; j < left.size(); ++j) {
      loss.push_back(added_loss(view, future, 10, left, j));
    }
    const auto j = std::min_element(loss.begin(), loss.end()) - loss.begin();
    order.push_back(left[static_cast<std::size_t>(j)]);
    left.erase(left.begin() + j);
  }
  const auto s = scores(*oracle, view);
  for (std::size_t k = 0; k < order.size(); ++k) {
    CHECK(s[static_cast<std::size_t>(order[k])] == static_cast<float>(k) - static_cast<float>(order.size()));
  }
  view.evict(*oracle);
  CHECK(kept(view) == left);
}
