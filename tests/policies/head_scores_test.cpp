// Allocators by measured head scores: sums, floors, caps, the placebo.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <numeric>
#include <set>

#include "policies/method.hpp"

using namespace kvreplay;

namespace {

// Two layers of the model's four, two KV heads.
struct Divided {
  std::vector<int> layers;
  std::vector<std::vector<int>> heads;
};

Divided divide(const std::string& part, int budget, int prompt_len = 1000, int n_tokens = 2000) {
  const auto table = [](const std::string& path) {
    return path == "s" ? ValueTable{path, "", {1, 3}, {{0.1, 0.3}, {0, 0}}}
                       : ValueTable{path, "", {1, 3}, {{0, 0}, {0.15, 0.05}}};
  };
  const Method m = parse_method("h2o+" + part, table);
  const std::vector<int> index{1, 3};
  const Allocator::Layers l{index, 4, prompt_len, budget, n_tokens, head_worth(*m.allocate, index, 2)};
  const auto allocator = m.allocate->info->allocate(m.allocate->config(1, 0).get());
  CHECK(allocator->over_sets());
  return {allocator->over_layers(l), {allocator->over_heads(l, 0), allocator->over_heads(l, 1)}};
}

int total(const Divided& d) {
  int sum = 0;
  for (const auto& heads : d.heads) {
    sum += std::accumulate(heads.begin(), heads.end(), 0);
  }
  return sum;
}

using Heads = std::vector<std::vector<int>>;

}  // namespace

TEST_CASE("surface_logic divides by importance, first over layers, then over heads") {
  // Importances 0.1 0.3 | 0.15 0.05: layers have 2/3 and 1/3 of the half that goes by importance.
  const Divided d = divide("surface_logic:surface=@s,logic=@l", 60);
  CHECK(d.layers == std::vector<int>{70, 50});  // 120 (1/4 + 1/3) and 120 (1/4 + 1/6)
  // The first head of a layer: 1 + 138 / 4 = 35.5 of 140, and 1 + 98 * 3 / 4 = 74.5 of 100; ties to the first.
  CHECK(d.heads == Heads{{36, 104}, {75, 25}});
  CHECK(divide("surface_logic:surface=@s,logic=@l,rho=0", 60).layers == std::vector<int>{60, 60});
  CHECK(divide("surface_logic:surface=@s,logic=@l,rho=1", 60).layers == std::vector<int>{80, 40});
  CHECK(divide("surface_logic:surface=@s,logic=@l,b_min=50", 60).heads == Heads{{60, 80}, {50, 50}});
}

TEST_CASE("surface_logic's weights choose what counts, and without scores heads are alike") {
  CHECK(divide("surface_logic:surface=@s,logic=@l,w_logic=0,rho=1", 60).heads == Heads{{60, 178}, {1, 1}});
  CHECK(divide("surface_logic:surface=@s,logic=@l,w_surface=0,rho=1", 60).layers == std::vector<int>{1, 119});
  CHECK(divide("surface_logic", 60).heads == Heads{{60, 60}, {60, 60}});
  CHECK(divide("surface_logic:surface=@s,w_surface=0", 60).heads == Heads{{60, 60}, {60, 60}});
}

TEST_CASE("surface_logic gives out all, to nobody more than the prompt, and nothing at a full budget") {
  for (const char* keys : {"", ",rho=1", ",rho=1,w_logic=0", ",placebo=3"}) {
    for (int budget : {1, 2, 3, 7, 60, 99, 100, 150}) {
      INFO(keys << " at " << budget);
      const Divided d = divide(std::string("surface_logic:surface=@s,logic=@l") + keys, budget, 100, 150);
      CHECK(total(d) == 4 * budget);
      for (std::size_t l = 0; l < 2; ++l) {
        for (int b : d.heads[l]) {
          CHECK(b >= 1);
          CHECK(b <= (budget <= 100 ? 100 : 150));
        }
      }
    }
    CHECK(divide(std::string("surface_logic:surface=@s,logic=@l") + keys, 150, 100, 150).heads ==
          Heads{{150, 150}, {150, 150}});
  }
}

