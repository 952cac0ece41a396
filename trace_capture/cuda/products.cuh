// Products of many tokens, by cuBLAS.
#pragma once
#include "trace_capture/cuda/device.cuh"

struct cublasContext;

namespace kvreplay::cuda {

class Products {
 public:
  explicit Products(const OwnStream& stream);
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  // y (n, rows) = x (n, k) W^T with W (rows, k), or y += it; sums in float32, never in TF32. The same shapes give the
  // same bits: one stream, a workspace of our own, no atomics.
  template <class T>
  void multiply(const T* weight, const T* x, float* y, int n, int rows, int k, bool add) const;

  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

 private:
  cublasContext* handle_ = nullptr;
  DeviceMemory workspace_;
};

}  // namespace kvreplay::cuda
