// Random matrices that a seed alone determines, so that encoder and decoder, keys and values, all heads share them.
#pragma once
#include <numbers>

#include "policies/counter_rng.hpp"
#include "policies/policy.hpp"

namespace kvreplay {

// Independent standard normals: (dim, dim). `stream` tells matrices of one seed apart.
inline MatD gaussian_matrix(int dim, std::uint64_t seed, int stream) {
  MatD g(dim, dim);
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j) {
      const double u = 1 - uniform_at(seed, stream, dim, i, j, 0), angle = uniform_at(seed, stream, dim, i, j, 1);
      g(i, j) = std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * angle);
    }
  }
  return g;
}

// Uniform over all rotations and reflections: Q of a Gaussian matrix = Q R with a positive diagonal of R.
inline MatF random_rotation(int dim, std::uint64_t seed) {
  const Eigen::HouseholderQR<MatD> qr(gaussian_matrix(dim, seed, 0));
  MatD q = qr.householderQ();
  for (int i = 0; i < dim; ++i) {
    if (qr.matrixQR()(i, i) < 0) {
      q.col(i) *= -1;
    }
  }
  return q.cast<float>();
}

// Walsh-Hadamard transform after random signs, in blocks of the largest power of two that divides dim.
inline MatF random_hadamard(int dim, std::uint64_t seed) {
  const int block = dim & -dim;
  MatF h = MatF::Zero(dim, dim);
  for (int i = 0; i < dim; ++i) {
    for (int j = i / block * block; j < (i / block + 1) * block; ++j) {
      const bool odd = __builtin_popcount(static_cast<unsigned>(i % block & j % block)) % 2 != 0;
      const bool flipped = uniform_at(seed, 2, dim, j) < 0.5;
      h(i, j) = (odd == flipped ? 1.0F : -1.0F) / std::sqrt(static_cast<float>(block));
    }
  }
  return h;
}

}  // namespace kvreplay
