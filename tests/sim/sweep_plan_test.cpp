// What a plan may say, what it stands for, and how its work is shared.
#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "policies/errors.hpp"
#include "sim/sweep/plan.hpp"
#include "sim/sweep/units.hpp"

using namespace kvreplay;
using Catch::Matchers::Contains;

namespace {

using Texts = std::vector<std::string>;

GridAxis axis(GridRange range) { return {"x", {}, range}; }

std::string refusal(const std::string& toml) {
  try {
    parse_plan(toml, "plan.toml");
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "accepted";
}

const std::string kLeast = "traces = [\"a.h5\"]\nmethods = [\"h2o\"]\n";

}  // namespace

TEST_CASE("a range in steps has its end where a step falls on it") {
  CHECK(axis({.from = 16, .to = 64, .step = 16}).texts(false) == Texts{"16", "32", "48", "64"});
  CHECK(axis({.from = 16, .to = 63, .step = 16}).texts(false) == Texts{"16", "32", "48"});
  CHECK(axis({.from = 0.1, .to = 0.4, .step = 0.1}).texts(false) == Texts{"0.1", "0.2", "0.3", "0.4"});
  CHECK(axis({.from = 0.9, .to = 0.9, .step = 0.1}).texts(false) == Texts{"0.9"});
}

TEST_CASE("a range of a count has both ends, even on its scale") {
  CHECK(axis({.from = 0, .to = 1, .count = 5}).texts(false) == Texts{"0", "0.25", "0.5", "0.75", "1"});
  CHECK(axis({.from = 1, .to = 1000, .count = 4, .scale = Scale::log}).texts(false) == Texts{"1", "10", "100", "1000"});
  CHECK(axis({.from = 0.9, .to = 0.9999, .count = 4, .scale = Scale::one_minus}).texts(false) ==
        Texts{"0.9", "0.99", "0.999", "0.9999"});
  CHECK(axis({.from = 4, .to = 64, .count = 4, .scale = Scale::log}).texts(true) == Texts{"4", "10", "25", "64"});
  CHECK(axis({.from = 0.123456789, .to = 1, .count = 1}).texts(false) == Texts{"0.123456789"});
}

TEST_CASE("random values lie in their range, are the same tomorrow, and stay when there are more of them") {
  GridRange range{.from = 1e-3, .to = 1, .count = 50, .random = true, .scale = Scale::log, .seed = 7};
  const Texts fifty = axis(range).texts(false);
  CHECK(fifty == axis(range).texts(false));
  CHECK(std::set<std::string>(fifty.begin(), fifty.end()).size() == 50);
  int below = 0;  // the middle on this scale
  for (const std::string& text : fifty) {
    const double x = std::stod(text);
    CHECK((x >= 1e-3 && x <= 1));
    below += x < 0.0316 ? 1 : 0;
  }
  CHECK((below > 10 && below < 40));
  range.count = 60;
  const Texts sixty = axis(range).texts(false);
  CHECK(Texts(sixty.begin(), sixty.begin() + 50) == fifty);
  range.seed = 8;
  CHECK(axis(range).texts(false) != sixty);
  GridAxis other = axis(range);
  other.param = "y";
  CHECK(other.texts(false) != axis(range).texts(false));
}

TEST_CASE("a whole plan is read") {
  const Plan p = parse_plan(R"(
traces = ["a/*.h5", "b.h5"]
methods = ["streaming", "h2o:sink=2,window=8"]
budgets = [64, "25%", 0.5, "64KiB"]
layers = "0,4-6"
compensators = ["mean", "clusters:k=4"]
metrics = ["error", "evicted_mass"]
statistics = ["p90", "mean"]
prompt_len = 100
max_steps = 50
checkpoints = 8
seed = 3
detail = ["heads", "outputs"]
output_steps = "0,3-4"
[[method]]
text = "momentum"
budgets = [32]
[method.grid]
zeta = [1, 2.5, "10%", true]
alpha = {from = 0.9, to = 0.99, count = 3, scale = "one_minus"}
[[method.zip]]
sink = [0, 4]
window = [8, 16]
)",
                            "plan.toml");
  CHECK(p.traces == Texts{"a/*.h5", "b.h5"});
  CHECK(p.budgets == Texts{"64", "25%", "0.5", "64KiB"});
  CHECK(p.layers == std::vector{0, 4, 5, 6});
  CHECK(p.compensators == Texts{"mean", "clusters:k=4"});
  CHECK(p.compensators_given);
  CHECK(p.metrics == "error,evicted_mass");
  CHECK(p.statistics == Texts{"mean", "p90"});
  CHECK((p.prompt_len == 100 && p.max_steps == 50 && p.checkpoints == 8 && p.seed == 3));
  CHECK((p.heads && p.outputs && !p.steps && !p.retained));
  CHECK(p.output_steps == std::vector{0, 3, 4});
  REQUIRE(p.methods.size() == 3);
  CHECK(p.methods[0].text == "streaming");
  CHECK(p.methods[1].text == "h2o:sink=2,window=8");
  const PlanMethod& m = p.methods[2];
  CHECK(m.text == "momentum");
  CHECK((m.own_budgets && m.budgets == Texts{"32"}));
  CHECK_THAT(m.where, Contains("line 15"));
  REQUIRE(m.axes.size() == 3);
  CHECK(m.axes[0][0].param == "zeta");  // in the order of the file
  CHECK(m.axes[0][0].texts(false) == Texts{"1", "2.5", "10%", "true"});
  CHECK(m.axes[1][0].param == "alpha");
  CHECK(m.axes[1][0].texts(false).size() == 3);
  REQUIRE(m.axes[2].size() == 2);
  CHECK(m.axes[2][0].param == "sink");
}

