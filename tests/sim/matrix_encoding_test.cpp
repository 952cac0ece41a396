// Encoders, and SALS' reader, against the float64 reference: what they return, what they read, what it costs.
#include <catch2/catch.hpp>

#include "tests/support/matrix.hpp"
#include "tests/support/reference_encoding.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

constexpr unsigned kSeed = 5;

CellResult replay_one(const Layer& layer, const std::string& text, int budget) {
  const Method method = parse_method(text);
  Job job;
  job.method = &method;
  job.budget = budget;
  ReplayOptions replay_options;
  replay_options.block_steps = 16;
  replay_options.seed = kSeed;
  return replay(layer, std::span(&job, 1), replay_options).cells[0];
}

struct EncodedCase {
  std::string text;
  EncodedCache cache;
};

// A full cache of which encoded tokens are still attended as themselves: nothing is evicted.
void check_encoded(const ToyOptions& o, const ToyLayer& toy, const std::vector<EncodedCase>& cases, double least) {
  const Layer layer = engine_layer(toy);
  for (const EncodedCase& c : cases) {
    INFO(c.text << ": " << describe(o));
    const CellResult cell = replay_one(layer, c.text, 1);
    CHECK(cell.error == "");
    if (!cell.error.empty()) {
      continue;
    }
    MetricsRequest metrics;
    metrics.attends = [](int, int, Pos) { return true; };
    metrics.rewritten = [&](int q_head, int step) { return encoded_output(toy, c.cache, q_head, step); };
    const NamedSeries truth = reference_metrics(toy, metrics), found = engine_series(cell);
    for (const std::string& difference : differences(truth, found)) {
      FAIL_CHECK(difference);
    }
    CHECK(found.at("error").isZero(0));
    CHECK(truth.at("error_output").maxCoeff() > least);
  }
}

std::vector<EncodedCase> cases_of(const ToyLayer& toy) {
  return {
      {"full+turboquant", reference_turboquant(toy, {3, 0.25, false, false, 0, kSeed})},
      {"full:scope=query_head+turboquant:bits=1,outliers=0,residual=9",
       reference_turboquant(toy, {1, 0, false, false, 9, kSeed})},
      {"full+turboquant:bits=2,keys=inner_product", reference_turboquant(toy, {2, 0.25, true, false, 0, kSeed})},
      {"full+turboquant:bits=1,outliers=0,keys=inner_product",
       reference_turboquant(toy, {1, 0, true, false, 0, kSeed})},
      {"full+turboquant:bits=2,rescale=true", reference_turboquant(toy, {2, 0.25, false, true, 0, kSeed})},
      {"full+polarquant", reference_polarquant(toy, {false, true, false, kSeed}, false)},
      {"full+polarquant:codebook=kmeans,generated=true", reference_polarquant(toy, {true, true, true, kSeed}, false)},
      {"full:scope=layer+polarquant:rotate=false,codebook=kmeans,levels=2,first_bits=2",
       reference_polarquant(toy, {true, false, false, kSeed, 2, 2}, true)},
      {"full:scope=layer+tada:residual=8", reference_tada(toy, {4, 128, 8, false, true})},
      {"full:scope=layer+tada:bits=2,residual=1,group=4,symmetric=true", reference_tada(toy, {2, 4, 1, true, true})},
      {"full:scope=layer+tada:bits=3,residual=8,centre=tokens", reference_tada(toy, {3, 128, 8, false, false})},
      {"full+kivi:group=8,residual=16,debias=3", reference_kivi_debiased(toy, {2, 8, 16}, 3)},
  };
}

std::vector<EncodedCase> stores_of(const ToyLayer& toy) {
  Sals half, along;
  half.residual = 4;
  along = half;
  along.rank = 0.5;
  along.bits = 2;
  along.group = 5;
  along.along_tokens = true;
  const std::string text = "full:scope=layer+sals_store:residual=4";
  return {{text, reference_sals_store(toy, half)},
          {text + ",rank=0.5,bits=2,group=5,along=tokens", reference_sals_store(toy, along)}};
}

Layer middle_layer(const ToyLayer& toy) {
  Layer layer = engine_layer(toy);
  layer.index = 5;
  layer.n_model_layers = 12;
  return layer;
}

}  // namespace

TEST_CASE("encoders return what the reference's encoded caches return, and evict nothing", "[encoding]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  const ToyOptions o = options(group_size, prompt_len, element);
  const ToyLayer toy = make_toy_layer(o);
  check_encoded(o, toy, cases_of(toy), 1e-3);
}

TEST_CASE("encoders survive huge logits and equal keys", "[encoding]") {
  ToyOptions o = options(2, 20, Element::f32);
  o.kind = GENERATE(ToyKind::huge_logits, ToyKind::equal_keys);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = middle_layer(toy);
  for (const std::string part :
       {"turboquant", "turboquant:keys=inner_product", "polarquant:generated=true", "polarquant:codebook=kmeans",
        "tada:residual=4", "tada:residual=4,symmetric=true,centre=tokens", "kivi:group=4,residual=8,debias=4",
        "sals_store:residual=4", "sals_score+sals_store:residual=4", "sals_score:score=exact"}) {
    INFO(part << ", kind " << static_cast<int>(o.kind));
    const CellResult cell = replay_one(layer, "full:scope=layer+" + part, 12);
    CHECK(cell.error == "");
    CHECK(engine_series(cell).at("error_output").allFinite());
  }
}

