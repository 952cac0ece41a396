// What runs on the device, as plain functions: each enqueues its work on a stream and returns. All pointers are device
// memory. T is the element type of weights and activations: F16, Bf16 or float; sums are float32.
#pragma once
#include <cstddef>
#include <cstdint>

#include "trace_capture/cuda/index.hpp"

struct CUstream_st;

namespace kvreplay::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// x (n, hidden) = rows `ids` of embedding (vocab, hidden).
template <class T>
void gather(const T* embedding, const std::int32_t* ids, float* x, int n, int hidden, Stream stream);

// out (n, hidden) = x / sqrt(mean(x^2) + eps) * weight (hidden).
template <class T>
void rms_norm(const float* x, const float* weight, T* out, int n, int hidden, float eps, Stream stream);

// x (n, width) += bias (width).
void add_bias(float* x, const float* bias, int n, int width, Stream stream);

// out (n, width) = silu(gate) * up, of gate_up (n, 2 * width): gate first, then up. bias (2 * width) or nullptr.
template <class T>
void gate(const float* gate_up, const float* bias, T* out, int n, int width, Stream stream);

// y (rows) = W (rows, k) x (k), or y += W x: the product of one token, at the speed of reading W.
template <class T>
void multiply_one(const T* weight, const T* x, float* y, int rows, int k, bool add, Stream stream);

// out (width) = silu(gate) * up of one token, where weight (2 * width, k) holds the gate's rows, then the up's.
template <class T>
void multiply_gate_one(const T* weight, const float* bias, const T* x, T* out, int width, int k, Stream stream);

// Takes the fused product apart: adds the bias, normalises q and k (QK-norm), rotates them, and puts k and v into the
// cache at [past, past + n).
template <class T>
struct Placing {
  const float* qkv;       // (n, (n_heads + 2 * n_kv_heads) * head_dim)
  const float* bias;      // ((n_heads + 2 * n_kv_heads) * head_dim), or nullptr
  const float* q_norm;    // (head_dim), or nullptr
  const float* k_norm;    // (head_dim), or nullptr
  const float* rotation;  // (capacity, head_dim / 2, 2) cos and sin by position
  T* q;                   // (n, n_heads, head_dim)
  T* k;                   // (n_kv_heads, capacity, head_dim)
  T* v;                   // (n_kv_heads, capacity, head_dim)
  int n, past, n_heads, n_kv_heads, head_dim, capacity;
  float eps;
  ElementType stored = kElement<T>;  // what q, k and v are rounded to as well
};
template <class T>
void place(const Placing<T>& placing, Stream stream);

// Causal attention of n queries at [past, past + n) over the cache; window 0 = all.
template <class T>
struct Attention {
  const T* q;   // (n, n_heads, head_dim)
  const T* k;   // (n_kv_heads, capacity, head_dim)
  const T* v;   // (n_kv_heads, capacity, head_dim)
  T* attn;      // (n, n_heads, head_dim)
  float* out;   // the same before rounding, or nullptr
  float* part;  // n = 1: (n_heads, max_splits, head_dim + 2) unscaled output, maximum, sum of each split
  int n, past, n_heads, n_kv_heads, head_dim, capacity, window;
  float scale;
};
template <class T>
void attend(const Attention<T>& attention, Stream stream);
// Shared memory that a block of attend() with n > 1 needs, bytes.
std::size_t attention_shared_bytes(int head_dim);

// Of each row of logits (rows, vocab): id and log softmax at next[row], or at the largest logit (ties: the lower id)
// where next is nullptr.
struct Scored {
  std::int32_t id;
  float logprob;
};
void score(const float* logits, const std::int32_t* next, Scored* out, int rows, int vocab, Stream stream);

// Fills a packet (trace_capture/packet.hpp) of n tokens from `first` on, in n_layers layers. Row 0 of a layer's q and
// out is token `pass_first`. What the element type cannot hold becomes infinite, which the recorder refuses.
template <class T>
struct Packing {
  const std::int32_t* layers;   // (n_layers) numbers in the model
  const std::int32_t* queries;  // (m) tokens whose queries are stored
  const std::int32_t* outputs;  // (c) tokens whose attention outputs are stored
  const T* cache;               // (layers of the model, 2, n_kv_heads, capacity, head_dim)
  const T* q;                   // (n_layers, pass_n, n_heads, head_dim)
  const float* out;             // (n_layers, pass_n, n_heads, head_dim)
  std::byte* packet;
  std::size_t k_at, v_at, q_at, out_at, layer_stride;  // of the packet, bytes
  int first, pass_first, pass_n, n_layers, head_dim, capacity;
  PackCounts counts;
};
template <class T>
void pack(const Packing<T>& packing, ElementType element, Stream stream);

}  // namespace kvreplay::cuda
