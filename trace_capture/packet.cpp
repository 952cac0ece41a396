#include "trace_capture/packet.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

std::size_t sz(std::int64_t value) { return static_cast<std::size_t>(value); }

std::size_t aligned(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

// Those of the ascending tokens that lie in [first, first + n).
std::span<const Pos> those_of(const std::vector<Pos>& tokens, Pos first, Pos n) {
  const auto begin = std::lower_bound(tokens.begin(), tokens.end(), first);
  const auto end = std::lower_bound(begin, tokens.end(), first + n);
  return {begin, end};
}

// Bytes of one layer's part with m queries and c outputs, from the packet's begin `at`.
LayerLayout layer_layout(const RecordPlan& plan, std::size_t at, Pos n, std::size_t m, std::size_t c) {
  const std::size_t head_dim = sz(plan.head_dim), row = head_dim * size_of(plan.element);
  LayerLayout layer;
  layer.k = at;
  layer.v = aligned(layer.k + sz(plan.n_kv_heads) * sz(n) * row);
  layer.q = aligned(layer.v + sz(plan.n_kv_heads) * sz(n) * row);
  layer.out = aligned(layer.q + sz(plan.n_heads) * m * row);
  layer.end = aligned(layer.out + sz(plan.n_heads) * c * head_dim * sizeof(float));
  return layer;
}

}  // namespace

PacketLayout packet_layout(const RecordPlan& plan, Pos first, Pos n, std::size_t begin, std::size_t end) {
  KVREPLAY_CHECK(n >= 0 && first >= 0 && begin <= end && end <= plan.layers.size());
  PacketLayout layout;
  layout.first = first;
  layout.n = n;
  layout.layers = std::span(plan.layers).subspan(begin, end - begin);
  layout.queries = those_of(plan.queries, first, n);
  layout.outputs = those_of(plan.outputs, first, n);
  layout.at.reserve(layout.layers.size());
  for (std::size_t i = 0; i < layout.layers.size(); ++i) {
    layout.at.push_back(layer_layout(plan, layout.bytes, n, layout.queries.size(), layout.outputs.size()));
    layout.bytes = layout.at.back().end;
  }
  return layout;
}

std::size_t largest_packet(const RecordPlan& plan, Pos n, std::size_t n_layers) {
  const std::size_t m = std::min(sz(n), plan.queries.size()), c = std::min(sz(n), plan.outputs.size());
  return n_layers * layer_layout(plan, 0, n, m, c).end;
}

void round_to(ElementType element, std::span<float> values) {
  if (element == ElementType::f32) {
    return;
  }
  constexpr std::size_t kPiece = 1024;
  std::byte narrowed[kPiece * 2];
  float rounded[kPiece];
  for (std::size_t begin = 0; begin < values.size(); begin += kPiece) {
    const auto piece = values.subspan(begin, std::min(kPiece, values.size() - begin));
    narrow(element, piece, narrowed);
    if (widen(element, narrowed, std::span(rounded, piece.size()))) {
      std::copy_n(rounded, piece.size(), piece.data());
    } else {
      std::transform(piece.begin(), piece.end(), rounded, piece.begin(),
                     [](float value, float now) { return std::isfinite(now) ? now : value; });
    }
  }
}

void pack(const RecordPlan& plan, const PacketLayout& layout, std::size_t index, const LayerRows& rows,
          std::span<std::byte> packet) {
  KVREPLAY_CHECK(index < layout.at.size() && packet.size() >= layout.bytes);
  const std::size_t n = sz(layout.n), m = layout.queries.size(), c = layout.outputs.size();
  const std::size_t n_heads = sz(plan.n_heads), n_kv_heads = sz(plan.n_kv_heads), head_dim = sz(plan.head_dim);
  KVREPLAY_CHECK(rows.k.size() == n * n_kv_heads * head_dim && rows.v.size() == rows.k.size());
  KVREPLAY_CHECK(m == 0 || rows.q.size() == n * n_heads * head_dim);
  KVREPLAY_CHECK(c == 0 || rows.out.size() == n * n_heads * head_dim);
  const LayerLayout& at = layout.at[index];
  const std::size_t row = head_dim * size_of(plan.element);

  for (std::size_t head = 0; head < n_kv_heads; ++head) {
    for (std::size_t t = 0; t < n; ++t) {
      const std::size_t from = (t * n_kv_heads + head) * head_dim, to = (head * n + t) * row;
      narrow(plan.element, rows.k.subspan(from, head_dim), packet.data() + at.k + to);
      narrow(plan.element, rows.v.subspan(from, head_dim), packet.data() + at.v + to);
    }
  }
  for (std::size_t head = 0; head < n_heads; ++head) {
    for (std::size_t i = 0; i < m; ++i) {
      const std::size_t t = sz(layout.queries[i] - layout.first);
      narrow(plan.element, rows.q.subspan((t * n_heads + head) * head_dim, head_dim),
             packet.data() + at.q + (head * m + i) * row);
    }
    for (std::size_t i = 0; i < c; ++i) {
      const std::size_t t = sz(layout.outputs[i] - layout.first);
      std::memcpy(packet.data() + at.out + (head * c + i) * head_dim * sizeof(float),
                  rows.out.data() + (t * n_heads + head) * head_dim, head_dim * sizeof(float));
    }
  }
}

}  // namespace kvreplay
