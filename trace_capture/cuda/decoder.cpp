// The CUDA backend: weights resident, all work enqueued on one stream; the host waits only where it reads a result.
#include "trace_capture/decoder.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "policies/errors.hpp"
#include "trace_capture/cuda/carrier.cuh"
#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/cuda/products.cuh"
#include "trace_capture/cuda/weights.cuh"
#include "trace_capture/errors.hpp"
#include "trace_capture/pass_checks.hpp"
#include "trace_capture/recorder.hpp"
#include "trace_capture/rope.hpp"

namespace kvreplay {
namespace cuda {
namespace {

constexpr Pos kMaxPass = 2048;
constexpr int kLogitRows = 32;  // rows of logits computed at a time

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

// Chooses the device for this thread, and refuses what cannot run there.
cudaDeviceProp choose_device(int device, const ModelConfig& config) {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  if (status != cudaSuccess || n == 0) {
    cudaGetLastError();
    throw DeviceError(fmt::format("no CUDA device was found ({}): use --device cpu",
                                  status == cudaSuccess ? "none is visible" : cudaGetErrorString(status)));
  }
  if (device < 0 || device >= n) {
    throw DeviceError(fmt::format("CUDA device {} is not there: allowed are 0 to {}", device, n - 1));
  }
  check(cudaSetDevice(device), "choosing the device");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "asking for the device's properties");
  if (properties.major < 8) {
    throw DeviceError(
        fmt::format("{} is of compute capability {}.{}, and 8.0 is the least that works: use --device cpu",
                    properties.name, properties.major, properties.minor));
  }
  if (config.head_dim % 8 != 0 || config.head_dim > kMaxHeadDim) {
    throw DeviceError(
        fmt::format("head_dim {} does not work on a CUDA device, only multiples of 8 up to {}: use "
                    "--device cpu",
                    config.head_dim, kMaxHeadDim));
  }
  if (attention_shared_bytes(config.head_dim) > properties.sharedMemPerBlockOptin) {
    throw DeviceError(fmt::format(
        "attention with head_dim {} needs {} bytes of shared memory and {} has {}: use "
        "--device cpu",
        config.head_dim, attention_shared_bytes(config.head_dim), properties.name, properties.sharedMemPerBlockOptin));
  }
  return properties;
}

// What a pass works in, and what it leaves for the next.
template <class T>
struct Work {
  T* cache;            // (n_layers, 2, n_kv_heads, capacity, head_dim)
  float* rotation;     // (capacity, head_dim / 2, 2) cos and sin
  std::int32_t* ids;   // (max_pass)
  float* x;            // (max_pass, hidden) residual stream; after the pass, what the final norm reads
  T* normed;           // (max_pass, hidden)
  float* qkv;          // (max_pass, (n_heads + 2 * n_kv_heads) * head_dim)
  T* q;                // (q_rows, n_heads * head_dim)
  float* out;          // (q_rows, n_heads * head_dim)
  T* attn;             // (max_pass, n_heads * head_dim)
  float* part;         // (n_heads, max_splits, head_dim + 2)
  float* gate_up;      // (max_pass, 2 * intermediate)
  T* gated;            // (max_pass, intermediate)
  float* logits;       // (kLogitRows, vocab)
  std::int32_t* next;  // (max_pass)
  Scored* scored;      // (max_pass)
};

// Rows of q and out: a whole pass of one layer, or one token of every layer and of those not recorded.
Pos q_rows(const ModelConfig& c, Pos max_pass) { return std::max(max_pass, Pos{c.n_layers} + 1); }

std::size_t cache_layer(const ModelConfig& c, Pos capacity) {
  return 2 * sz(c.n_kv_heads) * sz(capacity) * sz(c.head_dim);
}

template <class T>
Work<T> lay_out_work(const ModelConfig& c, Pos capacity, Pos max_pass, Parts& cache, Parts& parts) {
  const std::size_t n = sz(max_pass), dim = sz(c.head_dim), q_width = sz(c.n_heads) * dim;
  Work<T> work{};
  work.cache = cache.take<T>(sz(c.n_layers) * cache_layer(c, capacity));
  work.rotation = parts.take<float>(sz(capacity) * dim);
  work.ids = parts.take<std::int32_t>(n);
  work.x = parts.take<float>(n * sz(c.hidden));
  work.normed = parts.take<T>(n * sz(c.hidden));
  work.qkv = parts.take<float>(n * (q_width + 2 * sz(c.n_kv_heads) * dim));
  work.q = parts.take<T>(sz(q_rows(c, max_pass)) * q_width);
  work.out = parts.take<float>(sz(q_rows(c, max_pass)) * q_width);
  work.attn = parts.take<T>(n * q_width);
  work.part = parts.take<float>(sz(c.n_heads) * sz(max_splits(capacity)) * (dim + 2));
  work.gate_up = parts.take<float>(n * 2 * sz(c.intermediate));
  work.gated = parts.take<T>(n * sz(c.intermediate));
  work.logits = parts.take<float>(std::size_t{kLogitRows} * sz(c.vocab));
  work.next = parts.take<std::int32_t>(n);
  work.scored = parts.take<Scored>(n);
  return work;
}

template <class T>
class CudaDecoder final : public Decoder {
 public:
  CudaDecoder(const Model& model, Pos capacity, int device)
      : config_(model.config), capacity_(capacity), device_(device), device_name_(choose_device(device, config_).name) {
    // Dynamic scaling turns a whole prompt by the frequencies of its full length: it must come in one pass.
    fixed_rope_ = rope_is_fixed(config_.rope, config_.max_positions, capacity);
    max_pass_ = fixed_rope_ ? std::min(capacity, kMaxPass) : capacity;
    if (fixed_rope_) {
      rope_ = rope_table(config_.rope, config_.head_dim, config_.max_positions, capacity);
    }
    allocate(model);
    upload_weights(model, weights_);
  }
  ~CudaDecoder() override { cudaStreamSynchronize(stream_.get()); }

