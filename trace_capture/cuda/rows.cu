// Work on rows of activations, one element or one row at a time.
#include <cmath>

#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/cuda/launch.cuh"

namespace kvreplay::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void gather_kernel(const T* embedding, const std::int32_t* ids, float* x, int hidden) {
  const std::size_t row = blockIdx.x;
  const T* from = embedding + static_cast<std::size_t>(ids[row]) * static_cast<std::size_t>(hidden);
  for (int c = static_cast<int>(threadIdx.x); c < hidden; c += kThreads) {
    x[row * static_cast<std::size_t>(hidden) + static_cast<std::size_t>(c)] = to_float(from[c]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const float* x, const float* weight, T* out, int hidden, float eps) {
  __shared__ float warp_sums[kThreads / 32];
  const std::size_t begin = static_cast<std::size_t>(blockIdx.x) * static_cast<std::size_t>(hidden);
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int c = thread; c < hidden; c += kThreads) {
    const float value = x[begin + static_cast<std::size_t>(c)];
    sum += value * value;
  }
  sum = lane_sum(sum, 32);
  if (thread % 32 == 0) {
    warp_sums[thread / 32] = sum;
  }
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    total += warp_sums[warp];
  }
  const float factor = 1.0F / sqrtf(total / static_cast<float>(hidden) + eps);
  for (int c = thread; c < hidden; c += kThreads) {
    const std::size_t at = begin + static_cast<std::size_t>(c);
    out[at] = from_float<T>(x[at] * factor * weight[c]);
  }
}

__global__ void add_bias_kernel(float* x, const float* bias, int width) {
  const std::size_t begin = static_cast<std::size_t>(blockIdx.x) * static_cast<std::size_t>(width);
  for (int c = static_cast<int>(threadIdx.x); c < width; c += kThreads) {
    x[begin + static_cast<std::size_t>(c)] += bias[c];
  }
}

__device__ inline float silu(float x) { return x / (1.0F + expf(-x)); }

template <class T>
__global__ void gate_kernel(const float* gate_up, const float* bias, T* out, int width) {
  const std::size_t row = blockIdx.x, wide = static_cast<std::size_t>(width);
  const float* gate = gate_up + row * 2 * wide;
  const float* up = gate + wide;
  for (int c = static_cast<int>(threadIdx.x); c < width; c += kThreads) {
    const float gate_bias = bias != nullptr ? bias[c] : 0.0F, up_bias = bias != nullptr ? bias[width + c] : 0.0F;
    out[row * wide + static_cast<std::size_t>(c)] = from_float<T>(silu(gate[c] + gate_bias) * (up[c] + up_bias));
  }
}

template <class T>
__device__ float dot_eight(const Eight<T>& a, const Eight<T>& b) {
  float x[8], y[8];
  widen_eight(a, x);
  widen_eight(b, y);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum += x[i] * y[i];
  }
  return sum;
}

// Row . x, summed over the lanes of a warp. Where rows begin at multiples of 16 bytes a lane takes eight elements at a
// time and asks for four such pieces before it uses the first: that many loads in flight are what reaches the memory's
// bandwidth.
template <class T>
__device__ float dot_row(const T* row, const T* x, int k, int lane) {
  constexpr int kStep = 32 * 8, kDeep = 4;
  float sum = 0;
  if (k % 8 == 0) {
    int c = lane * 8;
    for (; c + (kDeep - 1) * kStep < k; c += kDeep * kStep) {
      Eight<T> a[kDeep];
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        a[i] = load_eight(row + c + i * kStep);
      }
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        sum += dot_eight(a[i], load_eight(x + c + i * kStep));
      }
    }
    for (; c < k; c += kStep) {
      sum += dot_eight(load_eight(row + c), load_eight(x + c));
    }
  } else {
    for (int c = lane; c < k; c += 32) {
      sum += to_float(row[c]) * to_float(x[c]);
    }
  }
  return lane_sum(sum, 32);
}

constexpr int kRowsPerBlock = 4;  // a warp for each

template <class T>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    multiply_one_kernel(const T* weight, const T* x, float* y, int rows, int k, bool add) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * kRowsPerBlock + static_cast<int>(threadIdx.x) / 32;
  if (row >= rows) {  // the whole warp
    return;
  }
  const float sum = dot_row(weight + static_cast<std::size_t>(row) * static_cast<std::size_t>(k), x, k, lane);
  if (lane == 0) {
    y[row] = add ? y[row] + sum : sum;
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    multiply_gate_one_kernel(const T* weight, const float* bias, const T* x, T* out, int width, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * kRowsPerBlock + static_cast<int>(threadIdx.x) / 32;
  if (row >= width) {  // the whole warp
    return;
  }
  const std::size_t pitch = static_cast<std::size_t>(k);
  float gate = dot_row(weight + static_cast<std::size_t>(row) * pitch, x, k, lane);
  float up = dot_row(weight + static_cast<std::size_t>(width + row) * pitch, x, k, lane);
  if (lane == 0) {
    if (bias != nullptr) {
      gate += bias[row];
      up += bias[width + row];
    }
    out[row] = from_float<T>(silu(gate) * up);
  }
}

unsigned blocks(int n) { return static_cast<unsigned>(n); }

}  // namespace

template <class T>
void gather(const T* embedding, const std::int32_t* ids, float* x, int n, int hidden, Stream stream) {
  launch(gather_kernel<T>, blocks(n), kThreads, 0, stream, embedding, ids, x, hidden);
}

template <class T>
void rms_norm(const float* x, const float* weight, T* out, int n, int hidden, float eps, Stream stream) {
  launch(rms_norm_kernel<T>, blocks(n), kThreads, 0, stream, x, weight, out, hidden, eps);
}

void add_bias(float* x, const float* bias, int n, int width, Stream stream) {
  launch(add_bias_kernel, blocks(n), kThreads, 0, stream, x, bias, width);
}

template <class T>
void gate(const float* gate_up, const float* bias, T* out, int n, int width, Stream stream) {
  launch(gate_kernel<T>, blocks(n), kThreads, 0, stream, gate_up, bias, out, width);
}

template <class T>
void multiply_one(const T* weight, const T* x, float* y, int rows, int k, bool add, Stream stream) {
  launch(multiply_one_kernel<T>, blocks(ceil_div(rows, kRowsPerBlock)), 32 * kRowsPerBlock, 0, stream, weight, x, y,
         rows, k, add);
}

template <class T>
void multiply_gate_one(const T* weight, const float* bias, const T* x, T* out, int width, int k, Stream stream) {
  launch(multiply_gate_one_kernel<T>, blocks(ceil_div(width, kRowsPerBlock)), 32 * kRowsPerBlock, 0, stream, weight,
         bias, x, out, width, k);
}

// NOLINTBEGIN(bugprone-macro-parentheses): T is a type
#define KVREPLAY_FOR(T)                                                               \
  template void gather<T>(const T*, const std::int32_t*, float*, int, int, Stream);   \
  template void rms_norm<T>(const float*, const float*, T*, int, int, float, Stream); \
  template void gate<T>(const float*, const float*, T*, int, int, Stream);            \
  template void multiply_one<T>(const T*, const T*, float*, int, int, bool, Stream);  \
  template void multiply_gate_one<T>(const T*, const float*, const T*, T*, int, int, Stream);
KVREPLAY_FOR(float)
KVREPLAY_FOR(F16)
KVREPLAY_FOR(Bf16)
// NOLINTEND(bugprone-macro-parentheses)
#undef KVREPLAY_FOR

}  // namespace kvreplay::cuda
