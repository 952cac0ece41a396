#include "tests/trace_capture/random_model.hpp"

#include <cmath>
#include <cstring>
#include <deque>
#include <random>

namespace kvreplay::test {
namespace {

// Tensors that share one storage.
class Maker {
 public:
  Maker(ElementType element, unsigned seed) : element_(element), rng_(seed) {}

  Tensor make(std::vector<std::int64_t> shape, float mean, float deviation) {
    Tensor tensor;
    tensor.type = element_;
    tensor.shape = std::move(shape);
    std::vector<float> values(static_cast<std::size_t>(tensor.size()));
    std::normal_distribution<float> normal(mean, deviation);
    for (float& value : values) {
      value = normal(rng_);
    }
    // One element off: tensors of a file are aligned to their elements only.
    std::vector<std::byte>& bytes = storage_->emplace_back((values.size() + 1) * size_of(element_));
    narrow(element_, values, bytes.data() + size_of(element_));
    tensor.data = bytes.data() + size_of(element_);
    return tensor;
  }
  Tensor matrix(std::int64_t outputs, std::int64_t inputs) {
    return make({outputs, inputs}, 0, 1.3F / std::sqrt(static_cast<float>(inputs)));
  }
  Tensor bias(bool present, std::int64_t outputs) { return present ? make({outputs}, 0, 0.4F) : Tensor{}; }
  Tensor norm(std::int64_t width) { return make({width}, 1, 0.2F); }
  std::shared_ptr<const void> storage() const { return storage_; }

 private:
  ElementType element_;
  std::mt19937 rng_;
  std::shared_ptr<std::deque<std::vector<std::byte>>> storage_ = std::make_shared<std::deque<std::vector<std::byte>>>();
};

}  // namespace

ModelConfig small_config() {
  ModelConfig config;
  config.name = "random";
  config.architecture = "LlamaForCausalLM";
  config.n_layers = 2;
  config.hidden = 40;
  config.intermediate = 56;
  config.n_heads = 6;
  config.n_kv_heads = 2;
  config.head_dim = 10;
  config.vocab = 70;
  config.max_positions = 512;
  config.norm_eps = 1e-5;
  config.attention_scale = 1 / std::sqrt(10.0);
  config.sliding_window = {0, 0};
  return config;
}

Model random_model(const ModelConfig& config, ElementType element, unsigned seed) {
  Maker maker(element, seed);
  const std::int64_t hidden = config.hidden, q_width = std::int64_t{config.n_heads} * config.head_dim;
  const std::int64_t kv_width = std::int64_t{config.n_kv_heads} * config.head_dim;
  Model model;
  model.config = config;
  model.embedding = maker.make({config.vocab, hidden}, 0, 0.5F);
  model.final_norm = maker.norm(hidden);
  model.head = config.tied_embeddings ? model.embedding : maker.make({config.vocab, hidden}, 0, 0.5F);
  for (int i = 0; i < config.n_layers; ++i) {
    LayerWeights w;
    w.attention_norm = maker.norm(hidden);
    w.q = maker.matrix(q_width, hidden);
    w.k = maker.matrix(kv_width, hidden);
    w.v = maker.matrix(kv_width, hidden);
    w.q_bias = maker.bias(config.qkv_bias, q_width);
    w.k_bias = maker.bias(config.qkv_bias, kv_width);
    w.v_bias = maker.bias(config.qkv_bias, kv_width);
    w.q_norm = config.qk_norm ? maker.norm(config.head_dim) : Tensor{};
    w.k_norm = config.qk_norm ? maker.norm(config.head_dim) : Tensor{};
    w.o = maker.matrix(hidden, q_width);
    w.o_bias = maker.bias(config.o_bias, hidden);
    w.mlp_norm = maker.norm(hidden);
    w.gate = maker.matrix(config.intermediate, hidden);
    w.up = maker.matrix(config.intermediate, hidden);
    w.down = maker.matrix(hidden, config.intermediate);
    w.gate_bias = maker.bias(config.mlp_bias, config.intermediate);
    w.up_bias = maker.bias(config.mlp_bias, config.intermediate);
    w.down_bias = maker.bias(config.mlp_bias, hidden);
    model.layers.push_back(w);
  }
  model.storage = maker.storage();
  return model;
}

}  // namespace kvreplay::test
