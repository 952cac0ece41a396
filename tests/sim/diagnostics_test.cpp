// The diagnostics: the numbers of hand-made attention, and every one against the float64 reference on the engine's own
// evictions.
#include "sim/diagnostics.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <deque>

#include "policies/errors.hpp"
#include "tests/support/reference_compare.hpp"
#include "tests/support/reference_diagnostics.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

struct Run {
  std::deque<Method> methods;
  LayerResult result;
};

Run run(const Layer& layer, const std::vector<std::string>& texts, int budget, const std::string& metrics,
        int threads = 1, int block_steps = 64, const std::vector<std::vector<std::int32_t>>* evicted_at = nullptr) {
  Run r;
  std::vector<Job> jobs;
  for (const std::string& text : texts) {
    jobs.push_back({.method = &r.methods.emplace_back(parse_method(text)), .budget = budget, .evicted_at = evicted_at});
  }
  ReplayOptions options;
  options.metrics = MetricSet::parse(metrics);
  options.threads = threads;
  options.block_steps = block_steps;
  r.result = replay(layer, jobs, options);
  for (const CellResult& cell : r.result.cells) {
    REQUIRE(cell.error == "");
  }
  return r;
}

ToyLayer toy_layer(ToyKind kind = ToyKind::structured) {
  ToyOptions o;
  o.group_size = 2;
  o.n_tokens = 260;
  o.prompt_len = 21;
  o.kind = kind;
  return make_toy_layer(o);
}

// One head whose attention on the prompt at step i is rows[i]; tokens of the decode get next to none.
Layer made_layer(const MatD& rows) {
  const auto n = static_cast<int>(rows.cols()), n_steps = static_cast<int>(rows.rows());
  Layer layer;
  layer.n_model_layers = layer.n_heads = layer.n_kv_heads = layer.group_size = 1;
  layer.head_dim = layer.v_head_dim = n;
  layer.prompt_len = n;
  layer.n_tokens = n + n_steps;
  layer.first_query = n;
  layer.k = {MatF::Zero(n + n_steps, n)};
  layer.k[0].topRows(n).setIdentity();
  layer.v = {MatF::Ones(n + n_steps, n)};
  layer.q = {(rows.array().log() + 30).cast<float>()};
  return layer;
}

double at(const CellResult& cell, Metric metric, int row, int step) {
  const kvreplay::Series* s = cell.find(metric);
  REQUIRE(s != nullptr);
  return static_cast<double>(s->row(row)[static_cast<std::size_t>(step)]);
}

const std::vector<std::string> kTexts = {"streaming",
                                         "h2o",
                                         "tova",
                                         "tova:scope=query_head",
                                         "h2o:window=2,interval=5",
                                         "momentum",
                                         "snapkv:obs_window=4",
                                         "streaming:evict=before_attention+moments",
                                         "snapkv:obs_window=4,budget=10/momentum:alpha=0.9"};

}  // namespace

TEST_CASE("attention to come on a dropped token: .85 of 4") {
  MatD rows(5, 4);  // the first is that of the step itself
  rows << 0.25, 0.25, 0.25, 0.25, 0.5, 0.2, 0.1, 0.2, 0.4, 0.1, 0.4, 0.1, 0.6, 0.2, 0.1, 0.1, 0.25, 0.25, 0.25, 0.25;
  std::vector<std::vector<std::int32_t>> evicted(1, std::vector<std::int32_t>(9, 5));
  evicted[0][2] = 0;
  const Run r = run(made_layer(rows), {"given:evicted_at=made"}, 9, "future_missed_mass,evicted_mass", 1, 64, &evicted);
  CHECK(at(r.result.cells[0], Metric::future_missed_mass, 0, 0) == Approx(0.2125).epsilon(1e-6));
  CHECK(at(r.result.cells[0], Metric::evicted_mass, 0, 0) == Approx(0.25).epsilon(1e-6));
  // Only as many steps as the trace still has: .75 of 3, then .35 of 2, .25 of 1 and nothing.
  CHECK(at(r.result.cells[0], Metric::future_missed_mass, 0, 1) == Approx(0.25).epsilon(1e-6));
  CHECK(at(r.result.cells[0], Metric::future_missed_mass, 0, 2) == Approx(0.175).epsilon(1e-6));
  CHECK(at(r.result.cells[0], Metric::future_missed_mass, 0, 3) == Approx(0.25).epsilon(1e-6));
  CHECK(std::isnan(at(r.result.cells[0], Metric::future_missed_mass, 0, 4)));

  // The same behind four sinks that take half of the attention, and the token leaves one step later.
  MatD behind(5, 8);
  behind << MatD::Constant(5, 4, 0.125), rows / 2;
  evicted.assign(1, std::vector<std::int32_t>(13, 5));
  evicted[0][6] = 1;
  const Run s = run(made_layer(behind), {"given:evicted_at=made"}, 13, "future_missed_mass,future_missed_mass_no_sink",
                    1, 2, &evicted);
  const CellResult& cell = s.result.cells[0];
  CHECK(at(cell, Metric::future_missed_mass, 0, 0) == 0);
  CHECK(at(cell, Metric::future_missed_mass, 0, 1) == Approx(0.125).epsilon(1e-6));
  CHECK(at(cell, Metric::future_missed_mass_no_sink, 0, 1) == Approx(0.25).epsilon(1e-6));
}

