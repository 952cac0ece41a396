// The folder that a run writes: summary.csv, results.h5, run.json (docs/results.md).
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "sim/head_statistics.hpp"
#include "sim/replay.hpp"

namespace kvreplay {

inline constexpr int kBlockSteps = 64;  // steps per entry of /blocks

// Which cell a result belongs to.
struct CellId {
  std::string trace;  // file stem
  int layer = 0;
  std::string method, label, budget;
  int budget_tokens = -1;  // mean over the layer's sets; -1: none
  Foresight foresight = Foresight::none;
  std::string group;  // evictable, pinned or selection
  int prompt_len = 0, n_heads = 0, n_kv_heads = 0;
};

// Statistics of the counted values of one row of a series; NaN where there are none.
struct Statistics {
  int n = 0, n_skipped = 0;
  double mean, std, p50, p90, p99, max;  // std: population; quantiles interpolate linearly
};
Statistics statistics(std::span<const float> values);

struct Detail {
  bool steps = false, retained = false, outputs = false;
};

// Writes under temporary names; `publish` gives all three files their final ones.
class ResultsWriter {
 public:
  ResultsWriter(const std::filesystem::path& folder, Detail);
  ~ResultsWriter();  // unpublished: leaves no file behind
  void add(const CellId&, const CellResult&, const std::vector<int>& output_steps, int v_head_dim);
  // Where a layer's heads look: once for each layer of each trace.
  void add_heads(const std::string& trace, int layer, const HeadStatistics&);
  int n_cells() const { return int(cells_.size()); }
  // run_json: the text of run.json.
  void publish(const std::string& run_json);

 private:
  struct Storage;
  std::filesystem::path folder_;
  Detail detail_;
  std::unique_ptr<Storage> storage_;
  std::string summary_;  // rows of summary.csv so far
  std::vector<CellId> cells_;
  std::vector<std::string> beside_, acting_, states_;  // compensators, by cell
  std::vector<std::int32_t> n_steps_;
};

// ConfigError where `out` is a file, or holds files and `force` does not allow that.
void refuse_used_folder(const std::filesystem::path& out, bool force);
// "a,b" -> "\"a,b\"" where RFC 4180 asks for it.
std::string csv_field(const std::string& text);
// A file that appears under its final name whole or not at all; `part`: the temporary name, where several processes may
// write the file.
void write_whole(const std::filesystem::path&, const std::string& text, const std::filesystem::path& part = {});

}  // namespace kvreplay
