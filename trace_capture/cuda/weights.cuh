// A model's weights on the device: q, k, v in one matrix, gate and up in one matrix, vectors as float32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "trace_capture/cuda/device.cuh"
#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/model.hpp"

namespace kvreplay::cuda {

// Cuts one piece of memory into parts. Without a base it only counts, so that one function both sizes and places.
class Parts {
 public:
  explicit Parts(std::byte* base = nullptr) : base_(base) {}

  template <class T>
  T* take(std::size_t n) {
    at_ = (at_ + 255) / 256 * 256;
    T* part = base_ != nullptr ? reinterpret_cast<T*>(base_ + at_) : nullptr;
    at_ += n * sizeof(T);
    return part;
  }
  std::size_t bytes() const { return at_; }

 private:
  std::byte* base_;
  std::size_t at_ = 0;
};

// nullptr = the model has none.
template <class T>
struct DeviceLayer {
  float *attention_norm, *mlp_norm;  // (hidden)
  float *q_norm, *k_norm;            // (head_dim)
  T* qkv;                            // ((n_heads + 2 * n_kv_heads) * head_dim, hidden)
  float* qkv_bias;                   // ((n_heads + 2 * n_kv_heads) * head_dim)
  T* o;                              // (hidden, n_heads * head_dim)
  T* gate_up;                        // (2 * intermediate, hidden)
  float* gate_up_bias;               // (2 * intermediate)
  T* down;                           // (hidden, intermediate)
  float *o_bias, *down_bias;         // (hidden)
};

template <class T>
struct DeviceWeights {
  T *embedding, *head;  // (vocab, hidden); the same where they are tied
  float* final_norm;    // (hidden)
  std::vector<DeviceLayer<T>> layers;
};

template <class T>
DeviceWeights<T> lay_out_weights(const Model& model, Parts& parts);

// Copies and converts the model's tensors to their places.
template <class T>
void upload_weights(const Model& model, const DeviceWeights<T>& weights);

}  // namespace kvreplay::cuda
