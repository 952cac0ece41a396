#include "trace_capture/decoder.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "tests/trace_capture/families/compare.hpp"
#include "tests/trace_capture/random_model.hpp"
#include "tests/trace_capture/reference_decoder.hpp"

using namespace kvreplay;
using namespace kvreplay::test;
using Catch::Matchers::Contains;

namespace {

const std::filesystem::path kFolder = KVREPLAY_TRACE_CAPTURE_TESTS;
const std::filesystem::path kFineweb = KVREPLAY_FINEWEB_MODEL;

void require_close(const Tensors& found, const Tensors& expected, double tolerance) {
  REQUIRE(!expected.empty());
  for (const auto& [name, value] : differences(found, expected)) {
    INFO(name);
    CHECK(value <= tolerance);
  }
}

std::vector<std::int32_t> some_ids(std::size_t n, int vocab) {
  std::vector<std::int32_t> ids(n);
  for (std::size_t i = 0; i < n; ++i) {
    ids[i] = static_cast<std::int32_t>((i * i + 7 * i + 3) % static_cast<std::size_t>(vocab));
  }
  return ids;
}

std::vector<Pos> passes_of(Pos size, Pos n_tokens) {
  std::vector<Pos> passes;
  for (Pos done = 0; done < n_tokens; done += passes.back()) {
    passes.push_back(std::min(size, n_tokens - done));
  }
  return passes;
}

std::vector<Pos> all_of(Pos n) {
  std::vector<Pos> rows(static_cast<std::size_t>(n));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

Tensors decoded(const Model& model, const std::vector<std::int32_t>& ids, const std::vector<Pos>& passes,
                int threads = 2) {
  const auto decoder = make_cpu_decoder(model, static_cast<Pos>(ids.size()), threads);
  return decode(*decoder, model.config, ids, passes, all_of(static_cast<Pos>(ids.size())));
}

}  // namespace

TEST_CASE("every family computes what transformers computes, layer by layer") {
  int n_cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder / "families")) {
    if (entry.is_directory() && std::filesystem::exists(entry.path() / "config.json")) {
      INFO(entry.path().filename());
      const Model model = open_model(entry.path());
      const Reference reference = read_reference(entry.path() / "reference", model.config);
      REQUIRE(reference.tensors.size() == static_cast<std::size_t>(4 * model.config.n_layers + 2));
      const auto decoder = make_cpu_decoder(model, static_cast<Pos>(reference.ids.size()), 2);
      require_close(decode(*decoder, model.config, reference.ids, reference.passes, reference.rows), reference.tensors,
                    1e-4);
      ++n_cases;
    }
  }
  CHECK(n_cases == 11);
}

TEST_CASE("fineweb-llama-3m computes its independent reference over 2048 tokens of text") {
  const Model model = open_model(kFineweb);
  const Reference reference = read_reference(kFolder / "fineweb", model.config);
  const auto decoder = make_cpu_decoder(model, 2048);
  require_close(decode(*decoder, model.config, reference.ids, reference.passes, reference.rows), reference.tensors,
                1e-4);
}

TEST_CASE("fineweb-llama-3m continues greedily as its reference") {
  const Model model = open_model(kFineweb);
  std::ifstream file(kFineweb / "greedy_reference.json");
  const nlohmann::json json = nlohmann::json::parse(file);
  const auto expected = json.at("greedy_continuation").get<std::vector<std::int32_t>>();
  const auto decoder = make_cpu_decoder(model, 1024 + 64);
  CHECK(greedy(*decoder, json.at("prompt_token_ids"), expected.size()) == expected);
}

TEST_CASE("the decoder agrees with the float64 reference in every switch of a model") {
  ModelConfig config = small_config();
  SECTION("plain") {}
  SECTION("biases") { config.qkv_bias = config.o_bias = config.mlp_bias = true; }
  SECTION("normalised queries and keys") { config.qk_norm = true; }
  SECTION("tied embeddings") { config.tied_embeddings = true; }
  SECTION("a window in one layer") { config.sliding_window = {0, 5}; }
  SECTION("a window of the token alone") { config.sliding_window = {1, 1}; }
  SECTION("no groups") { config.n_kv_heads = 6; }
  SECTION("one KV head for more query heads than a block has lanes") {
    config.n_heads = 70;
    config.n_kv_heads = 1;
    config.head_dim = 4;
  }
  SECTION("another scale") { config.attention_scale = 0.7; }
  SECTION("frequencies that grow with the sequence") {
    config.rope.type = "dynamic";
    config.rope.factor = 3;
    config.max_positions = 20;
  }
  for (const ElementType element : {ElementType::f32, ElementType::f16, ElementType::bf16}) {
    const Model model = random_model(config, element, 11);
    const std::vector<std::int32_t> ids = some_ids(37, config.vocab);
    const std::vector<Pos> passes = {25, 9, 1, 1, 1};
    require_close(decoded(model, ids, passes), reference_decode(model, ids, passes), 2e-5);
  }
}

TEST_CASE("passes of any size give the same, and the same bits where they have more than one token") {
  ModelConfig config = small_config();
  config.sliding_window = {0, 33};
  const Model model = random_model(config, ElementType::bf16, 5);
  const std::vector<std::int32_t> ids = some_ids(300, config.vocab);
  const Tensors at_once = decoded(model, ids, {300});
  require_close(decoded(model, ids, passes_of(1, 300)), at_once, 1e-5);
  require_close(decoded(model, ids, passes_of(7, 300)), at_once, 1e-5);
  require_close(decoded(model, ids, passes_of(64, 300)), at_once, 1e-5);
  Tensors pieces = decoded(model, ids, {150, 7, 143}), whole = at_once;
  whole.erase("logits");  // one row at a time, or many: another order of sums
  whole.erase("logprob");
  for (const auto& [name, values] : whole) {
    INFO(name);
    CHECK((pieces[name] == values));
  }
}

