#include "traces/reader.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "traces/hdf5.hpp"
#include "traces/limits.hpp"
#include "traces/schema.hpp"
#include "traces/stored_array.hpp"

namespace kvreplay {
namespace {

using hdf5::Dataset;
using hdf5::Group;
using hdf5::Shape;

[[noreturn]] void refuse(const std::string& where, const std::string& expected, const std::string& found) {
  throw TraceError(where + ": expected " + expected + ", found " + found);
}

std::int64_t integer_in(const hdf5::Object& object, const char* name, std::int64_t low, std::int64_t high) {
  const std::int64_t value = object.integer(name);
  if (value < low || value > high) {
    refuse(object.where() + "@" + name, fmt::format("an integer from {} to {}", low, high), std::to_string(value));
  }
  return value;
}

int int_in(const hdf5::Object& object, const char* name, std::int64_t low, std::int64_t high) {
  return static_cast<int>(integer_in(object, name, low, high));
}

double finite(const hdf5::Object& object, const char* name) {
  const double value = object.real(name);
  if (!std::isfinite(value)) {
    refuse(object.where() + "@" + name, "a finite number", fmt::format("{}", value));
  }
  return value;
}

std::string text_or_empty(const hdf5::Object& object, const char* name) {
  return object.has_attribute(name) ? object.text(name) : std::string();
}

// A name that the format does not know is a misspelt one, and a misspelt option must not become a
// silent default. Files of a later minor version may hold more; names that start with x_ are the
// writer's own.
template <typename Known>
void refuse_unknown(const std::vector<std::string>& found, const Known& known, const std::string& where,
                    const char* noun) {
  for (const std::string& name : found) {
    if (!name.starts_with(schema::kUserPrefix) && std::find(known.begin(), known.end(), name) == known.end()) {
      throw TraceError(
          fmt::format("{} has the {} '{}', which format {} does not know; allowed are {} and names that "
                      "start with {}",
                      where, noun, name, schema::kVersion, fmt::join(known, ", "), schema::kUserPrefix));
    }
  }
}

ElementType element_of(const Dataset& dataset) {
  switch (dataset.type()) {
    case hdf5::Type::f16:
      return ElementType::f16;
    case hdf5::Type::bf16:
      return ElementType::bf16;
    case hdf5::Type::f32:
      return ElementType::f32;
    default:
      refuse(dataset.where(), "little-endian float16, bfloat16 or float32", std::string(name_of(dataset.type())));
  }
}

void expect_shape(const Dataset& dataset, const Shape& expected) {
  const Shape found = dataset.shape();
  if (found != expected) {
    refuse(dataset.where(), "shape " + hdf5::to_string(expected), hdf5::to_string(found));
  }
}

// A column of at least `n_valid` integers of exactly `n_rows`, the first n_valid of them within
// [low, high].
template <typename T>
std::vector<T> integer_column(const Group& group, const char* name, std::uint64_t n_rows, std::uint64_t n_valid,
                              std::int64_t low, std::int64_t high) {
  const Dataset dataset = group.dataset(name);
  expect_shape(dataset, {n_rows});
  const std::vector<std::int64_t> values = dataset.read_integers();
  std::vector<T> column(n_valid);
  for (std::uint64_t i = 0; i < n_valid; ++i) {
    if (values[i] < low || values[i] > high) {
      refuse(fmt::format("{}[{}]", dataset.where(), i), fmt::format("a value from {} to {}", low, high),
             std::to_string(values[i]));
    }
    column[i] = static_cast<T>(values[i]);
  }
  return column;
}

// Token indices, strictly ascending; those from n_valid on belong to tokens that never came.
std::vector<Pos> index_column(const Group& group, const char* name, std::uint64_t n_rows, Pos n_tokens, Pos n_valid) {
  const Dataset dataset = group.dataset(name);
  expect_shape(dataset, {n_rows});
  std::vector<Pos> index;
  std::int64_t previous = -1;
  for (const std::int64_t value : dataset.read_integers()) {
    if (value <= previous || value >= n_tokens) {
      refuse(fmt::format("{}[{}]", dataset.where(), index.size()),
             fmt::format("token indices below {} in ascending order", n_tokens),
             previous < 0 ? std::to_string(value) : fmt::format("{} after {}", value, previous));
    }
    previous = value;
    if (value < n_valid) {
      index.push_back(static_cast<Pos>(value));
    }
  }
  return index;
}

// Layer numbers are written in decimal with at least three digits.
int layer_number(const std::string& name, const std::string& where, int n_layers) {
  int number = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  if (error != std::errc() || end != name.data() + name.size() || number < 0 || name != fmt::format("{:03}", number)) {
    refuse(where, "layer groups named 000, 001, ...", "'" + name + "'");
  }
  if (number >= n_layers) {
    refuse(where, fmt::format("layer numbers below n_layers = {}", n_layers), name);
  }
  return number;
}

void read_model(const Group& root, bool strict, TraceInfo& info) {
  const Group model = root.group(schema::kModel);
  if (strict) {
    refuse_unknown(model.attribute_names(), schema::kModelAttributes, model.where(), "attribute");
    refuse_unknown(model.children(), std::array{schema::kRope}, model.where(), "member");
  }
  info.model_name = model.text(schema::kName);
  info.architecture = text_or_empty(model, schema::kArchitecture);
  info.config_json = text_or_empty(model, schema::kConfigJson);
  info.weights_hash = text_or_empty(model, schema::kWeightsHash);
  info.dtype = text_or_empty(model, schema::kDtype);
  info.n_layers = int_in(model, schema::kNLayers, 1, schema::kMaxLayers);
  info.n_heads = int_in(model, schema::kNHeads, 1, schema::kMaxHeads);
  info.n_kv_heads = int_in(model, schema::kNKvHeads, 1, info.n_heads);
  if (info.n_heads % info.n_kv_heads != 0) {
    refuse(model.where() + "@n_kv_heads", fmt::format("a divisor of n_heads = {}", info.n_heads),
           std::to_string(info.n_kv_heads));
  }
  info.group_size = info.n_heads / info.n_kv_heads;
  info.head_dim = int_in(model, schema::kHeadDim, 1, schema::kMaxHeadDim);
  info.v_head_dim = int_in(model, schema::kVHeadDim, 1, schema::kMaxHeadDim);
  info.attention_scale = finite(model, schema::kAttentionScale);
  if (info.attention_scale <= 0) {
    refuse(model.where() + "@attention_scale", "a positive number", fmt::format("{}", info.attention_scale));
  }
  info.logit_softcap = finite(model, schema::kLogitSoftcap);
  if (info.logit_softcap < 0) {
    refuse(model.where() + "@logit_softcap", "0 (none) or a positive number", fmt::format("{}", info.logit_softcap));
  }
  info.qk_norm = model.has_attribute(schema::kQkNorm) && int_in(model, schema::kQkNorm, 0, 1) == 1;
  const std::vector<std::int64_t> windows = model.integers(schema::kSlidingWindow);
  if (windows.size() != static_cast<std::size_t>(info.n_layers)) {
    refuse(model.where() + "@sliding_window", fmt::format("{} values, one per model layer", info.n_layers),
           std::to_string(windows.size()));
  }
  for (const std::int64_t window : windows) {
    if (window < 0 || window > std::numeric_limits<std::int32_t>::max()) {
      refuse(model.where() + "@sliding_window", "0 (none) or a length", std::to_string(window));
    }
    info.sliding_window.push_back(static_cast<int>(window));
  }

  if (!model.has(schema::kRope)) {
    return;
  }
  const Group group = model.group(schema::kRope);
  if (strict) {
    refuse_unknown(group.attribute_names(), schema::kRopeAttributes, group.where(), "attribute");
  }
  Rope& rope = info.rope;
  rope.present = true;
  rope.style = group.text(schema::kStyle);
  if (rope.style != schema::kStyleHalf && rope.style != schema::kStyleInterleaved) {
    refuse(group.where() + "@style", "half or interleaved", "'" + rope.style + "'");
  }
  rope.rotary_dim = int_in(group, schema::kRotaryDim, 2, info.head_dim);
  if (rope.rotary_dim % 2 != 0) {
    refuse(group.where() + "@rotary_dim", "an even number", std::to_string(rope.rotary_dim));
  }
  rope.attention_factor = group.has_attribute(schema::kAttentionFactor) ? finite(group, schema::kAttentionFactor) : 1;
  if (rope.attention_factor <= 0) {
    refuse(group.where() + "@attention_factor", "a positive number", fmt::format("{}", rope.attention_factor));
  }
  rope.theta = group.has_attribute(schema::kTheta) ? finite(group, schema::kTheta) : 0;
  rope.scaling_json = text_or_empty(group, schema::kScalingJson);
  rope.invertible = !group.has_attribute(schema::kInvertible) || int_in(group, schema::kInvertible, 0, 1) == 1;
  rope.inv_freq = group.reals(schema::kInvFreq);
  if (rope.inv_freq.size() != static_cast<std::size_t>(rope.rotary_dim / 2)) {
    refuse(group.where() + "@inv_freq", fmt::format("{} values (rotary_dim / 2)", rope.rotary_dim / 2),
           std::to_string(rope.inv_freq.size()));
  }
  for (const double frequency : rope.inv_freq) {
    if (!std::isfinite(frequency) || frequency < 0) {
      refuse(group.where() + "@inv_freq", "finite numbers from 0", fmt::format("{}", frequency));
    }
  }
}

void read_tokens(const Group& root, bool strict, std::uint64_t n_rows, TraceInfo& info) {
  constexpr std::int64_t kInt32Min = std::numeric_limits<std::int32_t>::min();
  constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();
  const Group tokens = root.group(schema::kTokens);
  if (strict) {
    refuse_unknown(
        tokens.children(),
        std::array{schema::kId, schema::kPosition, schema::kPhase, schema::kLogprob, schema::kPiece, schema::kSpans},
        tokens.where(), "member");
  }
  const auto n_valid = static_cast<std::uint64_t>(info.n_tokens);
  info.token_ids = integer_column<std::int32_t>(tokens, schema::kId, n_rows, n_valid, kInt32Min, kInt32Max);
  info.positions = integer_column<std::int32_t>(tokens, schema::kPosition, n_rows, n_valid, 0, kInt32Max);
  info.phase = integer_column<std::uint8_t>(tokens, schema::kPhase, n_rows, n_valid, 0, 1);
  const auto first_decode = std::find(info.phase.begin(), info.phase.end(), 1);
  info.prompt_len = static_cast<Pos>(first_decode - info.phase.begin());
  if (info.prompt_len == 0) {
    refuse(tokens.where() + "/phase", "at least one prompt token (phase 0)", "phase 1 at token 0");
  }
  const auto again = std::find(first_decode, info.phase.end(), 0);
  if (again != info.phase.end()) {
    refuse(tokens.where() + "/phase", "no prompt token after the first decode token",
           fmt::format("phase 0 at token {}", again - info.phase.begin()));
  }
  if (tokens.has(schema::kLogprob)) {
    const Dataset dataset = tokens.dataset(schema::kLogprob);
    expect_shape(dataset, {n_rows});
    const std::vector<double> values = dataset.read_reals();
    info.logprob.assign(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(n_valid));
  }
  if (tokens.has(schema::kPiece)) {
    const Dataset dataset = tokens.dataset(schema::kPiece);
    expect_shape(dataset, {n_rows});
    info.pieces = dataset.read_texts();
    info.pieces.resize(n_valid);
  }
  if (tokens.has(schema::kSpans)) {
    const Group spans = tokens.group(schema::kSpans);
    const std::vector<std::string> names = spans.dataset(schema::kName).read_texts();
    const auto limit = static_cast<std::int64_t>(n_rows);
    const auto begins = integer_column<Pos>(spans, schema::kBegin, names.size(), names.size(), 0, limit);
    const auto ends = integer_column<Pos>(spans, schema::kEnd, names.size(), names.size(), 0, limit);
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (begins[i] > ends[i]) {
        refuse(fmt::format("{} '{}'", spans.where(), names[i]), "begin before end",
               fmt::format("{} to {}", begins[i], ends[i]));
      }
      // Spans of an interrupted capture end where its tokens do.
      info.spans.push_back({names[i], std::min(begins[i], info.n_tokens), std::min(ends[i], info.n_tokens)});
    }
  }
}

std::uint64_t u64(std::int64_t value) { return static_cast<std::uint64_t>(value); }

}  // namespace

