// The CUDA backend against the CPU backend: logits, choices, and the traces that both record. Compiled twice: over the
// emulation (everywhere), and over CUDA (label gpu).
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <functional>

#include "policies/errors.hpp"
#include "tests/trace_capture/random_model.hpp"
#include "trace_capture/cuda_memory.hpp"
#include "trace_capture/decoder.hpp"
#include "trace_capture/recorder.hpp"
#include "traces/reader.hpp"

namespace kvreplay {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

// Heads that the device takes; rows of `down` that do not begin at multiples of 16 bytes.
ModelConfig small_config() {
  ModelConfig config = test::small_config();
  config.n_layers = 3;
  config.sliding_window = {0, 0, 0};
  config.intermediate = 44;
  config.n_heads = 4;
  config.head_dim = 8;
  config.attention_scale = 0.35;
  return config;
}

Model random_model(const ModelConfig& config, ElementType element) { return test::random_model(config, element, 1); }

struct Folder {
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("kvreplay_cuda_" + std::to_string(::getpid()));
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

std::vector<std::int32_t> some_ids(const ModelConfig& config, Pos n) {
  std::vector<std::int32_t> ids;
  for (Pos i = 0; i < n; ++i) {
    ids.push_back((i * i * 7 + i * 13 + 5) % config.vocab);
  }
  return ids;
}

RecordPlan plan_of(const ModelConfig& config, Pos capacity, ElementType element = ElementType::f32) {
  RecordPlan plan;
  plan.n_heads = config.n_heads;
  plan.n_kv_heads = config.n_kv_heads;
  plan.head_dim = config.head_dim;
  for (int layer = 0; layer < config.n_layers; ++layer) {
    plan.layers.push_back(layer);
  }
  plan.element = element;
  plan.capacity = capacity;
  plan.queries = queries_all(capacity);
  plan.outputs = plan.queries;
  return plan;
}

// All that a trace holds of one layer.
struct Rows {
  std::vector<float> q, k, v, out;
  bool operator==(const Rows&) const = default;
};

// Runs ids through the decoder in passes of the given lengths, records them by the plan, and reads the trace.
std::vector<Rows> record(Decoder& decoder, const ModelConfig& config, const RecordPlan& plan,
                         const std::vector<std::int32_t>& ids, const std::vector<Pos>& passes,
                         Recorder::Options options = {}) {
  const Folder folder;
  const std::filesystem::path path = folder.path / "t.h5";
  TraceInfo meta;
  meta.model_name = config.name;
  meta.n_layers = config.n_layers;
  meta.n_heads = config.n_heads;
  meta.n_kv_heads = config.n_kv_heads;
  meta.head_dim = meta.v_head_dim = config.head_dim;
  meta.attention_scale = config.attention_scale;
  meta.sliding_window = config.sliding_window;
  meta.element = plan.element;
  meta.layers = plan.layers;
  meta.prompt_len = 1;
  WriterOptions writing;
  writing.queries = plan.queries;
  writing.outputs = plan.outputs;
  TraceWriter writer(path, meta, plan.capacity, writing);
  {
    options.max_pass = options.max_pass == 512 ? decoder.max_pass() : options.max_pass;
    Recorder recorder(plan, writer, options);
    decoder.reset();
    Pos at = 0;
    for (const Pos n : passes) {
      const std::span<const std::int32_t> now = std::span(ids).subspan(sz(at), sz(n));
      decoder.pass(now, &recorder);
      recorder.tokens(now, {});
      at += n;
    }
    REQUIRE(at == plan.capacity);
    recorder.finish();
  }
  writer.close();

  const TraceReader reader(path);
  std::vector<Rows> layers;
  const auto read = [&](int heads, std::span<const Pos> index, auto&& one, std::vector<float>& out) {
    for (int head = 0; head < heads; ++head) {
      for (const Pos pos : index) {
        std::vector<float> row(sz(config.head_dim));
        one(head, pos, row);
        out.insert(out.end(), row.begin(), row.end());
      }
    }
  };
  const std::vector<Pos> all = queries_all(plan.capacity);
  for (const int layer : plan.layers) {
    Rows& rows = layers.emplace_back();
    const auto k = [&](int head, Pos pos, std::span<float> out) { reader.read_k(layer, head, pos, pos + 1, out); };
    const auto v = [&](int head, Pos pos, std::span<float> out) { reader.read_v(layer, head, pos, pos + 1, out); };
    const auto q = [&](int head, Pos pos, std::span<float> out) { reader.read_q(layer, head, pos, pos + 1, out); };
    const auto o = [&](int head, Pos pos, std::span<float> out) { reader.read_out(layer, head, pos, pos + 1, out); };
    read(config.n_kv_heads, all, k, rows.k);
    read(config.n_kv_heads, all, v, rows.v);
    read(config.n_heads, plan.queries, q, rows.q);
    read(config.n_heads, plan.outputs, o, rows.out);
  }
  return layers;
}

// The root of the mean squared difference over the root of the mean square.
double relative_rms(const std::vector<float>& found, const std::vector<float>& expected) {
  REQUIRE(found.size() == expected.size());
  REQUIRE(!found.empty());
  double difference = 0, square = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double d = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
    difference += d * d;
    square += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return std::sqrt(difference / square);
}

void require_close(const std::vector<Rows>& found, const std::vector<Rows>& expected, double limit) {
  REQUIRE(found.size() == expected.size());
  for (std::size_t layer = 0; layer < found.size(); ++layer) {
    CAPTURE(layer);
    CHECK(relative_rms(found[layer].q, expected[layer].q) < limit);
    CHECK(relative_rms(found[layer].k, expected[layer].k) < limit);
    CHECK(relative_rms(found[layer].v, expected[layer].v) < limit);
    CHECK(relative_rms(found[layer].out, expected[layer].out) < limit);
  }
}

std::vector<float> logits_of(Decoder& decoder, const ModelConfig& config, Pos row) {
  std::vector<float> out(sz(config.vocab));
  decoder.logits(row, out);
  return out;
}

// Every switch that a family can set, each with another shape.
std::vector<std::pair<std::string, ModelConfig>> configurations() {
  std::vector<std::pair<std::string, ModelConfig>> all;
  const auto add = [&](const std::string& name, const std::function<void(ModelConfig&)>& change) {
    ModelConfig config = small_config();
    change(config);
    all.emplace_back(name, config);
  };
  add("grouped heads", [](ModelConfig&) {});
  add("one key head for each query head", [](ModelConfig& c) {
    c.n_kv_heads = 4;
    c.tied_embeddings = true;
  });
  add("a group of five, wide heads", [](ModelConfig& c) {
    c.n_heads = 5;
    c.n_kv_heads = 1;
    c.head_dim = 72;
  });
  add("biases everywhere", [](ModelConfig& c) { c.qkv_bias = c.o_bias = c.mlp_bias = true; });
  add("normalised queries and keys", [](ModelConfig& c) {
    c.qk_norm = true;
    c.head_dim = 16;
  });
  add("sliding windows in some layers", [](ModelConfig& c) { c.sliding_window = {9, 0, 70}; });
  add("yarn", [](ModelConfig& c) {
    c.rope.type = "yarn";
    c.rope.factor = 4;
    c.rope.original_max_positions = 128;
  });
  add("angles as large as late tokens have", [](ModelConfig& c) {
    c.rope.type = "linear";
    c.rope.theta = 7000;
    c.rope.factor = 1e-3;
  });
  return all;
}

TEST_CASE("cuda decoder: float32 computes what the CPU computes") {
  const Pos prompt = 70, capacity = 74;  // more than a tile, then single tokens
  for (const auto& [name, config] : configurations()) {
    CAPTURE(name);
    const Model model = random_model(config, ElementType::f32);
    const auto cpu = make_cpu_decoder(model, capacity, 1), cuda = make_cuda_decoder(model, capacity);
    const std::vector<std::int32_t> ids = some_ids(config, capacity);
    const std::vector<Pos> passes{prompt, 1, 1, 2};
    require_close(record(*cuda, config, plan_of(config, capacity), ids, passes),
                  record(*cpu, config, plan_of(config, capacity), ids, passes), 1e-5);

    cpu->reset();
    cuda->reset();
    const std::span<const std::int32_t> all(ids);
    cpu->pass(all.subspan(0, sz(prompt)), nullptr);
    cuda->pass(all.subspan(0, sz(prompt)), nullptr);
    for (const Pos row : {Pos{0}, Pos{40}, prompt - 1}) {
      CHECK(relative_rms(logits_of(*cuda, config, row), logits_of(*cpu, config, row)) < 1e-5);
    }
    std::vector<float> expected(sz(prompt)), found(sz(prompt));
    cpu->log_probabilities(all.subspan(1, sz(prompt)), expected);
    cuda->log_probabilities(all.subspan(1, sz(prompt)), found);
    CHECK(relative_rms(found, expected) < 1e-5);
    std::vector<std::int32_t> next(1);
    for (std::uint64_t step = 0; step < 4; ++step) {
      const Choice greedy = cpu->choose({}, step), greedy_cuda = cuda->choose({}, step);
      CHECK(greedy_cuda.id == greedy.id);
      CHECK(greedy_cuda.logprob == Approx(greedy.logprob).epsilon(1e-4));
      const Sampling sampling{.temperature = 0.8, .top_p = 0.9, .top_k = 20, .seed = 3};
      const Choice sampled = cpu->choose(sampling, step), sampled_cuda = cuda->choose(sampling, step);
      CHECK(sampled_cuda.id == sampled.id);
      next[0] = sampled.id;
      cpu->pass(next, nullptr);
      cuda->pass(next, nullptr);
    }
    CHECK(cuda->n_past() == capacity);
  }
}

TEST_CASE("cuda decoder: frequencies that change with the length") {
  ModelConfig config = small_config();
  config.rope.type = "dynamic";
  config.rope.factor = 2;
  config.max_positions = 16;
  config.rope.original_max_positions = 16;
  const Pos capacity = 40;
  const Model model = random_model(config, ElementType::f32);
  const auto cpu = make_cpu_decoder(model, capacity, 1), cuda = make_cuda_decoder(model, capacity);
  REQUIRE(cuda->max_pass() == cpu->max_pass());
  const std::vector<std::int32_t> ids = some_ids(config, capacity);
  const std::vector<Pos> passes{30, 1, 1, 8};
  require_close(record(*cuda, config, plan_of(config, capacity), ids, passes),
                record(*cpu, config, plan_of(config, capacity), ids, passes), 1e-5);
}

TEST_CASE("cuda decoder: 16-bit weights stay within 2 % of float32, layer by layer") {
  const ElementType element = GENERATE(ElementType::bf16, ElementType::f16);
  const Pos capacity = 70;
  for (auto [name, config] : configurations()) {
    CAPTURE(name);
    config.n_layers = 1;  // so that both backends' layer has the same input
    config.sliding_window.resize(1);
    const Model model = random_model(config, element);
    const auto cpu = make_cpu_decoder(model, capacity, 1), cuda = make_cuda_decoder(model, capacity);
    const std::vector<std::int32_t> ids = some_ids(config, capacity);
    const std::vector<Pos> passes{68, 1, 1};
    require_close(record(*cuda, config, plan_of(config, capacity), ids, passes),
                  record(*cpu, config, plan_of(config, capacity), ids, passes), 0.02);
    CHECK(relative_rms(logits_of(*cuda, config, 0), logits_of(*cpu, config, 0)) < 0.02);
  }
}

TEST_CASE("cuda decoder: the recorded output is attention over the recorded rows") {
  const ModelConfig config = small_config();
  const Pos capacity = 70;
  const auto weights = GENERATE(ElementType::f32, ElementType::f16, ElementType::bf16);
  const auto stored = GENERATE(ElementType::f32, ElementType::f16, ElementType::bf16);
  CAPTURE(name_of(weights), name_of(stored));
  const Model model = random_model(config, weights);
  const auto cuda = make_cuda_decoder(model, capacity);
  const std::vector<Rows> layers =
      record(*cuda, config, plan_of(config, capacity, stored), some_ids(config, capacity), {68, 1, 1});
  const std::size_t dim = sz(config.head_dim);
  for (const Rows& rows : layers) {
    std::vector<float> expected;
    for (int head = 0; head < config.n_heads; ++head) {
      for (Pos pos = 0; pos < capacity; ++pos) {
        const float* q = rows.q.data() + sz(head * capacity + pos) * dim;
        const std::size_t kv_at = sz(head / config.group_size() * capacity) * dim;
        std::vector<double> out(dim);
        double sum = 0;
        for (std::size_t j = 0; j <= sz(pos); ++j) {
          double logit = 0;
          for (std::size_t c = 0; c < dim; ++c) {
            logit += static_cast<double>(q[c]) * static_cast<double>(rows.k[kv_at + j * dim + c]);
          }
          const double weight = std::exp(logit * config.attention_scale);
          sum += weight;
          for (std::size_t c = 0; c < dim; ++c) {
            out[c] += weight * static_cast<double>(rows.v[kv_at + j * dim + c]);
          }
        }
        for (const double x : out) {
          expected.push_back(static_cast<float>(x / sum));
        }
      }
    }
    REQUIRE(relative_rms(rows.out, expected) < 1e-5);  // float32 whatever the rows are
  }
}

TEST_CASE("cuda decoder: a prompt in chunks is the prompt") {
  const ModelConfig config = small_config();
  const Pos capacity = 134;
  const Model model = random_model(config, ElementType::f32);
  const auto cuda = make_cuda_decoder(model, capacity);
  const std::vector<std::int32_t> ids = some_ids(config, capacity);
  const RecordPlan plan = plan_of(config, capacity);
  const std::vector<Rows> whole = record(*cuda, config, plan, ids, {134});
  require_close(record(*cuda, config, plan, ids, {64, 1, 4, 65}), whole, 1e-6);
}

TEST_CASE("cuda decoder: two runs give the same bits, however small the recorder's slots") {
  const ModelConfig config = small_config();
  const Pos capacity = 74;
  const Model model = random_model(config, ElementType::bf16);
  const auto cuda = make_cuda_decoder(model, capacity);
  const std::vector<std::int32_t> ids = some_ids(config, capacity);
  const RecordPlan plan = plan_of(config, capacity, ElementType::bf16);
  const std::vector<Pos> passes{67, 1, 1, 1, 2, 1, 1};
  Recorder::Options options;
  options.memory = pinned_memory();
  const std::vector<Rows> first = record(*cuda, config, plan, ids, passes, options);
  REQUIRE(record(*cuda, config, plan, ids, passes, options) == first);
  options.stage_bytes = 1;  // two slots: every packet waits for the writer
  REQUIRE(record(*cuda, config, plan, ids, passes, options) == first);
  options.max_pass = 7;  // a layer's rows in several packets
  REQUIRE(record(*cuda, config, plan, ids, passes, options) == first);
  options.memory = {};  // slots that are not page-locked
  REQUIRE(record(*cuda, config, plan, ids, passes, options) == first);
  REQUIRE(record(*make_cuda_decoder(model, capacity), config, plan, ids, passes) == first);
}

TEST_CASE("cuda decoder: packets are not packed anew before they were copied") {
  const ModelConfig config = small_config();
  const Pos capacity = 24;
  const Model model = random_model(config, ElementType::bf16);
  const auto cuda = make_cuda_decoder(model, capacity);
  const std::vector<std::int32_t> ids = some_ids(config, capacity);
  const RecordPlan plan = plan_of(config, capacity, ElementType::bf16);
  const std::vector<Pos> passes(sz(capacity), 1);
  Recorder::Options options;
  options.memory = pinned_memory();
  const std::vector<Rows> many_slots = record(*cuda, config, plan, ids, passes, options);
  options.stage_bytes = 1;  // two slots: the writer is never more than two packets behind
  REQUIRE(record(*cuda, config, plan, ids, passes, options) == many_slots);
}

TEST_CASE("cuda decoder: chosen layers, queries and outputs are those of the whole trace") {
  const ModelConfig config = small_config();
  const Pos capacity = 80;
  const std::size_t dim = sz(config.head_dim);
  const Model model = random_model(config, ElementType::f16);
  const auto cuda = make_cuda_decoder(model, capacity);
  const std::vector<std::int32_t> ids = some_ids(config, capacity);
  const std::vector<Pos> passes{40, 36, 1, 1, 1, 1};
  const std::vector<Rows> all = record(*cuda, config, plan_of(config, capacity, ElementType::f16), ids, passes);
  RecordPlan plan = plan_of(config, capacity, ElementType::f16);
  plan.layers = {1};
  plan.queries = {0, 38, 39, 40, 75, 77, 79};
  plan.outputs = {41, 76, 78};
  const Rows some = record(*cuda, config, plan, ids, passes).at(0);
  REQUIRE(some.k == all[1].k);
  REQUIRE(some.v == all[1].v);
  std::vector<float> q, out;
  for (int head = 0; head < config.n_heads; ++head) {
    for (const Pos pos : plan.queries) {
      const auto at = all[1].q.begin() + (head * capacity + pos) * config.head_dim;
      q.insert(q.end(), at, at + config.head_dim);
    }
    for (const Pos pos : plan.outputs) {
      const auto at = all[1].out.begin() + (head * capacity + pos) * config.head_dim;
      out.insert(out.end(), at, at + config.head_dim);
    }
  }
  REQUIRE(some.q == q);
  REQUIRE(some.out == out);
  REQUIRE(some.q.size() == plan.queries.size() * sz(config.n_heads) * dim);
}

TEST_CASE("cuda decoder: a value that float16 cannot hold is named") {
  ModelConfig config = small_config();
  config.qk_norm = true;
  Model model = random_model(config, ElementType::f32);
  std::vector<float> huge(sz(config.head_dim), 1e6F);
  model.layers[1].k_norm.data = reinterpret_cast<const std::byte*>(huge.data());
  const auto cuda = make_cuda_decoder(model, 10);
  REQUIRE_THROWS_WITH(record(*cuda, config, plan_of(config, 10, ElementType::f16), some_ids(config, 10), {10}),
                      Catch::Contains("layer 1: k of head") && Catch::Contains("65504"));
}

TEST_CASE("cuda decoder: misuse is refused, and the decoder goes on") {
  const ModelConfig config = small_config();
  const Model model = random_model(config, ElementType::f32);
  const auto cuda = make_cuda_decoder(model, 8);
  const std::vector<std::int32_t> ids = some_ids(config, 9), outside{0, config.vocab};
  std::vector<float> logits(sz(config.vocab));
  REQUIRE_THROWS_AS(cuda->choose({}, 0), std::invalid_argument);
  REQUIRE_THROWS_AS(cuda->pass({}, nullptr), std::invalid_argument);
  REQUIRE_THROWS_AS(cuda->pass(ids, nullptr), std::invalid_argument);
  REQUIRE_THROWS_AS(cuda->pass(outside, nullptr), std::invalid_argument);
  cuda->pass(std::span(ids).subspan(0, 5), nullptr);
  REQUIRE_THROWS_AS(cuda->pass(std::span(ids).subspan(0, 4), nullptr), std::invalid_argument);
  REQUIRE_THROWS_AS(cuda->logits(5, logits), std::invalid_argument);
  REQUIRE_THROWS_AS(cuda->log_probabilities(outside, std::span(logits).subspan(0, 2)), std::invalid_argument);
  cuda->logits(4, logits);
  cuda->pass(std::span(ids).subspan(5, 3), nullptr);
  REQUIRE(cuda->n_past() == 8);
}

}  // namespace
}  // namespace kvreplay
