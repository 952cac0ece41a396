#include "trace_capture/cpu/product.hpp"

#include <algorithm>
#include <cstdint>

#if defined(__F16C__) && defined(__AVX__)
#include <immintrin.h>
#endif

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

// kLanes neighbouring elements, widened.
template <ElementType type>
Vector load_as(const std::byte* data) {
  if constexpr (type == ElementType::f32) {
    return load(reinterpret_cast<const float*>(data));
  } else if constexpr (type == ElementType::bf16) {  // the upper half of a float
    using Short [[gnu::vector_size(kLanes * 2), gnu::aligned(1), gnu::may_alias]] = std::uint16_t;
    using Long [[gnu::vector_size(kLanes * 4)]] = std::uint32_t;
    const Long bits = __builtin_convertvector(*reinterpret_cast<const Short*>(data), Long) << 16;
    return reinterpret_cast<const Vector&>(bits);
  } else {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data))));
#elif defined(__F16C__) && defined(__AVX__)
    return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data))));
#else
    Vector values;
    widen(type, data, {reinterpret_cast<float*>(&values), kLanes});
    return values;
#endif
  }
}

template <ElementType type>
float dot_of(const std::byte* a, const float* b, std::size_t n) {
  constexpr std::size_t kSums = 4, kStep = kSums * kLanes, kSize = size_of(type);
  Vector sum[kSums] = {};  // independent, so that the processor need not wait for the last
  std::size_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    for (std::size_t i = 0; i < kSums; ++i) {
      sum[i] += load_as<type>(a + (k + i * kLanes) * kSize) * load(b + k + i * kLanes);
    }
  }
  double total = 0;
  for (const Vector& part : sum) {
    for (int lane = 0; lane < kLanes; ++lane) {
      total += static_cast<double>(part[lane]);
    }
  }
  float rest[kStep];
  widen(type, a + k * kSize, {rest, n - k});
  for (std::size_t i = 0; k + i < n; ++i) {
    total += static_cast<double>(rest[i]) * static_cast<double>(b[k + i]);
  }
  return static_cast<float>(total);
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

float dot(ElementType type, const std::byte* a, const float* b, std::size_t n) {
  switch (type) {
    case ElementType::f16:
      return dot_of<ElementType::f16>(a, b, n);
    case ElementType::bf16:
      return dot_of<ElementType::bf16>(a, b, n);
    case ElementType::f32:
      return dot_of<ElementType::f32>(a, b, n);
  }
  return 0;
}

}  // namespace kvreplay
