// One run: traces x layers x methods x budgets, into a results folder.
#pragma once
#include <atomic>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "sim/results.hpp"

namespace kvreplay {

struct RunRequest {
  std::vector<std::filesystem::path> traces;
  std::vector<std::string> methods;  // texts, one each
  std::vector<std::string> budgets;
  std::map<std::string, std::vector<std::string>> budgets_of;  // by a method's text: its own, in place of `budgets`
  // "@NAME" in a method's text, where the file lies elsewhere. Results name the method by its text all the same.
  std::map<std::string, std::filesystem::path> tables;
  bool leave_out_unfit = false;  // a method that does not fit a budget is left out there, and named in the outcome
  std::vector<std::string> compensators;  // measured beside every method; empty: none
  bool compensators_given = false;        // false: dropped where a soft-cap forbids them
  MetricSet metrics = MetricSet::all();
  std::vector<int> layers;  // empty: all
  std::vector<int> replay;  // of these layers, over which allocators divide, the ones to replay; empty: all
  // What an allocator (canonical text) measured in one layer of a trace, where that is known; empty: measured here.
  std::function<std::vector<double>(const std::filesystem::path& trace, int layer, const std::string& allocator)>
      measured;
  Pos prompt_len = 0;  // 0: the trace's own
  int max_steps = 0;   // only so many decode steps, the first ones; 0: all
  Detail detail;
  std::vector<int> output_steps;
  int n_checkpoints = 16;
  int threads = 1;
  std::uint64_t seed = 0;
  std::uint64_t memory = 0;   // bytes; 0: three quarters of what is free
  std::filesystem::path out;  // empty: nothing is written
  bool force = false;
  std::vector<std::string> argv;
  const std::atomic<bool>* stop = nullptr;
  std::function<void(const CellId&, const CellResult&, const Layer&)> cell;  // sees every finished cell
  std::function<void(const CellId&, const std::string& why)> cell_failed;    // and every other one
  // After every block: decode steps of one method done, in all, and what is being replayed.
  std::function<void(double done, double total, const std::string& what)> progress;
};

struct RunOutcome {
  struct LeftOut {
    std::string label, budget, why;
  };
  int n_cells = 0;
  std::vector<LeftOut> left_out;
  bool interrupted = false;
  bool trace_failed = false;        // a trace could not be read to its end
  std::vector<std::string> failed;  // one sentence per cell or trace that failed
};

// ConfigError and TraceError before anything is written where the request cannot be met.
RunOutcome run(const RunRequest&);
// The same up to where something would be written or replayed.
void check(const RunRequest&);

// Bytes that replaying a layer takes: shared by the cells beside each other, and of each of them.
struct MemoryNeed {
  double shared = 0, own = 0;
  // How many cells fit beside each other; 0: not even one.
  std::size_t cells_in(double bytes) const;
};
struct LayerExtent {
  int n_tokens = 0, n_steps = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, v_head_dim = 0;
};
MemoryNeed memory_need(const LayerExtent&, const MetricSet&, std::size_t n_compensators);
double memory_allowed(std::uint64_t asked);  // RunRequest::memory in bytes

// "2GiB" -> bytes; ConfigError.
std::uint64_t parse_bytes(const std::string& option, const std::string& text);
// "0,4-7" -> {0, 4, 5, 6, 7}; ConfigError.
std::vector<int> parse_integers(const std::string& option, const std::string& text);
// A JSON file of one number per layer, or per layer and KV head, for "@file.json" in a method's text.
ValueTable read_value_table(const std::string& path);
// The same by name, where `tables` says in which file some names lie; the table keeps its name.
TableReader table_reader(const std::map<std::string, std::filesystem::path>& tables);

}  // namespace kvreplay
