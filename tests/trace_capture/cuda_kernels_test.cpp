// Every kernel against the plainest arithmetic. Compiled twice: over the emulation (everywhere), and over CUDA (label
// gpu).
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "trace_capture/cuda/carrier.cuh"
#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/cuda/products.cuh"
#include "trace_capture/packet.hpp"
#include "trace_capture/sampling.hpp"

// After CUDA's headers: both define things.
#include <catch2/catch.hpp>

namespace kvreplay::cuda {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

std::vector<float> random_values(std::size_t n, float spread, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> values(n);
  for (float& value : values) {
    value = normal(generator);
  }
  return values;
}

// An array on the device and its way there and back.
template <class T>
class Array {
 public:
  explicit Array(std::size_t n) : n_(n), memory_(n * sizeof(T) + 16, "a test") {}
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    check(cudaMemcpyAsync(memory_.data(), values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice, stream_.get()), "up");
    stream_.wait();
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> values(const OwnStream& after) const {
    after.wait();
    std::vector<T> out(n_);
    check(cudaMemcpyAsync(out.data(), memory_.data(), n_ * sizeof(T), cudaMemcpyDeviceToHost, stream_.get()), "down");
    stream_.wait();
    return out;
  }

 private:
  std::size_t n_;
  DeviceMemory memory_;
  OwnStream stream_;
};

template <class T>
std::vector<T> narrowed(const std::vector<float>& values) {
  std::vector<T> out;
  for (const float value : values) {
    out.push_back(from_float<T>(value));
  }
  return out;
}

template <class T>
std::vector<float> widened(const std::vector<T>& values) {
  std::vector<float> out;
  for (const T value : values) {
    out.push_back(to_float(value));
  }
  return out;
}

template <class T>
std::vector<float> rounded(const std::vector<float>& values) {
  return widened(narrowed<T>(values));
}

// max|difference| / RMS of what is expected
template <class Expected>
double distance(const std::vector<float>& found, const std::vector<Expected>& expected) {
  REQUIRE(found.size() == expected.size());
  double square = 0, largest = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double difference = std::abs(static_cast<double>(found[i]) - static_cast<double>(expected[i]));
    largest = difference <= largest ? largest : difference;  // a NaN stays
    square += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return largest / std::sqrt(square / static_cast<double>(std::max<std::size_t>(1, found.size())));
}

// Of a result that was computed in float32 and rounded to T once: half a unit of the largest value.
template <class T>
constexpr double kRounding = 2e-6;
template <>
constexpr double kRounding<F16> = 4e-3;
template <>
constexpr double kRounding<Bf16> = 3e-2;

TEMPLATE_TEST_CASE("cuda: rows are gathered, normalised and gated", "", float, F16, Bf16) {
  const OwnStream stream;
  const int hidden = 300, n = 3;
  const std::vector<float> table = rounded<TestType>(random_values(sz(7 * hidden), 1, 1));
  const std::vector<std::int32_t> ids{6, 0, 3};
  const Array<TestType> embedding(narrowed<TestType>(table));
  const Array<std::int32_t> device_ids(ids);
  const Array<float> x(sz(n * hidden));
  gather(embedding.data(), device_ids.data(), x.data(), n, hidden, stream.get());
  const std::vector<float> rows = x.values(stream);
  for (int i = 0; i < n; ++i) {
    REQUIRE(
        std::equal(rows.begin() + i * hidden, rows.begin() + (i + 1) * hidden, table.begin() + ids[sz(i)] * hidden));
  }

  const std::vector<float> weight = random_values(sz(hidden), 1, 2);
  const Array<float> device_weight(weight);
  const Array<TestType> out(sz(n * hidden));
  rms_norm(x.data(), device_weight.data(), out.data(), n, hidden, 1e-5F, stream.get());
  std::vector<double> expected;
  for (int i = 0; i < n; ++i) {
    double square = 0;
    for (int c = 0; c < hidden; ++c) {
      square += static_cast<double>(rows[sz(i * hidden + c)]) * static_cast<double>(rows[sz(i * hidden + c)]);
    }
    for (int c = 0; c < hidden; ++c) {
      expected.push_back(static_cast<double>(rows[sz(i * hidden + c)]) / std::sqrt(square / hidden + 1e-5) *
                         static_cast<double>(weight[sz(c)]));
    }
  }
  REQUIRE(distance(widened(out.values(stream)), expected) < kRounding<TestType>);

  const int width = hidden / 2;
  const Array<TestType> gated(sz(n * width));
  for (const bool with_bias : {false, true}) {
    gate(x.data(), with_bias ? device_weight.data() : nullptr, gated.data(), n, width, stream.get());
    expected.clear();
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < width; ++c) {
        const auto bias = [&](int at) { return with_bias ? static_cast<double>(weight[sz(at)]) : 0.0; };
        const double g = static_cast<double>(rows[sz(i * hidden + c)]) + bias(c);
        expected.push_back(g / (1 + std::exp(-g)) *
                           (static_cast<double>(rows[sz(i * hidden + width + c)]) + bias(width + c)));
      }
    }
    REQUIRE(distance(widened(gated.values(stream)), expected) < kRounding<TestType>);
  }

  add_bias(x.data(), device_weight.data(), n, hidden, stream.get());
  const std::vector<float> biased = x.values(stream);
  for (std::size_t i = 0; i < biased.size(); ++i) {
    REQUIRE(biased[i] == rows[i] + weight[i % sz(hidden)]);
  }
}

