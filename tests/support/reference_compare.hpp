// The engine's answers beside the reference's. Tolerances are stated here, once.
#pragma once
#include <string>
#include <vector>

#include "sim/replay.hpp"
#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

// Masses and errors; metrics with f_E or with logits alone. Relative, with an absolute floor of the
// same size.
inline constexpr double kErrorTolerance = 1e-5;
inline constexpr double kEvictedTolerance = 1e-4;
// Of a victim's score over the smallest.
inline constexpr double kScoreTolerance = 1e-5;

Layer engine_layer(const ToyLayer& layer);

// Rows of the trace's own heads: (n_sets, n_tokens).
Evicted recorded_evictions(const CellResult& cell);

// By name as the reference has it: "error_corrected.NAME" with the compensator's own text,
// "layer.error" and so on.
NamedSeries engine_series(const CellResult& cell);

// Sentences, one for each metric that differs: the worst place and both numbers. A metric that only
// one side has, and a step that only one side counts, differ too; `names` are the compensators of
// the engine in the reference's order.
std::vector<std::string> differences(const NamedSeries& truth, const NamedSeries& found);

// Bit for bit, NaN equal to NaN; empty if the same.
std::string first_bit_difference(const CellResult& a, const CellResult& b);

}  // namespace kvreplay::testing