TEST_CASE("importance that returns in a trace made for it") {
  // Two windows of the prompt: the first leads for five events, then the second, which overtakes it at event 9. One
  // window's worth of tokens is kept, so one of them is important.
  MatD rows(14 * 8, 16);
  for (Eigen::Index step = 0; step < rows.rows(); ++step) {
    const double first = step < 5 * 8 ? 0.88 : 0.1;
    rows.row(step) << Eigen::RowVectorXd::Constant(8, first / 8), Eigen::RowVectorXd::Constant(8, (1 - first) / 8);
  }
  const Run r = run(made_layer(rows), {"streaming:sink=14"}, 14, "diagnostics");
  const CellResult& cell = r.result.cells[0];
  REQUIRE(cell.find(Metric::resident)->row(0)[50] == 15);
  // Eligible are the second window (9 events without importance, then back) and the first two of the decode (never).
  CHECK(at(cell, Metric::importance_return, 0, 0) == Approx(1.0 / 3));
  CHECK(at(cell, Metric::lost_importance, 0, 0) == 0);  // the two of the decode had left, the second window had not
  CHECK(at(cell, Metric::importance_gain, 0, 0) == Approx(1.0 / 91));
  CHECK(at(cell, Metric::importance_loss, 0, 0) == Approx(1.0 / 13));
  CHECK(cell.find(Metric::lost_importance)->steps == std::vector<int>{14 * 8 - 1});

  // Dropped at the prompt's end, the second window is lost when it counts, and returns.
  std::vector<std::vector<std::int32_t>> evicted(1, std::vector<std::int32_t>(16 + 14 * 8, 0));
  std::fill(evicted[0].begin(), evicted[0].begin() + 8, 14 * 8);
  const Run lost = run(made_layer(rows), {"given:evicted_at=made"}, 16, "lost_importance", 1, 64, &evicted);
  CHECK(at(lost.result.cells[0], Metric::lost_importance, 0, 0) == Approx(1.0 / 3));
}

