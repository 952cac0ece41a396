// The CPU backend: float32 arithmetic over weights of any element type, every buffer allocated by the first pass.
#include "trace_capture/decoder.hpp"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "policies/errors.hpp"
#include "trace_capture/cpu/attention.hpp"
#include "trace_capture/cpu/linear.hpp"
#include "trace_capture/cpu/norm.hpp"
#include "trace_capture/cpu/rotation.hpp"
#include "trace_capture/cpu/swiglu.hpp"
#include "trace_capture/pass_checks.hpp"
#include "trace_capture/recorder.hpp"

namespace kvreplay {
namespace {

using Index = std::ptrdiff_t;

constexpr Pos kMaxPass = 512;
constexpr Index kLogitRows = 64;                 // rows of logits computed at a time
constexpr Index kWorthThreads = Index{1} << 17;  // elements

std::size_t sz(Index n) { return static_cast<std::size_t>(n); }

// A matrix that grows to the largest pass and stays.
class Buffer {
 public:
  Rows rows(Index n, Index width) {
    data_.resize(std::max(data_.size(), sz(n * width)));
    return {data_.data(), n, width};
  }

 private:
  std::vector<float> data_;
};

// Memory that the system provides page by page, as it is written.
std::unique_ptr<float[]> uninitialised(Index n) { return std::make_unique_for_overwrite<float[]>(sz(n)); }

std::vector<float> widened(const Tensor& tensor) {
  std::vector<float> values(tensor ? sz(tensor.size()) : 0);
  if (tensor) {
    widen(tensor.type, tensor.data, values);
  }
  return values;
}

std::span<const float> span_of(Rows rows) { return {rows.data, sz(rows.n * rows.width)}; }

class CpuDecoder final : public Decoder {
 public:
  CpuDecoder(const Model& model, Pos capacity, int threads)
      : model_(model),
        config_(model.config),
        capacity_(capacity),
        threads_(threads),
        linear_(threads),
        attention_(model.config, threads),
        final_norm_(widened(model.final_norm)) {
    // Dynamic scaling turns a whole prompt by the frequencies of its full length: it must come in one pass.
    fixed_rope_ = rope_is_fixed(config_.rope, config_.max_positions, capacity);
    max_pass_ = fixed_rope_ ? std::min(capacity, kMaxPass) : capacity;
    if (fixed_rope_) {
      rope_ = rope_table(config_.rope, config_.head_dim, config_.max_positions, capacity);
    }
    for (const LayerWeights& weights : model.layers) {
      Layer layer;
      layer.attention_norm = widened(weights.attention_norm);
      layer.mlp_norm = widened(weights.mlp_norm);
      layer.q_norm = widened(weights.q_norm);
      layer.k_norm = widened(weights.k_norm);
      layer.k = uninitialised(kv_width() * capacity);
      layer.v = uninitialised(kv_width() * capacity);
      layers_.push_back(std::move(layer));
    }
  }

  void reset() override { n_past_ = n_last_ = 0; }
  Pos n_past() const override { return n_past_; }
  Pos max_pass() const override { return max_pass_; }
  std::string name() const override { return "cpu"; }

  void pass(std::span<const std::int32_t> ids, Recorder* recorder) override {
    check_pass(ids, n_past_, max_pass_, capacity_, config_.vocab);
    const Index n = static_cast<Index>(ids.size());
    if (!fixed_rope_) {
      rope_ = rope_table(config_.rope, config_.head_dim, config_.max_positions, n_past_ + static_cast<Pos>(n));
    }
    rotation_.prepare(rope_, n_past_, static_cast<Pos>(n));
    n_last_ = 0;  // until the pass is complete
    const Rows hidden = hidden_.rows(n, config_.hidden);
    embed(ids, hidden);
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      attend(layer, hidden, recorder);
      feed_forward(layer, hidden);
    }
    for_each_row(hidden, [&](Rows row) { rms_norm(as_const(row), final_norm_, config_.norm_eps, row); });
    n_past_ += static_cast<Pos>(n);
    n_last_ = static_cast<Pos>(n);
    logits_begin_ = logits_end_ = 0;
  }

