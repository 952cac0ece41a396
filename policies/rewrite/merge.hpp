// What the merging rewriters share: whom a leaving token resembles, what attention tokens have received, and
// what a merged slot costs.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <span>
#include <vector>

#include "policies/column_mass.hpp"
#include "policies/staying.hpp"

namespace kvreplay {

// When tokens that leave are merged into others.
enum class MergeAt { prompt, always };
inline constexpr std::string_view kMergeAts[] = {"prompt", "always"};

// 0 where a vector has no direction.
inline double cosine(const VecF& a, const VecF& b) {
  const double norms = a.cast<double>().norm() * b.cast<double>().norm();
  return norms > 0 ? a.cast<double>().dot(b.cast<double>()) / norms : 0;
}

struct Nearest {
  int slot = -1;  // -1: nobody stays
  double cosine = -2;
};

// For each slot that leaves, the staying one whose key has the largest cosine; of equals the oldest.
inline std::vector<Nearest> nearest_slots(const View& view, int lane, std::span<const int> leaving,
                                          std::span<const int> staying) {
  constexpr double kTie = 1e-12;
  constexpr float kFloatError = 1e-5F;  // products in float find the candidates, double decides between them
  constexpr std::size_t kFew = 3, kChunk = 256;
  std::vector<Nearest> out(leaving.size());
  const auto offer = [&](std::size_t i, int slot) {
    const double u = cosine(view.key(lane, leaving[i]), view.key(lane, slot));
    if (u > out[i].cosine + kTie) {
      out[i] = {slot, u};
    }
  };
  if (leaving.size() <= kFew) {
    for (std::size_t i = 0; i < leaving.size(); ++i) {
      for (const int slot : staying) {
        offer(i, slot);
      }
    }
    return out;
  }
  if (staying.empty()) {
    return out;
  }
  const auto directions = [&](std::span<const int> slots) {
    MatF k(static_cast<Eigen::Index>(slots.size()), view.head_dim);
    for (Eigen::Index i = 0; i < k.rows(); ++i) {
      k.row(i) = view.key(lane, slots[static_cast<std::size_t>(i)]).stableNormalized();
    }
    return k;
  };
  const MatF kept = directions(staying);
  for (std::size_t first = 0; first < leaving.size(); first += kChunk) {
    const std::size_t n = std::min(kChunk, leaving.size() - first);
    const MatF u = directions(leaving.subspan(first, n)) * kept.transpose();
    for (std::size_t i = 0; i < n; ++i) {
      const auto row = u.row(static_cast<Eigen::Index>(i));
      const float close = row.maxCoeff() - kFloatError;
      for (Eigen::Index j = 0; j < row.size(); ++j) {
        if (row[j] >= close) {
          offer(first + i, staying[static_cast<std::size_t>(j)]);
        }
      }
    }
  }
  return out;
}

// Attention of the current queries in one lane, over all that is resident, reduced over its heads: (n_slots).
inline void lane_attention(const View& view, int lane, std::vector<float>& out) {
  out.assign(view.pos.size(), 0.0F);
  if (view.n_lanes == 1) {
    view.attention(out);
    return;
  }
  std::vector<float> one(out.size());
  for (int head = 0; head < view.n_heads; ++head) {
    view.head_attention(lane, head, one);
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = view.group == Reduce::max ? std::max(out[i], one[i]) : out[i] + one[i];
    }
  }
  if (view.group == Reduce::mean) {
    for (float& a : out) {
      a /= static_cast<float>(view.n_heads);
    }
  }
}

// Attention that each token received since birth, by lane and position.
class ReceivedAttention {
 public:
  ReceivedAttention(const SetShape& shape, bool of_prompt)
      : of_prompt_(of_prompt),
        sums_(static_cast<std::size_t>(shape.n_lanes), std::vector<double>(static_cast<std::size_t>(shape.n_tokens))) {}

  // Once per step, before a slot is rewritten: a rewritten slot has its weights from the next step on.
  void meet(const View& view) {
    if (view.now == now_ || view.pos.empty()) {
      return;
    }
    now_ = view.now;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      std::vector<double>& sum = sums_[static_cast<std::size_t>(lane)];
      if (!view.at_prefill()) {
        lane_attention(view, lane, attn_);
        for (std::size_t i = 0; i < attn_.size(); ++i) {
          sum[static_cast<std::size_t>(view.pos[i])] += static_cast<double>(attn_[i]);
        }
      } else if (of_prompt_) {
        const Eigen::RowVectorXd mass = reduce_heads(view.group, view.column_mass(lane, Needs::kAll));
        std::copy(mass.begin(), mass.end(), sum.begin());
      }
    }
  }
  double& of(int lane, Pos pos) { return sums_[static_cast<std::size_t>(lane)][static_cast<std::size_t>(pos)]; }

 private:
  bool of_prompt_;
  Pos now_ = -1;
  std::vector<std::vector<double>> sums_;  // per lane (n_tokens)
  std::vector<float> attn_;                // (n_slots)
};

// A bias, or votes, is one number more to keep, from the first merge on that gives one.
inline void store_merged(Cache& cache, int lane, int slot, const Eigen::VectorXf& k, const Eigen::VectorXf& v,
                         float bias, int element_bytes) {
  const int more = (bias != 0 ? 1 : 0) - (cache.bias(lane, slot) != 0 ? 1 : 0);
  cache.rewrite(lane, slot, k, v, bias, cache.bytes(lane, slot) + more * element_bytes);
}

}  // namespace kvreplay
