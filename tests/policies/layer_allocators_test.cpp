// Allocators that measure every layer's prompt before they divide: their numbers and budgets by hand.
#include <catch2/catch.hpp>
#include <cmath>
#include <numeric>
#include <set>

#include "policies/catalogue.hpp"
#include "policies/method.hpp"

using namespace kvreplay;

namespace {

std::unique_ptr<Allocator> make(const std::string& part) {
  const Method m = parse_method("h2o+" + part);
  return m.allocate->info->allocate(m.allocate->config().get());
}

// What `part` gives the layers `index` of the model's six, of which it measured these numbers.
std::vector<int> divide(const std::string& part, const std::vector<int>& index, const std::vector<double>& numbers,
                        int budget, Pos prompt_len = 1000, Pos n_tokens = 1200) {
  Allocator::Layers l{index, 6, prompt_len, budget, n_tokens};
  l.measured = Eigen::Map<const MatD>(numbers.data(), std::ssize(numbers), 1);
  return make(part)->over_layers(l);
}

// One layer's prompt; rows of `heads` are query heads, `group_size` of them to a KV head.
Allocator::Prompt prompt(const std::vector<std::vector<double>>& heads, std::size_t group_size) {
  Allocator::Prompt p;
  p.prompt_len = static_cast<Pos>(heads[0].size());
  for (std::size_t first = 0; first < heads.size(); first += group_size) {
    MatD& mass = p.column_mass.emplace_back(group_size, heads[0].size());
    for (std::size_t h = 0; h < group_size; ++h) {
      mass.row(static_cast<Eigen::Index>(h)) =
          Eigen::Map<const Eigen::RowVectorXd>(heads[first + h].data(), std::ssize(heads[0]));
    }
  }
  return p;
}

using Budgets = std::vector<int>;

}  // namespace

TEST_CASE("d2o_layers measures how far heads differ in the variance of what tokens receive", "[layers]") {
  const auto f = [](const auto& p) { return make("d2o_layers")->measure(p); };
  // Variances 0, 3, 1, 1: between the least and the largest 0, 1, 1/3, 1/3, on the average 5/12.
  CHECK(f(prompt({{1, 1, 1, 1}, {4, 0, 0, 0}, {2, 2, 0, 0}, {0, 2, 2, 0}}, 2))[0] == Approx(5.0 / 12));
  CHECK(f(prompt({{1, 1, 1, 1}, {4, 0, 0, 0}, {2, 2, 0, 0}, {0, 2, 2, 0}}, 1))[0] == Approx(5.0 / 12));
  CHECK(f(prompt({{4, 0, 0, 0}, {1, 1, 1, 1}}, 2))[0] == Approx(0.5));
  CHECK(f(prompt({{3, 1}}, 1)) == std::vector<double>{0});  // one head, or all alike
  CHECK(make("d2o_layers")->measures());
  CHECK_FALSE(make("pyramid")->measures());
}

TEST_CASE("d2o_layers divides by softmax(-F), and the first and last layers keep all", "[layers]") {
  // Weights 1, 1, 1/2, 1: of 400 tokens 114.3, 114.3, 57.1, 114.3.
  const std::vector<double> f{0.5, 0.5, 0.5 + std::log(2), 0.5};
  CHECK(divide("d2o_layers", {0, 2, 3, 5}, f, 100) == Budgets{1200, 114, 57, 1200});
  CHECK(divide("d2o_layers:first=0,last=0", {0, 2, 3, 5}, f, 100) == Budgets{114, 114, 57, 114});
  CHECK(divide("d2o_layers:first=3,last=0", {0, 2, 3, 5}, f, 100) == Budgets{1200, 1200, 57, 114});
  CHECK(divide("d2o_layers", {0, 1, 2}, {0, 0, 0}, 100) == Budgets{1200, 1200, 100});
  CHECK(divide("d2o_layers", {2}, {0.7}, 100) == Budgets{100});
}

