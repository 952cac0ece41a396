// A small model of random weights, in memory.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "trace_capture/model.hpp"

namespace kvreplay::test {

inline ModelConfig small_config() {
  ModelConfig c;
  c.name = "random";
  c.architecture = "LlamaForCausalLM";
  c.n_layers = 3;
  c.hidden = 32;
  c.intermediate = 44;  // rows that do not begin at multiples of 16 bytes
  c.n_heads = 4;
  c.n_kv_heads = 2;
  c.head_dim = 8;
  c.vocab = 61;
  c.max_positions = 512;
  c.norm_eps = 1e-5;
  c.attention_scale = 0.35;
  c.sliding_window = {0, 0, 0};
  return c;
}

inline std::vector<float> random_values(std::size_t n, float spread, std::uint32_t seed, float mean = 0) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(mean, spread);
  std::vector<float> values(n);
  for (float& value : values) {
    value = normal(generator);
  }
  return values;
}

inline Model random_model(const ModelConfig& config, ElementType element) {
  struct Storage {
    std::deque<std::vector<std::byte>> tensors;
  };
  auto storage = std::make_shared<Storage>();
  std::uint32_t seed = 1;
  const auto tensor = [&](std::vector<std::int64_t> shape, float spread, float mean = 0) {
    Tensor out;
    out.type = element;
    out.shape = std::move(shape);
    std::vector<std::byte>& bytes =
        storage->tensors.emplace_back(static_cast<std::size_t>(out.size()) * size_of(element));
    narrow(element, random_values(static_cast<std::size_t>(out.size()), spread, seed++, mean), bytes.data());
    out.data = bytes.data();
    return out;
  };
  const std::int64_t hidden = config.hidden, dim = config.head_dim, inner = config.intermediate;
  const std::int64_t q_width = config.n_heads * dim, kv_width = config.n_kv_heads * dim;
  const float wide = 1.0F / std::sqrt(static_cast<float>(hidden));
  Model model;
  model.config = config;
  model.embedding = tensor({config.vocab, hidden}, 1);
  model.final_norm = tensor({hidden}, 0.1F, 1);
  model.head = config.tied_embeddings ? model.embedding : tensor({config.vocab, hidden}, wide);
  for (int i = 0; i < config.n_layers; ++i) {
    LayerWeights layer;
    layer.attention_norm = tensor({hidden}, 0.1F, 1);
    layer.q = tensor({q_width, hidden}, 1.5F * wide);
    layer.k = tensor({kv_width, hidden}, 1.5F * wide);
    layer.v = tensor({kv_width, hidden}, wide);
    if (config.qkv_bias) {
      layer.q_bias = tensor({q_width}, 0.5F);
      layer.k_bias = tensor({kv_width}, 0.5F);
      layer.v_bias = tensor({kv_width}, 0.5F);
    }
    if (config.qk_norm) {
      layer.q_norm = tensor({dim}, 0.2F, 1);
      layer.k_norm = tensor({dim}, 0.2F, 1);
    }
    layer.o = tensor({hidden, q_width}, wide);
    if (config.o_bias) {
      layer.o_bias = tensor({hidden}, 0.3F);
    }
    layer.mlp_norm = tensor({hidden}, 0.1F, 1);
    layer.gate = tensor({inner, hidden}, wide);
    layer.up = tensor({inner, hidden}, wide);
    layer.down = tensor({hidden, inner}, wide);
    if (config.mlp_bias) {
      layer.gate_bias = tensor({inner}, 0.3F);
      layer.up_bias = tensor({inner}, 0.3F);
      layer.down_bias = tensor({hidden}, 0.3F);
    }
    model.layers.push_back(layer);
  }
  model.storage = storage;
  return model;
}

}  // namespace kvreplay::test
