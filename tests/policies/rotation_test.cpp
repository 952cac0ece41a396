// Rotations that a part undoes, redoes and moves.
#include "policies/rotation.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <random>

using namespace kvreplay;

namespace {

Rotation rotation(bool interleaved, double factor) {
  Rotation r;
  r.interleaved = interleaved;
  r.attention_factor = factor;
  for (int i = 0; i < 3; ++i) {
    r.inv_freq.push_back(std::pow(100.0, -i / 3.0));
  }
  r.ids = {0, 1, 5, 4000};
  return r;
}

std::vector<float> random_vector(unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(8);  // two numbers beyond the rotated six
  for (float& a : x) {
    a = normal(rng);
  }
  return x;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
  return sum;
}

}  // namespace

TEST_CASE("a rotation turns each pair by its position times its frequency") {
  const bool interleaved = GENERATE(false, true);
  const Rotation r = rotation(interleaved, 1.5);
  const std::vector<float> raw = random_vector(1);
  std::vector<float> x = raw;
  r.apply(2, x);
  for (std::size_t i = 0; i < 3; ++i) {
    const std::size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + 3;
    const double angle = 5 * r.inv_freq[i];
    const double first = static_cast<double>(raw[a]), second = static_cast<double>(raw[b]);
    CHECK(static_cast<double>(x[a]) ==
          Approx(1.5 * (std::cos(angle) * first - std::sin(angle) * second)).epsilon(1e-5));
    CHECK(static_cast<double>(x[b]) ==
          Approx(1.5 * (std::sin(angle) * first + std::cos(angle) * second)).epsilon(1e-5));
  }
  CHECK(x[6] == raw[6]);
  CHECK(x[7] == raw[7]);
}

TEST_CASE("undoing a rotation gives back what was rotated, at any position") {
  const Rotation r = rotation(GENERATE(false, true), GENERATE(1.0, 0.8));
  for (int token = 0; token < 4; ++token) {
    const std::vector<float> raw = random_vector(2);
    std::vector<float> x = raw;
    r.apply(token, x);
    r.undo(token, x);
    for (std::size_t i = 0; i < x.size(); ++i) {
      CHECK(x[i] == Approx(raw[i]).margin(1e-5));
    }
  }
}

TEST_CASE("a logit depends on the distance of query and key alone") {
  const Rotation r = rotation(GENERATE(false, true), 1.2);
  std::vector<float> q = random_vector(3), k = random_vector(4);
  r.apply(3, q);
  r.apply(2, k);
  const double logit = dot(q, k);
  r.turn(17, q);
  CHECK(std::abs(dot(q, k) - logit) > 1e-3);
  r.turn(17, k);
  CHECK(dot(q, k) == Approx(logit).epsilon(1e-5));
}
