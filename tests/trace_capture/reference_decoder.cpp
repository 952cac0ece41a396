#include "tests/trace_capture/reference_decoder.hpp"

#include <algorithm>
#include <cmath>

#include "trace_capture/rope.hpp"

namespace kvreplay::test {
namespace {

using Vec = std::vector<double>;

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

Vec values(const Tensor& tensor) {
  std::vector<float> floats(tensor ? sz(tensor.size()) : 0);
  if (tensor) {
    widen(tensor.type, tensor.data, floats);
  }
  return {floats.begin(), floats.end()};
}

Vec product(const Tensor& weight, const Tensor& bias, const Vec& x) {
  const Vec w = values(weight), b = values(bias);
  Vec y = b.empty() ? Vec(w.size() / x.size(), 0.0) : b;
  for (std::size_t i = 0; i < y.size(); ++i) {
    for (std::size_t j = 0; j < x.size(); ++j) {
      y[i] += w[i * x.size() + j] * x[j];
    }
  }
  return y;
}

// Pieces of `width` of x, each normalised.
Vec norm(const Vec& x, const Tensor& weight, std::size_t width, double eps) {
  const Vec w = values(weight);
  Vec y = x;
  for (std::size_t begin = 0; begin < x.size(); begin += width) {
    double squares = 0;
    for (std::size_t j = 0; j < width; ++j) {
      squares += x[begin + j] * x[begin + j];
    }
    for (std::size_t j = 0; j < width; ++j) {
      y[begin + j] = x[begin + j] / std::sqrt(squares / static_cast<double>(width) + eps) * w[j];
    }
  }
  return y;
}

void rotate(Vec& x, const RopeTable& table, Pos pos) {
  const std::size_t half = table.inv_freq.size();
  for (std::size_t begin = 0; begin < x.size(); begin += 2 * half) {
    for (std::size_t j = 0; j < half; ++j) {
      const double angle = pos * table.inv_freq[j], low = x[begin + j], high = x[begin + half + j];
      x[begin + j] = table.attention_factor * (low * std::cos(angle) - high * std::sin(angle));
      x[begin + half + j] = table.attention_factor * (high * std::cos(angle) + low * std::sin(angle));
    }
  }
}

struct Layer {
  std::vector<Vec> q, k, v, out;  // one per token, (heads * head_dim)
};

Vec attend(const Layer& layer, const ModelConfig& config, int window) {
  const std::size_t head_dim = sz(config.head_dim), n = layer.k.size();
  Vec out(sz(config.n_heads) * head_dim, 0.0);
  for (std::size_t head = 0; head < sz(config.n_heads); ++head) {
    const std::size_t kv_head = head / sz(config.group_size());
    const std::size_t begin = window > 0 && n > sz(window) ? n - sz(window) : 0;
    Vec attn;
    for (std::size_t token = begin; token < n; ++token) {
      double dot = 0;
      for (std::size_t d = 0; d < head_dim; ++d) {
        dot += layer.q.back()[head * head_dim + d] * layer.k[token][kv_head * head_dim + d];
      }
      attn.push_back(dot * config.attention_scale);
    }
    const double max = *std::max_element(attn.begin(), attn.end());
    double sum = 0;
    for (double& a : attn) {
      a = std::exp(a - max);
      sum += a;
    }
    for (std::size_t token = begin; token < n; ++token) {
      for (std::size_t d = 0; d < head_dim; ++d) {
        out[head * head_dim + d] += attn[token - begin] / sum * layer.v[token][kv_head * head_dim + d];
      }
    }
  }
  return out;
}

// (n, heads * head_dim) as (heads, n, head_dim)
std::vector<float> head_major(const std::vector<Vec>& rows, std::size_t head_dim) {
  std::vector<float> out;
  for (std::size_t begin = 0; begin < rows[0].size(); begin += head_dim) {
    for (const Vec& row : rows) {
      for (std::size_t d = 0; d < head_dim; ++d) {
        out.push_back(static_cast<float>(row[begin + d]));
      }
    }
  }
  return out;
}

}  // namespace

Tensors reference_decode(const Model& model, const std::vector<std::int32_t>& ids, const std::vector<Pos>& passes) {
  const ModelConfig& config = model.config;
  const std::size_t hidden = sz(config.hidden), head_dim = sz(config.head_dim);
  const Vec embedding = values(model.embedding);
  std::vector<Layer> layers(sz(config.n_layers));
  Tensors tensors;
  Pos end = 0;
  for (const Pos n : passes) {
    const Pos begin = end;
    end += n;
    const RopeTable table = rope_table(config.rope, config.head_dim, config.max_positions, end);
    for (Pos pos = begin; pos < end; ++pos) {
      const auto row = embedding.begin() + static_cast<std::ptrdiff_t>(sz(ids[sz(pos)]) * hidden);
      Vec x(row, row + static_cast<std::ptrdiff_t>(hidden));
      const auto add = [&](const Vec& y) { std::transform(x.begin(), x.end(), y.begin(), x.begin(), std::plus<>()); };
      for (std::size_t l = 0; l < layers.size(); ++l) {
        const LayerWeights& w = model.layers[l];
        const Vec normed = norm(x, w.attention_norm, hidden, config.norm_eps);
        Vec q = product(w.q, w.q_bias, normed), k = product(w.k, w.k_bias, normed);
        if (config.qk_norm) {
          q = norm(q, w.q_norm, head_dim, config.norm_eps);
          k = norm(k, w.k_norm, head_dim, config.norm_eps);
        }
        rotate(q, table, pos);
        rotate(k, table, pos);
        layers[l].q.push_back(q);
        layers[l].k.push_back(k);
        layers[l].v.push_back(product(w.v, w.v_bias, normed));
        layers[l].out.push_back(attend(layers[l], config, config.sliding_window[l]));
        add(product(w.o, w.o_bias, layers[l].out.back()));
        const Vec mlp = norm(x, w.mlp_norm, hidden, config.norm_eps);
        Vec gate = product(w.gate, w.gate_bias, mlp);
        const Vec up = product(w.up, w.up_bias, mlp);
        for (std::size_t i = 0; i < gate.size(); ++i) {
          gate[i] *= up[i] / (1 + std::exp(-gate[i]));
        }
        add(product(w.down, w.down_bias, gate));
      }
      const Vec logits = product(model.head, {}, norm(x, model.final_norm, hidden, config.norm_eps));
      tensors["logits"].insert(tensors["logits"].end(), logits.begin(), logits.end());
      if (sz(pos) + 1 < ids.size()) {
        double sum = 0;
        for (const double logit : logits) {
          sum += std::exp(logit);
        }
        tensors["logprob"].push_back(static_cast<float>(logits[sz(ids[sz(pos) + 1])] - std::log(sum)));
      }
    }
  }
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string suffix = "." + std::to_string(l);
    tensors["q" + suffix] = head_major(layers[l].q, head_dim);
    tensors["k" + suffix] = head_major(layers[l].k, head_dim);
    tensors["v" + suffix] = head_major(layers[l].v, head_dim);
    tensors["out" + suffix] = head_major(layers[l].out, head_dim);
  }
  return tensors;
}

}  // namespace kvreplay::test
