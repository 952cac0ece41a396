// What allocators measure in a layer's prompt before they divide a budget over the layers (Allocator::measure).
#pragma once
#include <span>
#include <vector>

#include "policies/method.hpp"
#include "traces/reader.hpp"

namespace kvreplay {

// What each of these allocators measures in one layer of a trace, in their order; the layer's prompt is loaded once for
// all and let go. The attention is what a selector is shown at the prompt's end (View::column_mass), to the bit.
// TraceError where the trace cannot give the queries that they need.
std::vector<std::vector<double>> measure_layer(const TraceReader&, int layer, Pos prompt_len,
                                               std::span<const PartUse* const> allocators, int threads);

}  // namespace kvreplay
