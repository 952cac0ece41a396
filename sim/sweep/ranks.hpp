// Processes that mpirun or srun started together share one sweep.
#pragma once
#include <memory>

#include "sim/sweep/team.hpp"

namespace kvreplay {

// The team that this process was started in; of itself alone where it was not, and MPI is then never touched.
// ConfigError where the others cannot be reached.
std::unique_ptr<Team> team_of_environment();

}  // namespace kvreplay
