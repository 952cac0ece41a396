// config.json: published models, both generations of fields, and sentences for what is wrong.
#include "trace_capture/config.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <random>

#include "tests/trace_capture/model_folder.hpp"

namespace kvreplay::test {
namespace {

using Catch::Matchers::Contains;
using nlohmann::json;

ModelConfig read(const json& config) { return read_config(ModelFolder(config).path()); }
std::string refusal(const json& config) {
  const ModelFolder folder(config);
  return error_of([&] { read_config(folder.path()); });
}
// The small Llama with some fields replaced; null removes one.
json changed(const json& changes, json config = small_llama()) {
  config.merge_patch(changes);
  return config;
}
json mistral() { return small_config("MistralForCausalLM", "mistral"); }
json qwen2() { return small_config("Qwen2ForCausalLM", "qwen2"); }
json qwen3() { return small_config("Qwen3ForCausalLM", "qwen3"); }

// What the published files say, shortened to the fields that matter.
const char* const kLlama31 = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256})";
const char* const kMistral01 = R"({
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "vocab_size": 32000})";
const char* const kQwen25 = R"({
  "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
  "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
  "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 152064})";
const char* const kQwen3 = R"({
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643, "eos_token_id": 151645,
  "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728,
  "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
  "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "use_sliding_window": false, "vocab_size": 151936})";

TEST_CASE("the published configurations of the four families are read") {
  const ModelConfig llama = read(json::parse(kLlama31));
  CHECK(llama.family == Family::llama);
  CHECK(llama.architecture == "LlamaForCausalLM");
  CHECK(llama.name == "model");
  CHECK(json::parse(llama.json) == json::parse(kLlama31));
  CHECK(llama.n_layers == 32);
  CHECK(llama.hidden == 4096);
  CHECK(llama.intermediate == 14336);
  CHECK(llama.n_heads == 32);
  CHECK(llama.n_kv_heads == 8);
  CHECK(llama.group_size() == 4);
  CHECK(llama.head_dim == 128);
  CHECK(llama.vocab == 128256);
  CHECK(llama.max_positions == 131072);
  CHECK(llama.norm_eps == 1e-5);
  CHECK(llama.attention_scale == Approx(1 / std::sqrt(128.0)).epsilon(1e-15));
  CHECK_FALSE((llama.qkv_bias || llama.o_bias || llama.mlp_bias || llama.qk_norm || llama.tied_embeddings));
  CHECK(llama.sliding_window == std::vector<int>(32, 0));
  CHECK(llama.rope.type == "llama3");
  CHECK(llama.rope.theta == 500000);
  CHECK(llama.rope.factor == 8);
  CHECK(llama.rope.original_max_positions == 8192);
  CHECK(json::parse(llama.rope.json) == json::parse(kLlama31)["rope_scaling"]);
  CHECK(llama.bos_id == 128000);
  CHECK(llama.eos_ids == std::vector<std::int32_t>{128001, 128008, 128009});

  const ModelConfig mistral = read(json::parse(kMistral01));
  CHECK(mistral.family == Family::mistral);
  CHECK(mistral.sliding_window == std::vector<int>(32, 4096));
  CHECK(mistral.rope.type == "default");
  CHECK(mistral.rope.json.empty());

  const ModelConfig qwen25 = read(json::parse(kQwen25));
  CHECK(qwen25.family == Family::qwen2);
  CHECK(qwen25.group_size() == 7);
  CHECK(qwen25.head_dim == 128);
  CHECK(qwen25.qkv_bias);
  CHECK_FALSE((qwen25.o_bias || qwen25.qk_norm));
  CHECK(qwen25.sliding_window == std::vector<int>(28, 0));
  CHECK(qwen25.eos_ids == std::vector<std::int32_t>{151645});

  const ModelConfig qwen3 = read(json::parse(kQwen3));
  CHECK(qwen3.family == Family::qwen3);
  CHECK(qwen3.head_dim == 128);
  CHECK(qwen3.n_heads * qwen3.head_dim == 4096);
  CHECK(qwen3.hidden == 2560);
  CHECK((qwen3.qk_norm && qwen3.tied_embeddings));
  CHECK_FALSE(qwen3.qkv_bias);
  CHECK(qwen3.rope.theta == 1000000);
}