TEST_CASE("d2o_layers holds shares between one hundredth of the prompt and all of it", "[layers]") {
  const std::vector<double> f{0, std::log(2), 0, 0};
  const std::string all = "d2o_layers:first=0,last=0";
  CHECK(divide(all, {0, 1, 2, 3}, f, 10) == Budgets{11, 10, 11, 11});                      // 5.7 is below 10
  CHECK(divide(all + ",least=0", {0, 1, 2, 3}, f, 10) == Budgets{11, 6, 11, 11});          //
  CHECK(divide(all + ",least=0.1", {0, 1, 2, 3}, f, 100) == Budgets{114, 100, 114, 114});  // 57 is below 100
  CHECK(divide(all, {0, 1, 2, 3}, f, 900) == Budgets{1000, 514, 1000, 1000});              // 1029 is above the prompt
  CHECK(divide(all, {0, 1, 2, 3}, f, 1, 20) == Budgets{1, 1, 1, 1});                       // never none
  CHECK(divide(all, {0, 1, 2, 3}, f, 1200) == Budgets(4, 1200));                           // nothing has to go
}

TEST_CASE("zigzag counts the tokens that hold a share of a head's attention", "[layers]") {
  const auto tokens = [](const std::string& part, const auto& p) { return make(part)->measure(p)[0]; };
  CHECK(tokens("zigzag", prompt({{1, 5, 1, 3}}, 1)) == 3);  // 5 + 3 + 1 of 10
  CHECK(tokens("zigzag:share=0.8", prompt({{1, 5, 1, 3}}, 1)) == 2);
  CHECK(tokens("zigzag:share=1", prompt({{1, 5, 1, 3}}, 1)) == 4);
  CHECK(tokens("zigzag:share=0", prompt({{1, 5, 1, 3}}, 1)) == 1);
  CHECK(tokens("zigzag", prompt({std::vector<double>(10, 0.1)}, 1)) == 9);
  CHECK(tokens("zigzag:share=0.8", prompt({{1, 5, 1, 3}, {10, 0, 0, 0}, {4, 4, 1, 1}, {1, 1, 4, 4}}, 2)) == 1.75);
  CHECK(parse_method("streaming+zigzag:obs_window=7").needs().prompt_queries == 7);
}

TEST_CASE("zigzag keeps the total, gives nobody more than the prompt and everybody a token", "[layers]") {
  CHECK(divide("zigzag", {1, 4}, {3, 9}, 6) == Budgets{3, 9});
  CHECK(divide("zigzag", {1, 4}, {3, 9}, 6, 8) == Budgets{4, 8});
  CHECK(divide("zigzag", {1, 4}, {1, 1000}, 1) == Budgets{1, 1});
  CHECK(divide("zigzag", {0, 1, 2}, {2, 2, 3}, 10) == Budgets{9, 8, 13});  // 8.57, 8.57, 12.86
  CHECK(divide("zigzag", {1, 4}, {3, 9}, 1200) == Budgets{1200, 1200});
  const Budgets one = divide("zigzag", {2}, {5}, 77);
  CHECK(one == Budgets{77});
}

TEST_CASE("allocators that need no other layer give each layer the same beside any others", "[layers]") {
  const std::vector<int> run{0, 2, 3, 5};
  const auto shares = [](const Allocator& a, const std::vector<int>& index) {
    Allocator::Layers l{index, 6, 4096, 2048, 4200, MatD(std::ssize(index), 2), MatD(std::ssize(index), 1)};
    for (Eigen::Index i = 0; i < std::ssize(index); ++i) {
      const int layer = index[std::size_t(i)];
      l.worth.row(i) << 0.1 + layer * layer, 0.3 * layer;
      l.measured(i, 0) = 0.2 + 0.1 * layer;
    }
    std::vector<std::pair<int, Budgets>> all;
    const Budgets budgets = a.over_layers(l);
    for (std::size_t i = 0; i < index.size(); ++i) {
      all.emplace_back(budgets[i], a.over_heads(l, i));
    }
    return all;
  };
  std::set<std::string_view> alone;
  for (const PartInfo* part : all_parts()) {
    if (part->role == Role::allocate) {
      INFO(part->name);
      const auto allocator = part->allocate(part->config().get());
      const auto together = shares(*allocator, run);
      bool same = true;
      for (std::size_t i = 0; i < run.size(); ++i) {
        same &= shares(*allocator, {run[i]})[0] == together[i];
      }
      CHECK(same == allocator->per_layer());
      if (same) {
        alone.insert(part->name);
      }
    }
  }
  CHECK(alone == std::set<std::string_view>{"adakv", "fair", "pyramid", "uniform", "whitelist"});
}
