// Rows that lie in the memory of a CUDA device, for whoever has only a pointer to them (the C ABI).
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvreplay {

// Can copy_from_device read device memory here? False in a build without CUDA and where there is no device.
bool device_pointers_supported();

// Gathers rows [n_heads][n] of row_bytes each from device memory, strides in bytes, into host memory: out (n_heads, n,
// row_bytes), dense. In the order of `stream` (a cudaStream_t, nullptr = the default stream); out is complete on
// return. Throws DeviceError.
void copy_from_device(const void* data, std::int64_t n_heads, std::int64_t n, std::int64_t stride_head,
                      std::int64_t stride_token, std::size_t row_bytes, void* stream, std::byte* out);

}  // namespace kvreplay
