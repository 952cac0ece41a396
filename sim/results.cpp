#include "sim/results.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "policies/errors.hpp"
#include "policies/help.hpp"
#include "sim/whole_file.hpp"
#include "traces/hdf5.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;

constexpr const char* kResults = "results.h5";
constexpr const char* kSummary = "summary.csv";
constexpr const char* kRun = "run.json";
constexpr const char* kHeader =
    "trace,layer,kv_head,q_head,method,label,budget,compensator,foresight,metric,n,n_skipped,mean,std,p50,p90,p99,"
    "max\n";

double quantile(const std::vector<float>& sorted, double p) {
  const double at = p * double(sorted.size() - 1);
  const auto i = std::size_t(at);
  const double low = double(sorted[i]), high = double(sorted[std::min(i + 1, sorted.size() - 1)]);
  return low + (at - double(i)) * (high - low);
}

std::string number(double x) { return std::isnan(x) ? "" : fmt::format("{:.9g}", x); }

std::string series_name(const Series& s, const CellResult& cell) {
  std::string name(info(s.metric).name);
  if (!s.span.empty()) {
    name += ":" + s.span;
  }
  if (s.compensator >= 0) {
    name += "." + cell.compensators[std::size_t(s.compensator)];
  }
  return name;
}

// "/" separates groups in HDF5; percent-encoding keeps names apart.
std::string safe_path(const std::string& name) {
  std::string path;
  for (char c : name) {
    path += c == '/' ? "%2F" : c == '%' ? "%25" : std::string(1, c);
  }
  return path;
}

// (rows, n_blocks) means of the counted values in each block of decode steps; NaN where nothing counted.
std::vector<double> block_means(const Series& s, int n_steps) {
  const int n_blocks = (n_steps + kBlockSteps - 1) / kBlockSteps;
  std::vector<double> sum(std::size_t(s.rows) * std::size_t(n_blocks), 0), n = sum;
  for (int r = 0; r < s.rows; ++r) {
    const auto row = s.row(r);
    for (int i = 0; i < s.n_steps; ++i) {
      const float x = row[std::size_t(i)];
      if (std::isnan(x)) {
        continue;
      }
      const int step = s.steps.empty() ? i : s.steps[std::size_t(i)];
      const std::size_t b = std::size_t(r) * std::size_t(n_blocks) + std::size_t(step / kBlockSteps);
      sum[b] += double(x);
      n[b] += 1;
    }
  }
  for (std::size_t b = 0; b < sum.size(); ++b) {
    sum[b] = n[b] > 0 ? sum[b] / n[b] : std::nan("");
  }
  return sum;
}

hdf5::Group child(const hdf5::Group& parent, const std::string& name) {
  return parent.has(name) ? parent.group(name) : parent.create_group(name);
}

}  // namespace

Statistics statistics(std::span<const float> values) {
  const double none = std::nan("");
  Statistics s{.n = 0, .n_skipped = 0, .mean = none, .std = none, .p50 = none, .p90 = none, .p99 = none, .max = none};
  std::vector<float> counted;
  for (float x : values) {
    if (!std::isnan(x)) {
      counted.push_back(x);
    }
  }
  s.n = int(counted.size());
  s.n_skipped = int(values.size()) - s.n;
  if (counted.empty()) {
    return s;
  }
  double sum = 0, squares = 0;
  for (float x : counted) {
    sum += double(x);
  }
  s.mean = sum / s.n;
  for (float x : counted) {
    squares += (double(x) - s.mean) * (double(x) - s.mean);
  }
  s.std = std::sqrt(squares / s.n);
  std::sort(counted.begin(), counted.end());
  s.p50 = quantile(counted, 0.5);
  s.p90 = quantile(counted, 0.9);
  s.p99 = quantile(counted, 0.99);
  s.max = double(counted.back());
  return s;
}

void refuse_used_folder(const fs::path& out, bool force) {
  std::error_code error;
  if (fs::exists(out, error) && !fs::is_directory(out, error)) {
    throw ConfigError("--out " + out.string() + " is not a folder");
  }
  if (fs::is_directory(out, error) && !fs::is_empty(out, error) && !force) {
    throw ConfigError("--out " + out.string() + " is not empty; name another folder or add --force");
  }
}

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) {
    return text;
  }
  std::string quoted = "\"";
  for (char c : text) {
    quoted += c == '"' ? "\"\"" : std::string(1, c);
  }
  return quoted + "\"";
}

