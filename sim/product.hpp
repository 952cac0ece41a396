// Sums of weight * value over columns that lie anywhere in memory, without gathering or packing them first.
#pragma once
#include <span>

#include "policies/policy.hpp"

namespace kvreplay {

// Whether a value of this length can be multiplied where it lies.
bool multiplies_in_place(int dim);

// num (rows, dim) += sum over j of weights[j] (rows) times values[j] (dim): float over up to 256 columns, double
// across.
void add_products_in_place(std::span<const float* const> weights, std::span<const float* const> values, MatD& num);

}  // namespace kvreplay
