// What every backend refuses of a pass, in the same words.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "traces/reader.hpp"

namespace kvreplay {

// Throws std::invalid_argument for an id outside [0, vocab).
void check_vocabulary(std::span<const std::int32_t> ids, int vocab);

// Throws std::invalid_argument for no ids, more than max_pass, more than fit after n_past, or outside the vocabulary.
void check_pass(std::span<const std::int32_t> ids, Pos n_past, Pos max_pass, Pos capacity, int vocab);

// Throws std::invalid_argument unless row is one of the last pass's n_last and n_out values are asked for.
void check_logits_of(Pos row, std::size_t n_out, Pos n_last, int vocab);

// Throws std::invalid_argument unless there are n_out = next.size() <= n_last ids of the vocabulary.
void check_scored(std::span<const std::int32_t> next, std::size_t n_out, Pos n_last, int vocab);

}  // namespace kvreplay