void write_whole(const fs::path& path, const std::string& text, const fs::path& temporary) {
  WholeFile file(path, temporary);
  file.add(text);
  file.publish();
}

struct ResultsWriter::Storage {
  hdf5::File file;
  hdf5::Group blocks;
  bool published = false;
};

ResultsWriter::ResultsWriter(const fs::path& folder, Detail detail) : folder_(folder), detail_(detail) {
  hdf5::File file = hdf5::File::create(folder / kResults);
  hdf5::Group blocks = file.root().create_group("blocks");
  storage_ = std::make_unique<Storage>(Storage{std::move(file), std::move(blocks)});
  summary_ = kHeader;
}

ResultsWriter::~ResultsWriter() {
  if (storage_->published) {
    return;
  }
  try {
    storage_->file.discard();
  } catch (const std::exception&) {  // nothing more can be done, and nothing has a final name
  }
}

void ResultsWriter::add(const CellId& id, const CellResult& cell, const std::vector<int>& output_steps,
                        int v_head_dim) {
  const std::string index = fmt::format("{:06d}", cells_.size());
  const hdf5::Group& root = storage_->file.root();
  const hdf5::Group blocks = storage_->blocks.create_group(index);
  const int group_size = id.n_heads / id.n_kv_heads;
  for (const Series& s : cell.series) {
    const std::string name = series_name(s, cell);
    const std::vector<double> means = block_means(s, cell.n_steps);
    const auto rows = std::uint64_t(s.rows);
    blocks.create(safe_path(name), hdf5::Type::f64, {rows, means.size() / rows}).write(hdf5::bytes_of(means));
    if (detail_.steps) {
      const hdf5::Dataset steps =
          child(child(root, "steps"), index).create(safe_path(name), hdf5::Type::f32, {rows, std::uint64_t(s.n_steps)});
      steps.write(hdf5::bytes_of(s.values));
      if (!s.steps.empty()) {
        steps.set("steps", std::span<const std::int32_t>(s.steps));
      }
    }
    const Level level = info(s.metric).level;
    for (int r = 0; r < s.rows; ++r) {
      const Statistics st = statistics(s.row(r));
      const std::string kv_head = level == Level::query_head ? fmt::to_string(r / group_size)
                                  : level == Level::kv_head  ? fmt::to_string(r)
                                                             : "";
      summary_ += fmt::format(
          "{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}\n", csv_field(id.trace), id.layer, kv_head,
          level == Level::query_head ? fmt::to_string(r) : "", csv_field(id.method), csv_field(id.label),
          csv_field(id.budget), s.compensator >= 0 ? csv_field(cell.compensators[std::size_t(s.compensator)]) : "",
          foresight_name(id.foresight),
          csv_field(std::string(info(s.metric).name) + (s.span.empty() ? "" : ":" + s.span)), st.n, st.n_skipped,
          number(st.mean), number(st.std), number(st.p50), number(st.p90), number(st.p99), number(st.max));
    }
  }
  if (detail_.retained && !cell.attended.empty()) {
    const auto n_heads = std::uint64_t(id.n_heads), n_steps = std::uint64_t(cell.n_steps);
    const std::uint64_t n_bytes = cell.attended.size() / (n_heads * n_steps);
    child(root, "attended")
        .create(index, hdf5::Type::u8, {n_heads, n_steps, n_bytes}, {{1, n_steps, n_bytes}, 4, false})
        .write(hdf5::bytes_of(cell.attended));
  }
  if (detail_.retained) {
    std::vector<std::int32_t> all;
    for (const auto& row : cell.evicted_at) {
      all.insert(all.end(), row.begin(), row.end());
    }
    const std::uint64_t n_sets = cell.evicted_at.size();
    child(root, "evicted_at")
        .create(index, hdf5::Type::i32, {n_sets, all.size() / n_sets}, {{1, all.size() / n_sets}, 4, false})
        .write(hdf5::bytes_of(all));
  }
  if (detail_.outputs && !output_steps.empty()) {
    const hdf5::Group group = child(child(root, "outputs"), index);
    const hdf5::Shape shape{std::uint64_t(id.n_heads), output_steps.size(), std::uint64_t(v_head_dim)};
    const auto write = [&](const std::string& name, const std::vector<float>& values) {
      group.create(safe_path(name), hdf5::Type::f32, shape).write(hdf5::bytes_of(values));
    };
    write("f", cell.outputs.full);
    write("f_R", cell.outputs.retained);
    write("f_E", cell.outputs.evicted);
    for (std::size_t c = 0; c < cell.outputs.estimate.size(); ++c) {
      write("f_E." + cell.compensators[c], cell.outputs.estimate[c]);
    }
    group.set("steps", std::span<const std::int32_t>(output_steps));
  }
  cells_.push_back(id);
  std::string beside, states;
  for (std::size_t c = 0; c < cell.compensators.size(); ++c) {
    beside += (c > 0 ? "," : "") + cell.compensators[c];
    states += (c > 0 ? "," : "") + number(cell.state_bytes[c]);
  }
  beside_.push_back(beside);
  states_.push_back(states);
  acting_.push_back(cell.acting >= 0 ? cell.compensators[std::size_t(cell.acting)] : "");
  n_steps_.push_back(cell.n_steps);
}

