// Attention, and what comes right before it. All arithmetic is float32 on the elements as they are stored, so that a
// trace's own attention output can be recomputed from its rows.
#include <cmath>

#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/cuda/launch.cuh"

namespace kvreplay::cuda {
namespace {

constexpr int kThreads = 256;

// A warp takes one head of one token; its lanes take pairs of channels.
template <class T>
__global__ void __launch_bounds__(kThreads) place_kernel(const Placing<T> p) {
  constexpr int kPairs = kMaxHeadDim / 64;  // of one lane
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int heads = p.n_heads + 2 * p.n_kv_heads, half = p.head_dim / 2;
  const int token = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (head >= heads) {  // the whole warp
    return;
  }
  const bool is_q = head < p.n_heads, is_v = head >= p.n_heads + p.n_kv_heads;
  const std::size_t dim = static_cast<std::size_t>(p.head_dim);
  const float* row =
      p.qkv +
      (static_cast<std::size_t>(token) * static_cast<std::size_t>(heads) + static_cast<std::size_t>(head)) * dim;
  const float* bias = p.bias != nullptr ? p.bias + static_cast<std::size_t>(head) * dim : nullptr;

  Pair x[kPairs] = {};
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int c = lane + 32 * i;
    if (c < half) {
      x[i] = {row[c], row[c + half]};
      if (bias != nullptr) {
        x[i].first += bias[c];
        x[i].second += bias[c + half];
      }
      squares += x[i].first * x[i].first + x[i].second * x[i].second;
    }
  }
  const float* norm = is_v ? nullptr : is_q ? p.q_norm : p.k_norm;
  if (norm != nullptr) {
    const float factor = 1.0F / sqrtf(lane_sum(squares, 32) / static_cast<float>(p.head_dim) + p.eps);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = lane + 32 * i;
      if (c < half) {
        x[i] = {x[i].first * factor * norm[c], x[i].second * factor * norm[c + half]};
      }
    }
  }

  T* to = nullptr;
  if (is_q) {
    to = p.q +
         (static_cast<std::size_t>(token) * static_cast<std::size_t>(p.n_heads) + static_cast<std::size_t>(head)) * dim;
  } else {
    const int kv_head = is_v ? head - p.n_heads - p.n_kv_heads : head - p.n_heads;
    to = (is_v ? p.v : p.k) + (static_cast<std::size_t>(kv_head) * static_cast<std::size_t>(p.capacity) +
                               static_cast<std::size_t>(p.past + token)) *
                                  dim;
  }
  const float* rotation = p.rotation + static_cast<std::size_t>(p.past + token) * dim;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int c = lane + 32 * i;
    if (c < half) {
      const Pair y = is_v ? x[i] : rotate(x[i], rotation[2 * c], rotation[2 * c + 1]);
      to[c] = round_to<T>(p.stored, y.first);
      to[c + half] = round_to<T>(p.stored, y.second);
    }
  }
}

// Rows [0, rows) of `from` as float32 in a tile of kTile rows of `pitch`; what is beyond them is 0.
template <class T, int kWidth>
__device__ void load_tile(const T* from, std::size_t stride, int rows, int head_dim, float* tile) {
  constexpr int kPitch = kWidth + 4;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * (kWidth / 8); i += kThreads) {
    const int row = i / (kWidth / 8), c = i % (kWidth / 8) * 8;
    float x[8] = {};
    if (row < rows && c < head_dim) {
      widen_eight(load_eight(from + static_cast<std::size_t>(row) * stride + c), x);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      tile[row * kPitch + c + e] = x[e];
    }
  }
}

__device__ inline Float4 load4(const float* p) { return *reinterpret_cast<const Float4*>(p); }

