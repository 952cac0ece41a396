// Damage, regret and misses of every token against a slow reference in float64, written from the definitions.
#include "analysis/attribution.hpp"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <numeric>

#include "tests/support/reference_compare.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

struct Case {
  std::string method;
  Scope scope = Scope::kv_head;  // of the recorded evictions
  ToyOptions toy;
  int budget = 8;
};

ToyOptions toy(int group_size, Pos prompt_len = 20, ToyKind kind = ToyKind::structured) {
  ToyOptions o;
  o.group_size = group_size;
  o.n_tokens = 90;
  o.prompt_len = prompt_len;
  o.v_head_dim = 12;
  o.kind = kind;
  return o;
}

struct Replayed {
  ToyLayer toy;
  Layer layer;
  CellResult cell;
};

Replayed replayed(const Case& c) {
  Replayed r{make_toy_layer(c.toy), {}, {}};
  r.layer = engine_layer(r.toy);
  const Method method = parse_method(c.method);
  const Job job{.method = &method, .budget = c.budget};
  ReplayOptions options;
  options.metrics = MetricSet::parse("error,evicted_mass,error_parallel");  // with f_E, so in double as explain asks
  options.keep_attended = true;
  r.cell = replay(r.layer, std::span(&job, 1), options).cells.at(0);
  REQUIRE(r.cell.error.empty());
  return r;
}

// Sums over the lane's heads, by token.
struct Slow {
  std::vector<double> damage, damage_size, regret;  // damage_size: of the magnitudes, what rounding is relative to
  std::vector<int> missed, first_missed;
  std::vector<double> step_damage_sum;  // (n_steps)
};

Slow slow_attribution(const Replayed& r, Scope scope, int kv_head, int first_head, int n_heads) {
  const ToyLayer& toy = r.toy;
  const auto n_tokens = std::size_t(toy.options.n_tokens), n_steps = std::size_t(toy.n_steps());
  const MatD& v = toy.v[std::size_t(kv_head)];
  const Attends by_eviction = attends_from(toy, scope, recorded_evictions(r.cell));
  const auto attends = [&](int head, int step, Pos pos) {
    if (r.cell.attended.empty()) {
      return by_eviction(head, step, pos);
    }
    const std::size_t bytes = (n_tokens + 7) / 8;
    const std::uint8_t byte =
        r.cell.attended[(std::size_t(head) * n_steps + std::size_t(step)) * bytes + std::size_t(pos / 8)];
    return ((byte >> (pos % 8)) & 1) == 1;
  };
  Slow slow;
  slow.damage.assign(n_tokens, 0);
  slow.damage_size = slow.regret = slow.damage;
  slow.missed.assign(n_tokens, 0);
  slow.first_missed.assign(n_tokens, -1);
  slow.step_damage_sum.assign(n_steps, 0);
  for (int step = 0; step < toy.n_steps(); ++step) {
    const Pos now = toy.options.prompt_len + step;
    Eigen::VectorXd mean = Eigen::VectorXd::Zero(now + 1);
    std::vector<bool> lane_gone(std::size_t(now) + 1, true);
    for (int h = first_head; h < first_head + n_heads; ++h) {
      const int head = kv_head * toy.options.group_size + h;
      const Eigen::VectorXd logits = logits_at(toy, head, now);
      std::vector<bool> all(std::size_t(now) + 1, true), kept(all.size());
      for (Pos p = 0; p <= now; ++p) {
        kept[std::size_t(p)] = attends(head, step, p);
        lane_gone[std::size_t(p)] = lane_gone[std::size_t(p)] && !kept[std::size_t(p)];
      }
      const Softmax full = softmax_over(logits, v, all), retained = softmax_over(logits, v, kept);
      mean += full.weight / n_heads;
      const Eigen::VectorXd difference = full.output - retained.output;
      const bool usable = retained.log_mass >= logits.maxCoeff() + kLeastLogMass;
      for (Pos p = 0; p <= now; ++p) {
        if (kept[std::size_t(p)]) {
          continue;
        }
        slow.regret[std::size_t(p)] += full.weight[p];
        if (usable && difference.norm() > 0) {
          const double d = full.weight[p] * (v.row(p).transpose() - retained.output).dot(difference) /
                           (difference.norm() * full.output.norm());
          slow.damage[std::size_t(p)] += d;
          slow.damage_size[std::size_t(p)] += std::abs(d);
          slow.step_damage_sum[std::size_t(step)] += d;
        }
      }
    }
    std::vector<Pos> order(std::size_t(now) + 1);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](Pos a, Pos b) { return mean[a] != mean[b] ? mean[a] > mean[b] : a > b; });
    const auto n_kept = std::count(lane_gone.begin(), lane_gone.end(), false);
    for (std::ptrdiff_t i = 0; i < n_kept; ++i) {
      const auto p = std::size_t(order[std::size_t(i)]);
      if (lane_gone[p] && mean[order[std::size_t(i)]] > 1e-37) {
        ++slow.missed[p];
        slow.first_missed[p] = slow.first_missed[p] < 0 ? step : slow.first_missed[p];
      }
    }
  }
  return slow;
}

