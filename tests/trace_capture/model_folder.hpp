// Small model folders, right and wrong, written byte by byte.
#pragma once
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "policies/errors.hpp"
#include "tests/traces/fixtures.hpp"

namespace kvreplay::test {

// A new file each time: ext4 flushes one that is truncated and written again, which costs milliseconds.
inline void write_file(const std::filesystem::path& path, std::string_view bytes) {
  std::filesystem::remove(path);
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// The sentence of the ConfigError that f throws, "" if it throws none; any other exception passes through.
template <typename F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

// A safetensors file of these header bytes and data.
inline std::string framed(std::string_view header, std::string_view data) {
  const std::uint64_t n = header.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &n, 8);
  return out.append(header).append(data);
}

struct RawTensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string data;
};
using RawTensors = std::map<std::string, RawTensor>;

// As transformers writes it: the header ends in spaces up to a multiple of 8. `unaligned` leaves one too many.
inline std::string safetensors(const RawTensors& tensors, bool unaligned = false) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.data.size()}}};
    data += tensor.data;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8 + (unaligned ? 1 : 0), ' ');
  return framed(text, data);
}

// Two bytes per element, told apart by the tensor's name.
inline RawTensor bf16_tensor(const std::string& name, const std::vector<std::int64_t>& shape) {
  std::size_t n = 1;
  for (const std::int64_t extent : shape) {
    n *= static_cast<std::size_t>(extent);
  }
  RawTensor out{"BF16", shape, std::string(2 * n, '\0')};
  for (std::size_t i = 0; i < out.data.size(); ++i) {
    out.data[i] = static_cast<char>((name.size() * 31 + i * 7) % 61);
  }
  return out;
}

// Two layers, 4 query heads, 2 KV heads, head_dim 4.
inline nlohmann::json small_config(const std::string& architecture, const std::string& model_type) {
  return {{"architectures", {architecture}},
          {"model_type", model_type},
          {"num_hidden_layers", 2},
          {"hidden_size", 16},
          {"intermediate_size", 24},
          {"vocab_size", 32},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 4},
          {"max_position_embeddings", 64},
          {"tie_word_embeddings", true},
          {"eos_token_id", 2}};
}
inline nlohmann::json small_llama() { return small_config("LlamaForCausalLM", "llama"); }

enum class Extras { none, qkv_bias, all_biases, qk_norm };

// The tensors that a model of small_config has in its file.
inline RawTensors small_weights(Extras extras = Extras::none, const std::string& prefix = "model.") {
  RawTensors out;
  const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    out[name] = bf16_tensor(name, shape);
  };
  add(prefix + "embed_tokens.weight", {32, 16});
  add(prefix + "norm.weight", {16});
  for (const std::string layer : {"layers.0.", "layers.1."}) {
    const std::string at = prefix + layer;
    add(at + "input_layernorm.weight", {16});
    add(at + "post_attention_layernorm.weight", {16});
    add(at + "self_attn.q_proj.weight", {16, 16});
    add(at + "self_attn.k_proj.weight", {8, 16});
    add(at + "self_attn.v_proj.weight", {8, 16});
    add(at + "self_attn.o_proj.weight", {16, 16});
    add(at + "mlp.gate_proj.weight", {24, 16});
    add(at + "mlp.up_proj.weight", {24, 16});
    add(at + "mlp.down_proj.weight", {16, 24});
    if (extras == Extras::qkv_bias || extras == Extras::all_biases) {
      add(at + "self_attn.q_proj.bias", {16});
      add(at + "self_attn.k_proj.bias", {8});
      add(at + "self_attn.v_proj.bias", {8});
    }
    if (extras == Extras::all_biases) {
      add(at + "self_attn.o_proj.bias", {16});
      add(at + "mlp.gate_proj.bias", {24});
      add(at + "mlp.up_proj.bias", {24});
      add(at + "mlp.down_proj.bias", {16});
    }
    if (extras == Extras::qk_norm) {
      add(at + "self_attn.q_norm.weight", {4});
      add(at + "self_attn.k_norm.weight", {4});
    }
  }
  return out;
}

// A folder under the system's temporary folder, gone with the object.
class ModelFolder {
 public:
  ModelFolder() : path_(folder_ / "model") { std::filesystem::create_directories(path_); }
  explicit ModelFolder(const nlohmann::json& config) : ModelFolder() { write("config.json", config.dump()); }
  ModelFolder(const nlohmann::json& config, const RawTensors& tensors) : ModelFolder(config) {
    write("model.safetensors", safetensors(tensors));
  }

  void write(const std::string& name, std::string_view bytes) const { write_file(path_ / name, bytes); }
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  TemporaryFolder folder_;
  std::filesystem::path path_;
};

}  // namespace kvreplay::test
