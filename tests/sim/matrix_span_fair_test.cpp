// Allocators over named spans and over measured heads in the method matrix.
#include <catch2/catch.hpp>
#include <numeric>

#include "sim/head_scores.hpp"
#include "tests/support/matrix.hpp"
#include "tests/support/reference_span_fair.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

TEST_CASE("whitelist and fair select and measure as the reference does", "[spans]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  ToyOptions o = options(group_size, prompt_len, GENERATE(Element::f32, Element::bf16));
  o.spans = {{"system", 2, 5}, {"user", 5, 20}, {"question", 20, 90}};
  const Traits per_head = traits(Scope::kv_head), before = traits(Scope::kv_head, Pool::all, Order::before_attention);
  const std::vector<Case> cases = {
      {"h2o+whitelist:spans=system", reference_whitelist(reference_h2o(), 2, 5), per_head, true, 3},
      {"streaming:sink=2+whitelist:spans=system", reference_whitelist(reference_streaming(2), 2, 5), per_head, true, 3},
      {"h2o:window=0+fair", reference_fair(reference_h2o({0, false}), {5, 20}), per_head},
      {"knorm+fair:spans=user:question", reference_fair(reference_knorm(), {20}), per_head},
      {"tova+fair", reference_fair(reference_tova(), {5, 20}), traits(Scope::layer)},
      {"residual:sink=0,obs_window=1,window=0,rerank=0+fair",
       reference_fair(reference_residual({0, 1, 0, false, 0, true}), {5, 20}), before},
  };
  check_layer(o, cases, {1, 9, 72}, group_size == 1);
}

TEST_CASE("a head's scores are its attention to span tokens, by whether they are what follows", "[spans]") {
  const bool hard = GENERATE(false, true);
  ToyOptions o = options(GENERATE(1, 3), 20, Element::f32);
  const ToyLayer toy = make_toy_layer(o);
  std::vector<std::int32_t> ids;
  for (int i = 0; i < o.n_tokens; ++i) {
    ids.push_back(i * 7 % 5);
  }
  std::vector<bool> evidence(20, false);
  std::fill(evidence.begin() + 3, evidence.begin() + 15, true);
  const HeadScores found = head_scores(engine_layer(toy), ids, evidence, hard, 2);
  for (int h = 0; h < toy.n_heads(); ++h) {
    double surface = 0, logic = 0;
    const int n_steps = o.n_tokens - 1 - 20;
    for (Pos t = 20; t < o.n_tokens - 1; ++t) {
      const Eigen::VectorXd a = softmax_over(logits_at(toy, h, t), toy.v[static_cast<std::size_t>(toy.kv_head(h))],
                                             std::vector<bool>(static_cast<std::size_t>(t) + 1, true))
                                    .weight;
      Eigen::Index top = 0;
      a.maxCoeff(&top);
      for (Pos p = 3; p < 15; ++p) {
        const double mass = hard ? static_cast<double>(p == top) : a[p];
        (ids[static_cast<std::size_t>(p)] == ids[static_cast<std::size_t>(t) + 1] ? surface : logic) += mass;
      }
    }
    const auto head = static_cast<std::size_t>(h);
    CHECK(found.surface[head] == Approx(surface / n_steps).epsilon(1e-5).margin(1e-9));
    CHECK(found.logic[head] == Approx(logic / n_steps).epsilon(1e-5).margin(1e-9));
    CHECK(found.surface[head] + found.logic[head] + found.ignore[head] == Approx(1));
  }
}

TEST_CASE("each KV head evicts to the budget that its worth gives", "[spans]") {
  const ToyOptions o = options(GENERATE(1, 3), 40, Element::f32);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  const auto table = [](const std::string& path) { return ValueTable{path, "", {0}, {{0.1, 0.5}}}; };
  const std::string scope = GENERATE("kv_head", "query_head");
  const Method method = parse_method("h2o:scope=" + scope + "+surface_logic:surface=@s.json", table);
  const std::vector<int> layers{0};
  const auto allocator = method.allocate->info->allocate(method.allocate->config(0).get());
  const Allocator::Layers divide{layers, 1, 40, 12, 72, head_worth(*method.allocate, layers, 2)};
  Job job;
  job.method = &method;
  job.budget = allocator->over_layers(divide)[0];
  job.head_budgets = allocator->over_heads(divide, 0);
  CHECK(job.budget == 12);
  CHECK(job.head_budgets == std::vector<int>{5, 19});  // 1 + 22 / 6 = 4.67, 1 + 22 * 5 / 6 = 19.33
  const LayerResult result = replay(layer, std::span(&job, 1), {});
  REQUIRE(result.cells[0].error == "");
  SelectionRequest request;
  request.traits = method.traits;
  request.select = reference_h2o();
  request.budget = 12;
  const int per_head = scope == "kv_head" ? 1 : o.group_size;
  for (int h = 0; h < 2; ++h) {
    request.budgets.insert(request.budgets.end(), static_cast<std::size_t>(per_head),
                           job.head_budgets[static_cast<std::size_t>(h)]);
  }
  CHECK(check_selection(toy, request, recorded_evictions(result.cells[0])).excess <= 1e-5);
  const MatD resident = engine_series(result.cells[0]).at("resident");
  CHECK(resident(0, 30) == (5 + 1) * per_head);
  CHECK(resident(1, 30) == (19 + 1) * per_head);
}
