// Every method against the float64 reference: selection on the engine's own states, and every
// metric on its own sets.
#include "tests/support/matrix.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <memory>

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

// The methods with their papers' settings.
std::vector<Case> defaults() {
  const Traits per_head = traits(Scope::kv_head);
  Traits grow = per_head;
  grow.decode = Decode::grow;
  const Traits before = traits(Scope::kv_head, Pool::all, Order::before_attention);
  Residual alone, forgetful, bare;
  alone.re_rank = false;
  alone.window_prefill = 4;
  forgetful.accumulate_prefill = false;
  forgetful.window_prefill = forgetful.window_decode = 2;
  bare.sink = bare.window_decode = 0;
  bare.window_prefill = 1;
  Residual averaged;
  averaged.window_prefill = 4;
  averaged.window_decode = 2;
  averaged.ewma = 0.8;
  return {
      {"full", reference_full(), per_head, false},
      {"streaming", reference_streaming(), per_head},
      {"h2o", reference_h2o(), per_head},
      {"h2o:mass=mean", reference_h2o({0.5, true}, true), per_head},
      {"tova", reference_tova(), traits(Scope::layer)},
      {"snapkv", reference_snapkv({64, 5, false, false}), grow},
      {"snapkv:obs_window=4", reference_snapkv({4, 5, false, false}), grow, true, 4},
      {"snapkv:obs_window=3,pooling=max,kernel=7,group=max", reference_snapkv({3, 7, true, true}),
       [&] {
         Traits t = grow;
         t.group = Reduce::max;
         return t;
       }(),
       true, 3},
      {"snapkv:obs_window=4,decode=evict", reference_snapkv({4, 5, false, false}), per_head, true, 4},
      {"knorm", reference_knorm(), per_head},
      {"keydiff", reference_keydiff(), per_head},
      {"momentum", reference_momentum(), traits(Scope::layer, Pool::decode)},
      {"residual", reference_residual(), before},
      {"residual:obs_window=4,rerank=0", reference_residual(alone), before, true, 4},
      {"residual:obs_window=2,window=2,accumulate_prefill=false", reference_residual(forgetful), before, true, 3},
      {"residual:sink=0,window=0,obs_window=1", reference_residual(bare), before},
      {"residual:window=2,obs_window=4,ewma=0.8", reference_residual(averaged), before, true, 4},
      {"oracle_mass", reference_oracle_mass(), per_head},
  };
}

// The engine's keys, each away from its default at least once.
std::vector<Case> variations() {
  std::vector<Case> out;
  const auto add = [&](const std::string& text, const MakeSelector& select, Traits t, auto... change) {
    (change(t), ...);
    out.push_back({text, select, t});
  };
  const Traits per_head = traits(Scope::kv_head), per_layer = traits(Scope::layer);
  const auto query_head = [](Traits& t) { t.scope = Scope::query_head; };
  const auto layer = [](Traits& t) { t.scope = Scope::layer; };
  const auto decode_pool = [](Traits& t) { t.pool = Pool::decode; };
  const auto before = [](Traits& t) { t.evict = Order::before_attention; };
  const auto grow = [](Traits& t) { t.decode = Decode::grow; };
  const auto max = [](Traits& t) { t.group = Reduce::max; };
  const auto sum = [](Traits& t) { t.group = Reduce::sum; };
  const auto every5 = [](Traits& t) { t.interval = 5; };
  add("streaming:sink=2,evict=before_attention", reference_streaming(2), per_head, before);
  add("streaming:pool=decode", reference_streaming(), per_head, decode_pool);
  add("h2o:scope=query_head", reference_h2o(), per_head, query_head);
  add("h2o:scope=layer,window=3", reference_h2o({3, false}), per_head, layer);
  add("h2o:pool=decode,interval=5", reference_h2o(), per_head, decode_pool, every5);
  add("h2o:decode=grow,sink=1", reference_h2o({0.5, true}, false, 1), per_head, grow);
  add("h2o:window=0,evict=before_attention", reference_h2o({0, false}), per_head, before);
  add("tova:group=max,scope=kv_head", reference_tova(), per_head, max);
  add("tova:group=sum,interval=5", reference_tova(), per_layer, sum, every5);
  add("tova:scope=query_head,pool=decode", reference_tova(), per_layer, query_head, decode_pool);
  add("tova:pin_newest=1", reference_tova(1), per_layer);
  add("momentum:alpha=0.5,scope=kv_head,evict=before_attention", reference_momentum(0.5), per_head, decode_pool,
      before);
  add("knorm:interval=5", reference_knorm(), per_head, every5);
  add("keydiff:pool=decode", reference_keydiff(), per_head, decode_pool);
  add("residual:scope=query_head,window=0", reference_residual({1, 32, 0, true, 0, true}), per_head, query_head,
      before);
  add("residual:evict=after_attention,interval=5,group=max", reference_residual(), per_head, every5, max);
  add("oracle_mass:scope=layer", reference_oracle_mass(), per_head, layer);
  add("momentum:alpha=1,scope=query_head,group=max", reference_momentum(1), per_head, query_head, decode_pool, max);
  return out;
}

}  // namespace

