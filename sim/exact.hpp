// Exact attention of a block of queries: the work that every method of a run shares.
#pragma once
#include "policies/soft_cap.hpp"
#include "policies/weights.hpp"
#include "sim/layer.hpp"

namespace kvreplay {

enum class ValueProduct { none, f32, f64 };  // f64 where f_E is asked for: it is a difference of sums

// Rows are (step, head in group), row = step * group_size + head. Weights are exp(logit - max of the row), stored token
// by token: a token's weights over the block are contiguous, so "resident until step s" is a prefix of them, and a
// token is 0 before its own step, so that being born needs no bookkeeping.
struct ExactBlock {
  Pos begin = 0;
  int steps = 0, rows = 0, group_size = 0;
  MatF weights;                // (>= begin + steps, stride >= rows)
  MatF logits;                 // the same shape, if kept
  Eigen::ArrayXf max_logit;    // (rows)
  Eigen::ArrayXd z, z_prompt;  // (rows) sum of weights over all tokens; over the prompt
  MatD num, num_prompt;        // (rows, v_head_dim) weights times values, same two ranges

  void compute(const Layer&, int kv_head, Pos begin, int steps, ValueProduct, bool keep_logits);
  // No queries are stored for these steps: all weights are 0.
  void blank(const Layer&, Pos begin, int steps);
  // Adds sign * the attention that each token received: mass is (group_size, >= begin + steps).
  void add_column_mass(MatD& mass, double sign) const;

 private:
  void reshape(const Layer&, Pos begin, int steps, bool keep_logits);
  MatD wide_, wide_v_;  // one tile of weights, of values
  MatF part_;           // (rows, v_head_dim) one tile's product
};

// Attention that each token received from queries [begin, end), each softmaxed over all its past: (group_size, end).
MatD column_mass(const Layer&, int kv_head, Pos begin, Pos end);

}  // namespace kvreplay
