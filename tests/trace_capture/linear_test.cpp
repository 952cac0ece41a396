#include "trace_capture/cpu/linear.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>

#include "trace_capture/cpu/attention.hpp"

using namespace kvreplay;

namespace {

std::vector<float> random_values(std::ptrdiff_t n, unsigned seed, float deviation = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& value : values) {
    value = normal(rng);
  }
  return values;
}

// A weight whose data begins one element past an aligned address.
struct Weight {
  Weight(std::int64_t outputs, std::int64_t inputs, ElementType type, unsigned seed) {
    const std::vector<float> drawn = random_values(outputs * inputs, seed);
    bytes.resize((drawn.size() + 1) * size_of(type));
    narrow(type, drawn, bytes.data() + size_of(type));
    tensor.data = bytes.data() + size_of(type);
    tensor.type = type;
    tensor.shape = {outputs, inputs};
    values.resize(drawn.size());
    widen(type, tensor.data, values);
  }

  std::vector<std::byte> bytes;
  std::vector<float> values;
  Tensor tensor;
};

std::vector<float> applied(const Weight& weight, const Tensor& bias, const std::vector<float>& x, std::ptrdiff_t n,
                           int threads) {
  const std::ptrdiff_t outputs = weight.tensor.shape[0], inputs = weight.tensor.shape[1];
  std::vector<float> y(static_cast<std::size_t>(n * outputs), -1.0F);
  Linear(threads).apply(weight.tensor, bias, {x.data(), n, inputs}, {y.data(), n, outputs});
  return y;
}

}  // namespace

TEST_CASE("a linear layer is the product with every row, whatever its shape and element type") {
  struct Shape {
    std::ptrdiff_t n, outputs, inputs;
  };
  const auto type = GENERATE(ElementType::f32, ElementType::f16, ElementType::bf16);
  const auto shape = GENERATE(Shape{1, 1, 1}, Shape{1, 70, 2100}, Shape{2, 25, 3}, Shape{7, 50, 513},
                              Shape{64, 24, 1030}, Shape{65, 23, 40}, Shape{200, 49, 64}, Shape{1100, 7, 20});
  const Weight weight(shape.outputs, shape.inputs, type, 1);
  const Weight bias(1, shape.outputs, type, 2);
  Tensor bias_tensor = bias.tensor;
  bias_tensor.shape = {shape.outputs};
  const std::vector<float> x = random_values(shape.n * shape.inputs, 3);
  const std::vector<float> y = applied(weight, bias_tensor, x, shape.n, 2);
  double worst = 0;
  for (std::ptrdiff_t i = 0; i < shape.n; ++i) {
    for (std::ptrdiff_t j = 0; j < shape.outputs; ++j) {
      double sum = bias.values[static_cast<std::size_t>(j)];
      for (std::ptrdiff_t k = 0; k < shape.inputs; ++k) {
        sum += static_cast<double>(x[static_cast<std::size_t>(i * shape.inputs + k)]) *
               static_cast<double>(weight.values[static_cast<std::size_t>(j * shape.inputs + k)]);
      }
      worst = std::max(worst, std::abs(sum - static_cast<double>(y[static_cast<std::size_t>(i * shape.outputs + j)])));
    }
  }
  CHECK(worst <= 3e-6 * std::sqrt(static_cast<double>(shape.inputs)));
}

TEST_CASE("threads and neighbours change no bit of a linear layer") {
  const Weight weight(130, 700, ElementType::bf16, 4);
  const std::vector<float> x = random_values(std::ptrdiff_t{150} * 700, 5);
  const std::vector<float> alone = applied(weight, {}, x, 150, 1);
  CHECK(applied(weight, {}, x, 150, 2) == alone);
  CHECK(applied(weight, {}, x, 150, 7) == alone);
  const std::vector<float> first = applied(weight, {}, x, 3, 1);
  CHECK(std::equal(first.begin(), first.end(), alone.begin()));
  const std::vector<float> one = applied(weight, {}, x, 1, 1);
  CHECK(applied(weight, {}, x, 1, 4) == one);
}

TEST_CASE("attention is softmax(scale q k) v over the tokens that a token attends") {
  struct Case {
    int n_heads, n_kv_heads, head_dim, window;
    Pos first, n;
  };
  const auto c = GENERATE(Case{1, 1, 2, 0, 0, 1}, Case{6, 2, 10, 0, 0, 90}, Case{6, 2, 64, 0, 300, 1},
                          Case{12, 4, 16, 50, 200, 40}, Case{7, 1, 128, 130, 290, 10}, Case{90, 1, 4, 3, 5, 2});
  const std::ptrdiff_t capacity = 400, q_width = std::ptrdiff_t{c.n_heads} * c.head_dim;
  ModelConfig config;
  config.n_heads = c.n_heads;
  config.n_kv_heads = c.n_kv_heads;
  config.head_dim = c.head_dim;
  config.attention_scale = 0.5;
  std::vector<float> k = random_values(c.n_kv_heads * capacity * c.head_dim, 6);
  std::vector<float> v = random_values(c.n_kv_heads * capacity * c.head_dim, 7);
  const std::vector<float> q = random_values(c.n * q_width, 8, 6);
  const auto at = [&](int kv_head, std::ptrdiff_t token) {
    return static_cast<std::size_t>((kv_head * capacity + token) * c.head_dim);
  };
  for (int kv_head = 0; kv_head < c.n_kv_heads; ++kv_head) {  // what was not passed yet must not be felt
    for (std::size_t i = at(kv_head, c.first + c.n); i < at(kv_head, capacity); ++i) {
      k[i] = v[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  std::vector<float> out(q.size());
  const auto run = [&](int threads) {
    Attention attention(config, threads);
    attention.attend({q.data(), c.n, q_width}, {k.data(), v.data(), capacity}, c.first, c.window,
                     {out.data(), c.n, q_width});
    return out;
  };
  const std::vector<float> found = run(1);
  CHECK(run(2) == found);

  double worst = 0;
  for (Pos i = 0; i < c.n; ++i) {
    for (int head = 0; head < c.n_heads; ++head) {
      const int kv_head = head / (c.n_heads / c.n_kv_heads);
      const Pos end = c.first + i + 1, begin = c.window > 0 ? std::max(0, end - c.window) : 0;
      const float* query = q.data() + i * q_width + std::ptrdiff_t{head} * c.head_dim;
      std::vector<double> expected(static_cast<std::size_t>(c.head_dim)), logits;
      for (Pos token = begin; token < end; ++token) {
        double dot = 0;
        for (int d = 0; d < c.head_dim; ++d) {
          dot +=
              static_cast<double>(query[d]) * static_cast<double>(k[at(kv_head, token) + static_cast<std::size_t>(d)]);
        }
        logits.push_back(0.5 * dot);
      }
      const double max = *std::max_element(logits.begin(), logits.end());
      double sum = 0;
      for (Pos token = begin; token < end; ++token) {
        const double weight = std::exp(logits[static_cast<std::size_t>(token - begin)] - max);
        sum += weight;
        for (std::size_t d = 0; d < expected.size(); ++d) {
          expected[d] += weight * static_cast<double>(v[at(kv_head, token) + d]);
        }
      }
      for (std::size_t d = 0; d < expected.size(); ++d) {
        const float* o = found.data() + i * q_width + std::ptrdiff_t{head} * c.head_dim;
        worst = std::max(worst, std::abs(expected[d] / sum - static_cast<double>(o[d])));
      }
    }
  }
  CHECK(worst <= 5e-5);
}
