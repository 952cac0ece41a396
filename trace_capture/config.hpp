// A model's shapes and switches, from the config.json of a Hugging Face folder.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace kvreplay {

enum class Family { llama, mistral, qwen2, qwen3 };

// rope_scaling (or rope_parameters) as the file gives it; rope.hpp turns it into frequencies.
struct RopeConfig {
  std::string type = "default";  // default | linear | dynamic | llama3 | yarn
  double theta = 10000;
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;                // llama3
  double beta_fast = 32, beta_slow = 1;                            // yarn
  std::optional<double> attention_factor, mscale, mscale_all_dim;  // yarn
  bool truncate = true;                                            // yarn: whole correction dimensions
  int original_max_positions = 0;                                  // what the model was trained with before scaling
  std::string json;                                                // as the file says it, "" = no scaling
};

struct ModelConfig {
  std::string name;          // the folder's name
  std::string architecture;  // "LlamaForCausalLM"
  std::string json;          // config.json, whole
  Family family = Family::llama;
  int n_layers = 0, hidden = 0, intermediate = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, vocab = 0;
  int max_positions = 0;
  double norm_eps = 1e-6;
  double attention_scale = 0;  // 1 / sqrt(head_dim)
  bool qkv_bias = false, o_bias = false, mlp_bias = false, qk_norm = false, tied_embeddings = false;
  std::vector<int> sliding_window;  // (n_layers) tokens that a token sees, itself among them; 0 = all
  RopeConfig rope;
  std::int32_t bos_id = -1;           // -1 = none
  std::vector<std::int32_t> eos_ids;  // generation_config.json adds its own

  int group_size() const { return n_heads / n_kv_heads; }
};

// Reads folder/config.json (and folder/generation_config.json for eos ids). Throws ConfigError naming the file, the
// field, what is allowed and what was found: unknown architecture, RoPE scaling or activation, missing or absurd
// numbers, heads that do not divide.
ModelConfig read_config(const std::filesystem::path& folder);

}  // namespace kvreplay
