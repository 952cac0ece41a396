// Looks for the parameter values that make an objective small: for everything, for each layer and for each KV head.
#pragma once
#include <atomic>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay {

struct TuneRequest {
  std::vector<std::filesystem::path> traces, holdout;  // holdout: nothing is chosen on these
  double holdout_share = 0;  // or: of the decode steps of `traces`, the last share; nothing is chosen on these
  std::string method;
  std::vector<std::string> params;  // "alpha=0.3:0.995", see Axis::parse
  std::vector<std::string> budgets;
  std::string objective = "error_output";
  int n_candidates = 32;    // beside the method as it is
  std::vector<int> layers;  // empty: all
  Pos prompt_len = 0;       // 0: the trace's own
  int max_steps = 0;        // 0: all
  int threads = 1;
  std::uint64_t seed = 0;
  std::uint64_t memory = 0;
  std::filesystem::path out;
  bool force = false;
  std::vector<std::string> argv;
  const std::atomic<bool>* stop = nullptr;
  std::function<void(double done, double total, const std::string& what)> progress;
};

struct TuneOutcome {
  bool interrupted = false;         // nothing was written
  bool trace_failed = false;        // a trace could not be read to its end
  std::vector<std::string> failed;  // one sentence per cell or trace that failed; nothing was written
};

// Writes OUT/train (an ordinary results folder of all candidates on all layers and steps), OUT/params (value tables),
// OUT/holdout (the chosen on the held-out traces) and OUT/tuned.json. OUT appears whole or not at all.
TuneOutcome tune(const TuneRequest& request);

}  // namespace kvreplay
