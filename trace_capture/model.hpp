// A model folder, opened: configuration and weights, each tensor's shape checked against the configuration. What both
// backends start from.
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "trace_capture/config.hpp"
#include "trace_capture/safetensors.hpp"

namespace kvreplay {

// Products are y = W x: a weight has one row for each output.
struct LayerWeights {
  Tensor attention_norm;                 // (hidden)
  Tensor q, k, v;                        // (n_heads * head_dim, hidden), (n_kv_heads * head_dim, hidden) twice
  Tensor q_bias, k_bias, v_bias;         // (n_heads * head_dim), (n_kv_heads * head_dim) twice; where qkv_bias
  Tensor q_norm, k_norm;                 // (head_dim); where qk_norm
  Tensor o, o_bias;                      // (hidden, n_heads * head_dim), (hidden) where o_bias
  Tensor mlp_norm;                       // (hidden)
  Tensor gate, up, down;                 // (intermediate, hidden) twice, (hidden, intermediate)
  Tensor gate_bias, up_bias, down_bias;  // where mlp_bias
};

struct Model {
  ModelConfig config;
  Tensor embedding;   // (vocab, hidden)
  Tensor final_norm;  // (hidden)
  Tensor head;        // (vocab, hidden); the embedding where they are tied
  std::vector<LayerWeights> layers;
  std::string weights_hash;
  std::shared_ptr<const void> storage;  // what the tensors point into
};

// Throws ConfigError.
Model open_model(const std::filesystem::path& folder);

// The element type of most weights: what `--dtype model` stores.
ElementType element_type(const Model& model);

}  // namespace kvreplay
