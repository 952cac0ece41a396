#include "tests/bench/random_layer.hpp"

#include <cmath>
#include <random>

#include "traces/writer.hpp"

namespace kvreplay {

Layer random_layer(int n_kv_heads, int group_size, int head_dim, Pos n_tokens, Pos prompt_len, unsigned seed) {
  Layer layer;
  layer.n_model_layers = 1;
  layer.n_heads = n_kv_heads * group_size;
  layer.n_kv_heads = n_kv_heads;
  layer.group_size = group_size;
  layer.head_dim = layer.v_head_dim = head_dim;
  layer.n_tokens = n_tokens;
  layer.prompt_len = prompt_len;
  layer.scale = 1 / std::sqrt(static_cast<float>(head_dim));
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  const auto fill = [&](Eigen::Index rows, float spread) {
    return MatF(MatF::NullaryExpr(rows, head_dim, [&] { return spread * normal(generator); }));
  };
  for (int h = 0; h < n_kv_heads; ++h) {
    layer.q.push_back(fill(Eigen::Index(n_tokens) * group_size, layer.scale));
    layer.k.push_back(fill(n_tokens, 2));
    layer.v.push_back(fill(n_tokens, 1));
  }
  return layer;
}

void write_trace(const std::filesystem::path& path, const Layer& layer, ElementType element) {
  TraceInfo meta;
  meta.model_name = "random numbers";
  meta.architecture = "none";
  meta.generator = meta.config_json = "{}";
  meta.provenance = "Independent normal entries, for timing only.";
  meta.dtype = name_of(element);
  meta.element = element;
  meta.n_layers = 1;
  meta.n_heads = layer.n_heads;
  meta.n_kv_heads = layer.n_kv_heads;
  meta.group_size = layer.group_size;
  meta.head_dim = layer.head_dim;
  meta.v_head_dim = layer.v_head_dim;
  meta.attention_scale = layer.scale;
  meta.sliding_window = {0};
  meta.layers = {0};
  meta.prompt_len = layer.prompt_len;

  WriterOptions options;
  options.queries = queries_all(layer.n_tokens);
  TraceWriter writer(path, meta, layer.n_tokens, options);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(layer.n_tokens));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::int32_t>(i);
  }
  writer.append_tokens(ids);

  constexpr Pos kRows = 1024;
  for (Pos begin = 0; begin < layer.n_tokens; begin += kRows) {
    const Pos n = std::min<Pos>(kRows, layer.n_tokens - begin);
    std::vector<float> q, k, v;  // (heads, n, head_dim)
    for (int h = 0; h < layer.n_kv_heads; ++h) {
      const auto add = [&](std::vector<float>& to, const auto& rows) {
        const MatF copy = rows;
        to.insert(to.end(), copy.data(), copy.data() + copy.size());
      };
      const auto queries = layer.queries(h, begin, n);  // (n * group_size, head_dim)
      for (int g = 0; g < layer.group_size; ++g) {
        add(q, queries(Eigen::seqN(g, n, layer.group_size), Eigen::all) / layer.scale);
      }
      add(k, layer.k[static_cast<std::size_t>(h)].middleRows(begin, n));
      add(v, layer.v[static_cast<std::size_t>(h)].middleRows(begin, n));
    }
    writer.append(0, n, k, v, q);
  }
  writer.close();
}

}  // namespace kvreplay
