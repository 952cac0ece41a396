#include "trace_capture/model.hpp"

#include <fmt/format.h>

#include <cstring>
#include <set>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

// An extent of a weight and how config.json says it.
struct Extent {
  std::int64_t n;
  const char* fields;
};

// Takes tensors out of the file, each with the shape that the configuration gives it.
class Weights {
 public:
  Weights(const Safetensors& file, const std::filesystem::path& folder)
      : file_(file), folder_(folder), prefix_(file.has("embed_tokens.weight") ? "" : "model.") {}

  const std::string& prefix() const { return prefix_; }

  Tensor take(const std::string& name, const std::vector<Extent>& extents) {
    std::vector<std::int64_t> shape;
    std::string reason;
    for (const Extent& extent : extents) {
      shape.push_back(extent.n);
      reason += fmt::format("{}{} = {}", reason.empty() ? "" : ", ", extent.fields, extent.n);
    }
    taken_.insert(name);
    if (!file_.has(name)) {
      throw ConfigError(
          fmt::format("{}: tensor {} is missing; config.json asks for it with {}", folder_.string(), name, reason));
    }
    try {
      return file_.tensor(name, shape);
    } catch (const ConfigError& error) {
      throw ConfigError(fmt::format("{}; config.json says {}", error.what(), reason));
    }
  }

  // A tensor of a layer that nobody took would change what the model computes: better not to run it than to run
  // another model. Frequencies that old files carry follow from the configuration.
  void check_all_taken(const ModelConfig& config) const {
    const std::string layers = prefix_ + "layers.";
    for (const std::string& name : file_.names()) {
      if (name.starts_with(layers) && name.find(".rotary_emb.") == std::string::npos && taken_.count(name) == 0) {
        throw ConfigError(fmt::format(
            "{}: tensor {} does not belong to a {} with num_hidden_layers = {} and the biases that config.json names",
            folder_.string(), name, config.architecture, config.n_layers));
      }
    }
  }

 private:
  const Safetensors& file_;
  std::filesystem::path folder_;
  std::string prefix_;
  std::set<std::string> taken_;
};

LayerWeights take_layer(Weights& weights, const ModelConfig& config, int layer) {
  const Extent hidden{config.hidden, "hidden_size"}, head_dim{config.head_dim, "head_dim"};
  const Extent inner{config.intermediate, "intermediate_size"};
  const Extent queries{std::int64_t{config.n_heads} * config.head_dim, "num_attention_heads * head_dim"};
  const Extent keys{std::int64_t{config.n_kv_heads} * config.head_dim, "num_key_value_heads * head_dim"};
  const std::string at = fmt::format("{}layers.{}.", weights.prefix(), layer);
  const std::string attention = at + "self_attn.", mlp = at + "mlp.";

  LayerWeights out;
  out.attention_norm = weights.take(at + "input_layernorm.weight", {hidden});
  out.q = weights.take(attention + "q_proj.weight", {queries, hidden});
  out.k = weights.take(attention + "k_proj.weight", {keys, hidden});
  out.v = weights.take(attention + "v_proj.weight", {keys, hidden});
  out.o = weights.take(attention + "o_proj.weight", {hidden, queries});
  if (config.qkv_bias) {
    out.q_bias = weights.take(attention + "q_proj.bias", {queries});
    out.k_bias = weights.take(attention + "k_proj.bias", {keys});
    out.v_bias = weights.take(attention + "v_proj.bias", {keys});
  }
  if (config.o_bias) {
    out.o_bias = weights.take(attention + "o_proj.bias", {hidden});
  }
  if (config.qk_norm) {
    out.q_norm = weights.take(attention + "q_norm.weight", {head_dim});
    out.k_norm = weights.take(attention + "k_norm.weight", {head_dim});
  }
  out.mlp_norm = weights.take(at + "post_attention_layernorm.weight", {hidden});
  out.gate = weights.take(mlp + "gate_proj.weight", {inner, hidden});
  out.up = weights.take(mlp + "up_proj.weight", {inner, hidden});
  out.down = weights.take(mlp + "down_proj.weight", {hidden, inner});
  if (config.mlp_bias) {
    out.gate_bias = weights.take(mlp + "gate_proj.bias", {inner});
    out.up_bias = weights.take(mlp + "up_proj.bias", {inner});
    out.down_bias = weights.take(mlp + "down_proj.bias", {hidden});
  }
  return out;
}

bool same_values(const Tensor& a, const Tensor& b) {
  const std::size_t bytes = static_cast<std::size_t>(a.size()) * size_of(a.type);
  return a.type == b.type && a.shape == b.shape && (a.data == b.data || std::memcmp(a.data, b.data, bytes) == 0);
}

}  // namespace

Model open_model(const std::filesystem::path& folder) {
  Model model;
  model.config = read_config(folder);
  const ModelConfig& config = model.config;
  const auto file = std::make_shared<Safetensors>(folder);
  Weights weights(*file, folder);

  const std::vector<Extent> table{{config.vocab, "vocab_size"}, {config.hidden, "hidden_size"}};
  model.embedding = weights.take(weights.prefix() + "embed_tokens.weight", table);
  model.final_norm = weights.take(weights.prefix() + "norm.weight", {{config.hidden, "hidden_size"}});
  model.head = model.embedding;
  if (!config.tied_embeddings || file->has("lm_head.weight")) {
    if (!file->has("lm_head.weight")) {
      throw ConfigError(
          fmt::format("{}: tensor lm_head.weight is missing; expected it, or tie_word_embeddings true in config.json",
                      folder.string()));
    }
    model.head = weights.take("lm_head.weight", table);
    if (config.tied_embeddings && !same_values(model.head, model.embedding)) {
      throw ConfigError(
          fmt::format("{}: config.json says tie_word_embeddings true, but lm_head.weight differs from "
                      "{}embed_tokens.weight; set it "
                      "to false to use both",
                      folder.string(), weights.prefix()));
    }
  }
  for (int layer = 0; layer < config.n_layers; ++layer) {
    model.layers.push_back(take_layer(weights, config, layer));
  }
  weights.check_all_taken(config);
  model.weights_hash = file->fingerprint();
  model.storage = file;
  return model;
}

ElementType element_type(const Model& model) {
  std::int64_t n[3] = {};  // elements of each type
  const auto count = [&](const Tensor& tensor) {
    if (tensor) {
      n[static_cast<std::size_t>(tensor.type)] += tensor.size();
    }
  };
  count(model.embedding);
  if (model.head.data != model.embedding.data) {
    count(model.head);
  }
  for (const LayerWeights& layer : model.layers) {
    for (const Tensor* tensor : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      count(*tensor);
    }
  }
  ElementType best = ElementType::f32;  // and where two are equal, the wider
  for (const ElementType type : {ElementType::bf16, ElementType::f16}) {
    if (n[static_cast<std::size_t>(type)] > n[static_cast<std::size_t>(best)]) {
      best = type;
    }
  }
  return best;
}

}  // namespace kvreplay