TEST_CASE("diagnostics are those of the reference") {
  const ToyLayer toy = toy_layer();
  const Layer layer = engine_layer(toy);
  const int n_steps = toy.n_steps();
  for (const int budget : {9, 40, 400}) {
    const Run r = run(layer, kTexts, budget, "all,diagnostics", 2, 16);
    for (std::size_t i = 0; i < kTexts.size(); ++i) {
      const CellResult& cell = r.result.cells[i];
      const Scope scope = r.methods[i].traits.scope;
      const bool own_prompts = r.methods[i].prefill_select.has_value();
      const Evicted recorded = recorded_evictions(cell);
      int n_lost = 0;
      for (int head = 0; head < toy.n_heads(); ++head) {
        INFO(kTexts[i] << " at budget " << budget << ", head " << head);
        const int set = own_prompts ? toy.kv_head(head) : set_of(toy, scope, head);
        const Gone gone = [&](int step, Pos pos) { return recorded(set, pos) <= step; };
        const MatD rows = attention_rows(toy, head);
        const auto resident = [&](int step) {
          int n = 0;
          for (Pos pos = 0; pos <= toy.options.prompt_len + step; ++pos) {
            n += gone(step, pos) ? 0 : 1;
          }
          return n;
        };
        const Eigen::VectorXd missed = reference_future_missed(rows, toy.options.prompt_len, kHorizon, 0, gone);
        const Eigen::VectorXd no_sink = reference_future_missed(rows, toy.options.prompt_len, kHorizon, 4, gone);
        double worst = 0;
        int n_first = 0;
        double off = 0;
        for (int step = 0; step < n_steps; ++step) {
          const double a = at(cell, Metric::future_missed_mass, head, step);
          const double b = at(cell, Metric::future_missed_mass_no_sink, head, step);
          CHECK(std::isnan(a) == (step == n_steps - 1));
          if (step < n_steps - 1) {
            worst = std::max({worst, std::abs(a - missed[step]), std::abs(b - no_sink[step])});
          }
          Eigen::VectorXd kept = rows.row(step).transpose();
          for (Pos pos = 0; pos <= toy.options.prompt_len + step; ++pos) {
            kept[pos] *= gone(step, pos) ? 0 : 1;
          }
          const std::vector<Pos> theirs = largest(rows.row(step).transpose(), 16), mine = largest(kept, 16);
          if (mine.empty()) {
            continue;
          }
          n_first += at(cell, Metric::top1_agreement, head, step) != (mine[0] == theirs[0] ? 1 : 0) ? 1 : 0;
          double both = 0;
          for (Pos pos : mine) {
            both += std::count(theirs.begin(), theirs.end(), pos) > 0 ? 1 : 0;
          }
          const double jaccard = both / (static_cast<double>(mine.size() + theirs.size()) - both);
          off = std::max(off, std::abs(at(cell, Metric::top16_jaccard, head, step) - jaccard));
        }
        CHECK(worst < kErrorTolerance);
        CHECK(n_first == 0);
        CHECK(off < 1e-6);

        const ReferenceImportance truth = reference_importance(rows, toy.options.prompt_len, gone, resident);
        const auto same = [&](Metric metric, int part, int whole) {
          const double got = at(cell, metric, head, 0);
          CHECK(std::isnan(got) == (whole == 0));
          if (whole > 0) {
            CHECK(got == Approx(static_cast<double>(part) / whole).epsilon(1e-6));
          }
        };
        same(Metric::importance_return, truth.returned, truth.eligible);
        same(Metric::lost_importance, truth.lost_returned, truth.lost);
        same(Metric::importance_gain, truth.changed[0], truth.from[0]);
        same(Metric::importance_loss, truth.changed[1], truth.from[1]);
        n_lost += truth.lost;
      }
      if (budget == 9 && kTexts[i] == "h2o") {
        CHECK(n_lost > 0);
      }
    }
  }
}

TEST_CASE("churn is the share of the kept tokens that a step lost") {
  const ToyLayer toy = toy_layer();
  const Layer layer = engine_layer(toy);
  const std::vector<std::string> texts = {"h2o", "h2o:window=2,interval=5", "streaming:evict=before_attention",
                                          "tova:scope=query_head", "full"};
  const Run r = run(layer, texts, 9, "churn", 2, 16);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const CellResult& cell = r.result.cells[i];
    const Evicted recorded = recorded_evictions(cell);
    const Scope scope = r.methods[i].traits.scope;
    double worst = 0;
    for (int kv = 0; kv < layer.n_kv_heads; ++kv) {
      for (int step = 1; step < toy.n_steps(); ++step) {
        double expected = 0;
        for (int g = 0; g < layer.group_size; ++g) {
          int both = 0, either = 0;
          for (Pos pos = 0; pos < toy.options.prompt_len + step; ++pos) {
            const int left = recorded(set_of(toy, scope, kv * layer.group_size + g), pos);
            const bool before = left > step - 1, now = left > step;
            both += before && now ? 1 : 0;
            either += before || now ? 1 : 0;
          }
          expected += (1 - static_cast<double>(both) / either) / layer.group_size;
        }
        worst = std::max(worst, std::abs(at(cell, Metric::churn, kv, step) - expected));
      }
      CHECK(std::isnan(at(cell, Metric::churn, kv, 0)));
    }
    INFO(texts[i]);
    CHECK(worst < 1e-6);
  }
}

