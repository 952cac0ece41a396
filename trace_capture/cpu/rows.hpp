// Tokens as rows: dense row-major float matrices that somebody else owns.
#pragma once
#include <cstddef>

namespace kvreplay {

struct Rows {
  float* data = nullptr;  // (n, width)
  std::ptrdiff_t n = 0, width = 0;

  float* operator[](std::ptrdiff_t row) const { return data + row * width; }
};

struct ConstRows {
  const float* data = nullptr;  // (n, width)
  std::ptrdiff_t n = 0, width = 0;

  const float* operator[](std::ptrdiff_t row) const { return data + row * width; }
};

inline ConstRows as_const(Rows rows) { return {rows.data, rows.n, rows.width}; }

}  // namespace kvreplay
