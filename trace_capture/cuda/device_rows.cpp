#include "trace_capture/device_rows.hpp"

#include <fmt/format.h>

#include "trace_capture/cuda/device.cuh"
#include "trace_capture/errors.hpp"

namespace kvreplay {

bool device_pointers_supported() {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  cudaGetLastError();
  return status == cudaSuccess && n > 0;
}

void copy_from_device(const void* data, std::int64_t n_heads, std::int64_t n, std::int64_t stride_head,
                      std::int64_t stride_token, std::size_t row_bytes, void* stream, std::byte* out) {
  if (n_heads <= 0 || n <= 0 || row_bytes == 0) {
    return;
  }
  cudaPointerAttributes attributes{};
  cuda::check(cudaPointerGetAttributes(&attributes, data), "looking up a device pointer");
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
    throw DeviceError("rows were said to be in device memory, but their pointer is not: clear on_device for host rows");
  }
  // Rows of the longer of the two directions go in one copy; out has heads apart by n rows, tokens by one.
  const bool by_head = n >= n_heads;
  const std::int64_t copies = by_head ? n_heads : n, rows = by_head ? n : n_heads;
  const std::int64_t step = by_head ? stride_head : stride_token, pitch = by_head ? stride_token : stride_head;
  const std::size_t out_step = row_bytes * static_cast<std::size_t>(by_head ? n : 1);
  const std::size_t out_pitch = row_bytes * static_cast<std::size_t>(by_head ? 1 : n);
  if (rows > 1 && pitch < static_cast<std::int64_t>(row_bytes)) {
    throw DeviceError(fmt::format("rows of {} bytes in device memory cannot be {} bytes apart", row_bytes, pitch));
  }
  int device = 0;
  cuda::check(cudaGetDevice(&device), "asking for the device in use");
  cuda::check(cudaSetDevice(attributes.device), "choosing the device of a pointer");
  cudaError_t status = cudaSuccess;
  const auto in = static_cast<cudaStream_t>(stream);
  for (std::int64_t i = 0; i < copies && status == cudaSuccess; ++i) {
    status = cudaMemcpy2DAsync(out + static_cast<std::size_t>(i) * out_step, out_pitch,
                               static_cast<const std::byte*>(data) + i * step,
                               rows > 1 ? static_cast<std::size_t>(pitch) : row_bytes, row_bytes,
                               static_cast<std::size_t>(rows), cudaMemcpyDeviceToHost, in);
  }
  if (status == cudaSuccess) {
    status = cudaStreamSynchronize(in);
  }
  cudaSetDevice(device);
  cuda::check(status, "copying rows from the device");
}

}  // namespace kvreplay