// A block takes kTile queries of one head and goes over the keys a tile at a time, with a running maximum and sum for
// each query. Thread (ty, tx) of 16 x 16 owns queries 4 ty .. 4 ty + 3; of the logits, keys tx + 16 c; of the output,
// channels 4 tx + 64 c .. + 3. kWidth: head_dim, rounded up to 64, 128 or 256.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) prefill_kernel(const Attention<T> a) {
  constexpr int kPitch = kWidth + 4, kKeyPitch = kTile + 4, kChunks = kWidth / 64;
  float* q = shared_memory();         // (kTile, kPitch)
  float* kv = q + kTile * kPitch;     // (kTile, kPitch): keys, then values
  float* attn = kv + kTile * kPitch;  // (kTile, kKeyPitch)

  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / (a.n_heads / a.n_kv_heads);
  const int first = static_cast<int>(blockIdx.x) * kTile, rows = least(kTile, a.n - first);
  const std::size_t dim = static_cast<std::size_t>(a.head_dim);
  const std::size_t token_stride = static_cast<std::size_t>(a.n_heads) * dim;
  const std::size_t q_at = static_cast<std::size_t>(first) * token_stride + static_cast<std::size_t>(head) * dim;
  const std::size_t cache_at = static_cast<std::size_t>(kv_head) * static_cast<std::size_t>(a.capacity) * dim;
  load_tile<T, kWidth>(a.q + q_at, token_stride, rows, a.head_dim, q);

  float acc[4][4 * kChunks] = {};
  float max[4], sum[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    max[r] = -INFINITY;
    sum[r] = 0;
  }

  const int begin = first_visible(a.past + first, a.window), end = a.past + first + rows;
  for (int key = begin; key < end; key += kTile) {
    const int keys = least(kTile, end - key);
    const std::size_t key_at = cache_at + static_cast<std::size_t>(key) * dim;
    __syncthreads();  // the last tile's values are done with
    load_tile<T, kWidth>(a.k + key_at, dim, keys, a.head_dim, kv);
    __syncthreads();

    float logits[4][4] = {};
#pragma unroll 4
    for (int d = 0; d < kWidth; d += 4) {
      Float4 x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = load4(q + (4 * ty + i) * kPitch + d);
        y[i] = load4(kv + (tx + 16 * i) * kPitch + d);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            logits[r][c] += x[r].x[e] * y[c].x[e];
          }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int pos = a.past + first + 4 * ty + r, from = first_visible(pos, a.window);
      float tile_max = -INFINITY;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int at = key + tx + 16 * c;
        logits[r][c] = at >= from && at <= pos ? logits[r][c] * a.scale : -INFINITY;
        tile_max = fmaxf(tile_max, logits[r][c]);
      }
      const float new_max = fmaxf(max[r], lane_max(tile_max, 16));
      const float shrink = max[r] == -INFINITY ? 0.0F : expf(max[r] - new_max);
      float tile_sum = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        // A tile may hold nothing that this query sees: then new_max may still be -inf.
        const float weight = logits[r][c] == -INFINITY ? 0.0F : expf(logits[r][c] - new_max);
        attn[(4 * ty + r) * kKeyPitch + tx + 16 * c] = weight;
        tile_sum += weight;
      }
      sum[r] = sum[r] * shrink + lane_sum(tile_sum, 16);
      max[r] = new_max;
#pragma unroll
      for (int c = 0; c < 4 * kChunks; ++c) {
        acc[r][c] *= shrink;
      }
    }
    __syncthreads();  // the keys are done with, the weights are there
    load_tile<T, kWidth>(a.v + key_at, dim, keys, a.head_dim, kv);
    __syncthreads();

#pragma unroll 2
    for (int j = 0; j < kTile; j += 4) {
      Float4 weight[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        weight[r] = load4(attn + (4 * ty + r) * kKeyPitch + j);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const Float4 value = load4(kv + (j + i) * kPitch + 4 * tx + 64 * c);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              acc[r][4 * c + e] += weight[r].x[i] * value.x[e];
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 4 * ty + r, channel = 4 * tx + 64 * c + e;
        if (row < rows && channel < a.head_dim) {
          const std::size_t at =
              q_at + static_cast<std::size_t>(row) * token_stride + static_cast<std::size_t>(channel);
          const float x = acc[r][4 * c + e] / sum[r];
          a.attn[at] = from_float<T>(x);
          if (a.out != nullptr) {
            a.out[at] = x;
          }
        }
      }
    }
  }
}