TEST_CASE("what a plan does not say is as in a run") {
  const Plan p = parse_plan(kLeast, "plan.toml");
  CHECK(p.compensators == Texts{"mean", "moments", "gaussian"});
  CHECK_FALSE(p.compensators_given);
  CHECK((p.metrics == "all" && p.checkpoints == 16 && p.layers.empty() && p.statistics == Texts{"mean"}));
  CHECK(parse_plan(kLeast + "compensators = []", "p").compensators.empty());
  CHECK(parse_plan(kLeast + "compensators = \"none\"", "p").compensators.empty());
}

TEST_CASE("what is wrong with a plan is one sentence that says where") {
  CHECK_THAT(refusal("x = "), Contains("plan.toml line 1: "));
  CHECK_THAT(refusal("x = {a = 5to = 1}"), Contains("plan.toml"));
  CHECK_THAT(refusal("# \xC3\xA9\nx = '\xC3\xA9'\ny\xC3\xA9 = 1\n"), Contains("plan.toml line 3: a character beyond"));
  CHECK(parse_plan(kLeast + "budgets = [1.0, 20, 0.00001, '25%', 0.1]\n", "plan.toml").budgets ==
        Texts{"1.0", "20", "0.00001", "25%", "0.1"});  // 1.0 is all of the prompt, and not one token
  CHECK(refusal(kLeast + "budgets = [8] # \xC3\xA9\n") == "accepted");
  CHECK_THAT(refusal(kLeast + "x = \"\"\"\n\\\"\xC3\xA9\"\"\"\n\xC3\xA9"), Contains("plan.toml line 5: "));
  // Where these look for space, toml++ has undefined behaviour beyond ASCII.
  CHECK_THAT(refusal("\nx =0[\"\xD2\x90\"e]\n"), Contains("plan.toml line 2: "));
  CHECK_THAT(refusal(kLeast + "x = \"\"\"\\ \n\xD2\x90\"\"\""), Contains("plan.toml line 3: a character beyond"));
  CHECK_THAT(refusal("traces = ['\xC3\xA9.h5']\nmethods = ['h2o']\nx = '\xD2\x90'"), Contains("line 3: 'x'"));
  CHECK_THAT(refusal("methods = [\"h2o\"]"), Contains("no trace is given"));
  CHECK_THAT(refusal("traces = [\"a.h5\"]"), Contains("no method is given"));
  CHECK_THAT(refusal(kLeast + "budgts = [64]"),
             Contains("plan.toml line 3: 'budgts' is no key of a plan; the nearest is 'budgets' of"));
  CHECK_THAT(refusal(kLeast + "[[method]]\ntext = \"h2o\"\nbudget = 64"),
             Contains("line 5: 'budget' is no key of a method"));
  CHECK_THAT(refusal(kLeast + "[[method]]\nbudgets = [64]"), Contains("line 3: a method needs its text"));
  CHECK_THAT(refusal(kLeast + "[method]\ntext = \"h2o\""), Contains("[[method]]"));
  CHECK_THAT(refusal(kLeast + "method = [3]"), Contains("[[method]]"));
  CHECK_THAT(refusal(kLeast + "prompt_len = \"x\""), Contains("'prompt_len' takes a whole number"));
  CHECK_THAT(refusal(kLeast + "max_steps = 0"), Contains("'max_steps' takes a whole number from 1"));
  CHECK_THAT(refusal(kLeast + "seed = -1"), Contains("'seed' takes a whole number from 0"));
  CHECK_THAT(refusal(kLeast + "metrics = [\"eror\"]"), Contains("error"));
  CHECK_THAT(refusal(kLeast + "statistics = [\"p95\"]"), Contains("'p95' is no statistic; the nearest is 'p9"));
  CHECK_THAT(refusal(kLeast + "detail = [\"head\"]"), Contains("the nearest is 'heads'"));
  CHECK_THAT(refusal(kLeast + "detail = [\"outputs\"]"), Contains("output_steps"));
  CHECK_THAT(refusal(kLeast + "layers = \"0-\""), Contains("'0-' is no list of numbers"));
  CHECK_THAT(refusal(kLeast + "budgets = [[64]]"), Contains("'budgets' takes numbers and texts"));
  CHECK_THAT(refusal(kLeast + "budgets = [nan]"), Contains("'budgets' takes numbers and texts"));
  CHECK_THAT(refusal("traces = []\nmethods = [\"h2o\"]"), Contains("the list is empty"));
}

