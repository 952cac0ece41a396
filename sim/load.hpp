// From a trace's rows to the layout that the engine multiplies.
#pragma once
#include "sim/layer.hpp"
#include "traces/reader.hpp"

namespace kvreplay {

struct LoadOptions {
  Pos prompt_len = 0;
  Pos n_tokens = 0;                 // of the trace's tokens the first so many; 0: all
  Pos first_query = 0;              // queries of earlier positions are not read
  std::vector<std::string> scores;  // names of external scores to read
  bool w_o = false;
  bool values = true;  // false: Layer::v stays empty, which attention weights can do without
};

// The layer's sliding window where it is shorter than n_tokens, so that the layer cannot be replayed; else 0.
int short_window(const TraceInfo&, int layer, Pos n_tokens);

double slot_bytes(const TraceInfo&);  // of one token's key and value as stored

// Reads one layer. TraceError where the trace cannot give it; check_unchanged has been called.
Layer load_layer(const TraceReader&, int layer, const LoadOptions&);

// The first position from which queries are stored without a gap up to the end; n_tokens if there are none.
Pos first_stored_query(const TraceReader&, int layer);

}  // namespace kvreplay
