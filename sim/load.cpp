#include "sim/load.hpp"

#include <algorithm>

namespace kvreplay {

Pos first_stored_query(const TraceReader& trace, int layer) {
  const std::span<const Pos> index = trace.q_index(layer);
  Pos first = trace.info().n_tokens;
  for (auto it = index.rbegin(); it != index.rend() && *it == first - 1; ++it) {
    --first;
  }
  return first;
}

int short_window(const TraceInfo& info, int layer, Pos n_tokens) {
  const int window = std::size_t(layer) < info.sliding_window.size() ? info.sliding_window[std::size_t(layer)] : 0;
  return window < n_tokens ? window : 0;
}

double slot_bytes(const TraceInfo& info) { return double(size_of(info.element)) * (info.head_dim + info.v_head_dim); }

Layer load_layer(const TraceReader& trace, int number, const LoadOptions& options) {
  trace.check_unchanged();
  const TraceInfo& info = trace.info();
  Layer l;
  l.index = number;
  l.n_model_layers = info.n_layers;
  l.n_heads = info.n_heads;
  l.n_kv_heads = info.n_kv_heads;
  l.group_size = info.group_size;
  l.head_dim = info.head_dim;
  l.v_head_dim = info.v_head_dim;
  l.n_tokens = options.n_tokens > 0 ? options.n_tokens : info.n_tokens;
  l.prompt_len = options.prompt_len;
  l.first_query = options.first_query;
  l.logit_softcap = float(info.logit_softcap);
  l.scale = float(info.attention_scale);
  l.element_bytes = int(size_of(info.element));
  for (const Span& span : info.spans) {
    if (span.begin < l.n_tokens) {
      l.spans.push_back({span.name, span.begin, std::min(span.end, l.n_tokens)});
    }
  }

  if (info.rope.present && info.rope.invertible) {
    l.rotation = Rotation{.interleaved = info.rope.style == "interleaved",
                          .attention_factor = info.rope.attention_factor,
                          .inv_freq = info.rope.inv_freq,
                          .ids = {info.positions.begin(), info.positions.begin() + l.n_tokens}};
  }

  const auto values = [](MatF& m) { return std::span<float>(m.data(), std::size_t(m.size())); };
  const Eigen::Index n_queries = l.n_tokens - l.first_query;
  MatF one(n_queries, l.head_dim);
  for (int h = 0; h < l.n_kv_heads; ++h) {
    MatF& k = l.k.emplace_back(l.n_tokens, l.head_dim);
    trace.read_k(number, h, 0, l.n_tokens, values(k));
    if (options.values) {
      MatF& v = l.v.emplace_back(l.n_tokens, l.v_head_dim);
      trace.read_v(number, h, 0, l.n_tokens, values(v));
    }
    MatF& q = l.q.emplace_back(n_queries * l.group_size, l.head_dim);
    for (int g = 0; g < l.group_size; ++g) {
      trace.read_q(number, h * l.group_size + g, l.first_query, l.n_tokens, values(one));
      for (Eigen::Index t = 0; t < n_queries; ++t) {
        q.row(t * l.group_size + g) = l.scale * one.row(t);
      }
    }
  }
  if (options.w_o && trace.has_w_o(number)) {
    const std::vector<float> w = trace.read_w_o(number);
    l.w_o = MapF(w.data(), trace.hidden(number), Eigen::Index(l.n_heads) * l.v_head_dim);
  }
  for (const std::string& name : options.scores) {
    auto& per_head = l.scores.emplace_back(name, std::vector<std::vector<float>>()).second;
    for (int h = 0; h < l.n_kv_heads; ++h) {
      per_head.push_back(trace.read_scores(number, name, h));
      per_head.back().resize(std::size_t(l.n_tokens));
    }
  }
  trace.check_unchanged();  // nor while it was read
  return l;
}

}  // namespace kvreplay