struct TraceReader::Layer {
  int number = 0;
  // In the order k, v, q, out, w_o, scores/...
  std::vector<std::pair<std::string, StoredArray>> arrays;
  std::map<std::string, std::string> hashes;
  std::vector<Pos> q_index, out_index;

  const StoredArray* find(const std::string& name) const {
    const auto at = std::find_if(arrays.begin(), arrays.end(), [&](const auto& a) { return a.first == name; });
    return at == arrays.end() ? nullptr : &at->second;
  }
};

TraceReader::~TraceReader() = default;
TraceReader::TraceReader(TraceReader&&) noexcept = default;
TraceReader& TraceReader::operator=(TraceReader&&) noexcept = default;

TraceReader::TraceReader(const std::filesystem::path& path) {
  try {
    open(path);
  } catch (const hdf5::StorageError& error) {
    throw TraceError(error.what());
  }
}

void TraceReader::open(const std::filesystem::path& path) {
  file_ = std::make_shared<const FileBytes>(path);  // knows the file's time: what changes from here on is noticed
  const hdf5::File file = hdf5::File::open(path);
  const Group& root = file.root();
  info_.path = path;
  info_.stem = path.extension() == ".part" ? path.stem().stem().string() : path.stem().string();

  if (!root.has_attribute(schema::kFormatAttr)) {
    throw TraceError(root.where() + " lacks the attribute 'format'; this HDF5 file is not a trace");
  }
  if (const std::string format = root.text(schema::kFormatAttr); format != schema::kFormat) {
    refuse(root.where() + "@format", schema::kFormat, "'" + format + "'");
  }
  const std::string version = root.text(schema::kVersionAttr);
  int major = -1, minor = -1;
  const auto [dot, error] = std::from_chars(version.data(), version.data() + version.size(), major);
  if (error == std::errc() && dot != version.data() + version.size() && *dot == '.') {
    std::from_chars(dot + 1, version.data() + version.size(), minor);
  }
  if (major != schema::kMajor || minor < 0) {
    refuse(root.where() + "@format_version", fmt::format("{}.x, which this version reads", schema::kMajor),
           "'" + version + "'");
  }
  const bool strict = minor <= schema::kMinor;
  if (strict) {
    refuse_unknown(root.attribute_names(), schema::kRootAttributes, root.where(), "attribute");
    refuse_unknown(root.children(),
                   std::array{schema::kModel, schema::kTypes, schema::kTokens, schema::kNValid, schema::kLayers},
                   root.where(), "member");
  }
  info_.uuid = text_or_empty(root, schema::kUuid);
  info_.created_utc = text_or_empty(root, schema::kCreatedUtc);
  info_.generator = text_or_empty(root, schema::kGenerator);
  info_.provenance = text_or_empty(root, schema::kProvenance);
  info_.content_hash = text_or_empty(root, schema::kContentHash);
  info_.complete = !root.has_attribute(schema::kComplete) || int_in(root, schema::kComplete, 0, 1) == 1;
  read_model(root, strict, info_);

  // Tokens: how many the file has room for, and how many came.
  const Dataset ids = root.group(schema::kTokens).dataset(schema::kId);
  const Shape id_shape = ids.shape();
  if (id_shape.size() != 1 || id_shape[0] == 0 || id_shape[0] > u64(schema::kMaxTokens)) {
    refuse(ids.where(), "a list of at least one token", "shape " + hdf5::to_string(id_shape));
  }
  const std::uint64_t n_rows = id_shape[0];
  const Dataset n_valid_set = root.dataset(schema::kNValid);
  if (hdf5::n_elements(n_valid_set.shape()) != 1) {
    refuse(n_valid_set.where(), "one integer", "shape " + hdf5::to_string(n_valid_set.shape()));
  }
  const std::vector<std::int64_t> n_valid = n_valid_set.read_integers();
  if (n_valid.size() != 1 || n_valid[0] < 1 || u64(n_valid[0]) > n_rows) {
    refuse(n_valid_set.where(), fmt::format("from 1 to {} valid tokens", n_rows),
           n_valid.empty() ? "nothing" : std::to_string(n_valid[0]));
  }
  info_.n_tokens = static_cast<Pos>(n_valid[0]);
  read_tokens(root, strict, n_rows, info_);

  const Group layers = root.group(schema::kLayers);
  std::optional<ElementType> element;
  std::vector<Pos> all(static_cast<std::size_t>(info_.n_tokens));
  std::iota(all.begin(), all.end(), 0);
  const std::uint64_t most_bytes = limits::kArrays.of(file_->size());
  std::uint64_t bytes = 0;  // that all arrays and their indexes stand for
  const auto count = [&](std::uint64_t more) {
    if (more > most_bytes - bytes) {
      throw TraceError(fmt::format("{}: its arrays stand for more than {} bytes, which a file of {} bytes may not",
                                   path.string(), most_bytes, file_->size()));
    }
    bytes += more;
  };
  for (const std::string& name : layers.children()) {
    const int number = layer_number(name, layers.where(), info_.n_layers);
    const Group group = layers.group(name);
    const std::vector<std::string> members = group.children();
    if (strict) {
      refuse_unknown(members,
                     std::array{schema::kK, schema::kV, schema::kQ, schema::kQIndex, schema::kOut, schema::kOutIndex,
                                schema::kWO, schema::kScores},
                     group.where(), "member");
    }
    Layer layer;
    // `dims` is the expected shape; two-dimensional arrays are seen as three-dimensional ones.
    const auto add = [&](const Group& in, const char* set_name, const std::string& key, const Shape& dims,
                         std::uint64_t valid) {
      const Dataset dataset = in.dataset(set_name);
      expect_shape(dataset, dims);
      const ElementType type = element_of(dataset);
      hdf5::Storage storage = dataset.storage();
      count(storage.extents.size() * sizeof(hdf5::Extent));
      Shape three = dims;
      if (dims.size() == 2) {
        const bool per_token = key.starts_with(schema::kScores);
        three.insert(per_token ? three.end() : three.begin(), 1);
        if (!storage.chunk.empty()) {
          storage.chunk.insert(per_token ? storage.chunk.end() : storage.chunk.begin(), 1);
        }
      }
      layer.hashes[key] = text_or_empty(dataset, schema::kSha256);
      layer.arrays.emplace_back(key, StoredArray(file_, dataset.where(), type, three, std::move(storage), valid));
      count(layer.arrays.back().second.valid_bytes());
      return type;
    };
    const auto one_type = [&](ElementType type, const char* set_name) {
      if (element && *element != type) {
        refuse(group.where() + "/" + set_name, fmt::format("{} like the rest of q, k and v", name_of(*element)),
               std::string(name_of(type)));
      }
      element = type;
    };
    const std::uint64_t n_heads = u64(info_.n_heads), n_kv_heads = u64(info_.n_kv_heads);
    const std::uint64_t head_dim = u64(info_.head_dim), v_head_dim = u64(info_.v_head_dim);
    const auto tokens = u64(info_.n_tokens);
    one_type(add(group, schema::kK, schema::kK, {n_kv_heads, n_rows, head_dim}, tokens), schema::kK);
    one_type(add(group, schema::kV, schema::kV, {n_kv_heads, n_rows, v_head_dim}, tokens), schema::kV);
    if (group.has(schema::kQ)) {
      std::uint64_t n_queries = n_rows;
      count(all.size() * sizeof(Pos));
      layer.q_index = all;
      if (group.has(schema::kQIndex)) {
        const Shape shape = group.dataset(schema::kQIndex).shape();
        n_queries = shape.empty() ? 0 : shape[0];
        layer.q_index = index_column(group, schema::kQIndex, n_queries, static_cast<Pos>(n_rows), info_.n_tokens);
      }
      one_type(add(group, schema::kQ, schema::kQ, {n_heads, n_queries, head_dim}, layer.q_index.size()), schema::kQ);
    } else if (group.has(schema::kQIndex)) {
      throw TraceError(group.where() + " has a q_index but no q");
    }
    if (group.has(schema::kOut) != group.has(schema::kOutIndex)) {
      throw TraceError(group.where() + " must have both out and out_index, or neither");
    }
    if (group.has(schema::kOut)) {
      const Shape shape = group.dataset(schema::kOutIndex).shape();
      const std::uint64_t n_check = shape.empty() ? 0 : shape[0];
      layer.out_index = index_column(group, schema::kOutIndex, n_check, static_cast<Pos>(n_rows), info_.n_tokens);
      add(group, schema::kOut, schema::kOut, {n_heads, n_check, v_head_dim}, layer.out_index.size());
    }
    if (group.has(schema::kWO)) {
      const Shape shape = group.dataset(schema::kWO).shape();
      const std::uint64_t hidden = shape.empty() ? 0 : shape[0];
      if (hidden < 1 || hidden > u64(schema::kMaxHidden)) {
        refuse(group.where() + "/w_o", fmt::format("(hidden, {})", n_heads * v_head_dim), hdf5::to_string(shape));
      }
      add(group, schema::kWO, schema::kWO, {hidden, n_heads * v_head_dim}, hidden);
    }
    if (group.has(schema::kScores)) {
      const Group scores = group.group(schema::kScores);
      for (const std::string& score : scores.children()) {
        add(scores, score.c_str(), std::string(schema::kScores) + "/" + score, {n_kv_heads, n_rows}, tokens);
      }
    }
    layer.number = number;
    layers_.push_back(std::move(layer));
  }
  if (layers_.empty()) {
    refuse(layers.where(), "at least one layer", "none");
  }
  std::sort(layers_.begin(), layers_.end(), [](const Layer& a, const Layer& b) { return a.number < b.number; });
  info_.element = *element;

  std::vector<const StoredArray*> arrays;
  for (const Layer& layer : layers_) {
    info_.layers.push_back(layer.number);
    for (const auto& [name, stored] : layer.arrays) {
      arrays.push_back(&stored);
    }
  }
  check_extents(arrays, *file_);
}

