// Allocators before the "/": heads that share the budget of the prompt's cut, against float64.
#include <catch2/catch.hpp>
#include <numeric>

#include "tests/support/matrix.hpp"
#include "tests/support/reference_span_fair.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

// How many of the highest scores of all sets together each has, its own `safe` highest set aside and added. Empty where
// two sets come too near to each other at the border.
std::vector<int> shared(const std::vector<std::vector<double>>& scores, int mean, int safe) {
  struct Token {
    double score;
    int set;
  };
  std::vector<Token> rest;
  for (std::size_t s = 0; s < scores.size(); ++s) {
    std::vector<double> own = scores[s];
    std::sort(own.rbegin(), own.rend());
    for (std::size_t i = static_cast<std::size_t>(safe); i < own.size(); ++i) {
      rest.push_back({own[i], static_cast<int>(s)});
    }
  }
  std::stable_sort(rest.begin(), rest.end(), [](const Token& a, const Token& b) { return a.score > b.score; });
  const std::size_t n = std::min(rest.size(), scores.size() * static_cast<std::size_t>(mean - safe));
  std::vector<int> budgets(scores.size(), safe);
  for (std::size_t i = 0; i < n; ++i) {
    ++budgets[static_cast<std::size_t>(rest[i].set)];
  }
  if (n > 0 && n < rest.size() && rest[n - 1].score < rest[n].score * (1 + 1e-4)) {
    return {};
  }
  return budgets;
}

// Attention that each token of the prompt received, mean over the set's heads, the latest `window` sure to stay.
std::vector<std::vector<double>> scores_of(const ToyLayer& toy, Scope scope, int window) {
  const Pos prompt = toy.options.prompt_len;
  std::vector<std::vector<double>> scores(static_cast<std::size_t>(n_sets(toy, scope)),
                                          std::vector<double>(static_cast<std::size_t>(prompt), 0));
  const double per_set = scope == Scope::query_head ? 1 : toy.options.group_size;
  for (int h = 0; h < toy.n_heads(); ++h) {
    std::vector<double>& sum = scores[static_cast<std::size_t>(set_of(toy, scope, h))];
    for (Pos pos = 0; pos < prompt; ++pos) {
      const std::vector<bool> all(static_cast<std::size_t>(pos) + 1, true);
      const Eigen::VectorXd a =
          softmax_over(logits_at(toy, h, pos), toy.v[static_cast<std::size_t>(toy.kv_head(h))], all).weight;
      for (Pos p = 0; p <= pos; ++p) {
        sum[static_cast<std::size_t>(p)] += a[p] / per_set;
      }
    }
  }
  for (auto& sum : scores) {
    std::fill(sum.end() - std::min(window, prompt), sum.end(), std::numeric_limits<double>::infinity());
  }
  return scores;
}

// Every set's cut and evictions are those of a run in which all sets have its budget.
int sets_as_alone(const ToyLayer& toy, SelectionRequest request, const std::vector<int>& budgets,
                  const Evicted& recorded) {
  int n = 0;
  for (std::size_t s = 0; s < budgets.size(); ++s) {
    request.prefill_budget = budgets[s];
    const SelectionResult alone = reference_selection(toy, request);
    const auto row = static_cast<Eigen::Index>(s);
    CHECK((recorded.row(row).head(toy.options.prompt_len).array() > 0).count() ==
          std::min(budgets[s], toy.options.prompt_len));
    if (alone.margin > 1e-4) {
      CHECK(alone.evicted_at.row(row) == recorded.row(row));
      ++n;
    }
  }
  return n;
}

CellResult replay_one(const ToyLayer& toy, const Job& job) {
  return replay(engine_layer(toy), std::span(&job, 1), {}).cells[0];
}

}  // namespace

