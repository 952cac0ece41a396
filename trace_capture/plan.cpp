#include "trace_capture/plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <numeric>

#include "policies/errors.hpp"
#include "traces/writer.hpp"

namespace kvreplay {
namespace {

constexpr int kPromptChecks = 4;

std::uint64_t u64(std::int64_t value) { return static_cast<std::uint64_t>(value); }

// n of them, evenly spread, the last one included.
std::vector<Pos> spread(std::span<const Pos> tokens, int n) {
  std::vector<Pos> chosen;
  const std::int64_t size = std::ssize(tokens), count = std::min<std::int64_t>(n, size);
  for (std::int64_t i = 1; i <= count; ++i) {
    chosen.push_back(tokens[static_cast<std::size_t>(i * size / count - 1)]);
  }
  return chosen;
}

}  // namespace

QueryChoice QueryChoice::parse(const std::string& text) {
  if (text == "all") {
    return {Kind::all, 0};
  }
  if (text == "decode") {
    return {Kind::decode, 0};
  }
  if (text.starts_with("window:")) {
    const char *begin = text.data() + 7, *end = text.data() + text.size();
    QueryChoice choice{Kind::window, 0};
    const auto [at, error] = std::from_chars(begin, end, choice.window);
    if (error == std::errc() && at == end && choice.window >= 1) {
      return choice;
    }
  }
  throw ConfigError("--queries: '" + text +
                    "' is none of all, decode and window:N (the last N of the prompt, and all of the decode)");
}

std::vector<Pos> QueryChoice::tokens(Pos prompt_len, Pos n_tokens) const {
  switch (kind) {
    case Kind::all:
      return queries_all(n_tokens);
    case Kind::decode:
      return queries_decode(prompt_len, n_tokens);
    case Kind::window:
      return queries_window(window, prompt_len, n_tokens);
  }
  return {};
}

RecordPlan record_plan(const ModelConfig& config, const StoreOptions& options, Pos prompt_len, Pos n_tokens) {
  RecordPlan plan;
  plan.n_heads = config.n_heads;
  plan.n_kv_heads = config.n_kv_heads;
  plan.head_dim = config.head_dim;
  plan.layers = options.layers;
  if (plan.layers.empty()) {
    plan.layers.resize(static_cast<std::size_t>(config.n_layers));
    std::iota(plan.layers.begin(), plan.layers.end(), 0);
  }
  for (const int layer : plan.layers) {
    if (layer < 0 || layer >= config.n_layers) {
      throw ConfigError(
          fmt::format("--layers: {} has no layer {}; its layers are 0 to {}", config.name, layer, config.n_layers - 1));
    }
  }
  plan.element = options.element;
  plan.capacity = n_tokens;
  plan.queries = options.queries.tokens(prompt_len, n_tokens);
  // An output can be checked only where the query is there too.
  const auto decode = std::lower_bound(plan.queries.begin(), plan.queries.end(), prompt_len);
  plan.outputs = spread({plan.queries.begin(), decode}, std::min(options.check_steps, kPromptChecks));
  const std::vector<Pos> later = spread({decode, plan.queries.end()}, options.check_steps);
  plan.outputs.insert(plan.outputs.end(), later.begin(), later.end());
  return plan;
}

std::uint64_t trace_bytes(const Model& model, const StoreOptions& options, Pos prompt_len, Pos n_tokens,
                          std::size_t piece_bytes) {
  const ModelConfig& config = model.config;
  const RecordPlan plan = record_plan(config, options, prompt_len, n_tokens);
  const std::uint64_t head_dim = u64(config.head_dim), n_heads = u64(config.n_heads), tokens = u64(n_tokens);
  const std::uint64_t rows = 2 * u64(config.n_kv_heads) * tokens + n_heads * plan.queries.size();
  std::uint64_t layer =
      rows * head_dim * size_of(plan.element) + n_heads * plan.outputs.size() * head_dim * sizeof(float);
  if (plan.queries.size() < tokens) {
    layer += plan.queries.size() * sizeof(Pos);  // q_index
  }
  if (options.w_o) {
    layer += u64(config.hidden) * n_heads * head_dim * size_of(model.layers[0].o.type);
  }
  constexpr std::uint64_t kMetadata = 64 << 10, kLayerMetadata = 4 << 10;  // groups and attributes
  return plan.layers.size() * (layer + kLayerMetadata) + tokens * (13 + piece_bytes) + kMetadata + config.json.size();
}

std::uint64_t free_bytes(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::path at = std::filesystem::absolute(folder, error);
  while (!std::filesystem::exists(at, error) && at.has_relative_path()) {
    at = at.parent_path();
  }
  const std::filesystem::space_info space = std::filesystem::space(at, error);
  if (error) {
    throw ConfigError(fmt::format("{}: its free space cannot be told ({})", at.string(), error.message()));
  }
  return space.available;
}

std::string bytes_text(std::uint64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

}  // namespace kvreplay