  void logits(Pos row, std::span<float> out) override {
    check_logits_of(row, out.size(), n_last_, config_.vocab);
    const std::span<const float> values = logits_of(row, row + 1);
    std::copy(values.begin(), values.end(), out.begin());
  }

  void log_probabilities(std::span<const std::int32_t> next, std::span<float> out) override {
    check_scored(next, out.size(), n_last_, config_.vocab);
    const Index n = static_cast<Index>(next.size()), vocab = config_.vocab;
    for (Index first = 0; first < n; first += kLogitRows) {
      const Index end = std::min(n, first + kLogitRows);
      const std::span<const float> rows = logits_of(first, end);
#pragma omp parallel for num_threads(threads_) schedule(static) if ((end - first) * vocab > kWorthThreads)
      for (Index row = first; row < end; ++row) {
        out[sz(row)] = log_probability(rows.subspan(sz((row - first) * vocab), sz(vocab)), next[sz(row)]);
      }
    }
  }

  Choice choose(const Sampling& sampling, std::uint64_t step) override {
    if (n_last_ == 0) {
      throw std::invalid_argument("the next token is chosen after a pass, and there was none");
    }
    return kvreplay::choose(logits_of(n_last_ - 1, n_last_), sampling, step);
  }

 private:
  struct Layer {
    std::vector<float> attention_norm, mlp_norm;  // (hidden)
    std::vector<float> q_norm, k_norm;            // (head_dim) or empty
    std::unique_ptr<float[]> k, v;                // (n_kv_heads, capacity, head_dim)
  };

  Index q_width() const { return static_cast<Index>(config_.n_heads) * config_.head_dim; }
  Index kv_width() const { return static_cast<Index>(config_.n_kv_heads) * config_.head_dim; }

  template <class Work>
  void for_each_row(Rows rows, Work&& work) const {
#pragma omp parallel for num_threads(threads_) schedule(static) if (rows.n > 1 && rows.n * rows.width > kWorthThreads)
    for (Index i = 0; i < rows.n; ++i) {
      work(Rows{rows[i], 1, rows.width});
    }
  }

  void embed(std::span<const std::int32_t> ids, Rows hidden) const {
    const Tensor& table = model_.embedding;
    for (Index i = 0; i < hidden.n; ++i) {
      const std::byte* row = table.data + sz(ids[sz(i)] * hidden.width) * size_of(table.type);
      widen(table.type, row, {hidden[i], sz(hidden.width)});
    }
  }

  // hidden (n, hidden) normalised.
  Rows normed(Rows hidden, std::span<const float> weight) {
    const Rows out = normed_.rows(hidden.n, hidden.width);
    for_each_row(out, [&](Rows row) {
      const Index i = (row.data - out.data) / out.width;
      rms_norm({hidden[i], 1, hidden.width}, weight, config_.norm_eps, row);
    });
    return out;
  }

  static void add(Rows rows, Rows to) {
    for (Index i = 0; i < rows.n * rows.width; ++i) {
      to.data[i] += rows.data[i];
    }
  }

  // Each head of each row, where the model normalises queries and keys.
  void norm_heads(Rows rows, std::span<const float> weight) const {
    if (!weight.empty()) {
      const Rows heads{rows.data, rows.n * rows.width / config_.head_dim, config_.head_dim};
      rms_norm(as_const(heads), weight, config_.norm_eps, heads);
    }
  }

  void remember(Rows rows, float* cache) const {
    const Index head_dim = config_.head_dim;
    for (Index i = 0; i < rows.n; ++i) {
      for (Index head = 0; head < config_.n_kv_heads; ++head) {
        std::copy_n(rows[i] + head * head_dim, head_dim, cache + (head * capacity_ + n_past_ + i) * head_dim);
      }
    }
  }

