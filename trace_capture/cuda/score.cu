// The most likely token of a row of logits, and log-probabilities.
#include <cmath>

#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/cuda/launch.cuh"

namespace kvreplay::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;

struct Best {
  float logit;
  int id;
};

// The larger logit; of equal ones the lower id.
__device__ inline Best better(Best a, Best b) {
  return b.logit > a.logit || (b.logit == a.logit && b.id < a.id) ? b : a;
}

// A block takes a row. Every sum runs in a fixed order, in double.
__global__ void __launch_bounds__(kThreads)
    score_kernel(const float* logits, const std::int32_t* next, Scored* out, int vocab) {
  __shared__ Best bests[kWarps];
  __shared__ double sums[kWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const float* row = logits + static_cast<std::size_t>(blockIdx.x) * static_cast<std::size_t>(vocab);

  Best best{-INFINITY, vocab};
  for (int id = thread; id < vocab; id += kThreads) {
    best = better(best, {row[id], id});
  }
  for (int step = 16; step > 0; step /= 2) {
    const Best other{__shfl_xor_sync(0xFFFFFFFFU, best.logit, step), __shfl_xor_sync(0xFFFFFFFFU, best.id, step)};
    best = better(best, other);
  }
  if (lane == 0) {
    bests[warp] = best;
  }
  __syncthreads();
  best = bests[0];
  for (int i = 1; i < kWarps; ++i) {
    best = better(best, bests[i]);
  }

  double sum = 0;
  for (int id = thread; id < vocab; id += kThreads) {
    sum += static_cast<double>(expf(row[id] - best.logit));
  }
  for (int step = 16; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFU, sum, step);
  }
  if (lane == 0) {
    sums[warp] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    double total = 0;
    for (int i = 0; i < kWarps; ++i) {
      total += sums[i];
    }
    const int id = next != nullptr ? next[blockIdx.x] : best.id < vocab ? best.id : 0;
    const double logit = static_cast<double>(row[id]) - static_cast<double>(best.logit);
    out[blockIdx.x] = {id, static_cast<float>(logit - log(total))};
  }
}

}  // namespace

void score(const float* logits, const std::int32_t* next, Scored* out, int rows, int vocab, Stream stream) {
  launch(score_kernel, static_cast<unsigned>(rows), kThreads, 0, stream, logits, next, out, vocab);
}

}  // namespace kvreplay::cuda