  void reset() override {
    stream_.wait();  // page-locked ids and rotations may be written anew
    n_past_ = n_last_ = 0;
    recorder_ = nullptr;
  }
  Pos n_past() const override { return n_past_; }
  Pos max_pass() const override { return max_pass_; }
  std::string name() const override { return "cuda: " + device_name_; }

  void pass(std::span<const std::int32_t> ids, Recorder* recorder) override {
    check_pass(ids, n_past_, max_pass_, capacity_, config_.vocab);
    check(cudaSetDevice(device_), "choosing the device");
    const Pos n = static_cast<Pos>(ids.size());
    n_last_ = 0;  // until the pass is complete
    logits_begin_ = logits_end_ = 0;
    prepare_rotation(n);
    begin_recording(recorder);
    std::copy(ids.begin(), ids.end(), host_ids_.as<std::int32_t>() + n_past_);
    to_device(work_.ids, host_ids_.as<std::int32_t>() + n_past_, ids.size());
    gather(weights_.embedding, work_.ids, work_.x, n, config_.hidden, stream());
    const bool together = recorder != nullptr && all_layers_fit(*recorder, n);
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      attention_block(layer, n, recorder, together);
      feed_forward_block(layer, n);
    }
    if (together) {
      carry(*recorder, n, 0, recorder->plan().layers.size());
    }
    n_past_ += n;
    n_last_ = n;
  }

  void logits(Pos row, std::span<float> out) override {
    check_logits_of(row, out.size(), n_last_, config_.vocab);
    check(cudaSetDevice(device_), "choosing the device");
    to_host(out.data(), logits_of(row, row + 1), out.size());
    stream_.wait();
  }