TEST_CASE("heads share the prompt's budget by their scores, then keep what they had", "[prompt]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const int prompt_budget = GENERATE(1, 9, 72);
  const ToyLayer toy = make_toy_layer(options(group_size, prompt_len, Element::f32));
  struct Half {
    std::string prompt, decode;
    Scope scope;
    ReferenceTokens window;
    double alpha;
    MakeSelector select;
  };
  const Half halves[] = {
      {"h2o:window=0", "+adakv/momentum:scope=kv_head", Scope::kv_head, {0, false}, 0.2, reference_momentum()},
      {"h2o", "+adakv:alpha=0/h2o:window=0", Scope::kv_head, {0.5, true}, 0, reference_h2o({0, false})},
      {"h2o:window=0,scope=query_head",
       "+adakv:alpha=0.5/streaming:scope=query_head",
       Scope::query_head,
       {0, false},
       0.5,
       reference_streaming()},
  };
  int n_compared = 0;
  for (const Half& half : halves) {
    const Method method = parse_method(half.prompt + (half.prompt == "h2o" ? ":" : ",") +
                                       "budget=" + std::to_string(prompt_budget) + half.decode);
    std::vector<int> budgets(static_cast<std::size_t>(n_sets(toy, half.scope)), prompt_budget);
    if (prompt_budget < prompt_len) {
      const int safe = std::max(1, static_cast<int>(half.alpha * prompt_budget + 1e-9));
      budgets = shared(scores_of(toy, half.scope, half.window.of(prompt_budget)), prompt_budget, safe);
    }
    for (const int budget : {1, 9, 72}) {
      Job job;
      job.method = &method;
      job.budget = budget;
      const CellResult cell = replay_one(toy, job);
      INFO(method.name << " at budget " << budget << ": " << describe(toy.options));
      REQUIRE(cell.error == "");
      const Evicted recorded = recorded_evictions(cell);
      SelectionRequest request;
      request.traits = traits(half.scope, Pool::decode);
      request.select = half.select;
      request.budget = budget;
      // Percentages are of the budget asked for, before it is shared.
      request.prefill_select = reference_h2o({static_cast<double>(half.window.of(prompt_budget)), false});
      n_compared += sets_as_alone(toy, request, budgets, recorded);
      MetricsRequest metrics;
      metrics.attends = attends_from(toy, half.scope, recorded);
      for (const std::string& d : differences(reference_metrics(toy, metrics), engine_series(cell))) {
        FAIL_CHECK(d);
      }
    }
  }
  CHECK(n_compared > 0);
}

TEST_CASE("the cut of each head has the budget that it was given before the run", "[prompt]") {
  const ToyLayer toy = make_toy_layer(options(GENERATE(1, 3), 48, Element::bf16));
  const Method method = parse_method("h2o+surface_logic/h2o");
  Job job;
  job.method = &method;
  job.budget = 7;
  job.prompt_budget = 12;
  job.prompt_head_budgets = {5, 19};
  const CellResult cell = replay_one(toy, job);
  REQUIRE(cell.error == "");
  SelectionRequest request;
  request.traits = traits(Scope::kv_head, Pool::decode);
  request.select = request.prefill_select = reference_h2o();
  request.budget = 7;
  // Percentages are of the budget asked for: the window of both heads is 6, as of 12.
  request.prefill_select = reference_h2o({6, false});
  CHECK(sets_as_alone(toy, request, {5, 19}, recorded_evictions(cell)) == 2);
}

TEST_CASE("spans can be protected at the prompt's cut alone", "[prompt]") {
  ToyOptions o = options(GENERATE(1, 3), 48, Element::f32);
  o.spans = {{"system", 2, 5}, {"user", 5, 20}};
  const ToyLayer toy = make_toy_layer(o);
  const Method method = parse_method("h2o:budget=9+whitelist:spans=system/h2o");
  Job job;
  job.method = &method;
  job.budget = 7;
  const CellResult cell = replay_one(toy, job);
  REQUIRE(cell.error == "");
  SelectionRequest request;
  request.traits = traits(Scope::kv_head, Pool::decode);
  request.select = reference_h2o();
  request.budget = 7;
  request.prefill_select = reference_whitelist(reference_h2o(), 2, 5);
  request.prefill_budget = 9;
  CHECK(check_selection(toy, request, recorded_evictions(cell)).excess <= kScoreTolerance);
  for (const auto& set : cell.evicted_at) {
    CHECK(*std::min_element(set.begin() + 2, set.begin() + 5) == toy.n_steps());
  }
}
