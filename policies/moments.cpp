#include "policies/moments.hpp"

#include <algorithm>
#include <cmath>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

constexpr std::size_t kChunk = 256;  // losses per matrix product

Eigen::Map<const Eigen::RowVectorXf> row(const float* x, int n) { return {x, n}; }

}  // namespace

Moments::Moments(int head_dim, int v_head_dim)
    : k_mean(Eigen::VectorXf::Zero(head_dim)),
      v_mean(Eigen::VectorXf::Zero(v_head_dim)),
      scatter(MatF::Zero(v_head_dim, head_dim)) {}

void Moments::add(const Eigen::Ref<const Eigen::VectorXf>& k, const Eigen::Ref<const Eigen::VectorXf>& v) {
  const float before = static_cast<float>(n), after = before + 1;
  const Eigen::VectorXf dk = k - k_mean, dv = v - v_mean;
  scatter.noalias() += (before / after * dv) * dk.transpose();
  k_mean += dk / after;
  v_mean += dv / after;
  ++n;
}

void Moments::remove(const Eigen::Ref<const Eigen::VectorXf>& k, const Eigen::Ref<const Eigen::VectorXf>& v) {
  KVREPLAY_CHECK(n > 0);
  if (--n == 0) {
    *this = Moments(static_cast<int>(k_mean.size()), static_cast<int>(v_mean.size()));
    return;
  }
  const float after = static_cast<float>(n);
  k_mean -= (k - k_mean) / after;
  v_mean -= (v - v_mean) / after;
  scatter.noalias() -= (after / (after + 1) * (v - v_mean)) * (k - k_mean).transpose();
}

void Moments::merge(const Moments& other) {
  if (other.n == 0) {
    return;
  }
  const double total = static_cast<double>(n) + other.n;
  const float share = static_cast<float>(other.n / total);
  const Eigen::VectorXf dk = other.k_mean - k_mean, dv = other.v_mean - v_mean;
  scatter += other.scatter;
  scatter.noalias() += (static_cast<float>(n) * share * dv) * dk.transpose();
  k_mean += share * dk;
  v_mean += share * dv;
  n += other.n;
}

Moments Moments::of(const Eigen::Ref<const MatF>& k, const Eigen::Ref<const MatF>& v) {
  KVREPLAY_CHECK(k.rows() == v.rows());
  Moments m(static_cast<int>(k.cols()), static_cast<int>(v.cols()));
  if (k.rows() == 0) {
    return m;
  }
  m.n = static_cast<std::uint32_t>(k.rows());
  m.k_mean = (k.cast<double>().colwise().sum() / m.n).transpose().cast<float>();
  m.v_mean = (v.cast<double>().colwise().sum() / m.n).transpose().cast<float>();
  const MatF dk = k.rowwise() - m.k_mean.transpose(), dv = v.rowwise() - m.v_mean.transpose();
  m.scatter.noalias() = dv.transpose() * dk;
  return m;
}

MomentTrack::MomentTrack(int head_dim, int v_head_dim, MomentNeeds needs)
    : head_dim_(head_dim),
      v_head_dim_(v_head_dim),
      needs_(needs),
      k0_(Eigen::RowVectorXf::Zero(head_dim)),
      v0_(Eigen::RowVectorXf::Zero(v_head_dim)),
      k_(Eigen::RowVectorXd::Zero(head_dim)),
      v_(Eigen::RowVectorXd::Zero(v_head_dim)),
      kk_(Eigen::RowVectorXd::Zero(head_dim)) {
  if (needs.tilt) {
    kv_ = MatD::Zero(head_dim, v_head_dim);
  }
  if (needs.full) {
    kk_full_ = MatD::Zero(head_dim, head_dim);
  }
}

const MomentRows& MomentTrack::block(const Eigen::Ref<const MatF>& q, int n_heads, std::span<const Loss> losses) {
  const Eigen::Index rows = q.rows();
  const int steps = static_cast<int>(rows) / n_heads;
  rows_.n.resize(rows);
  rows_.mean_logit.resize(rows);
  rows_.v_mean.resize(rows, v_head_dim_);
  if (needs_.tilt) {
    rows_.tilt.resize(rows, v_head_dim_);
  }
  if (needs_.diagonal) {
    rows_.variance_diagonal.resize(rows);
  }
  if (needs_.full) {
    rows_.variance_full.resize(rows);
  }
  if (needs_.radii) {
    rows_.radius_k.resize(rows);
    rows_.radius_v.resize(rows);
  }
  // Those that only the next block will miss.
  std::size_t n_here = losses.size();
  while (n_here > 0 && losses[n_here - 1].step >= steps) {
    --n_here;
  }
  const std::span<const Loss> later = losses.subspan(n_here);
  losses = losses.first(n_here);
  std::size_t taken = 0;
  for (int begin = 0; begin < steps;) {
    // Losses of a segment's first step join the state before its products. Later ones ride along
    // while they are few and fewer than those before: then the centre is never far off, even at the
    // start.
    std::size_t first = taken;
    while (first < losses.size() && losses[first].step <= begin) {
      ++first;
    }
    const double before = n_ + static_cast<double>(first - taken);
    std::size_t last = first;
    int end = steps;
    while (last < losses.size()) {
      std::size_t next = last;
      while (next < losses.size() && losses[next].step == losses[last].step) {
        ++next;
      }
      if (next - first > kChunk || static_cast<double>(next - first) > before) {
        end = losses[last].step;
        break;
      }
      last = next;
    }
    segment(q, n_heads, begin, end, losses.subspan(taken, last - taken));
    taken = last;
    begin = end;
  }
  absorb(later);
  return rows_;
}

