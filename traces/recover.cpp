#include "traces/recover.hpp"

#include <fmt/format.h>

#include <stdexcept>

#include "traces/repack.hpp"

namespace kvreplay {

Pos recover(const std::filesystem::path& in, const std::filesystem::path& out) {
  const TraceReader trace(in);
  const TraceInfo& info = trace.info();
  if (info.complete) {
    throw std::invalid_argument(in.string() + " is complete; there is nothing to recover");
  }
  repack(in, out,
         {.note = fmt::format("The capture was interrupted; its first {} tokens were recovered.", info.n_tokens)});
  return info.n_tokens;
}

}  // namespace kvreplay