TEST_CASE("the number of threads changes no bit") {
  ModelConfig config = small_config();
  config.hidden = 130;
  config.intermediate = 700;
  const Model model = random_model(config, ElementType::f16, 6);
  const std::vector<std::int32_t> ids = some_ids(200, config.vocab);
  const std::vector<Pos> passes = {130, 67, 1, 1, 1};
  const Tensors alone = decoded(model, ids, passes, 1);
  CHECK(decoded(model, ids, passes, 2) == alone);
  CHECK(decoded(model, ids, passes, 5) == alone);
}

TEST_CASE("a decoder starts anew after reset, and long prompts come in passes") {
  const Model model = random_model(small_config(), ElementType::f32, 7);
  const auto decoder = make_cpu_decoder(model, 2000, 2);
  CHECK(decoder->name() == "cpu");
  CHECK(decoder->max_pass() == 512);
  const std::vector<std::int32_t> ids = some_ids(600, model.config.vocab);
  const std::vector<std::int32_t> first = greedy(*decoder, ids, 20);
  CHECK(decoder->n_past() == 619);
  CHECK(greedy(*decoder, {1, 2, 3}, 20) != first);
  CHECK(greedy(*decoder, ids, 20) == first);
  decoder->reset();
  CHECK(decoder->n_past() == 0);
}

TEST_CASE("a prompt under dynamic scaling goes in one pass, as transformers takes it") {
  ModelConfig config = small_config();
  config.rope.type = "dynamic";
  config.rope.factor = 2;
  config.max_positions = 600;
  const Model model = random_model(config, ElementType::f32, 8);
  CHECK(make_cpu_decoder(model, 600)->max_pass() == 512);
  CHECK(make_cpu_decoder(model, 900)->max_pass() == 900);
}

TEST_CASE("logits, log-probabilities and the choice speak of the last pass") {
  const Model model = random_model(small_config(), ElementType::f32, 9);
  const auto decoder = make_cpu_decoder(model, 100, 1);
  const std::vector<std::int32_t> ids = some_ids(50, model.config.vocab);
  decoder->pass(ids, nullptr);
  std::vector<float> row(70), logprob(49);
  decoder->log_probabilities(std::span(ids).subspan(1), logprob);
  for (const Pos token : {0, 33, 48}) {
    decoder->logits(token, row);
    const std::int32_t next = ids[static_cast<std::size_t>(token) + 1];
    CHECK(logprob[static_cast<std::size_t>(token)] == Approx(log_probability(row, next)).margin(1e-5));
  }
  decoder->logits(49, row);
  const Choice choice = decoder->choose({}, 0);
  CHECK(choice.id == choose(row, {}, 0).id);
  CHECK(choice.logprob == choose(row, {}, 0).logprob);
}

TEST_CASE("what a decoder cannot take is said in a sentence") {
  const Model model = random_model(small_config(), ElementType::f32, 10);
  const auto decoder = make_cpu_decoder(model, 8, 1);
  std::vector<float> row(70);
  CHECK_THROWS_WITH(decoder->choose({}, 0), Contains("there was none"));
  CHECK_THROWS_AS(decoder->pass(std::vector<std::int32_t>{}, nullptr), std::invalid_argument);
  CHECK_THROWS_WITH(decoder->pass(std::vector<std::int32_t>{1, 70}, nullptr),
                    "token id 70 is outside the vocabulary [0, 70)");
  CHECK_THROWS_WITH(decoder->pass(std::vector<std::int32_t>{-1}, nullptr), Contains("token id -1"));
  CHECK_THROWS_AS(decoder->pass(std::vector<std::int32_t>(9, 1), nullptr), std::invalid_argument);
  CHECK(decoder->n_past() == 0);
  decoder->pass(std::vector<std::int32_t>(6, 1), nullptr);
  CHECK_THROWS_WITH(decoder->pass(std::vector<std::int32_t>(3, 1), nullptr),
                    "3 tokens after the first 6 are more than the cache's capacity of 8");
  CHECK(decoder->n_past() == 6);
  CHECK_THROWS_AS(decoder->logits(6, row), std::invalid_argument);
  CHECK_THROWS_AS(decoder->logits(0, std::span(row).first(5)), std::invalid_argument);
  CHECK_THROWS_AS(decoder->log_probabilities(std::vector<std::int32_t>(7, 1), std::span(row).first(7)),
                  std::invalid_argument);
  decoder->pass(std::vector<std::int32_t>(2, 1), nullptr);
  CHECK(decoder->n_past() == 8);
}

TEST_CASE("weights that are not finite end in a sentence, not in a token") {
  const ModelConfig config = small_config();
  for (const float damage : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Model model = random_model(config, ElementType::f32, 12);
    const std::size_t n = static_cast<std::size_t>(model.layers[1].k.size());
    std::vector<float> k(n);
    widen(ElementType::f32, model.layers[1].k.data, k);
    k[17] = damage;
    model.layers[1].k.data = reinterpret_cast<const std::byte*>(k.data());
    const auto decoder = make_cpu_decoder(model, 8, 1);
    decoder->pass(std::vector<std::int32_t>{1, 2, 3}, nullptr);
    CHECK_THROWS_WITH(decoder->choose({}, 0), Contains("no next token can be chosen"));
  }
}