// Rows of steps begin to end. `losses`: up to the last of these steps.
void MomentTrack::segment(const Eigen::Ref<const MatF>& q, int n_heads, int begin, int end,
                          std::span<const Loss> losses) {
  const Eigen::Index first_row = Eigen::Index{begin} * n_heads, n_rows = Eigen::Index{end - begin} * n_heads;
  const auto q_rows = q.middleRows(first_row, n_rows);
  const bool products = needs_.tilt || needs_.full;
  std::size_t seen = 0;
  while (seen < losses.size() && losses[seen].step <= begin) {
    ++seen;
  }
  const std::span<const Loss> fresh = losses.subspan(seen);
  absorb(losses.first(seen));
  if (products) {
    gather(fresh);
    logits_.resize(n_rows, lost_k_.rows());
    if (!fresh.empty()) {
      logits_.noalias() = q_rows * lost_k_.transpose();
    }
    std::size_t happened = 0;
    for (int step = begin; step < end && happened < fresh.size(); ++step) {
      while (happened < fresh.size() && fresh[happened].step <= step) {
        ++happened;
      }
      logits_
          .block(Eigen::Index{step - begin} * n_heads, static_cast<Eigen::Index>(happened), n_heads,
                 static_cast<Eigen::Index>(fresh.size() - happened))
          .setZero();
    }
    if (needs_.tilt) {
      kv_now_ = kv_.cast<float>();
      tilted_.resize(n_rows, v_head_dim_);
      tilted_.noalias() = q_rows * kv_now_;
      if (!fresh.empty()) {
        tilted_.noalias() += logits_ * lost_v_;
      }
    }
    if (needs_.full) {
      kk_now_ = kk_full_.cast<float>();
      spread_.resize(n_rows, head_dim_);
      spread_.noalias() = q_rows * kk_now_;
    }
    if (!fresh.empty()) {
      multiply_in();
    }
  }

  Eigen::RowVectorXd k_mean, v_mean, v_shift;  // k_mean and v_shift about the centre
  Eigen::RowVectorXf variance;                 // (head_dim) of the keys
  const Eigen::RowVectorXd k0 = k0_.cast<double>();
  std::size_t joined = 0;
  for (int step = begin; step < end; ++step) {
    std::size_t next = joined;
    while (next < fresh.size() && fresh[next].step <= step) {
      ++next;
    }
    const bool changed = next > joined;
    if (changed) {
      join(fresh.subspan(joined, next - joined));
    }
    joined = next;
    if (n_ > 0 && (changed || step == begin)) {
      k_mean = k_ / n_;
      v_shift = v_ / n_;
      v_mean = v0_.cast<double>() + v_shift;
      if (needs_.diagonal) {
        variance = (kk_ / n_ - k_mean.cwiseAbs2()).cwiseMax(0).cast<float>();
      }
    }
    for (int head = 0; head < n_heads; ++head) {
      const Eigen::Index r = Eigen::Index{step} * n_heads + head, i = r - first_row;
      rows_.n[r] = n_;
      if (needs_.radii) {
        rows_.radius_k[r] = radius_k_;
        rows_.radius_v[r] = radius_v_;
      }
      if (n_ == 0) {
        rows_.mean_logit[r] = 0;
        rows_.v_mean.row(r).setZero();
        if (needs_.tilt) {
          rows_.tilt.row(r).setZero();
        }
        if (needs_.diagonal) {
          rows_.variance_diagonal[r] = 0;
        }
        if (needs_.full) {
          rows_.variance_full[r] = 0;
        }
        continue;
      }
      const auto q_row = q.row(r).cast<double>();
      const double shift = q_row.dot(k_mean);
      rows_.mean_logit[r] = q_row.dot(k0) + shift;
      rows_.v_mean.row(r) = v_mean;
      if (needs_.tilt) {
        rows_.tilt.row(r) = tilted_.row(i).cast<double>() / n_ - shift * v_shift;
      }
      if (needs_.diagonal) {
        rows_.variance_diagonal[r] = q.row(r).cwiseAbs2().dot(variance);
      }
      if (needs_.full) {
        const double squares =
            static_cast<double>(q.row(r).dot(spread_.row(i))) + static_cast<double>(logits_.row(i).squaredNorm());
        rows_.variance_full[r] = std::max(0.0, squares / n_ - shift * shift);
      }
    }
  }
}