TEST_CASE("per-step selection: agreement and churn are of what is attended, and nothing is missed") {
  const ToyLayer toy = toy_layer();
  const Layer layer = engine_layer(toy);
  const Method method = parse_method("full+quest:page=4");
  ReplayOptions options;
  options.metrics = MetricSet::parse("diagnostics");
  options.keep_attended = true;
  const Job job{.method = &method, .budget = 24};
  const CellResult cell = std::move(replay(layer, std::span(&job, 1), options).cells[0]);
  REQUIRE(cell.error == "");
  const auto n_bytes = (static_cast<std::size_t>(layer.n_tokens) + 7) / 8;
  const auto attended = [&](int head, int step, Pos pos) {
    const auto row = static_cast<std::size_t>(head) * static_cast<std::size_t>(toy.n_steps()) + std::size_t(step);
    return (cell.attended[row * n_bytes + static_cast<std::size_t>(pos / 8)] >> (pos % 8) & 1) != 0;
  };
  double off = 0, churn_off = 0, most = 0, mean = 0;
  for (int head = 0; head < toy.n_heads(); ++head) {
    const MatD rows = attention_rows(toy, head);
    for (int step = 0; step < toy.n_steps(); ++step) {
      Eigen::VectorXd kept = rows.row(step).transpose();
      for (Pos pos = 0; pos <= toy.options.prompt_len + step; ++pos) {
        kept[pos] *= attended(head, step, pos) ? 1 : 0;
      }
      const std::vector<Pos> theirs = largest(rows.row(step).transpose(), 16), mine = largest(kept, 16);
      double both = 0;
      for (Pos pos : mine) {
        both += std::count(theirs.begin(), theirs.end(), pos) > 0 ? 1 : 0;
      }
      const double jaccard = both / (static_cast<double>(mine.size() + theirs.size()) - both);
      off = std::max(off, std::abs(at(cell, Metric::top16_jaccard, head, step) - jaccard));
      mean += jaccard / (toy.n_heads() * toy.n_steps());
      if (step + 1 < toy.n_steps()) {
        most = std::max(most, at(cell, Metric::future_missed_mass, head, step));
      }
    }
  }
  for (int kv = 0; kv < layer.n_kv_heads; ++kv) {
    for (int step = 1; step < toy.n_steps(); ++step) {
      double expected = 0;
      for (int g = 0; g < layer.group_size; ++g) {
        const int head = kv * layer.group_size + g;
        int both = 0, either = 0;
        for (Pos pos = 0; pos < toy.options.prompt_len + step; ++pos) {
          both += attended(head, step - 1, pos) && attended(head, step, pos) ? 1 : 0;
          either += attended(head, step - 1, pos) || attended(head, step, pos) ? 1 : 0;
        }
        expected += (1 - static_cast<double>(both) / either) / layer.group_size;
      }
      churn_off = std::max(churn_off, std::abs(at(cell, Metric::churn, kv, step) - expected));
    }
  }
  CHECK(off < 1e-6);
  CHECK(churn_off < 1e-6);
  CHECK(most == 0);
  CHECK(mean > 0.2);
  CHECK(mean < 0.999);
  CHECK(std::isnan(at(cell, Metric::lost_importance, 0, 0)));  // the whole cache holds every window
}

TEST_CASE("a rewritten slot agrees as far as its new key lets it") {
  const ToyLayer toy = toy_layer();
  const Run r =
      run(engine_layer(toy), {"full", "full+kivi:bits=8,residual=4,group=4", "full+kivi:bits=2,residual=4,group=4"},
          400, "top1_agreement,top16_jaccard");
  double mean[3] = {0, 0, 0};
  for (std::size_t i = 0; i < 3; ++i) {
    for (float x : r.result.cells[i].find(Metric::top16_jaccard)->values) {
      mean[i] += static_cast<double>(x) / (toy.n_heads() * toy.n_steps());
    }
  }
  CHECK(mean[0] == Approx(1).epsilon(1e-9));
  CHECK(mean[1] > 0.9);
  CHECK(mean[1] < 1);
  CHECK(mean[2] < mean[1]);
}

