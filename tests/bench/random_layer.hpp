// A layer of random numbers for timing, and the same layer as a trace for other programs to read.
#pragma once
#include <filesystem>

#include "sim/layer.hpp"
#include "traces/widen.hpp"

namespace kvreplay {

// Independent normal entries, keys stretched so that logits have a spread of about 2.
Layer random_layer(int n_kv_heads, int group_size, int head_dim, Pos n_tokens, Pos prompt_len, unsigned seed);

// Layer 0 of a trace. In float32 every number is the layer's own.
void write_trace(const std::filesystem::path&, const Layer&, ElementType);

}  // namespace kvreplay
