// How kernels are started, and the sums over threads that several of them need.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <utility>

#include "trace_capture/cuda/device.cuh"

namespace kvreplay::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "starting a kernel");
}

// The shared memory that launch() asked for.
__device__ inline float* shared_memory() {
  alignas(16) extern __shared__ float kvreplay_shared[];
  return kvreplay_shared;
}

// Over `width` neighbouring lanes (a power of two); every lane of the warp takes part and gets its group's result.
__device__ inline float lane_sum(float x, int width) {
  for (int step = width / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFU, x, step);
  }
  return x;
}

__device__ inline float lane_max(float x, int width) {
  for (int step = width / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, step));
  }
  return x;
}

}  // namespace kvreplay::cuda