const TraceReader::Layer& TraceReader::layer_at(int layer) const {
  const auto at = std::find_if(layers_.begin(), layers_.end(), [&](const Layer& l) { return l.number == layer; });
  if (at == layers_.end()) {
    throw TraceError(fmt::format("{}: layer {} is not in this trace; it has {}", info_.path.string(), layer,
                                 fmt::join(info_.layers, ", ")));
  }
  return *at;
}

const StoredArray& TraceReader::array(int layer, const std::string& name) const {
  const StoredArray* stored = layer_at(layer).find(name);
  if (stored == nullptr) {
    throw TraceError(fmt::format("{}: /layers/{:03}/{} is not in this trace", info_.path.string(), layer, name));
  }
  return *stored;
}

std::vector<std::string> TraceReader::array_names(int layer) const {
  std::vector<std::string> names;
  for (const auto& [name, stored] : layer_at(layer).arrays) {
    names.push_back(name);
  }
  return names;
}

std::string TraceReader::array_hash(int layer, const std::string& name) const {
  const Layer& found = layer_at(layer);
  const auto at = found.hashes.find(name);
  return at == found.hashes.end() ? "" : at->second;
}

std::span<const Pos> TraceReader::q_index(int layer) const { return layer_at(layer).q_index; }
std::span<const Pos> TraceReader::out_index(int layer) const { return layer_at(layer).out_index; }