TEST_CASE("what config.json leaves out is what transformers takes") {
  json bare = {{"model_type", "llama"}, {"num_hidden_layers", 1}, {"hidden_size", 32},
               {"vocab_size", 8},       {"intermediate_size", 8}, {"num_attention_heads", 4}};
  const ModelConfig llama = read(bare);
  CHECK(llama.architecture == "LlamaForCausalLM");
  CHECK(llama.n_kv_heads == 4);
  CHECK(llama.head_dim == 8);
  CHECK(llama.max_positions == 2048);
  CHECK(llama.norm_eps == 1e-6);
  CHECK(llama.rope.theta == 10000);
  CHECK_FALSE(llama.tied_embeddings);
  CHECK(llama.bos_id == 1);
  CHECK(llama.eos_ids == std::vector<std::int32_t>{2});

  bare["model_type"] = "mistral";
  bare["num_attention_heads"] = 16;
  const ModelConfig mistral = read(bare);
  CHECK(mistral.n_kv_heads == 8);
  CHECK(mistral.max_positions == 131072);
  CHECK(mistral.sliding_window == std::vector<int>{4096});
  bare["num_key_value_heads"] = nullptr;
  CHECK(read(bare).n_kv_heads == 16);

  bare["model_type"] = "qwen3";
  bare["num_key_value_heads"] = 2;
  const ModelConfig qwen3 = read(bare);
  CHECK(qwen3.head_dim == 128);
  CHECK(qwen3.max_positions == 32768);
  CHECK(qwen3.bos_id == -1);
  CHECK(qwen3.eos_ids.empty());
  bare["model_type"] = "qwen2";
  CHECK(read(bare).head_dim == 2);
}

TEST_CASE("biases follow the family and attention_bias") {
  const json bias = {{"attention_bias", true}, {"mlp_bias", true}};
  const ModelConfig llama = read(changed(bias));
  CHECK((llama.qkv_bias && llama.o_bias && llama.mlp_bias));
  const ModelConfig qwen3_model = read(changed(bias, qwen3()));
  CHECK((qwen3_model.qkv_bias && qwen3_model.o_bias && !qwen3_model.mlp_bias));
  const ModelConfig mistral_model = read(changed(bias, mistral()));
  CHECK_FALSE((mistral_model.qkv_bias || mistral_model.o_bias || mistral_model.mlp_bias));
  const ModelConfig qwen2_model = read(changed({{"attention_bias", false}}, qwen2()));
  CHECK((qwen2_model.qkv_bias && !qwen2_model.o_bias));
}

TEST_CASE("sliding windows: Mistral's null is none, Qwen's needs its switch, Llama has none") {
  json config = mistral();
  config["sliding_window"] = nullptr;
  CHECK(read(config).sliding_window == std::vector<int>{0, 0});
  CHECK(read(changed({{"sliding_window", 7}}, mistral())).sliding_window == std::vector<int>{7, 7});
  CHECK(read(changed({{"sliding_window", 7}})).sliding_window == std::vector<int>{0, 0});

  const json window = {{"sliding_window", 9}, {"use_sliding_window", true}};
  CHECK(read(changed({{"sliding_window", 9}}, qwen2())).sliding_window == std::vector<int>{0, 0});
  CHECK(read(changed(window, qwen2())).sliding_window == std::vector<int>{0, 0});  // max_window_layers is 28
  json some = changed(window, qwen3());
  some["max_window_layers"] = 1;
  CHECK(read(some).sliding_window == std::vector<int>{0, 9});
  some["layer_types"] = {"sliding_attention", "full_attention"};
  CHECK(read(some).sliding_window == std::vector<int>{9, 0});

  some["layer_types"] = {"sliding_attention"};
  CHECK_THAT(refusal(some), Contains("layer_types: expected a list of num_hidden_layers = 2 names"));
  some["layer_types"] = {"full_attention", "chunked_attention"};
  CHECK_THAT(refusal(some), Contains("found \"chunked_attention\""));
  some["layer_types"] = {"full_attention", "sliding_attention"};
  some["use_sliding_window"] = false;
  CHECK_THAT(refusal(some), Contains("expected use_sliding_window true and a sliding_window"));
}