std::vector<double> naive_product(const std::vector<float>& weight, const std::vector<float>& x, int n, int rows,
                                  int k) {
  std::vector<double> y;
  for (int i = 0; i < n; ++i) {
    for (int row = 0; row < rows; ++row) {
      double sum = 0;
      for (int c = 0; c < k; ++c) {
        sum += static_cast<double>(weight[sz(row * k + c)]) * static_cast<double>(x[sz(i * k + c)]);
      }
      y.push_back(sum);
    }
  }
  return y;
}

TEMPLATE_TEST_CASE("cuda: products of one token and of many", "", float, F16, Bf16) {
  const OwnStream stream;
  const Products products(stream);
  // k: not a multiple of 8, a lane's single piece, the deep loop alone, and with a remainder.
  const int k = GENERATE(20, 64, 1024, 1384);
  const int rows = 10, n = 3;
  const std::vector<float> weight = rounded<TestType>(random_values(sz(rows * k), 1, 3));
  const std::vector<float> x = rounded<TestType>(random_values(sz(n * k), 1, 4));
  const std::vector<float> before = random_values(sz(n * rows), 5, 5);
  const std::vector<double> expected = naive_product(weight, x, n, rows, k);
  const Array<TestType> device_weight(narrowed<TestType>(weight)), device_x(narrowed<TestType>(x));

  const Array<float> y(before);
  products.multiply(device_weight.data(), device_x.data(), y.data(), n, rows, k, false);
  REQUIRE(distance(y.values(stream), expected) < 1e-5);
  const Array<float> added(before);
  products.multiply(device_weight.data(), device_x.data(), added.data(), n, rows, k, true);
  std::vector<double> sum = expected;
  for (std::size_t i = 0; i < sum.size(); ++i) {
    sum[i] += static_cast<double>(before[i]);
  }
  REQUIRE(distance(added.values(stream), sum) < 1e-5);

  const std::vector<double> first(expected.begin(), expected.begin() + rows),
      first_sum(sum.begin(), sum.begin() + rows);
  const Array<float> one(sz(rows)), one_added(std::vector<float>(before.begin(), before.begin() + rows));
  multiply_one(device_weight.data(), device_x.data(), one.data(), rows, k, false, stream.get());
  REQUIRE(distance(one.values(stream), first) < 1e-5);
  multiply_one(device_weight.data(), device_x.data(), one_added.data(), rows, k, true, stream.get());
  REQUIRE(distance(one_added.values(stream), first_sum) < 1e-5);

  const int width = rows / 2;
  const std::vector<float> bias = random_values(sz(rows), 1, 6);
  const Array<float> device_bias(bias);
  const Array<TestType> gated(sz(width));
  for (const bool with_bias : {false, true}) {
    multiply_gate_one(device_weight.data(), with_bias ? device_bias.data() : nullptr, device_x.data(), gated.data(),
                      width, k, stream.get());
    std::vector<double> expected_gated;
    for (int c = 0; c < width; ++c) {
      const double g = first[sz(c)] + (with_bias ? static_cast<double>(bias[sz(c)]) : 0);
      const double up = first[sz(width + c)] + (with_bias ? static_cast<double>(bias[sz(width + c)]) : 0);
      expected_gated.push_back(g / (1 + std::exp(-g)) * up);
    }
    REQUIRE(distance(widened(gated.values(stream)), expected_gated) < std::max(1e-5, kRounding<TestType>));
  }
}

