// What each query head does with named spans of the prompt while text is generated: copy from them, use them otherwise,
// or look elsewhere. Allocators over heads take these numbers as tables.
#pragma once
#include <span>
#include <vector>

#include "sim/layer.hpp"

namespace kvreplay {

// Means over the decode steps but the last, whose next token is not in the trace; one number per query head. With a
// head's attention at a step, and the token that follows it:
struct HeadScores {
  std::vector<double> surface;  // attention to span tokens that are the same token
  std::vector<double> logic;    // attention to all other span tokens
  std::vector<double> ignore;   // attention to tokens outside the spans: 1 - surface - logic
};

// token_ids: (n_tokens) of the trace. evidence: (prompt_len) whether a token is in the spans. hard: a step counts its
// most attended token (the latest of equals) as 1 instead of all tokens by their attention, as retrieval heads are
// found.
HeadScores head_scores(const Layer&, std::span<const std::int32_t> token_ids, const std::vector<bool>& evidence,
                       bool hard, int threads);

}  // namespace kvreplay