TEST_CASE("every method selects and measures as the reference does") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  check_layer(options(group_size, prompt_len, element), defaults(), {1, 9, 72});
}

TEST_CASE("every engine key does what the reference does") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  check_layer(options(group_size, prompt_len, Element::f32), variations(), {1, 9, 72});
}

TEST_CASE("the greedy oracle evicts what the reference's search would") {
  ToyOptions o = options(GENERATE(1, 2), 14, Element::f32);
  o.n_tokens = 30;
  Traits query_head = traits(Scope::query_head);
  check_layer(
      o,
      {{"oracle_greedy:horizon=4", reference_oracle_greedy(4), traits(Scope::kv_head)},
       {"oracle_greedy", reference_oracle_greedy(64), traits(Scope::kv_head)},
       {"oracle_greedy:horizon=3,scope=query_head", reference_oracle_greedy(3), query_head},
       {"oracle_greedy:horizon=3,pool=decode", reference_oracle_greedy(3), traits(Scope::kv_head, Pool::decode)}},
      {1, 6, 30});
}

TEST_CASE("readers attend what the reference chooses, and everything else is evicted mass") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 48);
  const ToyOptions o = options(group_size, prompt_len, Element::f32);
  const ToyLayer toy = make_toy_layer(o);
  struct ReaderCase {
    std::string text;
    std::function<std::vector<bool>(int q_head, Pos now, int budget)> choose;
  };
  const std::vector<ReaderCase> cases = {
      {"full+topk", [&](int h, Pos now, int b) { return reference_topk(toy, h, now, b, true); }},
      {"full+topk:per=query_head", [&](int h, Pos now, int b) { return reference_topk(toy, h, now, b, false); }},
      {"full+quest:page=4,min_pages=2",
       [&](int h, Pos now, int b) { return reference_quest(toy, h, now, 4, std::max(2, b / 4)); }}};
  const Layer layer = engine_layer(toy);
  for (const ReaderCase& c : cases) {
    for (const int budget : {1, 10, 72}) {
      INFO(c.text << " at budget " << budget << ": " << describe(o));
      const Method method = parse_method(c.text);
      Job job;
      job.method = &method;
      job.budget = budget;
      ReplayOptions replay_options;
      replay_options.block_steps = 16;
      const LayerResult result = replay(layer, std::span(&job, 1), replay_options);
      const CellResult& cell = result.cells[0];
      CHECK(cell.error == "");
      if (!cell.error.empty()) {
        continue;
      }
      MetricsRequest metrics;
      metrics.attends = [&](int q_head, int step, Pos pos) -> bool {
        const std::vector<bool> chosen = c.choose(q_head, o.prompt_len + step, budget);
        return chosen[static_cast<std::size_t>(pos)];
      };
      const NamedSeries found = engine_series(cell);
      for (const std::string& difference : differences(reference_metrics(toy, metrics), found)) {
        FAIL_CHECK(difference);
      }
      for (int step = 0; step < toy.n_steps(); ++step) {
        CHECK(found.at("resident")(0, step) == o.prompt_len + step + 1);
      }
    }
  }
}

TEST_CASE("kivi returns what the reference's quantised cache returns, and evicts nothing") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  const ToyOptions o = options(group_size, prompt_len, element);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  for (const Kivi& kivi : {Kivi{2, 8, 16}, Kivi{4, 4, 24}, Kivi{2, 32, 128}}) {
    const std::string text = "full+kivi:bits=" + std::to_string(kivi.bits) + ",group=" + std::to_string(kivi.group) +
                             ",residual=" + std::to_string(kivi.residual);
    INFO(text << ": " << describe(o));
    const Method method = parse_method(text);
    Job job;
    job.method = &method;
    job.budget = 1;
    ReplayOptions replay_options;
    replay_options.block_steps = 16;
    const LayerResult result = replay(layer, std::span(&job, 1), replay_options);
    CHECK(result.cells[0].error == "");
    if (!result.cells[0].error.empty()) {
      continue;
    }
    MetricsRequest metrics;
    metrics.attends = [](int, int, Pos) { return true; };
    metrics.rewritten = [&](int q_head, int step) { return reference_kivi(toy, kivi, q_head, step); };
    const NamedSeries truth = reference_metrics(toy, metrics), found = engine_series(result.cells[0]);
    for (const std::string& difference : differences(truth, found)) {
      FAIL_CHECK(difference);
    }
    CHECK(found.at("error").isZero(0));
    if (kivi.residual == 16) {
      CHECK(truth.at("error_output").maxCoeff() > 0.01);
    }
  }
}

