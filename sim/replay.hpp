// Replays one layer under any number of methods at once.
#pragma once
#include <atomic>
#include <functional>

#include "policies/method.hpp"
#include "sim/layer.hpp"
#include "sim/metrics.hpp"

namespace kvreplay {

// A method at one budget: what a cell is made of beside its layer.
struct Job {
  const Method* method = nullptr;
  int budget = 1;                      // tokens per set, mean over the layer
  std::vector<int> head_budgets = {};  // per KV head, for each of its sets; empty: all alike, or as their scores say
  // The same of the selector before the "/"; 0: what the method says, and `budget` where it says nothing.
  int prompt_budget = 0;
  std::vector<int> prompt_head_budgets = {};
  // Recorded evictions for `given:evicted_at`, per set (n_tokens).
  const std::vector<std::vector<std::int32_t>>* evicted_at = nullptr;
};

struct ReplayOptions {
  MetricSet metrics = MetricSet::all();
  std::vector<const PartUse*> compensators;  // measured beside every method, on its own evictions
  int n_checkpoints = 16;
  int block_steps = 64;
  int threads = 1;
  std::uint64_t seed = 0;
  std::vector<int> output_steps;            // steps whose CellResult::outputs are kept
  bool keep_attended = false;               // CellResult::attended of per-step selection
  const std::atomic<bool>* stop = nullptr;  // asked at every block; the replay ends early
  std::function<void(int steps)> progress;  // after every block, with the steps done
};

// Attention outputs of one cell at chosen steps: (n_heads, n_output_steps, v_head_dim) each; NaN where there is none.
struct Outputs {
  std::vector<float> full, retained, evicted;
  std::vector<std::vector<float>> estimate;  // per compensator: of the evicted output
};

struct CellResult {
  std::vector<std::string> compensators;  // canonical text; the method's own, if any, is one of them
  int acting = -1;                        // which of these acts on the method's output
  std::vector<double> state_bytes;        // of each at the end, per KV head; of all its sets in query_head scope
  std::vector<Series> series;             // in the order of the catalogue
  int n_steps = 0;
  // (n_sets, n_tokens) first decode step without the token, 0 = cut at the prompt, n_steps = never.
  std::vector<std::vector<std::int32_t>> evicted_at;
  // With a reader, if kept: (n_heads, n_steps, bytes) bit p % 8 of byte p / 8 = token p was attended.
  std::vector<std::uint8_t> attended;
  Outputs outputs;
  double seconds = 0;  // this method's own cost, summed over threads
  std::string error;   // the sentence of what went wrong; empty if nothing did
  const Series* find(Metric, int compensator = -1) const;
};

struct LayerResult {
  std::vector<CellResult> cells;                  // one per job
  double exact_seconds = 0, prefill_seconds = 0;  // shared by all cells, summed over threads
  bool complete = true;                           // false: stopped early
};

// Throws ConfigError where a method cannot run on this layer. Errors of one cell end up in CellResult::error.
LayerResult replay(const Layer&, std::span<const Job>, const ReplayOptions&);

}  // namespace kvreplay
