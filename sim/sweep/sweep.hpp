// A sweep: all cells of a plan, each measured once, whatever was finished before and whoever else is at it.
#pragma once
#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "sim/sweep/resolved.hpp"
#include "sim/sweep/state.hpp"
#include "sim/sweep/team.hpp"
#include "sim/sweep/units.hpp"

namespace kvreplay {

struct SweepRequest {
  std::filesystem::path plan, out;
  bool heads = false;  // beside what the plan says
  Shard shard;
  std::uint64_t memory = 0;
  int threads = 1;
  std::vector<std::string> argv;
  const std::atomic<bool>* stop = nullptr;
  std::function<void(double done, double total, const std::string& what)> progress;
};

struct SweepOutcome {
  Counts cells;  // of the shard
  std::size_t n_done_before = 0;
  std::vector<Failure> failures;  // of this process
  std::vector<std::string> damaged;
  std::vector<std::pair<std::string, std::string>> failed_traces;
  bool interrupted = false;
  bool trace_failed = false;
  bool tables = false;  // were written
};

// ConfigError and TraceError before anything is written where the plan cannot be. A cell that fails is in the outcome,
// and the rest goes on.
SweepOutcome sweep(const SweepRequest&, Team&);

// The plan with the traces and methods it stands for.
Sweep resolve(const SweepRequest&);

// A sweep's folder as an earlier start left it; ConfigError where it is none, or of another schema.
Sweep read_sweep(const std::filesystem::path& folder);
// sweep.json: what the plan came to, who is at it, and how far it is.
void write_sweep(const std::filesystem::path& folder, const Sweep&, const std::vector<std::string>& argv,
                 const SweepState* = nullptr);

}  // namespace kvreplay
