#include "trace_capture/cuda/products.cuh"

#include <cublas_v2.h>
#include <fmt/format.h>

#include "trace_capture/cuda/element.hpp"
#include "trace_capture/errors.hpp"

namespace kvreplay::cuda {
namespace {

void check_cublas(cublasStatus_t status, const char* doing) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw DeviceError(fmt::format("cuBLAS failed at {}: status {}", doing, static_cast<int>(status)));
  }
}

constexpr cudaDataType_t data_type(ElementType type) {
  return type == ElementType::f16 ? CUDA_R_16F : type == ElementType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}

}  // namespace

Products::Products(const OwnStream& stream) : workspace_(kWorkspaceBytes, "the workspace of products") {
  check_cublas(cublasCreate(&handle_), "starting");
  try {
    check_cublas(cublasSetStream(handle_, stream.get()), "choosing a stream");
    check_cublas(cublasSetWorkspace(handle_, workspace_.data(), kWorkspaceBytes), "setting a workspace");
    check_cublas(cublasSetAtomicsMode(handle_, CUBLAS_ATOMICS_NOT_ALLOWED), "forbidding atomics");
    check_cublas(cublasSetMathMode(handle_, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION), "choosing a precision");
  } catch (...) {
    cublasDestroy(handle_);
    throw;
  }
}

Products::~Products() { cublasDestroy(handle_); }

template <class T>
void Products::multiply(const T* weight, const T* x, float* y, int n, int rows, int k, bool add) const {
  // cuBLAS counts by columns: there W is (k, rows), x (k, n) and y (rows, n).
  const float one = 1, old = add ? 1 : 0;
  const cudaDataType_t type = data_type(kElement<T>);
  check_cublas(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, rows, n, k, &one, weight, type, k, x, type, k, &old, y,
                            CUDA_R_32F, rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "a product");
}

template void Products::multiply<float>(const float*, const float*, float*, int, int, int, bool) const;
template void Products::multiply<F16>(const F16*, const F16*, float*, int, int, int, bool) const;
template void Products::multiply<Bf16>(const Bf16*, const Bf16*, float*, int, int, int, bool) const;

}  // namespace kvreplay::cuda
