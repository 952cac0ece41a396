// What a trace is, for people and for programs.
#pragma once
#include <string>

#include "traces/reader.hpp"

namespace kvreplay {

std::string info_text(const TraceReader& trace);  // lines of "name  value"
std::string info_json(const TraceReader& trace);  // one JSON object

}  // namespace kvreplay
