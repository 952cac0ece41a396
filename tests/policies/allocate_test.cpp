#include <catch2/catch.hpp>
#include <numeric>

#include "policies/method.hpp"

using namespace kvreplay;

namespace {

std::unique_ptr<Allocator> make(const std::string& part) {
  const Method m = parse_method("h2o+" + part);
  return m.allocate->info->allocate(m.allocate->config().get());
}

std::vector<int> pyramid(const std::string& keys, int prompt_len, int budget, int n_layers = 32) {
  std::vector<int> index(static_cast<std::size_t>(n_layers));
  std::iota(index.begin(), index.end(), 0);
  return make("pyramid" + keys)->over_layers({index, n_layers, prompt_len, budget});
}

using Scores = std::vector<std::vector<float>>;
constexpr float kInf = std::numeric_limits<float>::infinity();

}  // namespace

TEST_CASE("pyramid gives kvpress' golden budgets for 32 layers and a prompt of 4096") {
  const auto half = pyramid("", 4096, 2048);
  CHECK(half[0] == 3994);
  CHECK(half[1] == 3868);
  CHECK(half[15] == 2111);
  CHECK(half[16] == 1985);
  CHECK(half[30] == 228);
  CHECK(half[31] == 102);
  CHECK(std::accumulate(half.begin(), half.end(), 0) == 32 * 2048);
  CHECK(pyramid("", 4096, 1024) == std::vector<int>(32, 1024));
  const auto most = pyramid("", 4096, 3072);
  CHECK(most[0] == 4032);
  CHECK(most[1] == 3970);
  CHECK(most[31] == 2112);
}

TEST_CASE("kvpress' pyramid is off below 20 windows and for one layer") {
  CHECK(pyramid("", 100000, 1279) == std::vector<int>(32, 1279));
  CHECK(pyramid("", 100000, 1280)[31] == 64);
  CHECK(pyramid("", 4096, 2048, 1) == std::vector<int>(1, 2048));
}

TEST_CASE("pyramid uses the model's own layer numbers, whichever layers run") {
  const std::vector<int> some{0, 15, 31};
  const auto budgets = make("pyramid")->over_layers({some, 32, 4096, 2048});
  CHECK(budgets == std::vector<int>{3994, 2111, 102});
}

TEST_CASE("the authors' pyramid works in integers with the window on top") {
  const auto b = pyramid(":version=official,window=32", 4096, 1056);
  CHECK(b[0] == 1997 + 32);       // 2 * 1024 - 1024 // 20
  CHECK(b[1] == 1997 - 62 + 32);  // (1997 - 51) // 31 = 62
  CHECK(b[31] == 1997 - 31 * 62 + 32);
  CHECK(pyramid(":version=official,window=32", 2000, 1056) == std::vector<int>(32, 1056));
  CHECK(pyramid(":version=official,window=32", 4096, 16) == std::vector<int>(32, 16));
}

TEST_CASE("adakv gives a head its share of the layer's top scores above a floor") {
  const Scores scores{{9, 8, 7, 1}, {6, 5, 0.2F, 0.1F}};
  CHECK(make("adakv")->over_sets());
  CHECK(make("adakv")->assign(scores, 2) == std::vector<int>{3, 1});
  CHECK(make("adakv:alpha=1")->assign(scores, 2) == std::vector<int>{2, 2});
  CHECK(make("adakv")->assign({scores[0]}, 3) == std::vector<int>{3});
  // The floor is sure even for a head that has nothing at the top: trunc(0.4 * 5) = 2.
  const Scores lopsided{std::vector<float>(20, 1.0F), std::vector<float>(20, 0.0F)};
  CHECK(make("adakv:alpha=0.4")->assign(lopsided, 5) == std::vector<int>{8, 2});
  CHECK(make("adakv:alpha=0")->assign(lopsided, 5) == std::vector<int>{9, 1});
}

TEST_CASE("adakv's safeguards spread exactly the total and keep a token in every head") {
  for (const char* part : {"adakv", "adakv:safeguard=official,alpha=0", "adakv:alpha=0.05"}) {
    INFO(part);
    Scores scores(8, std::vector<float>(50));
    for (std::size_t s = 0; s < scores.size(); ++s) {
      for (std::size_t i = 0; i < 50; ++i) {
        scores[s][i] = static_cast<float>((s + 3) * ((i * 7 + s) % 50 + 1));
      }
      scores[s][49] = kInf;
    }
    for (int budget : {2, 7, 25}) {
      const auto b = make(part)->assign(scores, budget);
      CHECK(std::accumulate(b.begin(), b.end(), 0) == 8 * budget);
      CHECK(*std::min_element(b.begin(), b.end()) >= 1);
    }
    const auto one = make("adakv")->assign(scores, 1);
    CHECK(one == std::vector<int>(8, 1));
  }
}

TEST_CASE("the authors' safeguard moves counts towards the mean, half to even, beside the window") {
  const Scores scores{{9, 8, 7, 1}, {6, 5, 0.2F, 0.1F}};
  CHECK(make("adakv:safeguard=official,alpha=0")->assign(scores, 2) == std::vector<int>{3, 1});
  CHECK(make("adakv:safeguard=official,alpha=0.5")->assign(scores, 2) == std::vector<int>{2, 2});
  const Scores windowed{{9, 8, 7, 1, kInf, kInf}, {6, 5, 0.2F, 0.1F, kInf, kInf}};
  CHECK(make("adakv:safeguard=official,alpha=0")->assign(windowed, 4) == std::vector<int>{5, 3});
}
