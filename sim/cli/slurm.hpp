// A batch script that runs a sweep as a job array, and then its merge.
#pragma once
#include <string>

#include "sim/sweep/sweep.hpp"

namespace kvreplay {

struct SlurmJob {
  std::string plan, out;  // absolute
  int n_tasks = 1, threads = 1;
  std::string memory;  // of a task, as 16GiB; empty: the cluster's default
  bool heads = false;
};
std::string sbatch_of(const SlurmJob&);

// What SLURM_ARRAY_TASK_ID, _MIN and _COUNT say, with indices from 0; all of the sweep where they are not there.
Shard shard_of_environment();

}  // namespace kvreplay
