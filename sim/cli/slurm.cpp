#include "sim/cli/slurm.hpp"

#include <fmt/format.h>

#include <cstdlib>
#include <filesystem>

#include "policies/errors.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/plugins.hpp"
#include "sim/run.hpp"

namespace kvreplay {
namespace {

std::string own_path() {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "kvreplay" : path.string();
}

int number_in(const char* name, int otherwise) {
  const char* text = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): nobody sets it meanwhile
  if (text == nullptr) {
    return otherwise;
  }
  char* end = nullptr;
  const long x = std::strtol(text, &end, 10);
  if (end == text || *end != '\0' || x < 0 || x > 100000000) {
    throw ConfigError(fmt::format("{}='{}' is no number of an array task; give --shard i/n", name, text));
  }
  return int(x);
}

}  // namespace

Shard shard_of_environment() {
  Shard s;
  const int id = number_in("SLURM_ARRAY_TASK_ID", -1);
  if (id < 0) {
    return s;
  }
  s.n = number_in("SLURM_ARRAY_TASK_COUNT", 1);
  s.index = id - number_in("SLURM_ARRAY_TASK_MIN", 0);
  if (s.index < 0 || s.index >= s.n) {
    throw ConfigError(
        fmt::format("SLURM_ARRAY_TASK_ID={} is none of {} array tasks numbered one by one; give --shard i/n", id, s.n));
  }
  return s;
}

std::string sbatch_of(const SlurmJob& job) {
  const std::string tool = quoted(own_path()), out = quoted(job.out);
  std::string memory, of_task;
  for (const auto& plugin : loaded_plugins()) {
    of_task += " --plugin " + quoted(std::filesystem::absolute(plugin->path).lexically_normal().string());
  }
  if (!job.memory.empty()) {
    const std::uint64_t bytes = parse_bytes("--memory", job.memory);
    memory = fmt::format("#SBATCH --mem={}M\n", bytes / 1048576 * 5 / 4 + 256);  // and what is not counted
    of_task += " --memory " + job.memory;
  }
  return fmt::format(
      R"(#!/bin/bash
# A sweep as a job array of {0} tasks, then its merge. Start it, and start it again to resume:
#
#   bash THIS_FILE
#
# which submits this file and, to run when all tasks have ended, the merge. Add what your cluster asks for, as
# --partition, --account and --time, to the lines below.
#SBATCH --job-name=kvreplay-sweep
#SBATCH --array=0-{1}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={2}
{3}#SBATCH --output={4}
set -euo pipefail

if [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ]; then
  mkdir -p {5}/items
  job=$(sbatch --parsable "$0")
  sbatch --dependency="afterany:${{job%%;*}}" --job-name=kvreplay-merge --output={6} \
    --wrap={7}
  exit
fi

# Which part is this task's is in SLURM_ARRAY_TASK_ID, _MIN and _COUNT.
exec {8} sweep {9} --out {5}{10} --threads "${{SLURM_CPUS_PER_TASK:-{2}}}"{11}
)",
      job.n_tasks, job.n_tasks - 1, job.threads, memory, quoted(job.out + "/slurm-%A_%a.log"), out,
      quoted(job.out + "/slurm-merge-%j.log"), quoted(tool + " merge " + out + " --out " + out), tool, quoted(job.plan),
      job.heads ? " --heads" : "", of_task);
}

}  // namespace kvreplay