TEST_CASE("an allocator moves budgets between heads, and each head selects within its own") {
  const ToyOptions o = options(3, 48, Element::f32);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  const std::vector<Case> cases = {
      {"h2o+adakv", reference_h2o(), traits(Scope::kv_head)},
      {"h2o:window=2+adakv:safeguard=official", reference_h2o({2, false}), traits(Scope::kv_head)},
      {"residual:obs_window=4+adakv", reference_residual({1, 4, 8, true, 0, true}),
       traits(Scope::kv_head, Pool::all, Order::before_attention)}};
  for (const Case& c : cases) {
    INFO(c.text);
    const Method method = parse_method(c.text);
    Job job;
    job.method = &method;
    job.budget = 12;
    const LayerResult result = replay(layer, std::span(&job, 1), {});
    CHECK(result.cells[0].error == "");
    if (!result.cells[0].error.empty()) {
      continue;
    }
    const Evicted recorded = recorded_evictions(result.cells[0]);
    SelectionRequest selection = request_of(c, job.budget);
    int total = 0;
    const MatD resident = reference_resident(toy, c.traits.scope, recorded);
    const int in_flight = c.traits.evict == Order::after_attention ? 1 : 0;
    for (Eigen::Index set = 0; set < recorded.rows(); ++set) {
      selection.budgets.push_back(static_cast<int>(resident(set, 0)) - in_flight);
      total += selection.budgets.back();
      CHECK(resident.row(set).isConstant(resident(set, 0)));
    }
    CHECK(total == 12 * recorded.rows());
    CHECK(check_selection(toy, selection, recorded).excess <= kScoreTolerance);
  }
}

TEST_CASE("one selector cuts the prompt, a second owns the decode tokens") {
  const ToyOptions o = options(3, 30, Element::f32);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  const Method method = parse_method("h2o:budget=10/momentum:alpha=0.9,scope=kv_head");
  Job job;
  job.method = &method;
  job.budget = 7;
  const LayerResult result = replay(layer, std::span(&job, 1), {});
  const CellResult& cell = result.cells[0];
  REQUIRE(cell.error == "");
  SelectionRequest selection;
  selection.select = reference_momentum(0.9);
  selection.traits = traits(Scope::kv_head, Pool::decode);
  selection.budget = 7;
  selection.prefill_select = reference_h2o();
  selection.prefill_budget = 10;
  const Evicted recorded = recorded_evictions(cell);
  CHECK(check_selection(toy, selection, recorded).excess <= kScoreTolerance);
  const SelectionResult own = reference_selection(toy, selection);
  REQUIRE(own.margin > 1e-4);
  CHECK(own.evicted_at == recorded);
  MetricsRequest metrics;
  metrics.attends = attends_from(toy, Scope::kv_head, recorded);
  for (const std::string& d : differences(reference_metrics(toy, metrics), engine_series(cell))) {
    FAIL_CHECK(d);
  }
}

TEST_CASE("recorded evictions are replayed as they are") {
  const ToyOptions o = options(3, 12, Element::f32);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  SelectionRequest selection;
  selection.select = reference_h2o();
  selection.budget = 9;
  const Evicted at = reference_selection(toy, selection).evicted_at;
  std::vector<std::vector<std::int32_t>> recorded;
  for (Eigen::Index set = 0; set < at.rows(); ++set) {
    recorded.emplace_back(at.row(set).begin(), at.row(set).end());
  }
  const Method method = parse_method("given:evicted_at=anywhere");
  Job job;
  job.method = &method;
  job.budget = 9;
  job.evicted_at = &recorded;
  const LayerResult result = replay(layer, std::span(&job, 1), {});
  CHECK(result.cells[0].error == "");
  if (result.cells[0].error.empty()) {
    CHECK(recorded_evictions(result.cells[0]) == at);
    MetricsRequest metrics;
    metrics.attends = attends_from(toy, Scope::kv_head, at);
    for (const std::string& d : differences(reference_metrics(toy, metrics), engine_series(result.cells[0]))) {
      FAIL_CHECK(d);
    }
  }
}
