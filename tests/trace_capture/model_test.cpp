// Whole model folders: every weight in its place, or a sentence that names tensor and field.
#include "trace_capture/model.hpp"

#include <catch2/catch.hpp>
#include <random>

#include "tests/trace_capture/model_folder.hpp"

namespace kvreplay::test {
namespace {

using Catch::Matchers::Contains;
using nlohmann::json;

json untied(json config = small_llama()) {
  config["tie_word_embeddings"] = false;
  return config;
}
std::string refusal(const json& config, const RawTensors& tensors) {
  const ModelFolder folder(config, tensors);
  return error_of([&] { open_model(folder.path()); });
}

bool holds(const Tensor& tensor, const RawTensors& raw, const std::string& name) {
  const RawTensor& expected = raw.at(name);
  return tensor && tensor.shape == expected.shape && tensor.type == ElementType::bf16 &&
         std::memcmp(tensor.data, expected.data.data(), expected.data.size()) == 0;
}

TEST_CASE("every weight of a layer lies in its place, with the prefix or without") {
  for (const std::string prefix : {"model.", ""}) {
    const RawTensors raw = small_weights(Extras::none, prefix);
    const ModelFolder folder(small_llama(), raw);
    const Model model = open_model(folder.path());
    CHECK(holds(model.embedding, raw, prefix + "embed_tokens.weight"));
    CHECK(holds(model.final_norm, raw, prefix + "norm.weight"));
    CHECK(model.head.data == model.embedding.data);
    REQUIRE(model.layers.size() == 2);
    for (int layer = 0; layer < 2; ++layer) {
      const LayerWeights& w = model.layers[static_cast<std::size_t>(layer)];
      const std::string at = prefix + "layers." + std::to_string(layer) + ".";
      CHECK(holds(w.attention_norm, raw, at + "input_layernorm.weight"));
      CHECK(holds(w.q, raw, at + "self_attn.q_proj.weight"));
      CHECK(holds(w.k, raw, at + "self_attn.k_proj.weight"));
      CHECK(holds(w.v, raw, at + "self_attn.v_proj.weight"));
      CHECK(holds(w.o, raw, at + "self_attn.o_proj.weight"));
      CHECK(holds(w.mlp_norm, raw, at + "post_attention_layernorm.weight"));
      CHECK(holds(w.gate, raw, at + "mlp.gate_proj.weight"));
      CHECK(holds(w.up, raw, at + "mlp.up_proj.weight"));
      CHECK(holds(w.down, raw, at + "mlp.down_proj.weight"));
      CHECK_FALSE((w.q_bias || w.k_bias || w.v_bias || w.o_bias || w.q_norm || w.k_norm));
      CHECK_FALSE((w.gate_bias || w.up_bias || w.down_bias));
    }
    CHECK_THAT(model.weights_hash, Catch::Matchers::StartsWith("fingerprint-sha256:"));
    CHECK(element_type(model) == ElementType::bf16);
  }
}

TEST_CASE("biases and QK-norms come with the families that have them") {
  const std::string at = "model.layers.1.";
  RawTensors raw = small_weights(Extras::qkv_bias);
  const Model qwen2 = open_model(ModelFolder(small_config("Qwen2ForCausalLM", "qwen2"), raw).path());
  CHECK(holds(qwen2.layers[1].q_bias, raw, at + "self_attn.q_proj.bias"));
  CHECK(holds(qwen2.layers[1].k_bias, raw, at + "self_attn.k_proj.bias"));
  CHECK(holds(qwen2.layers[1].v_bias, raw, at + "self_attn.v_proj.bias"));
  CHECK_FALSE(qwen2.layers[1].o_bias);

  raw = small_weights(Extras::all_biases);
  json config = small_llama();
  config["attention_bias"] = config["mlp_bias"] = true;
  const Model llama = open_model(ModelFolder(config, raw).path());
  CHECK(holds(llama.layers[1].o_bias, raw, at + "self_attn.o_proj.bias"));
  CHECK(holds(llama.layers[1].gate_bias, raw, at + "mlp.gate_proj.bias"));
  CHECK(holds(llama.layers[1].up_bias, raw, at + "mlp.up_proj.bias"));
  CHECK(holds(llama.layers[1].down_bias, raw, at + "mlp.down_proj.bias"));

  raw = small_weights(Extras::qk_norm);
  const Model qwen3 = open_model(ModelFolder(small_config("Qwen3ForCausalLM", "qwen3"), raw).path());
  CHECK(holds(qwen3.layers[1].q_norm, raw, at + "self_attn.q_norm.weight"));
  CHECK(holds(qwen3.layers[1].k_norm, raw, at + "self_attn.k_norm.weight"));
}

TEST_CASE("a model outlives its folder") {
  const RawTensors raw = small_weights();
  Model model;
  {
    const ModelFolder folder(small_llama(), raw);
    model = open_model(folder.path());
  }
  CHECK(holds(model.layers[0].down, raw, "model.layers.0.mlp.down_proj.weight"));
}

TEST_CASE("the head is the embedding only where config.json ties them") {
  RawTensors raw = small_weights();
  CHECK_THAT(refusal(untied(), raw),
             Contains("lm_head.weight is missing; expected it, or tie_word_embeddings true in config.json"));
  raw["lm_head.weight"] = bf16_tensor("another name", {32, 16});
  const ModelFolder folder(untied(), raw);
  const Model model = open_model(folder.path());
  CHECK(holds(model.head, raw, "lm_head.weight"));
  CHECK(holds(model.embedding, raw, "model.embed_tokens.weight"));

  CHECK_THAT(refusal(small_llama(), raw), Contains("tie_word_embeddings true, but lm_head.weight differs from "
                                                   "model.embed_tokens.weight"));
  raw["lm_head.weight"] = raw["model.embed_tokens.weight"];
  CHECK(refusal(small_llama(), raw).empty());
}

TEST_CASE("tensors and config.json that disagree are named, both") {
  const auto without = [](const std::string& name, Extras extras = Extras::none) {
    RawTensors raw = small_weights(extras);
    REQUIRE(raw.erase(name) == 1);
    return raw;
  };
  CHECK_THAT(refusal(small_llama(), without("model.embed_tokens.weight")),
             Contains("tensor model.embed_tokens.weight is missing"));
  CHECK_THAT(refusal(small_llama(), without("model.layers.1.mlp.up_proj.weight")),
             Contains("tensor model.layers.1.mlp.up_proj.weight is missing"));
  CHECK_THAT(refusal(small_config("Qwen2ForCausalLM", "qwen2"),
                     without("model.layers.0.self_attn.q_proj.bias", Extras::qkv_bias)),
             Contains("tensor model.layers.0.self_attn.q_proj.bias is missing"));
  CHECK_THAT(refusal(small_config("Qwen3ForCausalLM", "qwen3"), small_weights()),
             Contains("tensor model.layers.0.self_attn.q_norm.weight is missing"));

  const auto with = [](const char* field, int value) {
    json config = small_llama();
    config[field] = value;
    return refusal(config, small_weights());
  };
  CHECK_THAT(with("hidden_size", 20), Contains("tensor model.embed_tokens.weight: expected shape (32, 20), found (32, "
                                               "16); config.json says vocab_size = 32, hidden_size = 20"));
  CHECK_THAT(with("head_dim", 8), Contains("tensor model.layers.0.self_attn.q_proj.weight: expected shape (32, 16), "
                                           "found (16, 16); config.json says num_attention_heads * head_dim = 32"));
  CHECK_THAT(with("num_key_value_heads", 4),
             Contains("k_proj.weight") && Contains("num_key_value_heads * head_dim = 16"));
  CHECK_THAT(with("intermediate_size", 32), Contains("gate_proj.weight") && Contains("intermediate_size = 32"));
  CHECK_THAT(with("num_hidden_layers", 3), Contains("tensor model.layers.2.input_layernorm.weight is missing"));
  CHECK_THAT(with("num_hidden_layers", 1),
             Contains("does not belong to a LlamaForCausalLM with num_hidden_layers = 1"));

  RawTensors integers = small_weights();
  integers["model.layers.0.mlp.up_proj.weight"] = {"I8", {24, 16}, std::string(384, 'i')};
  CHECK_THAT(refusal(small_llama(), integers), Contains("up_proj.weight: expected F32, F16 or BF16, found I8"));
}

TEST_CASE("tensors that would change the result are refused, those that cannot are not") {
  RawTensors raw = small_weights();
  raw["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"F32", {2}, std::string(8, 'f')};
  raw["value_head.weight"] = {"F32", {2}, std::string(8, 'v')};
  CHECK(refusal(small_llama(), raw).empty());
  CHECK_THAT(refusal(small_llama(), small_weights(Extras::qkv_bias)),
             Contains("model.layers.0.self_attn.k_proj.bias does not belong to a LlamaForCausalLM"));
  CHECK_THAT(refusal(small_llama(), small_weights(Extras::qk_norm)), Contains("k_norm.weight does not belong"));
}

TEST_CASE("the element type is that of most weights") {
  RawTensors raw = small_weights();
  for (auto& [name, tensor] : raw) {
    if (name.find("norm") == std::string::npos) {
      tensor.dtype = "F16";
    }
  }
  CHECK(element_type(open_model(ModelFolder(small_llama(), raw).path())) == ElementType::f16);
  for (auto& [name, tensor] : raw) {
    if (name.find("mlp") != std::string::npos) {
      tensor = {"F32", tensor.shape, tensor.data + tensor.data};
    }
  }
  CHECK(element_type(open_model(ModelFolder(small_llama(), raw).path())) == ElementType::f32);
}

TEST_CASE("a damaged weights file is a sentence or a model, never a crash") {
  std::mt19937_64 random(11);
  const std::string whole = safetensors(small_weights());
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, whole.data(), 8);
  const ModelFolder folder(small_llama());
  int n_opened = 0, n_refused = 0;
  std::uint64_t sum = 0;  // of all bytes: reads every page that a tensor claims
  const auto touch = [&](const Tensor& tensor) {
    for (std::size_t i = 0; tensor && i < static_cast<std::size_t>(tensor.size()) * size_of(tensor.type); ++i) {
      sum += std::to_integer<std::uint64_t>(tensor.data[i]);
    }
  };
  const auto attempt = [&](std::string_view bytes) {
    folder.write("model.safetensors", bytes);
    const std::string sentence = error_of([&] {
      const Model model = open_model(folder.path());
      ++n_opened;
      touch(model.embedding);
      touch(model.final_norm);
      for (const LayerWeights& w : model.layers) {
        for (const Tensor* tensor : {&w.attention_norm, &w.q, &w.k, &w.v, &w.o, &w.mlp_norm, &w.gate, &w.up, &w.down}) {
          touch(*tensor);
        }
      }
    });
    n_refused += sentence.empty() ? 0 : 1;
    CHECK(sentence.find('\n') == std::string::npos);
  };
  for (int i = 0; i < 4000; ++i) {
    std::string bytes = whole;
    // Mostly the header and its length, where damage matters.
    const std::size_t reach = random() % 4 == 0 ? bytes.size() : random() % 2 == 0 ? 8 + header_bytes : 12;
    for (std::uint64_t flips = 1 + random() % 3; flips-- > 0;) {
      bytes[random() % reach] ^= static_cast<char>(1U << (random() % 8));
    }
    if (random() % 4 == 0) {
      bytes.resize(random() % bytes.size());
    }
    attempt(bytes);
  }
  // Digits in the header replaced: still JSON, other numbers.
  for (int i = 0; i < 2000; ++i) {
    std::string bytes = whole;
    for (std::uint64_t changes = 1 + random() % 2; changes > 0;) {
      char& c = bytes[8 + random() % header_bytes];
      if (c >= '0' && c <= '9') {
        c = static_cast<char>('0' + random() % 10);
        --changes;
      }
    }
    attempt(bytes);
  }
  CHECK(n_opened > 300);
  CHECK(n_refused > 3000);
  CHECK(sum > 0);
}

}  // namespace
}  // namespace kvreplay::test