TEST_CASE("generation_config.json adds its end tokens") {
  const ModelFolder folder(small_llama());
  folder.write("generation_config.json", R"({"eos_token_id": [5, 2, 31], "temperature": 0.6})");
  CHECK(read_config(folder.path()).eos_ids == std::vector<std::int32_t>{2, 5, 31});
  folder.write("generation_config.json", R"({"eos_token_id": 32})");
  CHECK_THAT(error_of([&] { read_config(folder.path()); }),
             Contains("generation_config.json: eos_token_id: expected token ids below vocab_size = 32, found 32"));
  folder.write("generation_config.json", "{}");
  CHECK(read_config(folder.path()).eos_ids == std::vector<std::int32_t>{2});

  json config = small_llama();
  config["eos_token_id"] = nullptr;
  config["bos_token_id"] = -1;
  const ModelConfig none = read(config);
  CHECK(none.eos_ids.empty());
  CHECK(none.bos_id == -1);
}

TEST_CASE("a model is named by its folder, in the hub's cache by its repository") {
  const TemporaryFolder temporary;
  const auto named = [&](const std::string& path) {
    std::filesystem::create_directories(temporary / path);
    write_file(temporary / (path + "/config.json"), small_llama().dump());
    return read_config(temporary / path).name;
  };
  CHECK(named("tiny") == "tiny");
  CHECK(named("tiny/") == "tiny");
  CHECK(named("tiny/.") == "tiny");
  CHECK(named("models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a1") == "Llama-3.1-8B");
}

TEST_CASE("rope_scaling that says something goes before rope_parameters, and the object's theta before its own") {
  const json linear = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 500.0}};
  CHECK(read(changed({{"rope_parameters", linear}, {"rope_theta", 700.0}})).rope.theta == 500);
  json both = changed({{"rope_parameters", {{"rope_theta", 900.0}}}, {"rope_scaling", linear}});
  CHECK(read(both).rope.type == "linear");
  both["rope_scaling"] = nullptr;
  CHECK(read(both).rope.type == "default");
  CHECK(read(both).rope.theta == 900);
  both["rope_scaling"] = json::object();
  CHECK(read(both).rope.theta == 900);
}