TEST_CASE("surface_logic's placebo shuffles importances over all heads of the run") {
  std::set<Heads> seen;
  for (int seed = 0; seed <= 5; ++seed) {
    const Divided d = divide("surface_logic:surface=@s,logic=@l,rho=1,placebo=" + std::to_string(seed), 60);
    CHECK(total(d) == 240);
    seen.insert(d.heads);
  }
  CHECK(seen.size() >= 4);
}

TEST_CASE("headkv shares a pool by score beside what every head keeps") {
  // beta 2: floor(28 / 2) = 14 of each of 4 heads to the pool of 56, 14 stay; 32 are the window.
  CHECK(divide("headkv:scores=@s,beta=2", 60).heads == Heads{{14 + 14 + 32, 42 + 14 + 32}, {46, 46}});
  CHECK(divide("headkv:scores=@s,beta=2", 60).layers == std::vector<int>{74, 46});
  CHECK(divide("headkv:scores=@s,beta=2,temp=2", 60).heads[0] == std::vector<int>{6 + 46, 50 + 46});  // 5.6, 50.4
  CHECK(divide("headkv:scores=@s,beta=1", 60).heads == Heads{{28 + 32, 84 + 32}, {32, 32}});
  CHECK(divide("headkv", 60).heads == Heads{{60, 60}, {60, 60}});
  CHECK(divide("headkv:scores=@s", 20).heads == Heads{{20, 20}, {20, 20}});  // all of it is window
  CHECK(divide("headkv:scores=@s", 2000).heads == Heads{{2000, 2000}, {2000, 2000}});
}

TEST_CASE("headkv gives no head more than the prompt, and what one cannot take to the others") {
  // 14 stay and 56 are shared: the second head's 42 + 14 + 32 are cut to 75, the 13 go to the first.
  CHECK(divide("headkv:scores=@s,beta=2", 60, 75, 150).heads == Heads{{14 + 14 + 13 + 32, 75}, {46, 46}});
  for (const char* keys : {"", ",beta=2", ",temp=3"}) {
    for (int budget : {33, 40, 60, 90, 99, 100, 140}) {
      INFO(keys << " at " << budget);
      const Divided d = divide(std::string("headkv:scores=@s") + keys, budget, 100, 150);
      CHECK(std::abs(total(d) - 4 * budget) <= 2);  // each rounded by itself
      for (const auto& heads : d.heads) {
        CHECK(*std::max_element(heads.begin(), heads.end()) <= (budget <= 100 ? 100 : 150));
      }
    }
    CHECK(divide(std::string("headkv:scores=@s") + keys, 100, 100, 150).heads == Heads{{100, 100}, {100, 100}});
  }
}

TEST_CASE("no budget is too large to be divided") {
  constexpr int kHuge = 2'000'000'000;
  for (const char* part : {"surface_logic:surface=@s,logic=@l", "surface_logic:surface=@s,rho=1", "headkv:scores=@s"}) {
    const Divided d = divide(part, kHuge);
    CHECK(d.layers == std::vector<int>{kHuge, kHuge});
    CHECK(d.heads == Heads{{kHuge, kHuge}, {kHuge, kHuge}});
  }
}

TEST_CASE("allocators by head scores refuse what cannot be") {
  CHECK_THROWS_WITH(parse_method("tova+surface_logic"), Catch::Contains("scope=layer"));
  CHECK_THROWS_WITH(parse_method("momentum:scope=kv_head+surface_logic"), Catch::Contains("pinned"));
  CHECK_THROWS_WITH(parse_method("h2o+surface_logic:b_min=40").check(30), Catch::Contains("b_min=40"));
  CHECK(parse_method("surfacelogic-like:surface=@s,logic=@l", [](const std::string& path) {
          return ValueTable{path, "", {0}, {{1}}};
        }).name == "snapkv:obs_window=32,pooling=max,kernel=7+surface_logic:surface=@s,logic=@l");
}
