#include "trace_capture/sampling.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <vector>

#include "policies/errors.hpp"

using namespace kvreplay;
using Catch::Matchers::Contains;

namespace {

std::set<std::int32_t> drawn(const std::vector<float>& logits, const Sampling& sampling) {
  std::set<std::int32_t> ids;
  for (std::uint64_t step = 0; step < 4000; ++step) {
    ids.insert(choose(logits, sampling, step).id);
  }
  return ids;
}

// ln of 0.4, 0.3, 0.15, 0.1, 0.05 in another order
const std::vector<float> kLogits = {std::log(0.1F), std::log(0.4F), std::log(0.05F), std::log(0.3F), std::log(0.15F)};

}  // namespace

TEST_CASE("greedy takes the largest logit, and of equal ones the lower id") {
  CHECK(choose(std::vector<float>{1, 3, 2}, {}, 0).id == 1);
  CHECK(choose(std::vector<float>{1, 3, 3, 3}, {}, 5).id == 1);
  CHECK(choose(std::vector<float>{-2}, {}, 0).id == 0);
  CHECK(choose(std::vector<float>{-0.0F, 0.0F}, {}, 0).id == 0);
}

TEST_CASE("log-probabilities are of the model, before temperature and cuts, and do not overflow") {
  CHECK(choose(kLogits, {}, 0).logprob == Approx(std::log(0.4)));
  const Choice choice = choose(kLogits, {.temperature = 5, .top_k = 1}, 3);
  CHECK(choice.id == 1);
  CHECK(choice.logprob == Approx(std::log(0.4)));
  CHECK(log_probability(std::vector<float>{3e38F, 3e38F}, 1) == Approx(-std::log(2.0)));
  CHECK(log_probability(std::vector<float>{1000, 0}, 1) == Approx(-1000));
  CHECK(log_probability(std::vector<float>{-7}, 0) == 0);
}

TEST_CASE("sampling draws in proportion to the softmax at its temperature") {
  for (const double temperature : {1.0, 0.5, 2.0}) {
    std::vector<double> expected;
    double total = 0;
    for (const float logit : kLogits) {
      expected.push_back(std::exp(static_cast<double>(logit) / temperature));
      total += expected.back();
    }
    std::vector<int> counts(kLogits.size());
    const int n = 40000;
    for (int step = 0; step < n; ++step) {
      ++counts[static_cast<std::size_t>(
          choose(kLogits, {.temperature = temperature, .seed = 9}, static_cast<std::uint64_t>(step)).id)];
    }
    double chi_squared = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      const double mean = n * expected[i] / total;
      chi_squared += (counts[i] - mean) * (counts[i] - mean) / mean;
    }
    CHECK(chi_squared < 18.5);  // 4 degrees of freedom, beyond it once in a thousand
  }
}

TEST_CASE("top-k keeps the k most likely tokens, of equal ones the lower ids") {
  CHECK(drawn(kLogits, {.temperature = 1, .top_k = 2}) == std::set<std::int32_t>{1, 3});
  CHECK(drawn(kLogits, {.temperature = 9, .top_k = 1}) == std::set<std::int32_t>{1});
  CHECK(drawn(kLogits, {.temperature = 3, .top_k = 99}).size() == 5);
  CHECK(drawn({2, 1, 1, 1}, {.temperature = 1, .top_k = 3}) == std::set<std::int32_t>{0, 1, 2});
}

TEST_CASE("top-p keeps the smallest set of most likely tokens that holds the probability") {
  CHECK(drawn(kLogits, {.temperature = 1, .top_p = 0.39}) == std::set<std::int32_t>{1});
  CHECK(drawn(kLogits, {.temperature = 1, .top_p = 0.5}) == std::set<std::int32_t>{1, 3});
  CHECK(drawn(kLogits, {.temperature = 1, .top_p = 0.84}) == std::set<std::int32_t>{1, 3, 4});
  CHECK(drawn(kLogits, {.temperature = 1, .top_p = 1e-9}) == std::set<std::int32_t>{1});
  // of what top-k left: 0.4 of 0.7 is less than 0.6
  CHECK(drawn(kLogits, {.temperature = 1, .top_p = 0.6, .top_k = 2}) == std::set<std::int32_t>{1, 3});
  CHECK(drawn(kLogits, {.temperature = 1, .top_p = 0.55, .top_k = 2}) == std::set<std::int32_t>{1});
}

TEST_CASE("a seed and a step give one token, other seeds and steps others") {
  const std::vector<float> flat(1000, 0.0F);
  std::set<std::int32_t> by_step, by_seed;
  for (std::uint64_t i = 0; i < 100; ++i) {
    const Choice choice = choose(flat, {.temperature = 1, .seed = 3}, i);
    CHECK(choose(flat, {.temperature = 1, .seed = 3}, i).id == choice.id);
    by_step.insert(choice.id);
    by_seed.insert(choose(flat, {.temperature = 1, .seed = i}, 3).id);
  }
  CHECK(by_step.size() > 80);
  CHECK(by_seed.size() > 80);
}

TEST_CASE("a temperature near 0 is greedy, and never draws what cannot be") {
  CHECK(drawn(kLogits, {.temperature = 1e-300}) == std::set<std::int32_t>{1});
  CHECK(drawn({0, -1e30F, 0}, {.temperature = 1}) == std::set<std::int32_t>{0, 2});
}

TEST_CASE("logits that are not finite are refused, naming the token") {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH(choose(std::vector<float>{1, nan, 2}, {}, 0), Contains("token id 1 is nan"));
  CHECK_THROWS_WITH(choose(std::vector<float>{1, 2, infinity}, {.temperature = 1}, 0), Contains("token id 2 is inf"));
  CHECK_THROWS_WITH(choose(std::vector<float>{-infinity, 2}, {}, 0), Contains("token id 0 is -inf"));
}

TEST_CASE("sampling values out of range are refused, naming the value and what is allowed") {
  CHECK_THROWS_AS(check({.temperature = -1}), ConfigError);
  CHECK_THROWS_WITH(check({.temperature = -1}), Contains("temperature -1"));
  CHECK_THROWS_AS(check({.temperature = std::nan("")}), ConfigError);
  CHECK_THROWS_WITH(check({.top_p = 0}), Contains("(0, 1]"));
  CHECK_THROWS_AS(check({.top_p = 1.01}), ConfigError);
  CHECK_THROWS_WITH(check({.top_k = -3}), Contains("top_k -3"));
  CHECK_NOTHROW(check({.temperature = 0.7, .top_p = 0.9, .top_k = 40}));
}
