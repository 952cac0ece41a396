// Which evicted tokens an error comes from, when they left, and whether they were needed again.
//
// With w_j the attention that token j would have had, f - f_R is the sum over E of w_j (v_j - f_R). What one token adds
// along the error's own direction, w_j (v_j - f_R) . (f - f_R) / (|f - f_R| |f|), is its damage: the damages of a step
// add up to `error` exactly, whatever decided the evictions. docs/explain.md has the words.
#pragma once
#include <vector>

#include "sim/replay.hpp"

namespace kvreplay {

inline constexpr int kCulprits = 5;  // tokens kept per step, by damage

// Query heads of one KV head that miss the same tokens: its whole group, or one head in query_head scope. Numbers are
// summed over these heads. Steps are decode steps; -1: never.
struct LaneAttribution {
  int kv_head = 0, q_head = -1;          // q_head: the model's, or -1 for the whole group
  std::vector<std::int32_t> evicted_at;  // (n_tokens) first step without the token, n_steps: never
  std::vector<double> damage;            // (n_tokens) summed over the steps that `error` counts
  std::vector<double> regret;            // (n_tokens) attention it would have had, summed over steps without it
  // A step misses a token that is not there and whose attention, mean over the heads, is among the |R| largest of V:
  // with as many tokens one would have kept it.
  std::vector<std::int32_t> missed, first_missed;  // (n_tokens) steps that missed it; the first of them
  std::vector<std::int32_t> worst_step;            // (n_tokens) where its damage is largest
  std::vector<double> worst_damage;                // (n_tokens)
  std::vector<std::int32_t> step_missed;           // (n_steps) tokens missed
  std::vector<double> step_missed_mass;            // (n_steps) their attention, mean over the heads
  std::vector<std::int32_t> culprit;   // (n_steps, kCulprits) tokens of largest damage, largest first; or -1
  std::vector<double> culprit_damage;  // (n_steps, kCulprits)
};

// One per lane, by KV head. The cell holds `error`, and `attended` where it reads: E is what is not attended then. The
// layer's queries begin at its prompt_len or before.
std::vector<LaneAttribution> attribute(const Layer&, const CellResult&, int threads);

}  // namespace kvreplay