void ResultsWriter::add_heads(const std::string& trace, int layer, const HeadStatistics& heads) {
  const hdf5::Group of_trace = child(child(storage_->file.root(), "heads"), safe_path(trace));
  const hdf5::Group group = of_trace.create_group(fmt::format("{:03}", layer));
  const auto columns = heads.columns();
  for (std::size_t i = 0; i < columns.size(); ++i) {
    group.create(std::string(HeadStatistics::kNames[i]), hdf5::Type::f64, {columns[i]->size()})
        .write(hdf5::bytes_of(*columns[i]));
  }
}

void ResultsWriter::publish(const std::string& run_json) {
  const hdf5::Group cells = storage_->file.root().create_group("cells");
  const auto texts = [&](const char* name, auto of) {
    std::vector<std::string> column;
    for (const CellId& c : cells_) {
      column.push_back(of(c));
    }
    cells.write_column(name, column);
  };
  const auto integers = [&](const char* name, auto of) {
    std::vector<std::int32_t> column;
    for (const CellId& c : cells_) {
      column.push_back(of(c));
    }
    cells.write_column(name, column);
  };
  texts("trace", [](const CellId& c) { return c.trace; });
  integers("layer", [](const CellId& c) { return c.layer; });
  texts("method", [](const CellId& c) { return c.method; });
  texts("label", [](const CellId& c) { return c.label; });
  texts("budget", [](const CellId& c) { return c.budget; });
  integers("budget_tokens", [](const CellId& c) { return c.budget_tokens; });
  texts("foresight", [](const CellId& c) { return std::string(foresight_name(c.foresight)); });
  texts("group", [](const CellId& c) { return c.group; });
  integers("prompt_len", [](const CellId& c) { return c.prompt_len; });
  integers("n_heads", [](const CellId& c) { return c.n_heads; });
  integers("n_kv_heads", [](const CellId& c) { return c.n_kv_heads; });
  integers("group_size", [](const CellId& c) { return c.n_heads / c.n_kv_heads; });
  cells.write_column("compensators", beside_);
  cells.write_column("compensator_acting", acting_);
  cells.write_column("state_bytes", states_);
  cells.write_column("n_steps", n_steps_);
  storage_->file.root().set("format", "kvreplay-results");
  storage_->file.root().set("format_version", "1.0");
  storage_->file.root().set("block_steps", kBlockSteps);
  // All three are on the disk before the first of older results goes: a disk that is full costs nothing.
  storage_->file.close();
  const fs::path results = folder_ / kResults;
  hdf5::sync(hdf5::File::part_of(results));
  WholeFile summary(folder_ / kSummary), run(folder_ / kRun);
  summary.add(summary_);
  summary.settle();
  run.add(run_json);
  run.settle();
  fs::remove(folder_ / kRun);  // with --force: an old one must not describe new tables
  fs::rename(hdf5::File::part_of(results), results);
  storage_->published = true;
  summary.publish();
  run.publish();
}

}  // namespace kvreplay
