// Rewrites a trace in the other profile: same logical content, same content hash. Also what makes
// an interrupted capture whole, where tokens that never came are left out, and what names spans in
// a trace that exists.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "traces/skeleton.hpp"

namespace kvreplay {

struct RepackOptions {
  Profile profile = Profile::working;
  ArchiveLayout archive;
  std::string note;  // appended to the provenance
  std::vector<Span>
      spans;  // beside those of the trace, or instead of one of the same name; the content hash covers them
};

// `out` appears whole or not at all. Throws std::invalid_argument for a layout that no archive has and for spans that
// are empty or reach beyond the tokens, TraceError for a bad or changing `in`.
void repack(const std::filesystem::path& in, const std::filesystem::path& out, const RepackOptions& options = {});

}  // namespace kvreplay
