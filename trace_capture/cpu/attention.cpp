#include "trace_capture/cpu/attention.hpp"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "trace_capture/cpu/lane_array.hpp"
#include "trace_capture/cpu/product.hpp"

namespace kvreplay {
namespace {

using Index = std::ptrdiff_t;
using Lanes = std::array<float, kBlockLanes>;

constexpr Index kKeys = 128;                     // keys of one block
constexpr Index kWorthThreads = Index{1} << 17;  // multiplications
constexpr float kNegligible = -87;               // of a logit below the maximum: e^-87 is the smallest normal float
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The online softmax of one block of lanes.
struct Softmax {
  Lanes max;
  std::array<double, kBlockLanes> sum = {};

  Softmax() { max.fill(kMinusInfinity); }

  // Turns logits (keys, lanes) into weights relative to the maximum so far; `decay` is what earlier weights shrink by.
  void add(float* logits, Index keys, Index lanes, Lanes& decay) {
    Lanes reference = max, block_sum = {};
    for (Index j = 0; j < keys; ++j) {
      for (Index i = 0; i < lanes; ++i) {
        const float logit = logits[j * lanes + i];
        reference[static_cast<std::size_t>(i)] = std::max(reference[static_cast<std::size_t>(i)], logit);
      }
    }
    for (std::size_t i = 0; i < static_cast<std::size_t>(lanes); ++i) {
      const float old = max[i];
      max[i] = reference[i];
      reference[i] = std::isinf(reference[i]) && reference[i] < 0 ? 0.0F : reference[i];  // no key of its own yet
      decay[i] = std::exp(old - reference[i]);
    }
    for (Index i = 0; i < lanes; i += kLanes) {
      const LaneArray from = lanes_at(reference.data() + i);
      LaneArray total = LaneArray::Zero();
      for (Index j = 0; j < keys; ++j) {
        const LaneArray below = lanes_at(logits + j * lanes + i) - from;
        LaneArray weight = below.exp();
        for (int lane = 0; lane < kLanes; ++lane) {
          weight[lane] = below[lane] <= kNegligible ? 0.0F : weight[lane];  // in this order a NaN stays one
        }
        lanes_at(logits + j * lanes + i) = weight;
        total += weight;
      }
      lanes_at(block_sum.data() + i) = total;
    }
    for (std::size_t i = 0; i < static_cast<std::size_t>(lanes); ++i) {
      sum[i] = sum[i] * static_cast<double>(decay[i]) + static_cast<double>(block_sum[i]);
    }
  }
};

}  // namespace

// Queries that share a KV head, one lane each: lane i is token i / group_size of the pass, head i % group_size of the
// group. A block takes lanes [begin, end), whatever tokens and heads they are.
struct Attention::Task {
  ConstRows q;
  Rows out;
  const float* k;  // (capacity, head_dim) of the KV head
  const float* v;
  Pos first;
  Index window, kv_head, begin, end;
};

Attention::Attention(const ModelConfig& config, int threads)
    : n_kv_heads_(config.n_kv_heads),
      group_size_(config.group_size()),
      head_dim_(config.head_dim),
      scale_(static_cast<float>(config.attention_scale)),
      threads_(threads),
      scratch_size_((2 * head_dim_ + kKeys) * kBlockLanes),
      scratch_(static_cast<std::size_t>(threads * scratch_size_)) {}

void Attention::attend(ConstRows q, const LayerCache& cache, Pos first, int window, Rows out) {
  const Index n_lanes = q.n * group_size_;
  const Index work = q.width * q.n * (first + q.n);
#pragma omp parallel for num_threads(threads_) collapse(2) schedule(dynamic) if (work > kWorthThreads)
  for (Index begin = 0; begin < n_lanes; begin += kBlockLanes) {
    for (Index kv_head = 0; kv_head < n_kv_heads_; ++kv_head) {
      const Index offset = kv_head * cache.capacity * head_dim_;
      const Index end = std::min<Index>(n_lanes, begin + kBlockLanes);
      run({q, out, cache.k + offset, cache.v + offset, first, window, kv_head, begin, end},
          scratch_.data() + omp_get_thread_num() * scratch_size_);
    }
  }
}

void Attention::run(const Task& task, float* scratch) const {
  const Index n_lanes = task.end - task.begin, lanes = (n_lanes + kLanes - 1) / kLanes * kLanes;
  float* const queries = scratch;                            // (head_dim, lanes)
  float* const weights = queries + head_dim_ * kBlockLanes;  // (kKeys, lanes)
  float* const sum = weights + kKeys * kBlockLanes;          // (head_dim, lanes)
  const auto token = [&](Index i) { return (task.begin + i) / group_size_; };
  const auto channel = [&](Index i) {
    return (task.kv_head * group_size_ + (task.begin + i) % group_size_) * head_dim_;
  };
  const auto end_of = [&](Index i) { return task.first + token(i) + 1; };  // the keys that lane i attends
  const auto begin_of = [&](Index i) { return task.window > 0 ? std::max<Index>(0, end_of(i) - task.window) : 0; };

  std::fill_n(queries, head_dim_ * lanes, 0.0F);
  std::fill_n(sum, head_dim_ * lanes, 0.0F);
  for (Index i = 0; i < n_lanes; ++i) {
    const float* query = task.q[token(i)] + channel(i);
    for (Index d = 0; d < head_dim_; ++d) {
      queries[d * lanes + i] = query[d];
    }
  }

  Softmax softmax;
  Lanes decay = {};
  const Index last = end_of(n_lanes - 1);
  // Blocks begin at multiples of kKeys, so that a token's sums do not depend on the pass it came in.
  for (Index begin = begin_of(0) / kKeys * kKeys; begin < last; begin += kKeys) {
    const Index keys = std::min(kKeys, last - begin);
    std::fill_n(weights, keys * lanes, 0.0F);
    add_product(static_cast<int>(keys), static_cast<int>(head_dim_), static_cast<int>(lanes),
                {task.k + begin * head_dim_, head_dim_, 1}, queries, lanes, weights, lanes);
    for (Index i = 0; i < keys * lanes; ++i) {
      weights[i] *= scale_;
    }
    for (Index i = 0; i < n_lanes; ++i) {
      for (Index j = 0; j < std::min(keys, begin_of(i) - begin); ++j) {
        weights[j * lanes + i] = kMinusInfinity;
      }
      for (Index j = std::max<Index>(0, end_of(i) - begin); j < keys; ++j) {
        weights[j * lanes + i] = kMinusInfinity;
      }
    }
    softmax.add(weights, keys, lanes, decay);
    for (Index d = 0; d < head_dim_; ++d) {
      for (Index i = 0; i < lanes; ++i) {
        sum[d * lanes + i] *= decay[static_cast<std::size_t>(i)];
      }
    }
    add_product(static_cast<int>(head_dim_), static_cast<int>(keys), static_cast<int>(lanes),
                {task.v + begin * head_dim_, 1, head_dim_}, weights, lanes, sum, lanes);
  }

  for (Index i = 0; i < n_lanes; ++i) {
    float* out = task.out[token(i)] + channel(i);
    for (Index d = 0; d < head_dim_; ++d) {
      out[d] = static_cast<float>(static_cast<double>(sum[d * lanes + i]) / softmax.sum[static_cast<std::size_t>(i)]);
    }
  }
}

}  // namespace kvreplay