namespace {

// Heads and positions come as int; what is negative is out of range like what is too large.
std::uint64_t row_of(std::int64_t value, const StoredArray& stored, const char* noun) {
  if (value < 0) {
    throw TraceError(fmt::format("{}: {} {} does not exist", stored.where(), noun, value));
  }
  return static_cast<std::uint64_t>(value);
}

void read_by_index(const StoredArray& stored, std::span<const Pos> index, int head, Pos begin, Pos end,
                   std::span<float> out, const char* noun) {
  const auto first = std::lower_bound(index.begin(), index.end(), begin);
  const std::int64_t row = first - index.begin(), n = std::int64_t{end} - begin;
  if (n < 0 || (n > 0 && (row + n > static_cast<std::int64_t>(index.size()) || *first != begin ||
                          index[static_cast<std::size_t>(row + n - 1)] != end - 1))) {
    throw TraceError(fmt::format("{}: {} of tokens {} to {} were asked for, but only {} are stored{}", stored.where(),
                                 noun, begin, end, index.size(),
                                 index.empty() ? "" : fmt::format(" (tokens {} to {})", index.front(), index.back())));
  }
  const auto from = static_cast<std::uint64_t>(row);
  stored.read(row_of(head, stored, "head"), from, from + static_cast<std::uint64_t>(n), out, index);
}

}  // namespace