// Losses of one step, all at once.
void MomentTrack::absorb(std::span<const Loss> losses) {
  centre(losses);
  join(losses);
  for (std::size_t i = 0; (needs_.tilt || needs_.full) && i < losses.size(); i += kChunk) {
    gather(losses.subspan(i, std::min(kChunk, losses.size() - i)));
    multiply_in();
  }
}

// Moves the centre to the mean, at the start to that of `losses`, whenever the count has doubled.
void MomentTrack::centre(std::span<const Loss> losses) {
  if (n_ == 0 && !losses.empty()) {
    Eigen::RowVectorXd k = k_, v = v_;  // zero
    for (const Loss& x : losses) {
      k += row(x.k, head_dim_).cast<double>();
      v += row(x.v, v_head_dim_).cast<double>();
    }
    k0_ = (k / static_cast<double>(losses.size())).cast<float>();
    v0_ = (v / static_cast<double>(losses.size())).cast<float>();
    n_centred_ = static_cast<double>(losses.size());
  } else if (n_ > 0 && n_ >= 2 * n_centred_) {
    const Eigen::RowVectorXf k0 = (k0_.cast<double>() + k_ / n_).cast<float>();
    const Eigen::RowVectorXf v0 = (v0_.cast<double>() + v_ / n_).cast<float>();
    const Eigen::RowVectorXd dk = k0.cast<double>() - k0_.cast<double>();
    const Eigen::RowVectorXd dv = v0.cast<double>() - v0_.cast<double>();
    if (needs_.tilt) {
      kv_.noalias() -= k_.transpose() * dv;
      kv_.noalias() += dk.transpose() * (n_ * dv - v_);
    }
    if (needs_.full) {
      kk_full_.noalias() -= k_.transpose() * dk;
      kk_full_.noalias() += dk.transpose() * (n_ * dk - k_);
    }
    kk_ += (dk.array() * (n_ * dk - 2 * k_).array()).matrix();
    k_ -= n_ * dk;
    v_ -= n_ * dv;
    k0_ = k0;
    v0_ = v0;
    n_centred_ = n_;
  }
}

void MomentTrack::gather(std::span<const Loss> losses) {
  const auto n = static_cast<Eigen::Index>(losses.size());
  lost_k_.resize(n, head_dim_);
  lost_v_.resize(n, v_head_dim_);
  for (Eigen::Index i = 0; i < n; ++i) {
    const Loss& x = losses[static_cast<std::size_t>(i)];
    lost_k_.row(i) = row(x.k, head_dim_) - k0_;
    lost_v_.row(i) = row(x.v, v_head_dim_) - v0_;
  }
}

// The gathered losses enter the two matrices: products in float32, sums in double.
void MomentTrack::multiply_in() {
  if (needs_.tilt) {
    outer_.resize(head_dim_, v_head_dim_);
    outer_.noalias() = lost_k_.transpose() * lost_v_;
    kv_ += outer_.cast<double>();
  }
  if (needs_.full) {
    outer_.resize(head_dim_, head_dim_);
    outer_.noalias() = lost_k_.transpose() * lost_k_;
    kk_full_ += outer_.cast<double>();
  }
}

// The losses of one step enter count, vectors and radii together.
void MomentTrack::join(std::span<const Loss> losses) {
  if (losses.empty()) {
    return;
  }
  Eigen::RowVectorXd k_shift, v_shift;  // of the means
  if (needs_.radii && n_ > 0) {
    k_shift = k_ / n_;
    v_shift = v_ / n_;
  }
  for (const Loss& x : losses) {
    const auto k = (row(x.k, head_dim_) - k0_).cast<double>();
    k_ += k;
    v_ += (row(x.v, v_head_dim_) - v0_).cast<double>();
    if (needs_.diagonal) {
      kk_ += k.cwiseAbs2();
    }
  }
  const bool had = n_ > 0;
  n_ += static_cast<double>(losses.size());
  if (!needs_.radii) {
    return;
  }
  radius_k_ = had ? radius_k_ + (k_ / n_ - k_shift).norm() : 0;
  radius_v_ = had ? radius_v_ + (v_ / n_ - v_shift).norm() : 0;
  const Eigen::RowVectorXf k_mean = (k0_.cast<double>() + k_ / n_).cast<float>();
  const Eigen::RowVectorXf v_mean = (v0_.cast<double>() + v_ / n_).cast<float>();
  for (const Loss& x : losses) {
    radius_k_ = std::max<double>(radius_k_, (row(x.k, head_dim_) - k_mean).norm());
    radius_v_ = std::max<double>(radius_v_, (row(x.v, v_head_dim_) - v_mean).norm());
  }
}

}  // namespace kvreplay
