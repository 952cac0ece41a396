// Statistics of the evicted tokens of one lane: the state, and what every row of a block sees of
// it.
#pragma once
#include <cstdint>

#include "policies/policy.hpp"

namespace kvreplay {

// Count, means and centred value-key scatter in float32, updated in Welford's form so that large
// key means cost no precision (MomentKV, arXiv:2606.01563, keeps raw sums in 16 bit instead).
// Order-independent up to rounding.
struct Moments {
  std::uint32_t n = 0;
  Eigen::VectorXf k_mean;  // (head_dim)
  Eigen::VectorXf v_mean;  // (v_head_dim)
  MatF scatter;            // (v_head_dim, head_dim) sum of (v - v_mean)(k - k_mean)^T, not normalised

  Moments(int head_dim, int v_head_dim);
  void add(const Eigen::Ref<const Eigen::VectorXf>& k, const Eigen::Ref<const Eigen::VectorXf>& v);
  void remove(const Eigen::Ref<const Eigen::VectorXf>& k, const Eigen::Ref<const Eigen::VectorXf>& v);
  void merge(const Moments& other);
  static Moments of(const Eigen::Ref<const MatF>& k,
                    const Eigen::Ref<const MatF>& v);  // two passes; rows are tokens
};

// What to keep beyond count and means.
struct MomentNeeds {
  bool tilt = false;      // value-key covariance times q
  bool diagonal = false;  // variance of the logits from the keys' variances alone
  bool full = false;      // variance of the logits from the keys' full covariance
  bool radii = false;     // bounds on the distance of keys and values from their means
  MomentNeeds operator|(const MomentNeeds& o) const {
    return {tilt || o.tilt, diagonal || o.diagonal, full || o.full, radii || o.radii};
  }
};

// The evicted set as each row of a block sees it; rows with n = 0 hold zeros, what nobody needs is
// empty.
struct MomentRows {
  Eigen::ArrayXd n;           // (rows)
  Eigen::ArrayXd mean_logit;  // (rows) q . k_mean
  MatD v_mean;                // (rows, v_head_dim)
  MatD tilt;                  // (rows, v_head_dim) scatter q / n
  Eigen::ArrayXd variance_diagonal,
      variance_full;                  // (rows) population variance of the evicted logits
  Eigen::ArrayXd radius_k, radius_v;  // (rows) every evicted k, v lies within this of its mean
};

// Follows one lane through the blocks. The state at a block's start meets all rows in matrix
// products; losses inside the block join step by step.
class MomentTrack {
 public:
  MomentTrack(int head_dim, int v_head_dim, MomentNeeds needs);
  // q: (steps * n_heads, head_dim), losses as in EvictedBlock. The result stands until the next
  // call.
  const MomentRows& block(const Eigen::Ref<const MatF>& q, int n_heads, std::span<const Loss> losses);

 private:
  void segment(const Eigen::Ref<const MatF>& q, int n_heads, int begin, int end, std::span<const Loss> losses);
  void absorb(std::span<const Loss> losses);
  void centre(std::span<const Loss> losses);
  void gather(std::span<const Loss> losses);
  void multiply_in();
  void join(std::span<const Loss> losses);

  int head_dim_, v_head_dim_;
  MomentNeeds needs_;
  MomentRows rows_;
  // Sums about a centre that float32 holds exactly and that follows the mean, so that nothing
  // cancels.
  double n_ = 0, n_centred_ = 0, radius_k_ = 0, radius_v_ = 0;
  Eigen::RowVectorXf k0_, v0_;     // the centre: (head_dim), (v_head_dim)
  Eigen::RowVectorXd k_, v_, kk_;  // sums of k - k0, v - v0, (k - k0)^2
  MatD kv_, kk_full_;              // sums of (k - k0)^T (v - v0) and (k - k0)^T (k - k0), keys along rows
  MatF kv_now_, kk_now_, outer_;   // the same rounded, and one chunk's share
  MatF lost_k_, lost_v_;           // (losses, .) centred keys and values of one chunk
  MatF logits_, tilted_,
      spread_;  // (rows, losses) centred logits; (rows, v_head_dim) q kv; (rows, head_dim) q kk
};

}  // namespace kvreplay
