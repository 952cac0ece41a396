#include "trace_capture/cpu/product.hpp"

#include <algorithm>

namespace kvreplay {
namespace {

using Vector [[gnu::vector_size(kLanes * sizeof(float)), gnu::aligned(alignof(float)), gnu::may_alias]] = float;

constexpr int kRows = 6;  // a tile of kRows x kVectors registers is summed at once

Vector load(const float* data) { return *reinterpret_cast<const Vector*>(data); }

template <int Rows, int Vectors>
void tile(int depth, Strided a, const float* b, std::ptrdiff_t b_row, float* c, std::ptrdiff_t c_row) {
  Vector sum[Rows][Vectors] = {};
  for (int k = 0; k < depth; ++k) {
    Vector right[Vectors];
    for (int i = 0; i < Vectors; ++i) {
      right[i] = load(b + k * b_row + i * kLanes);
    }
    for (int r = 0; r < Rows; ++r) {
      const float left = a.data[r * a.row + k * a.column];
      for (int i = 0; i < Vectors; ++i) {
        sum[r][i] += left * right[i];
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < Vectors; ++i) {
      *reinterpret_cast<Vector*>(c + r * c_row + i * kLanes) += sum[r][i];
    }
  }
}

// Picks the tile whose size is known at run time only, at the edges.
template <int Rows, int Vectors>
void edge(int rows, int vectors, int depth, Strided a, const float* b, std::ptrdiff_t b_row, float* c,
          std::ptrdiff_t c_row) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return edge<Rows - 1, Vectors>(rows, vectors, depth, a, b, b_row, c, c_row);
    }
  }
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) {
      return edge<Rows, Vectors - 1>(rows, vectors, depth, a, b, b_row, c, c_row);
    }
  }
  tile<Rows, Vectors>(depth, a, b, b_row, c, c_row);
}

}  // namespace

void add_product(int rows, int depth, int lanes, Strided a, const float* b, std::ptrdiff_t b_row, float* c,
                 std::ptrdiff_t c_row) {
  const int vectors = lanes / kLanes;
  for (int r = 0; r < rows; r += kRows) {
    edge<kRows, kVectors>(std::min(kRows, rows - r), vectors, depth, {a.data + r * a.row, a.row, a.column}, b, b_row,
                          c + r * c_row, c_row);
  }
}

void Dot::add(const float* a, const float* b, std::size_t n) {
  constexpr std::size_t kStep = std::size_t{4} * kLanes;
  Vector sum[4];
  for (int i = 0; i < 4; ++i) {
    sum[i] = load(partial_ + i * kLanes);
  }
  std::size_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    for (int i = 0; i < 4; ++i) {
      sum[i] += load(a + k + static_cast<std::size_t>(i) * kLanes) * load(b + k + static_cast<std::size_t>(i) * kLanes);
    }
  }
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<Vector*>(partial_ + i * kLanes) = sum[i];
  }
  for (std::size_t i = 0; k < n; ++k, ++i) {
    partial_[i] += a[k] * b[k];
  }
}

float Dot::sum() const {
  double sum = 0;
  for (const float value : partial_) {
    sum += static_cast<double>(value);
  }
  return static_cast<float>(sum);
}

}  // namespace kvreplay
