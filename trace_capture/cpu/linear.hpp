// Linear layers over weights that stay as they lie in the mapped file, bf16, f16 or f32, and are widened on the fly.
#pragma once
#include <vector>

#include "trace_capture/cpu/rows.hpp"
#include "trace_capture/safetensors.hpp"

namespace kvreplay {

class Linear {
 public:
  explicit Linear(int threads) : threads_(threads) {}

  // y = x Wᵀ + bias, row by row. weight: (outputs, inputs), bias: (outputs) or none. Each element of y is summed by one
  // thread, in an order that depends on neither the number of threads nor, beyond one row, the number of rows.
  void apply(const Tensor& weight, const Tensor& bias, ConstRows x, Rows y);

 private:
  void apply_to_one(const Tensor& weight, const float* x, float* y) const;
  void apply_to_block(const Tensor& weight, ConstRows x, Rows y);
  void set_side_by_side(ConstRows x);

  int threads_;
  std::vector<float> lanes_;  // (blocks of kBlockLanes rows of x, inputs, rows of the block side by side)
  std::vector<float> bias_;   // (outputs)
};

}  // namespace kvreplay
