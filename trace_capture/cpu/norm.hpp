// Root-mean-square normalisation of rows.
#pragma once
#include <span>

#include "trace_capture/cpu/rows.hpp"

namespace kvreplay {

// y[i] = x[i] / sqrt(mean(x[i]²) + eps) * weight; x and y may be the same. weight: (width)
void rms_norm(ConstRows x, std::span<const float> weight, double eps, Rows y);

}  // namespace kvreplay