TEST_CASE("spans lose the mass of their evicted tokens") {
  const ToyLayer toy = toy_layer();
  Layer layer = engine_layer(toy);
  const Pos mid = 40;
  layer.spans = {{"first", 0, mid}, {"rest", mid, layer.n_tokens}};
  for (const std::string text : {"h2o", "tova:scope=query_head", "momentum", "full+quest:page=4"}) {
    INFO(text);
    const Run r = run(layer, {text}, 16, "evicted_mass,lost_mass", 1, 16);
    const NamedSeries found = engine_series(r.result.cells[0]);
    const MatD &first = found.at("lost_mass.first"), &rest = found.at("lost_mass.rest");
    CHECK((first + rest - found.at("evicted_mass")).cwiseAbs().maxCoeff() < 1e-6);  // the two spans are all there is
    CHECK(first.minCoeff() >= 0);
    CHECK(first.maxCoeff() > 0.01);
    if (text == "full+quest:page=4") {
      continue;
    }
    const Evicted recorded = recorded_evictions(r.result.cells[0]);
    const MatD rows = attention_rows(toy, 1);
    const int set = set_of(toy, r.methods[0].traits.scope, 1);
    for (int step = 0; step < toy.n_steps(); ++step) {
      double lost = 0;
      for (Pos pos = 0; pos < mid; ++pos) {
        lost += recorded(set, pos) <= step ? rows(step, pos) : 0;
      }
      CHECK(first(1, step) == Approx(lost).margin(kErrorTolerance));
    }
  }
}

TEST_CASE("diagnostics are the same for any threads and blocks, and leave other numbers alone") {
  const Layer layer = engine_layer(toy_layer());
  const std::vector<std::string> texts = {"h2o", "tova:scope=query_head", "full+quest:page=4", "momentum"};
  const Run blocks = run(layer, texts, 17, "all,diagnostics", 2, 64), one = run(layer, texts, 17, "all,diagnostics"),
            plain = run(layer, texts, 17, "all");
  for (std::size_t i = 0; i < texts.size(); ++i) {
    INFO(texts[i]);
    CHECK(first_bit_difference(blocks.result.cells[i], one.result.cells[i]).empty());
    for (const kvreplay::Series& s : plain.result.cells[i].series) {
      CHECK_FALSE(info(s.metric).diagnostic);
      const kvreplay::Series* other = blocks.result.cells[i].find(s.metric, s.compensator);
      CHECK(std::equal(s.values.begin(), s.values.end(), other->values.begin(),
                       [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }));
    }
    for (const int block_steps : {1, 7}) {
      const Run other = run(layer, texts, 17, "diagnostics", 1, block_steps);
      NamedSeries truth = engine_series(blocks.result.cells[i]);
      for (const auto& [name, values] : engine_series(other.result.cells[i])) {
        INFO(name << " in blocks of " << block_steps);
        CHECK((values.array().isNaN() == truth.at(name).array().isNaN()).all());
        CHECK((values.array().isNaN()).select(0, values - truth.at(name)).cwiseAbs().maxCoeff() < 1e-5);
      }
    }
  }
}

TEST_CASE("huge logits and equal keys break no diagnostic") {
  for (const ToyKind kind : {ToyKind::huge_logits, ToyKind::equal_keys, ToyKind::sharp}) {
    const Run r = run(engine_layer(toy_layer(kind)), {"streaming", "h2o", "tova:scope=query_head"}, 7, "diagnostics");
    for (const CellResult& cell : r.result.cells) {
      for (const kvreplay::Series& s : cell.series) {
        if (info(s.metric).diagnostic) {
          for (float x : s.values) {
            CHECK((std::isnan(x) || (x >= 0 && x <= 1 + 1e-6F)));
          }
        }
      }
    }
  }
}

TEST_CASE("diagnostics are asked for") {
  CHECK_FALSE(MetricSet::parse("all").has(Metric::future_missed_mass));
  CHECK(MetricSet::parse("all") == MetricSet::all());
  CHECK(MetricSet::parse("all,churn").has(Metric::churn));
  CHECK(MetricSet::parse("all,churn").has(Metric::error));
  CHECK_FALSE(MetricSet::parse("diagnostics").has(Metric::error));
  CHECK(MetricSet::parse("diagnostics").has(Metric::lost_importance));
  CHECK_THROWS_AS(MetricSet::parse("all,chrun"), ConfigError);
}