TEST_CASE("what is wrong with a grid is said with its parameter") {
  const auto grid = [](const std::string& what) { return refusal(kLeast + "[[method]]\ntext = \"h2o\"\n" + what); };
  CHECK_THAT(grid("grid = 3"), Contains("'grid' takes a table of parameters"));
  CHECK_THAT(grid("grid = {a = 3}"), Contains("'a' takes a list of values or a range"));
  CHECK_THAT(grid("grid = {a = []}"), Contains("'a' takes a list of values or a range"));
  CHECK_THAT(grid("grid = {a = {from = 1, to = 2, stp = 1}}"),
             Contains("'stp' is no key of a range of values; the nearest is 'step'"));
  CHECK_THAT(grid("grid = {a = {from = 1, step = 1}}"), Contains("the range of 'a' needs from and to"));
  CHECK_THAT(grid("grid = {a = {from = 1, to = 2}}"), Contains("needs one of step, count and random"));
  CHECK_THAT(grid("grid = {a = {from = 1, to = 2, step = 1, count = 2}}"), Contains("needs one of"));
  CHECK_THAT(grid("grid = {a = {from = 2, to = 1, count = 2}}"), Contains("from 2 down to 1"));
  CHECK_THAT(grid("grid = {a = {from = 0, to = 1, step = 0}}"), Contains("a step above 0"));
  CHECK_THAT(grid("grid = {a = {from = 0, to = 1, step = 1e-9}}"), Contains("at most 100000 values"));
  CHECK_THAT(grid("grid = {a = {from = 0, to = 1, count = 2, scale = \"log\"}}"), Contains("from above 0"));
  CHECK_THAT(grid("grid = {a = {from = 0, to = 1, count = 2, scale = \"one_minus\"}}"), Contains("to below 1"));
  CHECK_THAT(grid("grid = {a = {from = 1, to = 2, count = 2, scale = \"logg\"}}"), Contains("the nearest is 'log'"));
  CHECK_THAT(grid("grid = {a = {from = 1, to = 2, step = 1, scale = \"log\"}}"), Contains("give count or random"));
  CHECK_THAT(grid("grid = {a = {from = 1, to = 2, count = 2, seed = 1}}"), Contains("nothing random"));
  CHECK_THAT(grid("grid = {a = {from = inf, to = 2, count = 2}}"), Contains("'from' takes a number"));
  CHECK_THAT(grid("zip = {a = [1, 2], b = [1, 2, 3]}"), Contains("'a' has 2 values and 'b' has 3"));
  CHECK_THAT(grid("grid = {a = [1]}\nzip = {a = [1]}"), Contains("'a' is both in grid and in zip"));
}

TEST_CASE("a shard is i of n") {
  CHECK(Shard::parse("0/1").n == 1);
  CHECK(Shard::parse("7/8").index == 7);
  for (const char* text : {"", "8/8", "-1/8", "1", "1/", "/8", "1/8x", "a/b", "0/0"}) {
    CHECK_THROWS_AS(Shard::parse(text), ConfigError);
  }
}

TEST_CASE("every layer of every trace is in one shard, whatever else the plan names") {
  for (const int n : {1, 2, 3, 8}) {
    std::vector<int> in(std::size_t(n), 0);
    for (int t = 0; t < 40; ++t) {
      SweepTrace trace;
      trace.content_hash = "sha256:" + std::to_string(t);
      for (int layer = 0; layer < 32; ++layer) {
        int owners = 0;
        for (int i = 0; i < n; ++i) {
          const bool has = Shard{i, n}.has(trace, layer);
          owners += has ? 1 : 0;
          in[std::size_t(i)] += has ? 1 : 0;
        }
        CHECK(owners == 1);
      }
    }
    for (const int layers : in) {  // 1280 / n within four standard deviations
      CHECK(std::abs(layers - 1280.0 / n) < 4 * std::sqrt(1280.0 / n) + 1);
    }
  }
}

TEST_CASE("units go through text and come back") {
  const std::vector<Unit> units{{0, 3, {0, 1, 2}}, {2, 31, {7}}};
  const std::vector<Unit> back = units_of(text_of(units));
  REQUIRE(back.size() == 2);
  CHECK((back[0].trace == 0 && back[0].layer == 3 && back[0].configs == units[0].configs));
  CHECK((back[1].trace == 2 && back[1].layer == 31 && back[1].configs == units[1].configs));
  CHECK(units_of("").empty());
}
