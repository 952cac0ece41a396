// Matrices as numpy.save writes them.
#pragma once
#include <string>

#include "policies/policy.hpp"

namespace kvreplay {

// Two-dimensional, float32 or float64, little-endian, in C order; ConfigError names the file and what it holds.
MatF read_npy(const std::string& path);

}  // namespace kvreplay
