// The gated activation between the two halves of a feed-forward layer.
#pragma once
#include <cstddef>

namespace kvreplay {

// gate[i] = silu(gate[i]) * up[i], silu(x) = x / (1 + e^-x)
void swiglu(float* gate, const float* up, std::size_t n);

}  // namespace kvreplay
