// Whether this process is one of several, by what their launchers say in the environment.
#pragma once
#include <algorithm>
#include <cstdlib>

namespace kvreplay {

// Processes started together: by OpenMPI's mpirun, by Hydra and PMI-2, by srun (a batch script alone is no step).
inline int n_launched() {
  int n = 1;
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    if (const char* text = std::getenv(name)) {  // NOLINT(concurrency-mt-unsafe): nobody sets it meanwhile
      n = std::max(n, std::atoi(text));
    }
  }
  return n;
}

}  // namespace kvreplay
