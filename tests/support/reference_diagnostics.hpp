// The diagnostics in float64, written from their definitions over whole rows of attention; shares no arithmetic with
// the engine.
#pragma once
#include <functional>

#include "tests/support/reference.hpp"

namespace kvreplay::testing {

// (n_steps, n_tokens): attention of one query head at every decode step, 0 for tokens to come.
MatD attention_rows(const ToyLayer& layer, int q_head);

// Whether a token has left by a decode step: the step does not have it.
using Gone = std::function<bool(int step, Pos pos)>;

// At every step: attention of the next `horizon` steps on tokens that had left, over that on tokens that were born,
// both without the first `sink` tokens. NaN where nothing is to come.
Eigen::VectorXd reference_future_missed(const MatD& rows, Pos prompt_len, int horizon, Pos sink, const Gone& gone);

// The n largest of a row, the older first where they are equal.
std::vector<Pos> largest(const Eigen::VectorXd& row, std::size_t n);

struct ReferenceImportance {
  int eligible = 0, returned = 0, lost = 0, lost_returned = 0;
  int from[2] = {0, 0}, changed[2] = {0, 0};
};
// Windows of 8 tokens at events of 8 steps; resident: slots at a step.
ReferenceImportance reference_importance(const MatD& rows, Pos prompt_len, const Gone& gone,
                                         const std::function<int(int step)>& resident);

}  // namespace kvreplay::testing