TEMPLATE_TEST_CASE("cuda: the fused product is normalised, rotated and put into the cache", "", float, F16, Bf16) {
  const OwnStream stream;
  const int head_dim = GENERATE(8, 80, 256);
  const bool with_bias = GENERATE(false, true), with_norm = GENERATE(false, true);
  const int n = 3, past = 2, n_heads = 6, n_kv_heads = 2, capacity = 7, heads = n_heads + 2 * n_kv_heads;
  const std::vector<float> qkv = random_values(sz(n * heads * head_dim), 1, 7);
  const std::vector<float> bias = random_values(sz(heads * head_dim), 1, 8);
  const std::vector<float> q_norm = random_values(sz(head_dim), 1, 9), k_norm = random_values(sz(head_dim), 1, 10);
  std::vector<float> rotation;
  for (int pos = 0; pos < capacity; ++pos) {
    for (int c = 0; c < head_dim / 2; ++c) {
      rotation.push_back(std::cos(static_cast<float>(pos) * 0.3F / static_cast<float>(c + 1)));
      rotation.push_back(std::sin(static_cast<float>(pos) * 0.3F / static_cast<float>(c + 1)));
    }
  }
  const Array<float> device_qkv(qkv), device_bias(bias), device_q_norm(q_norm), device_k_norm(k_norm);
  const Array<float> device_rotation(rotation);
  const Array<TestType> q(sz(n * n_heads * head_dim));
  const std::vector<float> untouched(sz(n_kv_heads * capacity * head_dim), 7.0F);
  const Array<TestType> k(narrowed<TestType>(untouched)), v(narrowed<TestType>(untouched));
  place(Placing<TestType>{device_qkv.data(), with_bias ? device_bias.data() : nullptr,
                          with_norm ? device_q_norm.data() : nullptr, with_norm ? device_k_norm.data() : nullptr,
                          device_rotation.data(), q.data(), k.data(), v.data(), n, past, n_heads, n_kv_heads, head_dim,
                          capacity, 1e-5F},
        stream.get());

  std::vector<double> expected_q(sz(n * n_heads * head_dim));
  std::vector<double> expected_k(untouched.begin(), untouched.end()), expected_v = expected_k;
  for (int token = 0; token < n; ++token) {
    for (int head = 0; head < heads; ++head) {
      std::vector<double> x;
      double square = 0;
      for (int c = 0; c < head_dim; ++c) {
        x.push_back(static_cast<double>(qkv[sz((token * heads + head) * head_dim + c)]));
        x.back() += with_bias ? static_cast<double>(bias[sz(head * head_dim + c)]) : 0;
        square += x.back() * x.back();
      }
      const bool is_v = head >= n_heads + n_kv_heads;
      if (with_norm && !is_v) {
        for (int c = 0; c < head_dim; ++c) {
          x[sz(c)] *=
              static_cast<double>((head < n_heads ? q_norm : k_norm)[sz(c)]) / std::sqrt(square / head_dim + 1e-5);
        }
      }
      std::vector<double> turned = x;
      const int half = head_dim / 2;
      for (int c = 0; c < half && !is_v; ++c) {
        const double cos = static_cast<double>(rotation[sz(((past + token) * half + c) * 2)]);
        const double sin = static_cast<double>(rotation[sz(((past + token) * half + c) * 2 + 1)]);
        turned[sz(c)] = x[sz(c)] * cos - x[sz(c + half)] * sin;
        turned[sz(c + half)] = x[sz(c + half)] * cos + x[sz(c)] * sin;
      }
      std::vector<double>& to = head < n_heads ? expected_q : is_v ? expected_v : expected_k;
      const int kv_head = is_v ? head - n_heads - n_kv_heads : head - n_heads;
      const int at = head < n_heads ? token * n_heads + head : kv_head * capacity + past + token;
      std::copy(turned.begin(), turned.end(), to.begin() + at * head_dim);
    }
  }
  REQUIRE(distance(widened(q.values(stream)), expected_q) < kRounding<TestType>);
  REQUIRE(distance(widened(k.values(stream)), expected_k) < kRounding<TestType>);
  REQUIRE(distance(widened(v.values(stream)), expected_v) < kRounding<TestType>);
}

