// In place of ranks.cpp where the build found no MPI.
#include <fmt/format.h>

#include "policies/errors.hpp"
#include "sim/sweep/launched.hpp"
#include "sim/sweep/ranks.hpp"

namespace kvreplay {

std::unique_ptr<Team> team_of_environment() {
  if (const int n = n_launched(); n > 1) {
    throw ConfigError(
        fmt::format("{} processes were started to share a sweep, but this kvreplay was built without MPI; install "
                    "libopenmpi-dev and build again, or give each its part with --shard",
                    n));
  }
  return std::make_unique<Team>();
}

}  // namespace kvreplay
