// The one small matrix product that linear layers and attention are made of: rows of one factor are broadcast, and the
// other has `kLanes` neighbours side by side, so that every sum is a chain over the depth, in the same order whatever
// is computed beside it.
#pragma once
#include <cstddef>

#include "traces/widen.hpp"

namespace kvreplay {

// One vector register of floats, loaded from any address.
#ifdef __AVX512F__
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kBlockLanes = kLanes * kVectors;  // lanes of one block of the right factor

// A float matrix in memory: element (i, j) is at data[i * row + j * column].
struct Strided {
  const float* data = nullptr;
  std::ptrdiff_t row = 0, column = 1;
};

// c (rows, lanes) += a (rows, depth) b (depth, lanes). lanes: a multiple of kLanes, at most kBlockLanes; b_row and
// c_row are the distances between rows, whose lanes lie side by side.
void add_product(int rows, int depth, int lanes, Strided a, const float* b, std::ptrdiff_t b_row, float* c,
                 std::ptrdiff_t c_row);

// sum over i of a[i] * b[i]; the n elements of a lie as `type` says and are widened on their way into the registers.
float dot(ElementType type, const std::byte* a, const float* b, std::size_t n);

}  // namespace kvreplay