void TraceReader::read_k(int layer, int kv_head, Pos begin, Pos end, std::span<float> out) const {
  const StoredArray& k = array(layer, schema::kK);
  k.read(row_of(kv_head, k, "KV head"), row_of(begin, k, "token"), row_of(end, k, "token"), out);
}

void TraceReader::read_v(int layer, int kv_head, Pos begin, Pos end, std::span<float> out) const {
  const StoredArray& v = array(layer, schema::kV);
  v.read(row_of(kv_head, v, "KV head"), row_of(begin, v, "token"), row_of(end, v, "token"), out);
}

void TraceReader::read_q(int layer, int head, Pos begin, Pos end, std::span<float> out) const {
  read_by_index(array(layer, schema::kQ), q_index(layer), head, begin, end, out, "queries");
}

bool TraceReader::has_out(int layer) const { return !layer_at(layer).out_index.empty(); }

void TraceReader::read_out(int layer, int head, Pos begin, Pos end, std::span<float> out) const {
  read_by_index(array(layer, schema::kOut), out_index(layer), head, begin, end, out, "outputs");
}

bool TraceReader::has_w_o(int layer) const { return layer_at(layer).find(schema::kWO) != nullptr; }

int TraceReader::hidden(int layer) const {
  const StoredArray* w_o = layer_at(layer).find(schema::kWO);
  return w_o == nullptr ? 0 : static_cast<int>(w_o->n_rows());
}

std::vector<float> TraceReader::read_w_o(int layer) const {
  const StoredArray& w_o = array(layer, schema::kWO);
  std::vector<float> out(w_o.n_rows() * w_o.width());
  w_o.read(0, 0, w_o.n_rows(), out);
  return out;
}

std::vector<std::string> TraceReader::score_names(int layer) const {
  const std::string prefix = std::string(schema::kScores) + "/";
  std::vector<std::string> names;
  for (const std::string& name : array_names(layer)) {
    if (name.starts_with(prefix)) {
      names.push_back(name.substr(prefix.size()));
    }
  }
  return names;
}

std::vector<float> TraceReader::read_scores(int layer, const std::string& name, int kv_head) const {
  const std::vector<std::string> names = score_names(layer);
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    throw TraceError(fmt::format("{}: layer {} has no scores named '{}'; it has {}", info_.path.string(), layer, name,
                                 names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "))));
  }
  const StoredArray& scores = array(layer, std::string(schema::kScores) + "/" + name);
  std::vector<float> out(scores.n_rows());
  scores.read(row_of(kv_head, scores, "KV head"), 0, scores.n_rows(), out);
  return out;
}

void TraceReader::check_unchanged() const { file_->check_unchanged(); }

}  // namespace kvreplay