// One token: a block takes kSplitTokens keys of one KV head, for up to kSplitHeads of its query heads at once, and
// leaves their weighted sum of values, its maximum logit and its sum of weights to merge_kernel.
template <class T>
__global__ void __launch_bounds__(kThreads) split_kernel(const Attention<T> a) {
  __shared__ float q[kSplitHeads][kMaxHeadDim];
  __shared__ float attn[kSplitHeads][kSplitTokens];
  __shared__ float partial[8 * kMaxHeadDim];  // (value_groups, kSplitHeads, head_dim)
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group_size = a.n_heads / a.n_kv_heads, blocks = head_blocks(group_size);
  const int kv_head = static_cast<int>(blockIdx.y) / blocks, block = static_cast<int>(blockIdx.y) % blocks;
  const int first_head = kv_head * group_size + block * kSplitHeads;
  const int heads = least(kSplitHeads, (kv_head + 1) * group_size - first_head);
  const int split = static_cast<int>(blockIdx.x);
  const int begin = first_visible(a.past, a.window) + split * kSplitTokens;
  const int keys = least(kSplitTokens, a.past + 1 - begin);
  const int dim = a.head_dim;
  const std::size_t cache_at =
      (static_cast<std::size_t>(kv_head) * static_cast<std::size_t>(a.capacity) + static_cast<std::size_t>(begin)) *
      static_cast<std::size_t>(dim);

  for (int i = thread; i < heads * dim; i += kThreads) {
    q[i / dim][i % dim] = to_float(a.q[first_head * dim + i]);
  }
  __syncthreads();

  // Eight lanes share a key; all lanes stay for the sums.
  for (int first = 0; first < kSplitTokens; first += kThreads / 8) {
    const int j = first + thread / 8;
    float logits[kSplitHeads] = {};
    if (j < keys) {
      const T* key = a.k + cache_at + static_cast<std::size_t>(j) * static_cast<std::size_t>(dim);
      for (int c = thread % 8 * 8; c < dim; c += 64) {
        float x[8];
        widen_eight(load_eight(key + c), x);
#pragma unroll
        for (int h = 0; h < kSplitHeads; ++h) {
          if (h < heads) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              logits[h] += q[h][c + e] * x[e];
            }
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kSplitHeads; ++h) {
      const float logit = lane_sum(logits[h], 8);
      if (thread % 8 == 0) {
        attn[h][j] = j < keys ? logit * a.scale : -INFINITY;
      }
    }
  }
  __syncthreads();

  const int n_parts = max_splits(a.capacity);
  const std::size_t width = static_cast<std::size_t>(dim) + 2;
  if (warp < heads) {
    float max = -INFINITY, sum = 0;
    for (int j = lane; j < kSplitTokens; j += 32) {
      max = fmaxf(max, attn[warp][j]);
    }
    max = lane_max(max, 32);
    for (int j = lane; j < kSplitTokens; j += 32) {
      attn[warp][j] = expf(attn[warp][j] - max);
      sum += attn[warp][j];
    }
    sum = lane_sum(sum, 32);
    if (lane == 0) {
      float* part = a.part + (static_cast<std::size_t>(first_head + warp) * static_cast<std::size_t>(n_parts) +
                              static_cast<std::size_t>(split)) *
                                 width;
      part[dim] = max;
      part[dim + 1] = sum;
    }
  }
  __syncthreads();

  const int pairs = dim / 2, groups = value_groups(dim), group = thread / pairs, c = thread % pairs * 2;
  if (group < groups) {
    float acc[kSplitHeads][2] = {};
    for (int j = group; j < keys; j += groups) {
      const T* value = a.v + cache_at + static_cast<std::size_t>(j) * static_cast<std::size_t>(dim) + c;
      const float x = to_float(value[0]), y = to_float(value[1]);
#pragma unroll
      for (int h = 0; h < kSplitHeads; ++h) {
        if (h < heads) {
          acc[h][0] += attn[h][j] * x;
          acc[h][1] += attn[h][j] * y;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kSplitHeads; ++h) {
      partial[(group * kSplitHeads + h) * dim + c] = acc[h][0];
      partial[(group * kSplitHeads + h) * dim + c + 1] = acc[h][1];
    }
  }
  __syncthreads();
  for (int i = thread; i < heads * dim; i += kThreads) {
    const int h = i / dim, channel = i % dim;
    float sum = 0;
    for (int g = 0; g < groups; ++g) {
      sum += partial[(g * kSplitHeads + h) * dim + channel];
    }
    a.part[(static_cast<std::size_t>(first_head + h) * static_cast<std::size_t>(n_parts) +
            static_cast<std::size_t>(split)) *
               width +
           static_cast<std::size_t>(channel)] = sum;
  }
}

constexpr int kMergeThreads = 128;

// A block puts the splits of one head together, always in the same order.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const Attention<T> a, int splits) {
  const int head = static_cast<int>(blockIdx.x), dim = a.head_dim;
  const std::size_t width = static_cast<std::size_t>(dim) + 2;
  const float* parts =
      a.part + static_cast<std::size_t>(head) * static_cast<std::size_t>(max_splits(a.capacity)) * width;
  float max = -INFINITY;
  for (int s = 0; s < splits; ++s) {
    max = fmaxf(max, parts[static_cast<std::size_t>(s) * width + static_cast<std::size_t>(dim)]);
  }
  for (int c = static_cast<int>(threadIdx.x); c < dim; c += kMergeThreads) {
    float sum = 0, mass = 0;
    for (int s = 0; s < splits; ++s) {
      const float* part = parts + static_cast<std::size_t>(s) * width;
      const float weight = expf(part[dim] - max);
      sum += weight * part[c];
      mass += weight * part[dim + 1];
    }
    const std::size_t at = static_cast<std::size_t>(head) * static_cast<std::size_t>(dim) + static_cast<std::size_t>(c);
    a.attn[at] = from_float<T>(sum / mass);
    if (a.out != nullptr) {
      a.out[at] = sum / mass;
    }
  }
}

template <class T, int kWidth>
void prefill(const Attention<T>& a, Stream stream) {
  const std::size_t bytes = attention_shared_bytes(kWidth);
  check(cudaFuncSetAttribute(prefill_kernel<T, kWidth>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "asking for shared memory");
  const dim3 grid(static_cast<unsigned>(ceil_div(a.n, kTile)), static_cast<unsigned>(a.n_heads));
  launch(prefill_kernel<T, kWidth>, grid, kThreads, bytes, stream, a);
}

}  // namespace

template <class T>
void place(const Placing<T>& placing, Stream stream) {
  const int heads = placing.n_heads + 2 * placing.n_kv_heads;
  const dim3 grid(static_cast<unsigned>(placing.n), static_cast<unsigned>(ceil_div(heads, kThreads / 32)));
  launch(place_kernel<T>, grid, kThreads, 0, stream, placing);
}

std::size_t attention_shared_bytes(int head_dim) {
  const std::size_t width = head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  return sizeof(float) * kTile * (2 * (width + 4) + kTile + 4);
}

template <class T>
void attend(const Attention<T>& a, Stream stream) {
  if (a.n == 1) {
    const int splits = n_splits(first_visible(a.past, a.window), a.past + 1);
    const dim3 grid(static_cast<unsigned>(splits),
                    static_cast<unsigned>(a.n_kv_heads * head_blocks(a.n_heads / a.n_kv_heads)));
    launch(split_kernel<T>, grid, kThreads, 0, stream, a);
    launch(merge_kernel<T>, static_cast<unsigned>(a.n_heads), kMergeThreads, 0, stream, a, splits);
  } else if (a.head_dim <= 64) {
    prefill<T, 64>(a, stream);
  } else if (a.head_dim <= 128) {
    prefill<T, 128>(a, stream);
  } else {
    prefill<T, 256>(a, stream);
  }
}

#define KVREPLAY_FOR(T)                              \
  template void place<T>(const Placing<T>&, Stream); \
  template void attend<T>(const Attention<T>&, Stream);
KVREPLAY_FOR(float)
KVREPLAY_FOR(F16)
KVREPLAY_FOR(Bf16)
#undef KVREPLAY_FOR

}  // namespace kvreplay::cuda