TEST_CASE("what cannot be captured rightly is refused by name") {
  struct Wrong {
    json changes;
    const char* sentence;
  };
  const auto rope = [](const json& scaling) { return json{{"rope_scaling", scaling}}; };
  const std::vector<Wrong> all = {
      {{{"architectures", {"LLaMAForCausalLM"}}},
       "'LLaMAForCausalLM' is not supported; supported are "
       "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
       "Qwen3ForCausalLM; nearest is LlamaForCausalLM"},
      {{{"architectures", {"Qwen3MoeForCausalLM"}}}, "nearest is Qwen3ForCausalLM"},
      {{{"architectures", json::array()}}, "architectures: expected a list that names the architecture, found []"},
      {{{"model_type", "granite"}}, "model_type: expected \"llama\", which belongs to LlamaForCausalLM"},
      {{{"hidden_act", "gelu_pytorch_tanh"}}, "hidden_act: expected \"silu\", found \"gelu_pytorch_tanh\""},
      {{{"quantization_config", {{"quant_method", "gptq"}}}}, "quantization_config: expected none"},
      {{{"num_hidden_layers", nullptr}}, "num_hidden_layers: expected an integer in [1, 1024], found nothing"},
      {{{"num_hidden_layers", 0}}, "num_hidden_layers: expected an integer in [1, 1024], found 0"},
      {{{"num_hidden_layers", 1e9}}, "num_hidden_layers: expected an integer in [1, 1024], found 1000000000.0"},
      {{{"hidden_size", "16"}}, "hidden_size: expected an integer in [1, 1048576], found \"16\""},
      {{{"vocab_size", 18446744073709551615U}}, "vocab_size: expected an integer"},
      {{{"intermediate_size", -4}}, "intermediate_size: expected an integer"},
      {{{"num_key_value_heads", 3}}, "num_key_value_heads: expected a divisor of num_attention_heads = 4, found 3"},
      {{{"num_attention_heads", 3}, {"num_key_value_heads", 3}, {"head_dim", nullptr}},
       "hidden_size: expected a multiple of num_attention_heads = 3 where there is no head_dim, found 16"},
      {{{"head_dim", 5}}, "head_dim (or hidden_size / num_attention_heads): expected an even number"},
      {{{"head_dim", 100000}}, "head_dim: expected an integer in [1, 4096]"},
      {{{"max_position_embeddings", 0}}, "max_position_embeddings: expected an integer"},
      {{{"rms_norm_eps", -1e-5}}, "rms_norm_eps: expected a number in [0, 1], found -1e-05"},
      {{{"tie_word_embeddings", 1}}, "tie_word_embeddings: expected true or false, found 1"},
      {{{"rope_theta", 0}}, "rope_theta: expected a number"},
      {{{"eos_token_id", "</s>"}}, "eos_token_id: expected token ids below vocab_size = 32, found \"</s>\""},
      {{{"eos_token_id", {1, 2.5}}}, "eos_token_id: expected token ids"},
      {{{"bos_token_id", 32}}, "bos_token_id: expected token ids below vocab_size = 32, found 32"},
      {{{"partial_rotary_factor", 0.5}}, "partial_rotary_factor: expected 1 (rotation of whole heads), found 0.5"},
      {rope("linear"), "rope_scaling: expected an object, found \"linear\""},
      {rope({{"type", "longrope"}}),
       "rope_scaling: RoPE scaling 'longrope' is not supported; supported are default, linear, dynamic, llama3, yarn"},
      {rope({{"type", "mrope"}, {"mrope_section", {2, 3, 3}}}), "RoPE scaling 'mrope' is not supported"},
      {rope({{"rope_type", "default"}, {"mrope_section", {2, 3, 3}}}), "mrope_section: expected none"},
      {rope({{"rope_type", "default"}, {"partial_rotary_factor", 0.25}}), "rope_scaling: partial_rotary_factor"},
      {rope({{"full_attention", {{"rope_type", "default"}}}}), "full_attention: expected one RoPE for all layers"},
      {rope({{"type", "linear"}}), "rope_scaling: factor: expected a number in [1, 1000000], found nothing"},
      {rope({{"type", "yarn"}}), "rope_scaling: factor: expected a number"},
      {rope({{"type", "dynamic"}, {"factor", 0.5}}), "factor: expected a number in [1, 1000000], found 0.5"},
      {rope({{"rope_type", "llama3"}, {"factor", 8.0}}), "low_freq_factor: expected a number"},
      {rope({{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 4.0}, {"high_freq_factor", 4.0}}),
       "high_freq_factor: expected more than low_freq_factor = 4, found 4.0"},
      {rope({{"type", "yarn"}, {"factor", 2.0}, {"beta_fast", 0.5}}), "beta_fast: expected at least beta_slow = 1"},
      {rope({{"type", "yarn"}, {"factor", 2.0}, {"truncate", "no"}}), "truncate: expected true or false"},
      {rope({{"type", "yarn"}, {"factor", 2.0}, {"original_max_position_embeddings", 0}}),
       "original_max_position_embeddings: expected an integer"},
  };
  for (const Wrong& wrong : all) {
    const std::string sentence = refusal(changed(wrong.changes));
    CHECK_THAT(sentence, Contains(wrong.sentence));
    CHECK_THAT(sentence, Contains("config.json"));
    CHECK(sentence.find('\n') == std::string::npos);
  }
}