struct AttentionCase {
  int n, past, n_heads, n_kv_heads, head_dim, window;
};

// Attention of random rows by the kernels, against double.
template <class T>
void check_attention(const AttentionCase& a) {
  CAPTURE(a.n, a.past, a.n_heads, a.n_kv_heads, a.head_dim, a.window);
  const OwnStream stream;
  const int capacity = a.past + a.n + 3, group_size = a.n_heads / a.n_kv_heads;
  const float scale = 1.0F / std::sqrt(static_cast<float>(a.head_dim));
  const std::vector<float> q = rounded<T>(random_values(sz(a.n * a.n_heads * a.head_dim), 2, 11));
  std::vector<float> k = rounded<T>(random_values(sz(a.n_kv_heads * capacity * a.head_dim), 1, 12));
  std::vector<float> v = rounded<T>(random_values(k.size(), 1, 13));
  for (int head = 0; head < a.n_kv_heads; ++head) {  // what was never written must not matter
    for (int i = (head * capacity + a.past + a.n) * a.head_dim; i < (head + 1) * capacity * a.head_dim; ++i) {
      k[sz(i)] = v[sz(i)] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  std::vector<double> expected;
  for (int i = 0; i < a.n; ++i) {
    for (int head = 0; head < a.n_heads; ++head) {
      const int pos = a.past + i, begin = a.window > 0 ? std::max(0, pos - a.window + 1) : 0;
      std::vector<double> out(sz(a.head_dim)), logits;
      for (int j = begin; j <= pos; ++j) {
        double dot = 0;
        for (int c = 0; c < a.head_dim; ++c) {
          dot += static_cast<double>(q[sz((i * a.n_heads + head) * a.head_dim + c)]) *
                 static_cast<double>(k[sz((head / group_size * capacity + j) * a.head_dim + c)]);
        }
        logits.push_back(dot * static_cast<double>(scale));
      }
      const double max = *std::max_element(logits.begin(), logits.end());
      double sum = 0;
      for (int j = begin; j <= pos; ++j) {
        const double weight = std::exp(logits[sz(j - begin)] - max);
        sum += weight;
        for (int c = 0; c < a.head_dim; ++c) {
          out[sz(c)] += weight * static_cast<double>(v[sz((head / group_size * capacity + j) * a.head_dim + c)]);
        }
      }
      for (const double x : out) {
        expected.push_back(x / sum);
      }
    }
  }
  const Array<T> device_q(narrowed<T>(q)), device_k(narrowed<T>(k)), device_v(narrowed<T>(v));
  const Array<T> attn(q.size());
  const Array<float> out(q.size());
  const Array<float> part(sz(a.n_heads) * sz(max_splits(capacity)) * sz(a.head_dim + 2));
  Attention<T> attention{
      device_q.data(), device_k.data(), device_v.data(), attn.data(), out.data(), part.data(), a.n,
      a.past,          a.n_heads,       a.n_kv_heads,    a.head_dim,  capacity,   a.window,    scale};
  attend(attention, stream.get());
  const std::vector<float> found = out.values(stream);
  REQUIRE(distance(found, expected) < 1e-5);
  REQUIRE(widened(attn.values(stream)) == rounded<T>(found));  // the same, rounded once
  attention.out = nullptr;
  attend(attention, stream.get());
  REQUIRE(widened(attn.values(stream)) == rounded<T>(found));  // the same bits again
}

TEMPLATE_TEST_CASE("cuda: attention of one token, split over the keys", "", float, F16, Bf16) {
  // Splits of one key, full splits, a window that begins within one; groups that need two blocks.
  for (const AttentionCase& a :
       {AttentionCase{1, 0, 2, 2, 8, 0}, AttentionCase{1, 127, 4, 2, 64, 0}, AttentionCase{1, 128, 7, 1, 80, 0},
        AttentionCase{1, 300, 6, 2, 128, 200}, AttentionCase{1, 300, 8, 1, 256, 0}, AttentionCase{1, 5, 2, 1, 32, 9}}) {
    check_attention<TestType>(a);
  }
}

TEMPLATE_TEST_CASE("cuda: attention of many tokens, in tiles", "", float, F16, Bf16) {
  // Within a tile, at its edge, beyond it; after earlier tokens; windows shorter and longer than a tile.
  for (const AttentionCase& a : {AttentionCase{2, 0, 2, 1, 8, 0}, AttentionCase{64, 0, 1, 1, 64, 0},
                                 AttentionCase{70, 61, 2, 2, 80, 0}, AttentionCase{65, 3, 3, 1, 128, 10},
                                 AttentionCase{66, 70, 2, 1, 64, 100}, AttentionCase{5, 64, 1, 1, 256, 1}}) {
    check_attention<TestType>(a);
  }
}

TEST_CASE("cuda: the best token and log-probabilities of rows of logits") {
  const OwnStream stream;
  const int vocab = 3001, rows = 3;
  std::vector<float> logits = random_values(sz(rows * vocab), 3, 14);
  logits[17] = logits[900] = logits[2999] = 30;  // a tie: the lower id
  logits[sz(vocab)] = 40;
  logits[sz(3 * vocab - 1)] = 40;
  const Array<float> device_logits(logits);
  const std::vector<std::int32_t> next{5, 3000, 1024};
  const Array<std::int32_t> device_next(next);
  const Array<Scored> scored(sz(rows));
  score(device_logits.data(), nullptr, scored.data(), rows, vocab, stream.get());
  const std::vector<Scored> best = scored.values(stream);
  score(device_logits.data(), device_next.data(), scored.data(), rows, vocab, stream.get());
  const std::vector<Scored> given = scored.values(stream);
  for (int row = 0; row < rows; ++row) {
    const std::span<const float> of_row(logits.data() + row * vocab, sz(vocab));
    const Choice choice = choose(of_row, Sampling{}, 0);
    REQUIRE(best[sz(row)].id == choice.id);
    REQUIRE(best[sz(row)].logprob == Approx(choice.logprob).epsilon(1e-6).margin(1e-6));
    REQUIRE(given[sz(row)].id == next[sz(row)]);
    REQUIRE(given[sz(row)].logprob == Approx(log_probability(of_row, next[sz(row)])).epsilon(1e-6));
  }
}

// A packet filled on the device is the packet that the CPU backend fills, bit for bit.
template <class T>
void check_packing(ElementType element) {
  const OwnStream stream;
  RecordPlan plan;
  plan.n_heads = 4;
  plan.n_kv_heads = 2;
  plan.head_dim = 40;
  plan.layers = {0, 2};
  plan.element = element;
  plan.capacity = 20;
  plan.queries = {0, 3, 5, 6, 9, 12};
  plan.outputs = {1, 6, 7, 15};
  const int n_layers = 3, pass_first = 4, pass_n = 6, capacity = 20, dim = plan.head_dim;
  const std::size_t half = sz(plan.n_kv_heads * capacity * dim), q_size = sz(pass_n * plan.n_heads * dim);
  const std::vector<float> cache = rounded<T>(random_values(sz(n_layers) * 2 * half, 1, 15));
  const std::vector<float> q = rounded<T>(random_values(2 * q_size, 1, 16)), out = random_values(2 * q_size, 1, 17);
  const Array<T> device_cache(narrowed<T>(cache)), device_q(narrowed<T>(q));
  const Array<float> device_out(out);
  std::vector<std::int32_t> lists(plan.layers.begin(), plan.layers.end());
  const Array<std::int32_t> layers(lists), queries(plan.queries), outputs(plan.outputs);

  for (const auto& [first, n] : {std::pair{4, 6}, std::pair{4, 1}, std::pair{6, 2}, std::pair{8, 2}}) {
    const PacketLayout layout = packet_layout(plan, first, n, 0, 2);
    std::vector<std::byte> expected(layout.bytes);
    for (std::size_t index = 0; index < 2; ++index) {
      LayerRows rows;
      std::vector<float> k, v;
      for (int t = first; t < first + n; ++t) {
        for (int head = 0; head < plan.n_kv_heads; ++head) {
          const float* from = cache.data() + sz(plan.layers[index]) * 2 * half + sz((head * capacity + t) * dim);
          k.insert(k.end(), from, from + dim);
          v.insert(v.end(), from + half, from + half + sz(dim));
        }
      }
      const std::size_t at = index * q_size + sz((first - pass_first) * plan.n_heads * dim);
      const std::size_t size = sz(n * plan.n_heads * dim);
      rows.k = k;
      rows.v = v;
      rows.q = std::span(q).subspan(at, size);
      rows.out = std::span(out).subspan(at, size);
      kvreplay::pack(plan, layout, index, rows, expected);
    }
    const auto before = [begin = first](const std::vector<Pos>& tokens) {
      return std::lower_bound(tokens.begin(), tokens.end(), begin) - tokens.begin();
    };
    const Array<std::byte> packet(std::vector<std::byte>(layout.bytes, std::byte{0}));
    Packing<T> packing{};
    packing.layers = layers.data();
    packing.queries = queries.data() + before(plan.queries);
    packing.outputs = outputs.data() + before(plan.outputs);
    packing.cache = device_cache.data();
    packing.q = device_q.data();
    packing.out = device_out.data();
    packing.packet = packet.data();
    packing.k_at = layout.at[0].k;
    packing.v_at = layout.at[0].v;
    packing.q_at = layout.at[0].q;
    packing.out_at = layout.at[0].out;
    packing.layer_stride = layout.at[1].k;
    packing.first = first;
    packing.pass_first = pass_first;
    packing.pass_n = pass_n;
    packing.n_layers = 2;
    packing.head_dim = dim;
    packing.capacity = capacity;
    packing.counts = {plan.n_heads, plan.n_kv_heads, n, static_cast<int>(layout.queries.size()),
                      static_cast<int>(layout.outputs.size())};
    pack(packing, element, stream.get());
    REQUIRE(packet.values(stream) == expected);
  }
}

TEMPLATE_TEST_CASE("cuda: packets are those of the host", "", float, F16, Bf16) {
  check_packing<TestType>(ElementType::f16);
  check_packing<TestType>(ElementType::bf16);
  check_packing<TestType>(ElementType::f32);
}

}  // namespace
}  // namespace kvreplay::cuda
