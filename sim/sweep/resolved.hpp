// A plan with everything looked up: which traces there are, which methods its grids make, and the keys of its cells.
// Written beside the results; from it alone status and merge know what belongs to the sweep.
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "sim/metrics.hpp"
#include "sim/sweep/plan.hpp"

namespace kvreplay {

// Part of every cell's key. Raised whenever what is kept of a finished cell changes, its numbers included, so that old
// ones are done anew. The tool's version is written beside the results and is no part of the key.
inline constexpr int kSweepSchema = 1;

struct SweepTrace {
  std::string path, stem, content_hash;
  std::string stamp;                 // size and time of the file: whether it changes while the sweep runs
  int prompt_len = 0, n_tokens = 0;  // as replayed
  int n_heads = 0, n_kv_heads = 0, head_dim = 0, v_head_dim = 0;
  std::vector<int> layers;
  std::vector<std::pair<int, std::string>> skipped;  // layer, reason
  std::vector<std::string> compensators;             // canonical; none where a soft-cap forbids the default ones
  int n_steps() const { return n_tokens - prompt_len; }
};

struct SweepMethod {
  std::string label, name;                                  // as in results: the text, and the canonical text
  std::vector<std::string> budgets;                         // {""} for a method without one
  std::vector<std::pair<std::string, std::string>> params;  // what its grid set
  std::map<std::string, std::string> files;                 // hashes of the files that its text names
  bool divides = false;                                     // has an allocator to which the layers in use matter
  std::map<std::string, std::string> measuring;             // allocators that measure: canonical, and with their files
};

// One column of cells: a method at a budget.
struct SweepConfig {
  int method = 0, budget = 0;
};

struct Sweep {
  std::vector<SweepTrace> traces;
  std::vector<std::pair<std::string, std::string>> failed_traces;  // path, sentence
  std::vector<SweepMethod> methods;
  std::vector<std::string> compensators;  // canonical, measured beside every method
  bool compensators_given = false;
  std::map<std::string, std::string> files;   // hashes of the files that they name
  std::map<std::string, std::string> tables;  // "@NAME" in a text: where the file lies
  std::vector<std::string> metrics, statistics;
  int checkpoints = 16;
  std::uint64_t seed = 0;
  // What finished cells must have beside the numbers per layer, sorted: "heads", "p90", "steps" ...
  std::vector<std::string> detail;
  std::vector<int> output_steps;
  std::vector<SweepConfig> configs;  // in the order of the plan

  bool heads() const { return has("heads"); }
  bool has(const std::string& word) const;
  const SweepMethod& method(int config) const { return methods[std::size_t(configs[std::size_t(config)].method)]; }
  const std::string& budget(int config) const;
  std::size_t n_cells() const;

  // What the cells of one layer share, hashed; and a cell's key.
  std::string group(const SweepTrace&, int layer) const;
  std::string key(const std::string& group, const SweepTrace&, int config) const;
  // Allocators that measure, of all methods: canonical text, and the same with the hashes of its files.
  std::map<std::string, std::string> measuring() const;
  // The same for what allocators measured in one layer.
  std::string measured_group(const SweepTrace&, int layer) const;
  static std::string measured_key(const std::string& group, const std::string& allocator_with_files);

  nlohmann::ordered_json json() const;
  static Sweep from_json(const nlohmann::ordered_json&);  // throws what nlohmann throws where it is none
};

// Opens every trace once. ConfigError where the plan itself cannot be; a trace that cannot be read is one of
// failed_traces.
Sweep resolve(const Plan&);

std::string stamp_of(const std::filesystem::path&);  // "" where there is no file

}  // namespace kvreplay
