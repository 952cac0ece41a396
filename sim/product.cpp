#include "sim/product.hpp"

#include <algorithm>

namespace kvreplay {
namespace {

// One vector register of floats, loaded from any address; a tile of kRows x kVectors of them is summed in registers.
#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 6, kVectors = 4;
#else
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#endif
using Vector [[gnu::vector_size(kLanes * sizeof(float)), gnu::aligned(alignof(float)), gnu::may_alias]] = float;

constexpr std::size_t kColumns = 256;  // summed in float
constexpr int kAhead = 32;             // rows

template <int Rows, int Vectors>
void tile(std::span<const float* const> weights, std::span<const float* const> values, Eigen::Index row,
          Eigen::Index first, MatD& num) {
  Vector sum[Rows][Vectors] = {};
  for (std::size_t j = 0; j < weights.size(); ++j) {
    const float* w = weights[j] + row;
    const float* value = values[j] + first;
    __builtin_prefetch(w + kAhead);  // columns lie apart: nobody else fetches the next rows of this one
    Vector v[Vectors];
    for (int i = 0; i < Vectors; ++i) {
      v[i] = *reinterpret_cast<const Vector*>(value + i * kLanes);
    }
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < Vectors; ++i) {
        sum[r][i] += w[r] * v[i];
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    double* out = &num(row + r, first);
    for (int i = 0; i < Vectors; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        out[i * kLanes + lane] += static_cast<double>(sum[r][i][lane]);
      }
    }
  }
}

// Picks the tile whose size is known at run time only, at the lower and right edges.
template <int Rows, int Vectors>
void edge(int rows, int vectors, std::span<const float* const> weights, std::span<const float* const> values,
          Eigen::Index row, Eigen::Index first, MatD& num) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return edge<Rows - 1, Vectors>(rows, vectors, weights, values, row, first, num);
    }
  }
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) {
      return edge<Rows, Vectors - 1>(rows, vectors, weights, values, row, first, num);
    }
  }
  tile<Rows, Vectors>(weights, values, row, first, num);
}

}  // namespace

bool multiplies_in_place(int dim) { return dim % kLanes == 0; }

void add_products_in_place(std::span<const float* const> weights, std::span<const float* const> values, MatD& num) {
  for (std::size_t j = 0; j < weights.size(); j += kColumns) {
    const std::size_t n = std::min(kColumns, weights.size() - j);
    const auto w = weights.subspan(j, n), v = values.subspan(j, n);
    for (Eigen::Index first = 0; first < num.cols(); first += kVectors * kLanes) {
      const int vectors = static_cast<int>(std::min<Eigen::Index>(kVectors, (num.cols() - first) / kLanes));
      for (Eigen::Index row = 0; row < num.rows(); row += kRows) {
        const int rows = static_cast<int>(std::min<Eigen::Index>(kRows, num.rows() - row));
        edge<kRows, kVectors>(rows, vectors, w, v, row, first, num);
      }
    }
  }
}

}  // namespace kvreplay
