#include "trace_capture/cuda/weights.cuh"

#include <algorithm>
#include <array>
#include <cstring>

namespace kvreplay::cuda {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

std::size_t product(int a, int b) { return sz(a) * sz(b); }

// Through two pieces of page-locked memory: while one is copied to the device, the other is filled.
class Uploader {
 public:
  Uploader() {
    for (Piece& piece : pieces_) {
      piece.memory = PinnedMemory(kBytes);
    }
  }

  // Nothing where the model has no such tensor.
  template <class T>
  void upload(const Tensor& tensor, T* to) {
    const std::size_t n = tensor ? sz(tensor.size()) : 0, most = kBytes / sizeof(T);
    for (std::size_t done = 0; done < n;) {
      const std::size_t now = std::min(most, n - done);
      Piece& piece = pieces_[next_];
      next_ = 1 - next_;
      piece.copied.wait();
      convert(tensor.type, tensor.data + done * size_of(tensor.type), now, kElement<T>, piece.memory.as<std::byte>());
      check(cudaMemcpyAsync(to + done, piece.memory.as<T>(), now * sizeof(T), cudaMemcpyHostToDevice, stream_.get()),
            "copying weights to the device");
      piece.copied.record(stream_);
      done += now;
    }
  }

  void wait() const { stream_.wait(); }

 private:
  static constexpr std::size_t kBytes = std::size_t{16} << 20;

  struct Piece {
    PinnedMemory memory;
    Event copied;
  };

  void convert(ElementType from, const std::byte* in, std::size_t n, ElementType to, std::byte* out) {
    if (from == to) {
      std::memcpy(out, in, n * size_of(from));
    } else if (to == ElementType::f32) {
      widen(from, in, {reinterpret_cast<float*>(out), n});
    } else {
      wide_.resize(n);
      widen(from, in, wide_);
      narrow(to, wide_, out);
    }
  }

  OwnStream stream_;
  std::array<Piece, 2> pieces_;
  std::size_t next_ = 0;
  std::vector<float> wide_;
};

}  // namespace

template <class T>
DeviceWeights<T> lay_out_weights(const Model& model, Parts& parts) {
  const ModelConfig& c = model.config;
  const std::size_t hidden = sz(c.hidden), q_width = product(c.n_heads, c.head_dim);
  const std::size_t qkv_width = q_width + 2 * product(c.n_kv_heads, c.head_dim), intermediate = sz(c.intermediate);
  const auto vector = [&](bool present, std::size_t n) { return present ? parts.take<float>(n) : nullptr; };

  DeviceWeights<T> weights{};
  weights.embedding = parts.take<T>(sz(c.vocab) * hidden);
  weights.head = model.head.data == model.embedding.data ? weights.embedding : parts.take<T>(sz(c.vocab) * hidden);
  weights.final_norm = parts.take<float>(hidden);
  for (const LayerWeights& from : model.layers) {
    DeviceLayer<T> layer{};
    layer.attention_norm = parts.take<float>(hidden);
    layer.mlp_norm = parts.take<float>(hidden);
    layer.q_norm = vector(bool(from.q_norm), sz(c.head_dim));
    layer.k_norm = vector(bool(from.k_norm), sz(c.head_dim));
    layer.qkv = parts.take<T>(qkv_width * hidden);
    layer.qkv_bias = vector(bool(from.q_bias), qkv_width);
    layer.o = parts.take<T>(hidden * q_width);
    layer.gate_up = parts.take<T>(2 * intermediate * hidden);
    layer.gate_up_bias = vector(bool(from.gate_bias), 2 * intermediate);
    layer.down = parts.take<T>(hidden * intermediate);
    layer.o_bias = vector(bool(from.o_bias), hidden);
    layer.down_bias = vector(bool(from.down_bias), hidden);
    weights.layers.push_back(layer);
  }
  return weights;
}

template <class T>
void upload_weights(const Model& model, const DeviceWeights<T>& weights) {
  const ModelConfig& c = model.config;
  const std::size_t hidden = sz(c.hidden), intermediate = sz(c.intermediate);
  const std::size_t q_width = product(c.n_heads, c.head_dim), kv_width = product(c.n_kv_heads, c.head_dim);
  Uploader uploader;
  uploader.upload(model.embedding, weights.embedding);
  if (weights.head != weights.embedding) {
    uploader.upload(model.head, weights.head);
  }
  uploader.upload(model.final_norm, weights.final_norm);
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const LayerWeights& from = model.layers[i];
    const DeviceLayer<T>& to = weights.layers[i];
    uploader.upload(from.attention_norm, to.attention_norm);
    uploader.upload(from.mlp_norm, to.mlp_norm);
    uploader.upload(from.q_norm, to.q_norm);
    uploader.upload(from.k_norm, to.k_norm);
    uploader.upload(from.q, to.qkv);
    uploader.upload(from.k, to.qkv + q_width * hidden);
    uploader.upload(from.v, to.qkv + (q_width + kv_width) * hidden);
    uploader.upload(from.q_bias, to.qkv_bias);
    uploader.upload(from.k_bias, to.qkv_bias + q_width);
    uploader.upload(from.v_bias, to.qkv_bias + q_width + kv_width);
    uploader.upload(from.o, to.o);
    uploader.upload(from.o_bias, to.o_bias);
    uploader.upload(from.gate, to.gate_up);
    uploader.upload(from.up, to.gate_up + intermediate * hidden);
    uploader.upload(from.gate_bias, to.gate_up_bias);
    uploader.upload(from.up_bias, to.gate_up_bias + intermediate);
    uploader.upload(from.down, to.down);
    uploader.upload(from.down_bias, to.down_bias);
  }
  uploader.wait();
}

template DeviceWeights<float> lay_out_weights<float>(const Model&, Parts&);
template DeviceWeights<F16> lay_out_weights<F16>(const Model&, Parts&);
template DeviceWeights<Bf16> lay_out_weights<Bf16>(const Model&, Parts&);
template void upload_weights<float>(const Model&, const DeviceWeights<float>&);
template void upload_weights<F16>(const Model&, const DeviceWeights<F16>&);
template void upload_weights<Bf16>(const Model&, const DeviceWeights<Bf16>&);

}  // namespace kvreplay::cuda