TEST_CASE("encoded slots may be evicted, and bytes follow them", "[encoding]") {
  const ToyOptions o = options(3, 48, Element::f16);
  const ToyLayer toy = make_toy_layer(o);
  for (const std::string part :
       {"turboquant", "polarquant:generated=true", "tada:residual=4", "kivi:group=4,residual=8", "sals_store"}) {
    for (const int budget : {1, 20}) {
      INFO(part << " at budget " << budget);
      const CellResult cell = replay_one(middle_layer(toy), "h2o:scope=layer+" + part, budget);
      CHECK(cell.error == "");
      const NamedSeries found = engine_series(cell);
      CHECK(found.at("resident").maxCoeff() == budget + 1);
      const double slot = 2.0 * (o.head_dim + o.v_head_dim);
      CHECK((found.at("bytes").array() <= slot * found.at("resident").array() + 1e-9).all());
      CHECK(found.at("bytes").minCoeff() > 0);
    }
  }
}

TEST_CASE("sals stores what the reference stores, and reads what the reference reads", "[sals]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  const ToyOptions o = options(group_size, prompt_len, element);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = middle_layer(toy);
  struct ReadCase {
    std::string text;
    Sals sals;
    bool stored;
  };
  Sals small, exact;
  small.sink = 2;
  small.window = 3;
  small.residual = 4;
  exact = small;
  exact.exact = true;
  exact.rank = 0.5;
  const std::string ends = "sink=2,window=3";
  const std::vector<ReadCase> cases = {
      {"full:scope=layer+sals_score:" + ends, small, false},
      {"full:scope=layer+sals_score:" + ends + ",rank=0.5,score=exact", exact, false},
      {"full:scope=layer+sals_score:" + ends + ",own_latent=false+sals_store:residual=4", small, true},
      {"sals:sink=2,window=3,residual=4,sals_score.rank=0.5,sals_score.score=exact", exact, true}};
  Sals quarter = small;
  const EncodedCache stored = reference_sals_store(toy, quarter);
  for (const ReadCase& c : cases) {
    for (const int budget : {1, 10, 72}) {
      if (budget < 5) {
        continue;  // sinks and window as written do not fit
      }
      INFO(c.text << " at budget " << budget << ": " << describe(o));
      const CellResult cell = replay_one(layer, c.text, budget);
      CHECK(cell.error == "");
      if (!cell.error.empty()) {
        continue;
      }
      std::vector<std::vector<bool>> reads;
      for (int step = 0; step < toy.n_steps(); ++step) {
        reads.push_back(reference_sals_choice(toy, c.sals, prompt_len + step, budget));
      }
      MetricsRequest metrics;
      metrics.attends = [&](int, int step, Pos pos) -> bool {
        return reads[static_cast<std::size_t>(step)][static_cast<std::size_t>(pos)];
      };
      if (c.stored) {
        metrics.rewritten = [&](int q_head, int step) {
          return encoded_output(toy, stored, q_head, step, reads[static_cast<std::size_t>(step)]);
        };
      }
      const NamedSeries found = engine_series(cell);
      for (const std::string& difference : differences(reference_metrics(toy, metrics), found)) {
        FAIL_CHECK(difference);
      }
      CHECK(found.at("attended").maxCoeff() == std::min(budget, o.n_tokens));
    }
  }
  check_encoded(o, toy, {}, 0);
  for (const EncodedCase& c : stores_of(toy)) {
    INFO(c.text << ": " << describe(o));
    const CellResult cell = replay_one(layer, c.text, 1);
    CHECK(cell.error == "");
    if (!cell.error.empty()) {
      continue;
    }
    MetricsRequest metrics;
    metrics.attends = [](int, int, Pos) { return true; };
    metrics.rewritten = [&](int q_head, int step) { return encoded_output(toy, c.cache, q_head, step); };
    for (const std::string& difference : differences(reference_metrics(toy, metrics), engine_series(cell))) {
      FAIL_CHECK(difference);
    }
  }
}

TEST_CASE("sals at budget one, and dense layers that change nothing", "[sals]") {
  const ToyOptions o = options(3, 12, Element::f32);
  const ToyLayer toy = make_toy_layer(o);
  Layer layer = middle_layer(toy);
  const CellResult one = replay_one(layer, "sals", 1);
  CHECK(one.error == "");
  CHECK(engine_series(one).at("attended").isConstant(1));
  for (const int index : {0, 1, 11}) {
    layer.index = index;
    const CellResult dense = replay_one(layer, "sals", 1);
    CHECK(dense.error == "");
    CHECK(engine_series(dense).at("error_output").isZero(0));
    CHECK(engine_series(dense).at("bytes_read") == engine_series(dense).at("bytes"));
  }
}
