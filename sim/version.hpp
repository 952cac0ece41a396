// What built this program.
#pragma once
#include <string_view>

namespace kvreplay {
extern const std::string_view kVersion, kGitHash, kBuildFlags;
}