void check(const Case& c, bool check_missed = true) {
  INFO(c.method << ", group " << c.toy.group_size << ", prompt " << c.toy.prompt_len);
  const Replayed r = replayed(c);
  const std::vector<LaneAttribution> lanes = attribute(r.layer, r.cell, 2);
  const bool per_head = c.scope == Scope::query_head && c.toy.group_size > 1;
  REQUIRE(lanes.size() == std::size_t(per_head ? r.layer.n_heads : r.layer.n_kv_heads));
  for (std::size_t l = 0; l < lanes.size(); ++l) {
    const LaneAttribution& lane = lanes[l];
    const int kv_head = per_head ? int(l) / c.toy.group_size : int(l);
    const int first_head = per_head ? int(l) % c.toy.group_size : 0, n_heads = per_head ? 1 : c.toy.group_size;
    REQUIRE(lane.kv_head == kv_head);
    REQUIRE(lane.q_head == (per_head ? int(l) : -1));
    const Slow slow = slow_attribution(r, c.scope, kv_head, first_head, n_heads);
    int n_wrong = 0;
    for (std::size_t t = 0; t < slow.damage.size(); ++t) {
      n_wrong += std::abs(lane.damage[t] - slow.damage[t]) > 2e-5 * slow.damage_size[t] + 1e-12;
      n_wrong += std::abs(lane.regret[t] - slow.regret[t]) > 1e-5 * slow.regret[t] + 1e-12;
      n_wrong += check_missed && (lane.missed[t] != slow.missed[t] || lane.first_missed[t] != slow.first_missed[t]);
    }
    CHECK(n_wrong == 0);
    // The engine's own series: damages add up to `error`, regrets to `evicted_mass`.
    double error = 0, mass = 0;
    for (int h = 0; h < n_heads; ++h) {
      const int head = kv_head * c.toy.group_size + first_head + h;
      for (float x : r.cell.find(Metric::error)->row(head)) {
        error += std::isnan(x) ? 0 : double(x);
      }
      for (float x : r.cell.find(Metric::evicted_mass)->row(head)) {
        mass += double(x);
      }
    }
    CHECK(std::accumulate(lane.damage.begin(), lane.damage.end(), 0.0) == Approx(error).epsilon(1e-5).margin(1e-9));
    CHECK(std::accumulate(lane.regret.begin(), lane.regret.end(), 0.0) == Approx(mass).epsilon(1e-5).margin(1e-9));
    CHECK(std::accumulate(lane.step_missed.begin(), lane.step_missed.end(), 0) ==
          std::accumulate(lane.missed.begin(), lane.missed.end(), 0));
  }
}

}  // namespace

