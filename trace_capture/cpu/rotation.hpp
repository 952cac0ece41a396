// Rotary position embedding in the half-split layout: channel i turns with channel i + head_dim / 2.
#pragma once
#include <vector>

#include "trace_capture/cpu/rows.hpp"
#include "trace_capture/rope.hpp"
#include "traces/reader.hpp"

namespace kvreplay {

// The angles of a pass, shared by all its layers and heads.
class Rotation {
 public:
  // For tokens at positions [first, first + n). Angles are float32 products, as the models were trained with them and
  // transformers forms them: at token 2000 the product in double is already 1e-4 rad away. Their cosines are exact.
  void prepare(const RopeTable& table, Pos first, Pos n);
  // Turns every head of every row: rows (n, heads * head_dim).
  void apply(Rows rows) const;

 private:
  std::ptrdiff_t half_ = 0;       // head_dim / 2
  std::vector<float> cos_, sin_;  // (n, half_), both times the attention factor
};

}  // namespace kvreplay
