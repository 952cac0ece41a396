// Models of random weights, in memory.
#pragma once
#include "trace_capture/model.hpp"

namespace kvreplay::test {

// A small Llama of 2 layers and 3 query heads per KV head.
ModelConfig small_config();

// Weights of the shapes that the configuration asks for, of the given element type, large enough that attention is
// neither flat nor all on one token. They live as long as the model.
Model random_model(const ModelConfig& config, ElementType element, unsigned seed);

}  // namespace kvreplay::test
