// The options of MomentKV's and Moment-KV's selectors in the method matrix.
#include <catch2/catch.hpp>

#include "tests/support/matrix.hpp"
#include "tests/support/reference_moments.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

std::vector<Case> cases() {
  const Traits before = traits(Scope::kv_head, Pool::all, Order::before_attention);
  const Traits momentum = traits(Scope::layer, Pool::decode);
  Traits query_head = before, max = before, lag = momentum;
  query_head.scope = Scope::query_head;
  max.group = Reduce::max;
  lag.interval = 16;
  const auto select = [](MomentSelection s) { return reference_moment_selection(s); };
  return {
      {"residual:prefill=attention,obs_window=4", select({.obs_window = 4}), before, true, 4},
      {"residual:prefill=attention,obs_window=4,chunk=4", select({.obs_window = 4, .chunk = 4}), before, true, 4},
      {"residual:prefill=rounds,obs_window=3,window=2,sink=0", select({0, 2, 3, 1, 8, 0}), before, true, 3},
      {"residual:prefill=rounds,rounds=3,obs_window=1,window=1,sink=0,chunk=4", select({0, 1, 1, 4, 3, 0}), before},
      {"residual:prefill=attention,obs_window=2,window=2,sink=0,score=lookahead", select({0, 2, 2, 1, 0, 1}), before,
       true, 2},
      {"residual:prefill=attention,obs_window=1,window=0,sink=0,score=lookahead,queries=3,scope=query_head",
       select({0, 0, 1, 1, 0, 3}), query_head},
      {"residual:prefill=attention,obs_window=1,window=0,sink=1,score=lookahead,group=max", select({1, 0, 1, 1, 0, 1}),
       max, true, 2},
      {"momentum:value_norm=true", reference_momentum_by_norm(0.97), momentum},
      {"momentum:interval=16", reference_momentum(), lag},
  };
}

}  // namespace

TEST_CASE("options of residual and momentum select and measure as the reference does", "[moments]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  check_layer(options(group_size, prompt_len, element), cases(), {1, 9, 72}, element == Element::f32);
}

TEST_CASE("options of residual and momentum survive huge logits and equal keys", "[moments]") {
  ToyOptions o = options(3, 12, Element::f32);
  o.kind = GENERATE(ToyKind::huge_logits, ToyKind::equal_keys);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  for (const Case& c : cases()) {
    INFO(c.text);
    const Method method = parse_method(c.text);
    for (const int budget : {4, 9}) {
      Job job;
      job.method = &method;
      job.budget = budget;
      const LayerResult result = replay(layer, std::span(&job, 1), {});
      CHECK(result.cells[0].error == "");
    }
  }
}

TEST_CASE("Moment-KV behind a prompt's compressor keeps what that left, and evicts by its own score", "[moments]") {
  const int group_size = GENERATE(1, 3);
  const ToyLayer toy = make_toy_layer(options(group_size, 40, Element::f32));
  const Layer layer = engine_layer(toy);
  const Method method = parse_method("snapkv:obs_window=4,budget=10/momentum:alpha=0.97");
  CHECK(method.traits.pool == Pool::decode);
  CHECK(method.traits.scope == Scope::layer);
  Job job;
  job.method = &method;
  job.budget = 6;
  const LayerResult result = replay(layer, std::span(&job, 1), {});
  const CellResult& cell = result.cells[0];
  REQUIRE(cell.error == "");
  // Of the prompt ten tokens stay for good in every KV head, those that SnapKV alone keeps; six decode tokens beside.
  const Method alone = parse_method("snapkv:obs_window=4");
  Job cut;
  cut.method = &alone;
  cut.budget = 10;
  const LayerResult prompt = replay(layer, std::span(&cut, 1), {});
  REQUIRE(cell.evicted_at.size() == prompt.cells[0].evicted_at.size());
  for (std::size_t h = 0; h < cell.evicted_at.size(); ++h) {
    for (std::size_t p = 0; p < 40; ++p) {
      CHECK(cell.evicted_at[h][p] == prompt.cells[0].evicted_at[h][p]);
    }
    const auto stay = std::count(cell.evicted_at[h].begin(), cell.evicted_at[h].end(), toy.n_steps());
    CHECK(stay == 10 + 6 + 1);  // what leaves after the last step was attended at every step
  }
  const MatD resident = engine_series(cell).at("resident");
  CHECK((resident.rightCols(20).array() == 10 + 6 + 1).all());
}