  void log_probabilities(std::span<const std::int32_t> next, std::span<float> out) override {
    check_scored(next, out.size(), n_last_, config_.vocab);
    check(cudaSetDevice(device_), "choosing the device");
    to_device(work_.next, next.data(), next.size());
    const Pos n = static_cast<Pos>(next.size());
    for (Pos first = 0; first < n; first += kLogitRows) {
      const Pos end = std::min(n, first + kLogitRows);
      score(logits_of(first, end), work_.next + first, work_.scored + first, end - first, config_.vocab, stream());
    }
    to_host(host_scored_.as<Scored>(), work_.scored, next.size());
    stream_.wait();
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = host_scored_.as<Scored>()[i].logprob;
    }
  }

  // Greedily on the device; any other way through the logits on the host, as the CPU backend.
  Choice choose(const Sampling& sampling, std::uint64_t step) override {
    if (n_last_ == 0) {
      throw std::invalid_argument("the next token is chosen after a pass, and there was none");
    }
    kvreplay::check(sampling);
    check(cudaSetDevice(device_), "choosing the device");
    const float* row = logits_of(n_last_ - 1, n_last_);
    if (sampling.temperature > 0) {
      host_logits_.resize(sz(config_.vocab));
      to_host(host_logits_.data(), row, host_logits_.size());
      stream_.wait();
      return kvreplay::choose(host_logits_, sampling, step);
    }
    score(row, nullptr, work_.scored, 1, config_.vocab, stream());
    to_host(host_scored_.as<Scored>(), work_.scored, 1);
    stream_.wait();
    const Scored best = *host_scored_.as<Scored>();
    if (!std::isfinite(best.logprob)) {
      throw std::runtime_error(
          fmt::format("the logits after token {} are not finite: these weights do not compute, or "
                      "not in this precision",
                      n_past_ - 1));
    }
    return {best.id, best.logprob};
  }

 private:
  void allocate(const Model& model) {
    Parts weight_sizes, cache_sizes, work_sizes;
    lay_out_weights<T>(model, weight_sizes);
    lay_out_work<T>(config_, capacity_, max_pass_, cache_sizes, work_sizes);
    const std::size_t work_bytes = work_sizes.bytes() + Products::kWorkspaceBytes;
    const std::size_t needed = weight_sizes.bytes() + cache_sizes.bytes() + work_bytes;
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for the free memory");
    if (needed > free) {
      throw DeviceError(fmt::format(
          "{} has {} free of {}, but this model needs {} for {} tokens (weights {}, cache {}, work {}): ask for fewer "
          "tokens, or use --device cpu",
          device_name_, gib(free), gib(total), gib(needed), capacity_, gib(weight_sizes.bytes()),
          gib(cache_sizes.bytes()), gib(work_bytes)));
    }
    weight_memory_ = DeviceMemory(weight_sizes.bytes(), "the weights");
    cache_memory_ = DeviceMemory(cache_sizes.bytes(), "the cache");
    work_memory_ = DeviceMemory(work_sizes.bytes(), "the activations");
    Parts weights(weight_memory_.data()), cache(cache_memory_.data()), work(work_memory_.data());
    weights_ = lay_out_weights<T>(model, weights);
    work_ = lay_out_work<T>(config_, capacity_, max_pass_, cache, work);
    products_.emplace(stream_);
    host_ids_ = PinnedMemory(sz(capacity_) * sizeof(std::int32_t));
    host_rotation_ = PinnedMemory(sz(capacity_) * sz(config_.head_dim) * sizeof(float));
    host_scored_ = PinnedMemory(sz(max_pass_) * sizeof(Scored));
  }

