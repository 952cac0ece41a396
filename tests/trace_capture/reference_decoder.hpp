// The second opinion: a decoder in float64 that says every formula once, slowly, one token after the other.
#pragma once
#include <cstdint>
#include <vector>

#include "tests/trace_capture/families/compare.hpp"

namespace kvreplay::test {

// The same tensors as decode(), of all tokens (rows = 0, 1, ...), in passes as given.
Tensors reference_decode(const Model& model, const std::vector<std::int32_t>& ids, const std::vector<Pos>& passes);

}  // namespace kvreplay::test
