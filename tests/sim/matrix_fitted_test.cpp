// Caches fitted at the prompt's cut, and their selectors, in the engine against float64.
#include <catch2/catch.hpp>
#include <cmath>

#include "policies/counter_rng.hpp"
#include "tests/support/matrix.hpp"
#include "tests/support/reference_fitted.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

struct FittedCase {
  std::string text;
  std::function<Fit(int budget)> fit;
};

std::vector<FittedCase> cases() {
  std::vector<FittedCase> all;
  const auto add = [&](const std::string& text, const auto& fit) { all.push_back({text, [fit](int) { return fit; }}); };
  // The product's key step may stop early; here it may not.
  add("h2o+grkv:iterations=3000", reference_grkv({}));
  add("h2o+grkv:keys=false,window=2,top=0,ridge=0.1", reference_grkv({32, 1, 4, 2, 0.1, 0, true, false}));
  add("h2o:scope=query_head+grkv:iterations=3000,queries=4,sink=0,window=4,rounds=2",
      reference_grkv({4, 2, 0, 4, 0.01, 0.1, true, true}));
  add("tova+grkv:iterations=3000,queries=5,values=false,window=1,ridge=0.1",
      reference_grkv({5, 1, 4, 1, 0.1, 0.1, false, true}));
  add("match_keys+matching:ridge=0.001", reference_matching({256, 2, true, true, -3, 3, 0.001}));
  add("match_keys:choice=omp,queries=8+matching:queries=20,least=-27,most=7,steps=0,values=false",
      reference_matching({20, 0, true, false, -27, 7, 0}));
  add("h2o+matching:bias=false,ridge=0.01", reference_matching({256, 2, false, true, -3, 3, 0.01}));
  return all;
}

// Every metric of one text at one budget, with what the reference's fitted cache returns.
void check_fitted(const ToyLayer& toy, const std::string& text, int budget, const Fit& fit) {
  const ToyOptions& o = toy.options;
  const Layer layer = engine_layer(toy);
  const Method method = parse_method(text);
  Job job;
  job.method = &method;
  job.budget = budget;
  ReplayOptions replay_options;
  replay_options.block_steps = 16;
  const CellResult cell = replay(layer, std::span(&job, 1), replay_options).cells[0];
  INFO(text << " at budget " << budget << ": " << describe(o));
  REQUIRE(cell.error == "");
  const Evicted recorded = recorded_evictions(cell);
  MetricsRequest metrics;
  const Scope scope = method.traits.scope;
  metrics.attends = attends_from(toy, scope, recorded);
  metrics.rewritten = fitted_output(toy, scope, recorded, fit);
  for (const std::string& difference : differences(reference_metrics(toy, metrics), engine_series(cell))) {
    FAIL_CHECK(difference);
  }
}

}  // namespace

TEST_CASE("fitted caches return what the reference's fit returns") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  const ToyLayer toy = make_toy_layer(options(group_size, prompt_len, element));
  for (const FittedCase& c : cases()) {
    for (const int budget : {1, 9, 72}) {
      check_fitted(toy, c.text, budget, c.fit(budget));
    }
  }
}

TEST_CASE("the keys of Attention Matching are the reference's") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Traits grow = traits(Scope::kv_head, Pool::all, Order::after_attention, Decode::grow);
  const Traits per_layer = traits(Scope::layer, Pool::all, Order::after_attention, Decode::grow);
  check_layer(
      options(group_size, prompt_len, Element::f32),
      {{"match_keys", reference_match_keys(false, MatchOver::rms, 256), grow},
       {"match_keys:over=mean,queries=5", reference_match_keys(false, MatchOver::mean, 5), grow},
       {"match_keys:over=max", reference_match_keys(false, MatchOver::max, 256), grow},
       {"match_keys:choice=omp,queries=8", reference_match_keys(true, MatchOver::rms, 8), grow},
       {"match_keys:choice=omp,queries=4,scope=layer", reference_match_keys(true, MatchOver::rms, 4), per_layer}},
      {1, 9, 72}, false);
}

TEST_CASE("sampled tokens are those that the chances say, and weigh one over them") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::bf16);
  const ToyLayer toy = make_toy_layer(options(group_size, prompt_len, element));
  const Layer layer = engine_layer(toy);
  const ReferenceSampling settings{2, 3, 8};
  const std::string text = "sample:sink=2,window=3,obs_window=8+inverse_chance:sink=2,window=3,obs_window=8";
  for (const int budget : {1, 9, 72}) {
    check_fitted(toy, text, budget, reference_inverse_chance(budget, settings));
    const Method method = parse_method(text);
    Job job;
    job.method = &method;
    job.budget = budget;
    const ReplayOptions replay_options;
    const CellResult cell = replay(layer, std::span(&job, 1), replay_options).cells[0];
    for (int kv = 0; kv < toy.options.n_kv_heads && prompt_len > budget; ++kv) {
      std::vector<int> heads;
      for (int h = 0; h < toy.n_heads(); ++h) {
        if (toy.kv_head(h) == kv) {
          heads.push_back(h);
        }
      }
      const std::vector<double> chances = reference_chances(toy, kv, heads, budget, settings);
      for (Pos p = 0; p < prompt_len; ++p) {
        const double draw = uniform_at(replay_options.seed, 0, kv, prompt_len - 1, p);
        const bool kept = cell.evicted_at[static_cast<std::size_t>(kv)][static_cast<std::size_t>(p)] > 0;
        if (std::abs(draw - chances[static_cast<std::size_t>(p)]) > 1e-6) {
          CHECK(kept == (draw < chances[static_cast<std::size_t>(p)]));
        }
      }
    }
  }
}

TEST_CASE("fitted caches stand huge logits and equal keys") {
  ToyOptions o = options(1, 40, Element::f32);
  o.kind = GENERATE(ToyKind::equal_keys, ToyKind::sharp, ToyKind::huge_logits);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  for (const std::string text : {"h2o+grkv:window=2", "attention-matching", "attention-matching:choice=omp", "hajek"}) {
    for (const int budget : {1, 9}) {
      const Method method = parse_method(text);
      Job job;
      job.method = &method;
      job.budget = budget;
      const CellResult cell = replay(layer, std::span(&job, 1), {}).cells[0];
      INFO(text << " at budget " << budget << ": " << describe(o));
      REQUIRE(cell.error == "");
      const MatD error = engine_series(cell).at("error_output");
      for (Eigen::Index i = 0; i < error.size(); ++i) {
        CHECK(!std::isinf(error.data()[i]));
      }
    }
  }
}