  void attend(int index, Rows hidden, Recorder* recorder) {
    const LayerWeights& weights = model_.layers[sz(index)];
    Layer& layer = layers_[sz(index)];
    const Index n = hidden.n;
    const ConstRows x = as_const(normed(hidden, layer.attention_norm));
    const Rows q = q_.rows(n, q_width()), k = k_.rows(n, kv_width()), v = v_.rows(n, kv_width());
    linear_.apply(weights.q, weights.q_bias, x, q);
    linear_.apply(weights.k, weights.k_bias, x, k);
    linear_.apply(weights.v, weights.v_bias, x, v);
    norm_heads(q, layer.q_norm);
    norm_heads(k, layer.k_norm);
    rotation_.apply(q);
    rotation_.apply(k);
    if (recorder != nullptr) {
      for (const Rows& rows : {q, k, v}) {
        round_to(recorder->plan().element, {rows.data, sz(rows.n * rows.width)});
      }
    }
    remember(k, layer.k.get());
    remember(v, layer.v.get());
    const Rows out = out_.rows(n, q_width());
    attention_.attend(as_const(q), {layer.k.get(), layer.v.get(), capacity_}, n_past_,
                      config_.sliding_window[sz(index)], out);
    if (recorder != nullptr && recorder->index_of(index) >= 0) {
      recorder->record(index, n_past_, static_cast<Pos>(n),
                       {.q = span_of(q), .k = span_of(k), .v = span_of(v), .out = span_of(out)});
    }
    const Rows projected = normed_.rows(n, config_.hidden);
    linear_.apply(weights.o, weights.o_bias, as_const(out), projected);
    add(projected, hidden);
  }

  void feed_forward(int index, Rows hidden) {
    const LayerWeights& weights = model_.layers[sz(index)];
    const ConstRows x = as_const(normed(hidden, layers_[sz(index)].mlp_norm));
    const Rows gate = gate_.rows(x.n, config_.intermediate), up = up_.rows(x.n, config_.intermediate);
    linear_.apply(weights.gate, weights.gate_bias, x, gate);
    linear_.apply(weights.up, weights.up_bias, x, up);
    for_each_row(gate, [&](Rows row) { swiglu(row.data, up.data + (row.data - gate.data), sz(row.width)); });
    const Rows projected = normed_.rows(x.n, config_.hidden);
    linear_.apply(weights.down, weights.down_bias, as_const(gate), projected);
    add(projected, hidden);
  }

  // Of rows [begin, end) of the last pass, at most kLogitRows of them: (end - begin, vocab). Kept until the next rows.
  std::span<const float> logits_of(Index begin, Index end) {
    const Rows out = logits_.rows(end - begin, config_.vocab);
    if (logits_begin_ != begin || logits_end_ != end) {
      const Rows hidden = hidden_.rows(n_last_, config_.hidden);
      linear_.apply(model_.head, {}, {hidden[begin], end - begin, hidden.width}, out);
      logits_begin_ = begin;
      logits_end_ = end;
    }
    return span_of(out);
  }

  const Model& model_;
  const ModelConfig& config_;
  Pos capacity_, max_pass_ = 0, n_past_ = 0, n_last_ = 0;  // n_last_: tokens of the last pass
  int threads_;
  bool fixed_rope_ = true;
  RopeTable rope_;
  Rotation rotation_;
  Linear linear_;
  Attention attention_;
  std::vector<float> final_norm_;  // (hidden)
  std::vector<Layer> layers_;
  Buffer hidden_;                            // (n, hidden); after the pass, what the head reads
  Buffer normed_;                            // (n, hidden)
  Buffer q_, k_, v_;                         // (n, heads * head_dim)
  Buffer out_;                               // (n, n_heads * head_dim)
  Buffer gate_, up_;                         // (n, intermediate)
  Buffer logits_;                            // (rows, vocab)
  Index logits_begin_ = 0, logits_end_ = 0;  // rows of the last pass that are in logits_
};

}  // namespace

std::unique_ptr<Decoder> make_cpu_decoder(const Model& model, Pos capacity, int threads) {
  KVREPLAY_CHECK(capacity > 0 && threads >= 0);
  return std::make_unique<CpuDecoder>(model, capacity, threads > 0 ? threads : omp_get_max_threads());
}

}  // namespace kvreplay
