#include "traces/skeleton.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "traces/schema.hpp"

namespace kvreplay {
namespace {

using hdf5::Group;
using hdf5::Layout;
using hdf5::Shape;

constexpr std::size_t kHexBytes = 64;

std::uint64_t u64(std::int64_t value) { return static_cast<std::uint64_t>(value); }

void write_model(const Group& root, const TraceInfo& info) {
  const Group model = root.create_group(schema::kModel);
  model.set(schema::kName, info.model_name);
  model.set(schema::kArchitecture, info.architecture);
  model.set(schema::kConfigJson, info.config_json);
  model.set(schema::kWeightsHash, info.weights_hash);
  model.set(schema::kDtype, info.dtype);
  model.set(schema::kNLayers, info.n_layers);
  model.set(schema::kNHeads, info.n_heads);
  model.set(schema::kNKvHeads, info.n_kv_heads);
  model.set(schema::kHeadDim, info.head_dim);
  model.set(schema::kVHeadDim, info.v_head_dim);
  model.set(schema::kAttentionScale, info.attention_scale);
  model.set(schema::kLogitSoftcap, info.logit_softcap);
  model.set(schema::kQkNorm, info.qk_norm ? 1 : 0);
  std::vector<std::int32_t> windows(info.sliding_window.begin(), info.sliding_window.end());
  windows.resize(static_cast<std::size_t>(info.n_layers), 0);
  model.set(schema::kSlidingWindow, std::span<const std::int32_t>(windows));
  if (info.rope.present) {
    const Group rope = model.create_group(schema::kRope);
    rope.set(schema::kStyle, info.rope.style);
    rope.set(schema::kRotaryDim, info.rope.rotary_dim);
    rope.set(schema::kAttentionFactor, info.rope.attention_factor);
    rope.set(schema::kTheta, info.rope.theta);
    rope.set(schema::kScalingJson, info.rope.scaling_json);
    rope.set(schema::kInvertible, info.rope.invertible ? 1 : 0);
    rope.set(schema::kInvFreq, std::span<const double>(info.rope.inv_freq));
  }
}

template <typename T>
void write_token_column(const Group& tokens, const char* name, hdf5::Type type, Pos capacity,
                        const std::vector<T>& values) {
  const hdf5::Dataset column = tokens.create(name, type, {u64(capacity)}, Layout{.reserved = true});
  if (!values.empty()) {
    column.write_block({0}, {values.size()}, hdf5::bytes_of(values));
  }
}

void write_tokens(const Group& root, const TracePlan& plan) {
  const TraceInfo& info = plan.info;
  const Group tokens = root.create_group(schema::kTokens);
  write_token_column(tokens, schema::kId, hdf5::Type::i32, plan.capacity, info.token_ids);
  std::vector<std::int32_t> positions = info.positions;
  if (positions.empty()) {
    positions.resize(static_cast<std::size_t>(plan.capacity));
    std::iota(positions.begin(), positions.end(), 0);
  }
  write_token_column(tokens, schema::kPosition, hdf5::Type::i32, plan.capacity, positions);
  std::vector<std::uint8_t> phase(static_cast<std::size_t>(plan.capacity), 1);
  std::fill(phase.begin(), phase.begin() + std::min(info.prompt_len, plan.capacity), std::uint8_t{0});
  write_token_column(tokens, schema::kPhase, hdf5::Type::u8, plan.capacity, phase);
  if (plan.has_logprob) {
    write_token_column(tokens, schema::kLogprob, hdf5::Type::f32, plan.capacity, info.logprob);
  }
  if (plan.piece_bytes > 0) {
    const hdf5::Dataset column =
        tokens.create_texts(schema::kPiece, plan.piece_bytes, u64(plan.capacity), Layout{.reserved = true});
    std::vector<char> raw(plan.piece_bytes * info.pieces.size(), '\0');
    for (std::size_t i = 0; i < info.pieces.size(); ++i) {
      const std::string& piece = info.pieces[i];
      std::copy_n(piece.begin(), std::min(piece.size(), plan.piece_bytes),
                  raw.begin() + static_cast<std::ptrdiff_t>(i * plan.piece_bytes));
    }
    if (!raw.empty()) {
      column.write_block({0}, {info.pieces.size()}, hdf5::bytes_of(raw));
    }
  }
  if (!info.spans.empty()) {
    std::vector<std::string> names;
    std::vector<std::int32_t> begins, ends;
    for (const Span& span : info.spans) {
      names.push_back(span.name);
      begins.push_back(span.begin);
      ends.push_back(span.end);
    }
    const Group spans = tokens.create_group(schema::kSpans);
    spans.write_column(schema::kName, std::span<const std::string>(names));
    spans.write_column(schema::kBegin, std::span<const std::int32_t>(begins));
    spans.write_column(schema::kEnd, std::span<const std::int32_t>(ends));
  }
}

// `dims` is (heads, rows, width), (rows, width) or (heads, rows); `rows_at` says which dimension a
// chunk cuts.
void create_array(const Group& group, const std::string& name, ElementType type, const Shape& dims, std::size_t rows_at,
                  const TracePlan& plan) {
  Layout layout{.reserved = true};
  if (plan.profile == Profile::archive) {
    layout = {.chunk = dims, .deflate = plan.archive.deflate};
    layout.chunk[rows_at] = std::min(dims[rows_at], u64(plan.archive.chunk_tokens));
    if (rows_at > 0) {
      layout.chunk[0] = 1;  // never two heads in a chunk: readers ask for one
    }
  }
  group.create(name, storage_type(type), dims, layout).reserve_text(schema::kSha256, kHexBytes);
}

void create_layer(const Group& layers, const LayerPlan& layer, const TracePlan& plan) {
  const TraceInfo& info = plan.info;
  const Group group = layers.create_group(layer_name(layer.layer));
  const std::uint64_t n_heads = u64(info.n_heads), n_kv_heads = u64(info.n_kv_heads), n_tokens = u64(plan.capacity);
  create_array(group, schema::kK, info.element, {n_kv_heads, n_tokens, u64(info.head_dim)}, 1, plan);
  create_array(group, schema::kV, info.element, {n_kv_heads, n_tokens, u64(info.v_head_dim)}, 1, plan);
  if (layer.has_q) {
    const std::uint64_t n_queries = layer.q_all ? n_tokens : layer.q_index.size();
    create_array(group, schema::kQ, info.element, {n_heads, n_queries, u64(info.head_dim)}, 1, plan);
    if (!layer.q_all) {
      group.write_column(schema::kQIndex, std::span<const std::int32_t>(layer.q_index));
    }
  }
  if (!layer.out_index.empty()) {
    create_array(group, schema::kOut, layer.out_type, {n_heads, layer.out_index.size(), u64(info.v_head_dim)}, 1, plan);
    group.write_column(schema::kOutIndex, std::span<const std::int32_t>(layer.out_index));
  }
  if (layer.hidden > 0) {
    create_array(group, schema::kWO, layer.w_o_type, {u64(layer.hidden), n_heads * u64(info.v_head_dim)}, 0, plan);
  }
  if (!layer.scores.empty()) {
    const Group scores = group.create_group(schema::kScores);
    for (const auto& [name, type] : layer.scores) {
      create_array(scores, name, type, {n_kv_heads, n_tokens}, 1, plan);
    }
  }
}

}  // namespace

void name_spans(TraceInfo& info, const std::vector<Span>& spans) {
  for (const Span& span : spans) {
    if (span.name.empty()) {
      throw std::invalid_argument("a span has an empty name");
    }
    if (span.begin < 0 || span.begin >= span.end || span.end > info.n_tokens) {
      throw std::invalid_argument(
          fmt::format("span '{}' is [{}, {}), but it must begin before its end, and the trace has {} tokens", span.name,
                      span.begin, span.end, info.n_tokens));
    }
    const auto same =
        std::find_if(info.spans.begin(), info.spans.end(), [&](const Span& other) { return other.name == span.name; });
    if (same == info.spans.end()) {
      info.spans.push_back(span);
    } else {
      *same = span;
    }
  }
}

hdf5::Type storage_type(ElementType type) {
  switch (type) {
    case ElementType::f16:
      return hdf5::Type::f16;
    case ElementType::bf16:
      return hdf5::Type::bf16;
    case ElementType::f32:
      return hdf5::Type::f32;
  }
  return hdf5::Type::other;
}

std::string layer_name(int layer) { return fmt::format("{:03}", layer); }

void write_skeleton(const Group& root, const TracePlan& plan, Pos n_valid) {
  const TraceInfo& info = plan.info;
  root.set(schema::kFormatAttr, schema::kFormat);
  root.set(schema::kVersionAttr, schema::kVersion);
  root.set(schema::kUuid, info.uuid);
  root.set(schema::kCreatedUtc, info.created_utc);
  root.set(schema::kGenerator, info.generator);
  root.set(schema::kProvenance, info.provenance);
  root.set(schema::kComplete, 0);
  root.reserve_text(schema::kContentHash, schema::kHashPrefix.size() + kHexBytes);
  root.create_group(schema::kTypes).commit_type(schema::kBfloat16, hdf5::Type::bf16);
  write_model(root, info);
  write_tokens(root, plan);
  const std::uint64_t valid = u64(n_valid);
  root.create(schema::kNValid, hdf5::Type::u64, {}, Layout{.reserved = true})
      .write(std::as_bytes(std::span(&valid, 1)));
  const Group layers = root.create_group(schema::kLayers);
  for (const LayerPlan& layer : plan.layers) {
    create_layer(layers, layer, plan);
  }
}

hdf5::Dataset array_dataset(const Group& root, int layer, const std::string& name) {
  Group group = root.group(schema::kLayers).group(layer_name(layer));
  const std::string scores = std::string(schema::kScores) + "/";
  return name.starts_with(scores) ? group.group(schema::kScores).dataset(name.substr(scores.size()))
                                  : group.dataset(name);
}

void seal(const Group& root, const TraceInfo& info, const TraceHashes& hashes) {
  for (const int layer : info.layers) {
    const std::string prefix = array_path(layer, "");
    for (const auto& [path, hex] : hashes.arrays) {
      if (path.starts_with(prefix)) {
        array_dataset(root, layer, path.substr(prefix.size())).set(schema::kSha256, hex);
      }
    }
  }
  root.set(schema::kContentHash, hashes.content);
  root.set(schema::kComplete, 1);
}

}  // namespace kvreplay