TEST_CASE("a folder or file that is none is said to be none") {
  const ModelFolder folder;
  const auto refused = [&](const std::filesystem::path& path) { return error_of([&] { read_config(path); }); };
  CHECK_THAT(refused(folder / "nowhere"), Contains("expected a model folder") && Contains("found nothing"));
  folder.write("weights.gguf", "GGUF");
  CHECK_THAT(refused(folder / "weights.gguf"), Contains("expected a model folder") && Contains("found a file"));
  CHECK_THAT(refused(folder.path()), Contains("config.json: cannot be opened"));
  folder.write("config.json", "{\"a\": ");
  CHECK_THAT(refused(folder.path()), Contains("config.json: expected JSON, found none from byte 7 on"));
  folder.write("config.json", "[1]");
  CHECK_THAT(refused(folder.path()), Contains("expected a JSON object, found [1]"));
  folder.write("config.json", "{\"a\": 1e999}");
  CHECK_THAT(refused(folder.path()), Contains("a number that is too large"));
  folder.write("config.json", std::string(1000000, '['));
  CHECK_THAT(refused(folder.path()), Contains("nested deeper than 64 levels"));
  std::filesystem::remove(folder / "config.json");
  std::filesystem::create_directory(folder / "config.json");
  CHECK_THAT(refused(folder.path()), Contains("config.json: expected a file, found a folder"));
}

TEST_CASE("a damaged config.json is a sentence or a configuration, never a crash") {
  std::mt19937_64 random(7);
  const std::string whole = changed({{"rope_scaling", json::parse(kLlama31)["rope_scaling"]},
                                     {"max_position_embeddings", 131072},
                                     {"architectures", {"Qwen3ForCausalLM"}},
                                     {"model_type", "qwen3"},
                                     {"use_sliding_window", true},
                                     {"max_window_layers", 1},
                                     {"layer_types", {"full_attention", "sliding_attention"}}})
                                .dump();
  const ModelFolder folder;
  int n_read = 0, n_refused = 0;
  const auto attempt = [&](std::string_view text) {
    folder.write("config.json", text);
    const std::string sentence = error_of([&] { n_read += read_config(folder.path()).n_layers > 0 ? 1 : 0; });
    n_refused += sentence.empty() ? 0 : 1;
    CHECK(sentence.find('\n') == std::string::npos);
  };
  for (int i = 0; i < 3000; ++i) {
    std::string text = whole;
    for (std::uint64_t flips = 1 + random() % 4; flips-- > 0;) {
      text[random() % text.size()] = static_cast<char>(random());
    }
    if (random() % 8 == 0) {
      text.resize(random() % text.size());
    }
    attempt(text);
  }
  const std::vector<json> hostile = {nullptr,
                                     true,
                                     -1,
                                     0,
                                     1,
                                     2147483648U,
                                     18446744073709551615U,
                                     -1e308,
                                     1e-300,
                                     "",
                                     "x",
                                     json::array(),
                                     json::object(),
                                     json::array({nullptr, -1})};
  const json sane = json::parse(whole);
  for (const json& bad : hostile) {
    for (const auto& [name, value] : sane.items()) {
      json config = sane;
      config[name] = bad;
      attempt(config.dump());
    }
    for (const auto& [name, value] : sane["rope_scaling"].items()) {
      json config = sane;
      config["rope_scaling"][name] = bad;
      attempt(config.dump());
    }
  }
  CHECK(n_read > 100);
  CHECK(n_refused > 1000);
}

}  // namespace
}  // namespace kvreplay::test
