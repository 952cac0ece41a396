// What moments of the evicted tokens fail to predict of a token's value, |v - v_mean - S k scale / n|, and which tokens
// have least of it times their attention (MomentKV, arXiv:2606.01563, eq. 10).
#pragma once
#include <span>
#include <vector>

#include "policies/moments.hpp"

namespace kvreplay {

// Of several lanes, whose residuals are one long vector: one Moments each.
using LaneMoments = std::vector<Moments>;

// Adds these slots to the moments.
void accumulate(const View&, std::span<const int> slots, LaneMoments& into);
// From scratch; out[i] belongs to slots[i].
void residuals(const View&, std::span<const int> slots, const LaneMoments&, float scale, std::span<float> out);

// Scores of a set whose moments move a little at every step, at less than a product with S for every token: residuals
// are kept as of an earlier look, and bounds on how far they may have moved leave few tokens to compute anew.
class ResidualTracker {
 public:
  ResidualTracker(Pos n_tokens, float scale) : scale_(scale), known_(static_cast<std::size_t>(n_tokens)) {}

  void forget(const View&);  // tokens whose key or value was rewritten
  // out: attention, infinite where protected -> attention times residual. The n_out lowest are exact; every other score
  // is exact or a bound from below that is above those.
  void score(const View&, const LaneMoments& now, int n_out, std::span<float> out);

 private:
  // Of a token under the moments of the last look, lanes together.
  struct Known {
    float residual = -1;  // -1: to be computed
    float reach = 0;      // |k - k_mean|
  };
  struct Drift {
    float all = 0, per_reach = 0;
  };
  void look(const View&, const LaneMoments& now);
  void learn(const View&);
  Drift drift(const LaneMoments& now) const;

  float scale_;
  LaneMoments at_look_;             // when all residuals were last computed
  std::vector<Known> known_;        // (n_tokens) by position
  std::size_t judged_ = 0;          // candidates since the last look
  std::vector<float> low_, highs_;  // (n_slots), (slots not protected): bounds on scores
  std::vector<int> candidates_;     // (slots that can be among the lowest)
};

}  // namespace kvreplay
