// The catalogue for programs: what `kvreplay policies --json` prints.
#pragma once
#include <string>

namespace kvreplay {

// JSON of one part or preset, of all of them where `name` is empty; ConfigError names the nearest.
std::string policies_json(const std::string& name);

}  // namespace kvreplay