TEST_CASE("damages of a step add up to its error, regrets to its evicted mass, token by token as in float64") {
  for (const int group_size : {1, 3}) {
    for (const Pos prompt_len : {Pos{20}, Pos{1}}) {
      check({.method = "h2o", .toy = toy(group_size, prompt_len)});
      check({.method = "h2o:scope=query_head", .scope = Scope::query_head, .toy = toy(group_size, prompt_len)});
      check({.method = "tova", .scope = Scope::layer, .toy = toy(group_size, prompt_len)});
      check({.method = "momentum", .scope = Scope::layer, .toy = toy(group_size, prompt_len)});
      check({.method = "momentkv", .toy = toy(group_size, prompt_len)});
      check({.method = "streaming:evict=before_attention", .toy = toy(group_size, prompt_len), .budget = 1});
      check({.method = "full+quest:page=4", .toy = toy(group_size, prompt_len), .budget = 16});
      check({.method = "full+topk:per=query_head", .toy = toy(group_size, prompt_len)});
      check({.method = "h2o+kivi:residual=4,group=4", .toy = toy(group_size, prompt_len)});
    }
    check({.method = "h2o:window=2,budget=6/momentum", .scope = Scope::kv_head, .toy = toy(group_size)});
  }
}

TEST_CASE("steps that error leaves out have no damage, but what was missed counts") {
  check({.method = "h2o", .toy = toy(2, 20, ToyKind::huge_logits), .budget = 3}, false);
  check({.method = "h2o", .toy = toy(2, 20, ToyKind::sharp), .budget = 3}, false);
  check({.method = "h2o", .toy = toy(2, 20, ToyKind::small_evicted)});
}

TEST_CASE("a soft-capped layer is attributed by its capped logits") {
  ToyOptions o = toy(2);
  o.softcap = 3;
  check({.method = "h2o", .toy = o});
}

TEST_CASE("nothing missing, nothing blamed") {
  for (const char* method : {"full", "full+kivi:residual=4,group=4"}) {
    const Replayed r = replayed({.method = method, .toy = toy(2)});
    for (const LaneAttribution& lane : attribute(r.layer, r.cell, 1)) {
      CHECK(std::all_of(lane.damage.begin(), lane.damage.end(), [](double x) { return x == 0; }));
      CHECK(std::all_of(lane.regret.begin(), lane.regret.end(), [](double x) { return x == 0; }));
      CHECK(std::all_of(lane.missed.begin(), lane.missed.end(), [](int x) { return x == 0; }));
      CHECK(std::all_of(lane.culprit.begin(), lane.culprit.end(), [](int x) { return x == -1; }));
    }
  }
}

TEST_CASE("culprits and worst steps are the largest damages of a step and of a token") {
  const Replayed r = replayed({.method = "h2o", .toy = toy(3)});
  for (const LaneAttribution& lane : attribute(r.layer, r.cell, 1)) {
    double worst_of_tokens = 0, worst_of_steps = 0;
    for (std::size_t t = 0; t < lane.damage.size(); ++t) {
      CHECK((lane.worst_step[t] >= 0) == (lane.worst_damage[t] > 0));
      worst_of_tokens = std::max(worst_of_tokens, lane.worst_damage[t]);
      const int at = lane.worst_step[t];
      if (at < 0) {
        continue;
      }
      // The step's list has the token, unless five others did more there.
      const auto first = lane.culprit.begin() + at * kCulprits;
      const bool listed = std::find(first, first + kCulprits, int(t)) != first + kCulprits;
      CHECK((listed || lane.culprit_damage[std::size_t(at * kCulprits + kCulprits - 1)] >= lane.worst_damage[t]));
    }
    for (std::size_t s = 0; s < lane.step_missed.size(); ++s) {
      const auto first = lane.culprit_damage.begin() + std::ptrdiff_t(s) * kCulprits;
      CHECK(std::is_sorted(first, first + kCulprits, std::greater<>()));
      worst_of_steps = std::max(worst_of_steps, *first);
    }
    CHECK(worst_of_tokens == worst_of_steps);
    CHECK(worst_of_tokens > 0);
  }
}

TEST_CASE("the number of threads changes no bit") {
  const Replayed r = replayed({.method = "h2o", .toy = toy(3)});
  const auto one = attribute(r.layer, r.cell, 1), two = attribute(r.layer, r.cell, 2);
  for (std::size_t l = 0; l < one.size(); ++l) {
    CHECK(one[l].damage == two[l].damage);
    CHECK(one[l].culprit == two[l].culprit);
  }
}