  // cos and sin of the next n positions. Each place of the page-locked table is written once in a sequence, so that no
  // copy under way is overwritten; with fixed frequencies it stays for all sequences.
  void prepare_rotation(Pos n) {
    Pos begin = n_past_;
    const Pos end = n_past_ + n;
    if (fixed_rope_) {
      begin = std::max(begin, n_rotations_);
      n_rotations_ = std::max(n_rotations_, end);
    } else {
      rope_ = rope_table(config_.rope, config_.head_dim, config_.max_positions, end);
    }
    if (begin >= end) {
      return;
    }
    const std::size_t dim = sz(config_.head_dim);
    float* table = host_rotation_.as<float>();
    for (Pos pos = begin; pos < end; ++pos) {
      for (std::size_t c = 0; c < dim / 2; ++c) {
        // In float32, as the CPU backend and transformers: from some thousand tokens on its rounding is felt.
        const double angle = static_cast<double>(static_cast<float>(pos) * static_cast<float>(rope_.inv_freq[c]));
        table[sz(pos) * dim + 2 * c] = static_cast<float>(std::cos(angle) * rope_.attention_factor);
        table[sz(pos) * dim + 2 * c + 1] = static_cast<float>(std::sin(angle) * rope_.attention_factor);
      }
    }
    to_device(work_.rotation + sz(begin) * dim, table + sz(begin) * dim, sz(end - begin) * dim);
  }

  void begin_recording(Recorder* recorder) {
    if (recorder == nullptr || (recorder == recorder_ && n_past_ > 0)) {
      return;
    }
    const RecordPlan& plan = recorder->plan();
    KVREPLAY_CHECK(plan.n_heads == config_.n_heads && plan.n_kv_heads == config_.n_kv_heads &&
                   plan.head_dim == config_.head_dim && plan.layers.back() < config_.n_layers);
    carrier_.begin(*recorder);
    recorder_ = recorder;
  }

  // May one packet carry all recorded layers of this pass? Then each layer keeps its q and out to the end of the pass.
  bool all_layers_fit(const Recorder& recorder, Pos n) const {
    return recorder.fits(n) && (recorder.plan().layers.size() + 1) * sz(n) <= sz(q_rows(config_, max_pass_));
  }

  void carry(Recorder& recorder, Pos n, std::size_t begin, std::size_t end) {
    carrier_.carry(recorder, PassRows<T>{work_.cache, work_.q, work_.out, n_past_, n, capacity_}, begin, end);
  }

  void attention_block(int index, Pos n, Recorder* recorder, bool together) {
    const DeviceLayer<T>& weights = weights_.layers[sz(index)];
    const int q_width = config_.n_heads * config_.head_dim, kv_width = config_.n_kv_heads * config_.head_dim;
    const int recorded = recorder != nullptr ? recorder->index_of(index) : -1;
    // Where all layers travel together each recorded one has its own rows of q and out, the others share the last ones.
    const std::size_t place_at =
        together ? (recorded >= 0 ? sz(recorded) : recorder->plan().layers.size()) * sz(n) * sz(q_width) : 0;
    T* k = work_.cache + sz(index) * cache_layer(config_, capacity_);
    T* v = k + cache_layer(config_, capacity_) / 2;
    T* q = work_.q + place_at;

    rms_norm(work_.x, weights.attention_norm, work_.normed, n, config_.hidden, eps(), stream());
    multiply(weights.qkv, work_.normed, work_.qkv, n, q_width + 2 * kv_width, config_.hidden, false);
    place(Placing<T>{work_.qkv, weights.qkv_bias, weights.q_norm, weights.k_norm, work_.rotation, q, k, v, n, n_past_,
                     config_.n_heads, config_.n_kv_heads, config_.head_dim, capacity_, eps(),
                     recorder != nullptr ? recorder->plan().element : kElement<T>},
          stream());
    attend(Attention<T>{q, k, v, work_.attn, recorded >= 0 ? work_.out + place_at : nullptr, work_.part, n, n_past_,
                        config_.n_heads, config_.n_kv_heads, config_.head_dim, capacity_,
                        config_.sliding_window[sz(index)], static_cast<float>(config_.attention_scale)},
           stream());
    if (recorded >= 0 && !together) {
      carry(*recorder, n, sz(recorded), sz(recorded) + 1);
    }
    multiply(weights.o, work_.attn, work_.x, n, config_.hidden, q_width, true);
    if (weights.o_bias != nullptr) {
      add_bias(work_.x, weights.o_bias, n, config_.hidden, stream());
    }
  }

