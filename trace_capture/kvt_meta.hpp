// The description that kvt_open takes: a JSON object with the model and with what is recorded of it.
#pragma once
#include <string_view>

#include "traces/reader.hpp"
#include "traces/writer.hpp"

namespace kvreplay {

struct TraceRequest {
  TraceInfo info;
  Pos capacity = 0;
  WriterOptions options;
};

// Strict: throws ConfigError, naming the key and what is allowed, for a key that is unknown, missing, given twice or of
// another kind, and for numbers that cannot be.
TraceRequest read_meta(std::string_view json);

}  // namespace kvreplay
