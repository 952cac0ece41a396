// Makes an interrupted capture a whole trace.
#pragma once
#include <filesystem>

#include "traces/reader.hpp"

namespace kvreplay {

// Writes the valid tokens of `in` to `out`, complete and hashed; returns how many they are. A
// complete trace is refused (std::invalid_argument).
Pos recover(const std::filesystem::path& in, const std::filesystem::path& out);

}  // namespace kvreplay
