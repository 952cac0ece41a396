#include "sim/cli/headscores_command.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "policies/errors.hpp"
#include "policies/spans.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/head_scores.hpp"
#include "sim/load.hpp"
#include "sim/run.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
  std::string trace, layers, group = "mean", out;
  std::vector<std::string> spans;
  bool hard = false, force = false;
  int threads = 0;
};

std::vector<TokenSpan> spans_of(const TraceInfo& info) {
  std::vector<TokenSpan> spans;
  for (const Span& s : info.spans) {
    spans.push_back({s.name, s.begin, s.end});
  }
  return spans;
}

std::vector<int> layers_of(const Options& o, const TraceInfo& info) {
  std::vector<int> layers = o.layers.empty() ? info.layers : parse_integers("--layers", o.layers);
  for (int layer : layers) {
    if (std::find(info.layers.begin(), info.layers.end(), layer) == info.layers.end()) {
      throw ConfigError(
          fmt::format("--layers: {} has no layer {}; it has {}", o.trace, layer, fmt::join(info.layers, ", ")));
    }
  }
  return layers;
}

// Of query heads: one number per KV head.
std::vector<double> per_kv_head(const std::vector<double>& scores, int group_size, bool max) {
  std::vector<double> out;
  for (std::size_t begin = 0; begin < scores.size(); begin += std::size_t(group_size)) {
    double most = 0, sum = 0;
    for (std::size_t i = begin; i < begin + std::size_t(group_size); ++i) {
      most = std::max(most, scores[i]);
      sum += scores[i];
    }
    out.push_back(max ? most : sum / group_size);
  }
  return out;
}

void write(const fs::path& path, const Json& table, bool force) {
  if (fs::exists(path) && !force) {
    throw ConfigError(path.string() + " exists already; name another folder, or use --force to replace it");
  }
  std::ofstream file(path);
  file << table.dump(1) << "\n";
  if (!file.flush()) {
    throw ConfigError(path.string() + " cannot be written");
  }
}

void headscores(const Options& o) {
  const TraceReader trace(o.trace);
  const TraceInfo& info = trace.info();
  const std::vector<TokenSpan> spans = spans_of(info);
  if (spans.empty()) {
    throw ConfigError(
        o.trace +
        ": headscores needs named spans of tokens, but the trace has none; 'kvreplay repack --span' names them");
  }
  check_span_names(o.trace, spans, o.spans);
  if (info.n_tokens - info.prompt_len < 2) {
    throw ConfigError(o.trace + ": headscores needs two decode steps, of which it asks what follows the first");
  }
  std::vector<bool> evidence(std::size_t(info.prompt_len), false);
  for (const TokenRange& r : ranges_of(spans, o.spans, info.prompt_len)) {
    std::fill(evidence.begin() + r.begin, evidence.begin() + r.end, true);
  }
  Json surface, logic, ignore;
  for (int layer : layers_of(o, info)) {
    if (short_window(info, layer, info.n_tokens) > 0) {
      continue;  // a run leaves it out too
    }
    if (first_stored_query(trace, layer) > info.prompt_len) {
      throw ConfigError(
          fmt::format("{}: layer {} lacks queries of decode steps; capture with --queries decode", o.trace, layer));
    }
    LoadOptions load;
    load.prompt_len = load.first_query = info.prompt_len;
    const Layer data = load_layer(trace, layer, load);
    const HeadScores scores = head_scores(data, info.token_ids, evidence, o.hard, threads_or_all(o.threads));
    const std::string name = std::to_string(layer);
    surface[name] = per_kv_head(scores.surface, info.group_size, o.group == "max");
    logic[name] = per_kv_head(scores.logic, info.group_size, o.group == "max");
    ignore[name] = per_kv_head(scores.ignore, info.group_size, o.group == "max");
  }
  std::error_code error;
  fs::create_directories(o.out, error);
  if (error) {
    throw ConfigError("--out " + o.out + " cannot be made: " + error.message());
  }
  write(fs::path(o.out) / "surface.json", surface, o.force);
  write(fs::path(o.out) / "logic.json", logic, o.force);
  write(fs::path(o.out) / "ignore.json", ignore, o.force);
  fmt::print("surface.json, logic.json and ignore.json of {} layers in {}\n", surface.size(), o.out);
}

}  // namespace

void add_headscores_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("headscores", "Measure per head how much it copies from spans of the prompt");
  const auto o = std::make_shared<Options>();
  command->add_option("trace", o->trace, "Trace file (HDF5) with named spans")->required();
  command->add_option("--span", o->spans, "Names of the spans that hold what is asked for (default: all)");
  command->add_flag("--hard", o->hard, "Count each step's most attended token alone, as retrieval heads are found");
  command->add_option("--group", o->group, "How query heads become one KV head: mean or max")
      ->check(CLI::IsMember({"mean", "max"}));
  command->add_option("--layers", o->layers, "The model's layer numbers, as 0,4-7 (default: all in the trace)");
  command->add_option("-j,--threads", o->threads, "Threads (default: all)");
  command->add_option("-o,--out", o->out, "Folder for the tables")->required();
  command->add_flag("--force", o->force, "Replace tables that are there");
  command->callback([o] { headscores(*o); });
}

}  // namespace kvreplay
