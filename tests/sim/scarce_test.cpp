// Where next to nothing is retained, or something outshines all that the trace has: sums that floats cannot hold.
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/support/reference_compare.hpp"
#include "tests/support/reference_merging.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

CellResult replay_one(const Layer& layer, const std::string& text, int budget) {
  const Method method = parse_method(text);
  Job job;
  job.method = &method;
  job.budget = budget;
  ReplayOptions options;
  options.block_steps = 16;
  return replay(layer, std::span(&job, 1), options).cells[0];
}

}  // namespace

TEST_CASE("a small retained mass is as right as a large one, whichever side has more tokens") {
  ToyOptions o;
  o.group_size = GENERATE(1, 3);
  o.n_tokens = 72;
  o.prompt_len = GENERATE(1, 12, 48);
  o.kind = GENERATE(ToyKind::sharp, ToyKind::huge_logits);
  o.seed = 7;
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  for (const std::string text : {"random", "streaming:sink=0", "h2o", "tova:scope=query_head", "knorm"}) {
    for (const int budget : {1, 9, 44, 64}) {
      const CellResult cell = replay_one(layer, text, budget);
      INFO(text << " at budget " << budget << ", prompt_len " << o.prompt_len << ", kind " << static_cast<int>(o.kind));
      REQUIRE(cell.error.empty());
      MetricsRequest request;
      request.attends = attends_from(toy, parse_method(text).traits.scope, recorded_evictions(cell));
      for (const std::string& d : differences(reference_metrics(toy, request), engine_series(cell))) {
        FAIL_CHECK(d);
      }
    }
  }
}

TEST_CASE("a method that changes nothing and evicts nothing is exact to the bit") {
  ToyOptions o;
  o.group_size = 2;
  o.prompt_len = GENERATE(1, 40);
  const Layer layer = engine_layer(make_toy_layer(o));
  for (const std::string text : {"h2o+keepkv", "h2o+cam", "h2o+merging", "kvmerger-paper", "full+kivi:residual=128",
                                 "full+polarquant", "h2o+grkv", "attention-matching", "hajek"}) {
    INFO(text);
    const NamedSeries found = engine_series(replay_one(layer, text, o.n_tokens));
    CHECK(found.at("error").isZero(0));
    if (text != "full+polarquant" || o.prompt_len == 0) {
      CHECK(found.at("error_output").isZero(0));
    }
  }
}

TEST_CASE("what evicts and changes nothing errs as plain eviction does, to the bit") {
  ToyOptions o;
  o.group_size = 2;
  o.prompt_len = 40;
  const Layer layer = engine_layer(make_toy_layer(o));
  for (const std::string text : {"h2o+keepkv:threshold=1", "streaming+merging:similarity_threshold=1"}) {
    INFO(text);
    const NamedSeries found = engine_series(replay_one(layer, text, 9));
    CHECK(found.at("error").maxCoeff() > 0.01);
    CHECK(found.at("error") == found.at("error_output"));
  }
}

TEST_CASE("of two rewritten slots that outshine the trace the brighter one counts") {
  // Two pairs merge whose mean logit is close to 0, which KeepKV's factor on the key divides by: their second numbers
  // become hundreds, and the decode query looks at these.
  ToyOptions o;
  o.n_kv_heads = 1;
  o.n_tokens = 6;
  o.prompt_len = 5;
  o.head_dim = o.v_head_dim = 4;
  ToyLayer toy = make_toy_layer(o);
  const auto partner = [](double logit, double mean) {  // of a pair with this softmax-weighted mean of logits
    double low = logit - 1.2, high = logit;
    for (int i = 0; i < 60; ++i) {
      const double x = (low + high) / 2, share = 1 / (1 + std::exp(x - logit));
      (share * logit + (1 - share) * x < mean ? low : high) = x;
    }
    return low;
  };
  toy.k[0] << 0.2, 1, 5, 0,            //
      partner(0.2, -0.0001), 1, 5, 0,  //
      0.2, 1, 0, 5,                    //
      partner(0.2, -0.0002), 1, 0, 5,  //
      0, 0, 0, 0,                      //
      0, 0, 0, 0;
  toy.q[0].setZero();
  toy.q[0](4, 0) = toy.q[0](5, 1) = 1 / toy.scale;
  toy.v[0] = MatD::Zero(6, 4);
  toy.v[0].topLeftCorner(4, 4) << 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0;
  const CellResult cell = replay_one(engine_layer(toy), "tova+keepkv:threshold=0.9,alpha=0", 3);
  REQUIRE(cell.error.empty());
  CHECK(recorded_evictions(cell).row(0).head(5) == Eigen::RowVectorXi{{1, 0, 1, 0, 1}});
  const double share = 2 * std::exp(1.0) / (4 * std::exp(1.0) + 2);  // of each pair in the exact output
  CHECK(engine_series(cell).at("error_output")(0, 0) ==
        Approx(std::hypot(share - 1, share) / std::hypot(share, share)).epsilon(1e-5));
}
