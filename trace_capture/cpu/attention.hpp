// Causal attention of the tokens of a pass over a cache of keys and values, exact: blocks of keys are read once, with
// the softmax rescaled as its maximum grows.
#pragma once
#include <vector>

#include "trace_capture/config.hpp"
#include "trace_capture/cpu/rows.hpp"
#include "traces/reader.hpp"

namespace kvreplay {

// The keys and values of one layer; rows of tokens that were not passed yet are not initialised.
struct LayerCache {
  const float* k = nullptr;     // (n_kv_heads, capacity, head_dim)
  const float* v = nullptr;     // (n_kv_heads, capacity, head_dim)
  std::ptrdiff_t capacity = 0;  // tokens
};

class Attention {
 public:
  Attention(const ModelConfig& config, int threads);

  // out = softmax(scale q kᵀ) v. Row i of q and out (n, n_heads * head_dim) is token first + i, which attends the
  // tokens (first + i - window, first + i], or all before it where window is 0. Each head of a token is computed by one
  // thread, in an order that does not depend on the number of threads.
  void attend(ConstRows q, const LayerCache& cache, Pos first, int window, Rows out);

 private:
  struct Task;
  void run(const Task& task, float* scratch) const;

  std::ptrdiff_t n_kv_heads_, group_size_, head_dim_;
  float scale_;
  int threads_;
  std::ptrdiff_t scratch_size_;
  std::vector<float> scratch_;  // (threads, scratch_size_)
};

}  // namespace kvreplay
