#include "trace_capture/cuda/device.cuh"

#include <fmt/format.h>

#include "trace_capture/errors.hpp"

namespace kvreplay::cuda {

void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // forgets it
    throw DeviceError(fmt::format("CUDA failed at {}: {}", doing, cudaGetErrorString(status)));
  }
}

std::string gib(std::size_t bytes) { return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / (1U << 30)); }

DeviceMemory::DeviceMemory(std::size_t bytes, const std::string& what) : bytes_(bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for the free memory");
    throw DeviceError(
        fmt::format("the device has {} free of {}, but {} needs {}", gib(free), gib(total), what, gib(bytes)));
  }
  check(status, "allocating memory");
  data_ = static_cast<std::byte*>(data);
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

PinnedMemory::PinnedMemory(std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMallocHost(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw DeviceError(
        fmt::format("{} of host memory could not be locked for the device; ask for a smaller stage "
                    "(--stage)",
                    gib(bytes)));
  }
  check(status, "locking host memory");
  data_ = static_cast<std::byte*>(data);
}

PinnedMemory::~PinnedMemory() { cudaFreeHost(data_); }

}  // namespace kvreplay::cuda
