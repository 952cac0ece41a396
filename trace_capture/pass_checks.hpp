// What every backend refuses of a pass, in the same words.
#pragma once
#include <cstdint>
#include <span>

#include "traces/reader.hpp"

namespace kvreplay {

// Throws std::invalid_argument for an id outside [0, vocab).
void check_vocabulary(std::span<const std::int32_t> ids, int vocab);

// Throws std::invalid_argument for no ids, more than max_pass, more than fit after n_past, or outside the vocabulary.
void check_pass(std::span<const std::int32_t> ids, Pos n_past, Pos max_pass, Pos capacity, int vocab);

}  // namespace kvreplay
