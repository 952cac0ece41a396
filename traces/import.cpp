#include "traces/import.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>

#include "traces/npz.hpp"
#include "traces/schema.hpp"
#include "traces/writer.hpp"

namespace kvreplay {
namespace {

using Shape = std::vector<std::uint64_t>;

std::uint64_t u64(std::int64_t value) { return static_cast<std::uint64_t>(value); }

void expect_shape(const NpyArray& array, const Shape& expected, const char* meaning) {
  if (array.shape != expected) {
    throw TraceError(fmt::format("{}: expected shape ({}) = {}, found ({})", array.where, fmt::join(expected, ", "),
                                 meaning, fmt::join(array.shape, ", ")));
  }
}

// "k12" is array k of layer 12; false for names that are no layer's.
bool split_name(const std::string& name, std::string& stem, int& layer) {
  const std::size_t digits = name.find_last_not_of("0123456789") + 1;
  stem = name.substr(0, digits);
  const auto [end, error] = std::from_chars(name.data() + digits, name.data() + name.size(), layer);
  return digits < name.size() && error == std::errc() && end == name.data() + name.size() &&
         (name[digits] != '0' || digits + 1 == name.size());
}

std::vector<int> layers_of(const Npz& npz, const std::string& path) {
  static const std::set<std::string> kWhole = {"token_ids", "position", "q_index", "out_index"};
  static const std::set<std::string> kPerLayer = {"q", "k", "v", "out", "w_o"};
  std::set<int> layers;
  for (const std::string& name : npz.names()) {
    std::string stem;
    int layer = 0;
    if (kWhole.contains(name)) {
      continue;
    }
    if (!split_name(name, stem, layer) || !kPerLayer.contains(stem)) {
      throw TraceError(fmt::format("{}: the array '{}' is unknown; allowed are {} and, with a layer number, {}", path,
                                   name, fmt::join(kWhole, ", "), fmt::join(kPerLayer, ", ")));
    }
    if (layer >= schema::kMaxLayers) {
      throw TraceError(fmt::format("{}: the array '{}' has layer number {}; at most {} are allowed", path, name, layer,
                                   schema::kMaxLayers - 1));
    }
    layers.insert(layer);
  }
  if (layers.empty()) {
    throw TraceError(path + ": has no layers; expected arrays named q0, k0, v0 and so on");
  }
  return {layers.begin(), layers.end()};
}

std::vector<std::int32_t> int32_list(const NpyArray& array, std::uint64_t n_at_least) {
  if (array.shape.size() != 1 || array.shape[0] < n_at_least) {
    throw TraceError(fmt::format("{}: expected a list of at least {}, found shape ({})", array.where, n_at_least,
                                 fmt::join(array.shape, ", ")));
  }
  std::vector<std::int32_t> values;
  for (const std::int64_t value : array.integers()) {
    if (value < std::numeric_limits<std::int32_t>::min() || value > std::numeric_limits<std::int32_t>::max()) {
      throw TraceError(fmt::format("{}: {} does not fit 32 bits", array.where, value));
    }
    values.push_back(static_cast<std::int32_t>(value));
  }
  return values;
}

// Ascending tokens below n_file; those below n_tokens are returned.
std::vector<Pos> index_list(const NpyArray& array, std::uint64_t n_file, Pos n_tokens) {
  std::vector<Pos> index = int32_list(array, 1);
  for (std::size_t i = 0; i < index.size(); ++i) {
    if (index[i] < 0 || u64(index[i]) >= n_file || (i > 0 && index[i] <= index[i - 1])) {
      throw TraceError(
          fmt::format("{}: expected ascending tokens below {}, found {} at [{}]", array.where, n_file, index[i], i));
    }
  }
  index.erase(std::lower_bound(index.begin(), index.end(), n_tokens), index.end());
  return index;
}

// The first n rows of every head: (heads, rows, width) -> (heads, n, width).
std::vector<float> first_rows(const NpyArray& array, std::uint64_t n) {
  std::vector<float> all = array.floats();
  const std::uint64_t rows = array.shape[1], width = array.shape[2];
  if (n == rows) {
    return all;
  }
  std::vector<float> cut;
  cut.reserve(array.shape[0] * n * width);
  for (std::uint64_t head = 0; head < array.shape[0]; ++head) {
    const auto from = all.begin() + static_cast<std::ptrdiff_t>(head * rows * width);
    cut.insert(cut.end(), from, from + static_cast<std::ptrdiff_t>(n * width));
  }
  return cut;
}

std::string name_in(const char* stem, int layer) { return fmt::format("{}{}", stem, layer); }

}  // namespace

std::vector<double> rope_frequencies(double theta, int rotary_dim) {
  std::vector<double> inv_freq;
  for (int i = 0; i < rotary_dim / 2; ++i) {
    inv_freq.push_back(std::pow(theta, -2.0 * i / rotary_dim));
  }
  return inv_freq;
}

void import_npz(const std::filesystem::path& in, const std::filesystem::path& out, const ImportOptions& options) {
  const std::string path = in.string();
  const Npz npz(in);
  const std::vector<int> present = layers_of(npz, path);
  TraceInfo meta;
  meta.layers = options.layers.empty() ? present : options.layers;
  std::sort(meta.layers.begin(), meta.layers.end());
  meta.layers.erase(std::unique(meta.layers.begin(), meta.layers.end()), meta.layers.end());
  for (const int layer : meta.layers) {
    if (!std::binary_search(present.begin(), present.end(), layer)) {
      throw std::invalid_argument(
          fmt::format("layer {} is not in {}; it has {}", layer, path, fmt::join(present, ", ")));
    }
  }

  const std::vector<std::int32_t> ids = int32_list(npz.load("token_ids"), 1);
  const std::uint64_t n_file = ids.size();
  if (n_file > u64(schema::kMaxTokens) || u64(options.n_tokens) > n_file || options.n_tokens < 0) {
    throw std::invalid_argument(
        fmt::format("tokens {} must be from 1 to the {} in {}", options.n_tokens, n_file, path));
  }
  const Pos n_tokens = options.n_tokens == 0 ? static_cast<Pos>(n_file) : options.n_tokens;
  if (options.prompt_len < 1 || options.prompt_len > n_tokens) {
    throw std::invalid_argument(
        fmt::format("prompt_len {} must be from 1 to the {} tokens", options.prompt_len, n_tokens));
  }
  std::vector<std::int32_t> positions;
  if (npz.has("position")) {
    positions = int32_list(npz.load("position"), n_file);
    positions.resize(u64(n_tokens));
    for (std::size_t i = 0; i < positions.size(); ++i) {
      if (positions[i] < 0) {
        throw TraceError(
            fmt::format("{}: position: expected positions from 0, found {} at [{}]", path, positions[i], i));
      }
    }
  }

  // The first layer says what the model is; all others must agree.
  const NpyArray first_k = npz.load(name_in("k", meta.layers[0])), first_v = npz.load(name_in("v", meta.layers[0])),
                 first_q = npz.load(name_in("q", meta.layers[0]));
  for (const NpyArray* array : {&first_k, &first_v, &first_q}) {
    if (array->shape.size() != 3 || array->n_elements() == 0) {
      throw TraceError(fmt::format("{}: expected three dimensions (heads, tokens, channels), found ({})", array->where,
                                   fmt::join(array->shape, ", ")));
    }
  }
  const Shape k_shape = {first_k.shape[0], n_file, first_k.shape[2]},
              v_shape = {first_k.shape[0], n_file, first_v.shape[2]};
  if (first_q.shape[0] > u64(schema::kMaxHeads) || first_q.shape[0] % first_k.shape[0] != 0) {
    throw TraceError(fmt::format("{}: {} query heads are not a multiple of the {} KV heads", first_q.where,
                                 first_q.shape[0], first_k.shape[0]));
  }
  if (first_k.shape[2] > u64(schema::kMaxHeadDim) || first_v.shape[2] > u64(schema::kMaxHeadDim)) {
    throw TraceError(
        fmt::format("{}: a head_dim of more than {} is not supported", first_k.where, schema::kMaxHeadDim));
  }
  meta.n_heads = static_cast<int>(first_q.shape[0]);
  meta.n_kv_heads = static_cast<int>(first_k.shape[0]);
  meta.group_size = meta.n_heads / meta.n_kv_heads;
  meta.head_dim = static_cast<int>(first_k.shape[2]);
  meta.v_head_dim = static_cast<int>(first_v.shape[2]);
  meta.element = options.dtype.value_or(first_k.element());

  std::vector<Pos> queries = queries_all(n_tokens);
  std::uint64_t n_queries = n_file;
  if (npz.has("q_index")) {
    const NpyArray q_index = npz.load("q_index");
    queries = index_list(q_index, n_file, n_tokens);
    n_queries = q_index.shape[0];
  } else if (first_q.shape[1] != n_file) {
    throw TraceError(fmt::format("{}: has {} queries of {} tokens; add an array q_index that says which", first_q.where,
                                 first_q.shape[1], n_file));
  }
  const Shape q_shape = {first_q.shape[0], n_queries, first_k.shape[2]};

  WriterOptions writing;
  writing.profile = options.profile;
  writing.archive = options.archive;
  writing.queries = queries;
  std::uint64_t n_outputs = 0;
  const bool has_out = npz.has(name_in("out", meta.layers[0])), has_w_o = npz.has(name_in("w_o", meta.layers[0]));
  if (has_out) {
    const NpyArray out_index = npz.load("out_index");
    n_outputs = out_index.n_elements();
    writing.outputs = index_list(out_index, n_file, n_tokens);
    writing.out_type = npz.load(name_in("out", meta.layers[0])).element();
  }
  if (has_w_o) {
    const NpyArray w_o = npz.load(name_in("w_o", meta.layers[0]));
    if (w_o.shape.size() != 2 || w_o.shape[0] < 1 || w_o.shape[0] > u64(schema::kMaxHidden)) {
      throw TraceError(fmt::format("{}: expected (hidden, n_heads * v_head_dim), found ({})", w_o.where,
                                   fmt::join(w_o.shape, ", ")));
    }
    writing.hidden = static_cast<int>(w_o.shape[0]);
    writing.w_o_type = w_o.element();
  }

  meta.prompt_len = options.prompt_len;
  meta.n_layers = options.n_layers == 0 ? present.back() + 1 : options.n_layers;
  meta.attention_scale = options.attention_scale;
  meta.logit_softcap = options.logit_softcap;
  meta.qk_norm = options.qk_norm;
  if (options.sliding_window < 0) {
    throw std::invalid_argument(fmt::format("sliding_window {} must be 0 (none) or a length", options.sliding_window));
  }
  meta.sliding_window.assign(static_cast<std::size_t>(std::clamp<int>(meta.n_layers, 0, schema::kMaxLayers)),
                             options.sliding_window);
  meta.model_name = options.model_name;
  meta.architecture = options.architecture;
  meta.dtype = name_of(meta.element);
  meta.provenance = options.provenance;
  meta.n_tokens = n_tokens;
  name_spans(meta, options.spans);
  meta.generator = options.generator;
  if (options.rope_theta != 0) {
    if (!std::isfinite(options.rope_theta) || options.rope_theta <= 1) {
      throw std::invalid_argument(fmt::format("rope_theta {} must be greater than 1", options.rope_theta));
    }
    meta.rope.present = true;
    meta.rope.style = options.rope_style;
    meta.rope.theta = options.rope_theta;
    meta.rope.rotary_dim = options.rotary_dim == 0 ? meta.head_dim : options.rotary_dim;
    meta.rope.inv_freq = rope_frequencies(options.rope_theta, meta.rope.rotary_dim);
  }

  TraceWriter writer(out, meta, n_tokens, writing);
  try {
    writer.append_tokens(std::span(ids).first(u64(n_tokens)), positions);
    for (const int layer : meta.layers) {
      const NpyArray k = npz.load(name_in("k", layer)), v = npz.load(name_in("v", layer)),
                     q = npz.load(name_in("q", layer));
      expect_shape(k, k_shape, "(n_kv_heads, n_tokens, head_dim)");
      expect_shape(v, v_shape, "(n_kv_heads, n_tokens, v_head_dim)");
      expect_shape(q, q_shape, "(n_heads, n_queries, head_dim)");
      try {
        writer.append(layer, n_tokens, first_rows(k, u64(n_tokens)), first_rows(v, u64(n_tokens)),
                      first_rows(q, queries.size()));
      } catch (const std::invalid_argument& error) {
        throw TraceError(fmt::format("{}: layer {}: {}", path, layer, error.what()));
      }
      if (has_out != npz.has(name_in("out", layer)) || has_w_o != npz.has(name_in("w_o", layer))) {
        throw TraceError(fmt::format("{}: out and w_o must be there for all layers or for none", path));
      }
      if (has_out) {
        const NpyArray outputs = npz.load(name_in("out", layer));
        expect_shape(outputs, {u64(meta.n_heads), n_outputs, u64(meta.v_head_dim)}, "(n_heads, n_check, v_head_dim)");
        const std::vector<float> values = outputs.floats();
        const std::size_t width = u64(meta.v_head_dim);
        std::vector<float> row(u64(meta.n_heads) * width);  // (n_heads, v_head_dim)
        for (std::size_t i = 0; i < writing.outputs.size(); ++i) {
          for (std::size_t head = 0; head < u64(meta.n_heads); ++head) {
            std::copy_n(values.begin() + static_cast<std::ptrdiff_t>((head * n_outputs + i) * width), width,
                        row.begin() + static_cast<std::ptrdiff_t>(head * width));
          }
          writer.write_output(layer, writing.outputs[i], row);
        }
      }
      if (has_w_o) {
        const NpyArray w_o = npz.load(name_in("w_o", layer));
        expect_shape(w_o, {u64(writing.hidden), u64(meta.n_heads) * u64(meta.v_head_dim)},
                     "(hidden, n_heads * v_head_dim)");
        writer.write_w_o(layer, w_o.floats());
      }
    }
    writer.close();
  } catch (...) {
    writer.discard();
    throw;
  }
}

}  // namespace kvreplay
