// Exponentials of logits, as packets take them.
#pragma once
#include <type_traits>

#include "policies/policy.hpp"

namespace kvreplay {

// exp, exactly 0 where it would be no normal number: Eigen's packet exp stops a little below instead, and denormal
// numbers are slow.
template <class Array>
auto weight_of(const Array& x) {
  using Scalar = typename Array::Scalar;
  constexpr bool kSingle = std::is_same_v<Scalar, float>;
  constexpr Scalar kLeast = kSingle ? Scalar(-87.3) : Scalar(-708.3), kSteep = 1e30;
  // A step from 0 to 1, of operations that packets have.
  return x.exp() * ((x - kLeast) * kSteep).min(Scalar(1)).max(Scalar(0));
}

// Makes each row of x exp(row - top[row]). Row by row, for in one expression a column beside a matrix that lies in rows
// keeps Eigen from taking packets.
template <class Matrix, class Tops>
void exp_rows(Matrix& x, const Tops& top) {
  for (Eigen::Index r = 0; r < x.rows(); ++r) {
    auto row = x.row(r).array();
    row -= top[r];
    row = weight_of(row);
  }
}

}  // namespace kvreplay
