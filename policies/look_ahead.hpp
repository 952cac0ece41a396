// What forgetting one more token costs the corrected output at once: |out(R \ j, E + j) - out(R, E)|, exactly, where
// out joins the attention over the retained tokens R with the first-order estimate of the evicted E
// (MomentKV, arXiv:2606.01563, eq. 9, 11 and 12), and E + j has the moments after j joined.
#pragma once
#include "policies/moments.hpp"

namespace kvreplay {

// Moments of the evicted in float64.
struct Evicted64 {
  double n = 0;            // at least 1: with nothing evicted, one token is remembered exactly and costs nothing
  Eigen::VectorXd k_mean;  // (head_dim)
  Eigen::VectorXd v_mean;  // (v_head_dim)
  MatD scatter;            // (v_head_dim, head_dim)

  static Evicted64 of(const Moments& m) {
    return {static_cast<double>(m.n), m.k_mean.cast<double>(), m.v_mean.cast<double>(), m.scatter.cast<double>()};
  }
};

// Of one query q (head_dim), softmax scale folded in; logits (n) and values (n, v_head_dim) are those of the retained
// tokens, at least one: (n), in O(n v_head_dim).
Eigen::ArrayXd look_ahead(const Evicted64& evicted, const Eigen::Ref<const Eigen::VectorXd>& q,
                          const Eigen::Ref<const Eigen::ArrayXd>& logits, const Eigen::Ref<const MatD>& values);

}  // namespace kvreplay
