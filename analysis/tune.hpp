// Looks for the parameter values that make an objective small: for everything, for each layer and for each KV head.
#pragma once
#include <atomic>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "analysis/objective.hpp"
#include "analysis/search.hpp"

namespace kvreplay {

struct TuneRequest {
  std::vector<std::filesystem::path> traces, holdout;  // holdout: nothing is chosen on these
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

// What one parameter can follow: one value for all, a value per layer, or a value per layer and KV head.
enum class Grain { global, layer, head };
// And why it is no finer, in a sentence; empty for heads.
struct GrainOf {
  Grain grain = Grain::head;
  std::string why;
};
GrainOf grain_of(const Axis& axis, const Method& method, int n_kv_heads, const Objective& objective);

// How closely a round looks: these layers (empty: all), so many of the first decode steps (0: all).
struct Fidelity {
  std::vector<int> layers;
  int max_steps = 0;
};
// The rounds before the last, which sees everything. layers: those that all traces have; first_eviction: the decode
// step before which nothing can differ. Rounds that would cost more than half of the last are left out.
std::vector<Fidelity> fidelities(const std::vector<int>& layers, int n_steps, int first_eviction);

// Writes OUT/train (an ordinary results folder of all candidates on all layers and steps), OUT/params (value tables),
// OUT/holdout (the chosen on the held-out traces) and OUT/tuned.json. OUT appears whole or not at all.
TuneOutcome tune(const TuneRequest& request);

// The methods that a tuned.json has chosen, for a run: their texts, the budgets of each, and where their tables lie.
struct TunedMethods {
  std::vector<std::string> methods, budgets;  // budgets: all of them, in order
  std::map<std::string, std::vector<std::string>> budgets_of;
  std::map<std::string, std::filesystem::path> tables;
};
TunedMethods read_tuned(const std::filesystem::path& file);  // ConfigError

}  // namespace kvreplay