  void feed_forward_block(int index, Pos n) {
    const DeviceLayer<T>& weights = weights_.layers[sz(index)];
    const int intermediate = config_.intermediate;
    rms_norm(work_.x, weights.mlp_norm, work_.normed, n, config_.hidden, eps(), stream());
    if (n == 1) {
      multiply_gate_one(weights.gate_up, weights.gate_up_bias, work_.normed, work_.gated, intermediate, config_.hidden,
                        stream());
    } else {
      multiply(weights.gate_up, work_.normed, work_.gate_up, n, 2 * intermediate, config_.hidden, false);
      gate(work_.gate_up, weights.gate_up_bias, work_.gated, n, intermediate, stream());
    }
    multiply(weights.down, work_.gated, work_.x, n, config_.hidden, intermediate, true);
    if (weights.down_bias != nullptr) {
      add_bias(work_.x, weights.down_bias, n, config_.hidden, stream());
    }
  }

  void multiply(const T* weight, const T* x, float* y, Pos n, int rows, int k, bool add) {
    if (n == 1) {
      multiply_one(weight, x, y, rows, k, add, stream());
    } else {
      products_->multiply(weight, x, y, n, rows, k, add);
    }
  }

  // Of rows [begin, end) of the last pass, at most kLogitRows of them: (end - begin, vocab). Kept until the next rows.
  const float* logits_of(Pos begin, Pos end) {
    if (logits_begin_ != begin || logits_end_ != end) {
      rms_norm(work_.x + sz(begin) * sz(config_.hidden), weights_.final_norm, work_.normed, end - begin, config_.hidden,
               eps(), stream());
      multiply(weights_.head, work_.normed, work_.logits, end - begin, config_.vocab, config_.hidden, false);
      logits_begin_ = begin;
      logits_end_ = end;
    }
    return work_.logits;
  }

  float eps() const { return static_cast<float>(config_.norm_eps); }
  Stream stream() const { return stream_.get(); }

  template <class U>
  void to_device(U* to, const U* from, std::size_t n) {
    check(cudaMemcpyAsync(to, from, n * sizeof(U), cudaMemcpyHostToDevice, stream()), "copying to the device");
  }
  template <class U>
  void to_host(U* to, const U* from, std::size_t n) {
    check(cudaMemcpyAsync(to, from, n * sizeof(U), cudaMemcpyDeviceToHost, stream()), "copying from the device");
  }

  const ModelConfig& config_;
  Pos capacity_, max_pass_ = 0, n_past_ = 0, n_last_ = 0;  // n_last_: tokens of the last pass
  int device_;
  std::string device_name_;
  bool fixed_rope_ = true;
  RopeTable rope_;
  Pos n_rotations_ = 0;  // positions whose cos and sin are on the device, where the frequencies are fixed

  OwnStream stream_;
  DeviceMemory weight_memory_, cache_memory_, work_memory_;
  DeviceWeights<T> weights_;
  Work<T> work_{};
  std::optional<Products> products_;
  PinnedMemory host_ids_;       // (capacity) by position
  PinnedMemory host_rotation_;  // (capacity, head_dim / 2, 2) by position
  PinnedMemory host_scored_;    // (max_pass)
  std::vector<float> host_logits_;
  Carrier carrier_{stream_};
  const Recorder* recorder_ = nullptr;     // whose plan the carrier has
  Pos logits_begin_ = 0, logits_end_ = 0;  // rows of the last pass that are in work_.logits
};

}  // namespace
}  // namespace cuda

bool built_with_cuda() { return true; }

std::unique_ptr<Decoder> make_cuda_decoder(const Model& model, Pos capacity, int device) {
  KVREPLAY_CHECK(capacity > 0);
  switch (element_type(model)) {
    case ElementType::f16:
      return std::make_unique<cuda::CudaDecoder<cuda::F16>>(model, capacity, device);
    case ElementType::bf16:
      return std::make_unique<cuda::CudaDecoder<cuda::Bf16>>(model, capacity, device);
    case ElementType::f32:
      break;
  }
  return std::make_unique<cuda::CudaDecoder<float>>(model, capacity, device);
}

}  // namespace kvreplay
