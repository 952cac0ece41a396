// Rewrites a trace in the other profile: same logical content, same content hash. Also what makes
// an interrupted capture whole: tokens that never came are left out.
#pragma once
#include <filesystem>

#include "traces/skeleton.hpp"

namespace kvreplay {

// `out` appears whole or not at all. A `note` is appended to the provenance.
void repack(const std::filesystem::path& in, const std::filesystem::path& out, Profile profile,
            const ArchiveLayout& layout = {}, const std::string& note = "");

}  // namespace kvreplay
