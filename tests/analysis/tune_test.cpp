#include "analysis/tune.hpp"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "analysis/fidelity.hpp"
#include "analysis/grain.hpp"
#include "analysis/tuned_methods.hpp"
#include "policies/errors.hpp"
#include "sim/run.hpp"
#include "traces/synth.hpp"

using namespace kvreplay;
namespace fs = std::filesystem;

namespace {

class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / ("kvreplay_tune_" + std::to_string(::getpid()))) {
    fs::create_directories(path_);
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

std::string content(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

fs::path small_trace(const Folder& folder, const std::string& name, std::uint64_t seed) {
  const fs::path path = folder / name;
  SynthOptions o;
  o.n_tokens = 448;
  o.prompt_len = 64;
  o.n_layers = 2;
  o.n_heads = 4;
  o.n_kv_heads = 2;
  o.head_dim = 16;
  o.element = ElementType::f32;
  o.seed = seed;
  synthesize(path, o);
  return path;
}

TuneRequest request(const fs::path& trace, const fs::path& out) {
  TuneRequest r;
  r.traces = {trace};
  r.method = "momentum:scope=kv_head";
  r.params = {"alpha=0.3:0.99"};
  r.budgets = {"16", "32"};
  r.n_candidates = 8;
  r.out = out;
  return r;
}

// Means of error_output over everything, over a layer, over a KV head of it, from runs of one method each.
struct Means {
  std::map<std::tuple<int, int>, std::pair<double, double>> sums;  // (layer, KV head) -> sum, steps
  double of(int layer, int head) const {
    double sum = 0, n = 0;
    for (const auto& [key, value] : sums) {
      if ((layer < 0 || std::get<0>(key) == layer) && (head < 0 || std::get<1>(key) == head)) {
        sum += value.first;
        n += value.second;
      }
    }
    return sum / n;
  }
};

Means one_run(const fs::path& trace, const std::string& method, const std::string& budget) {
  Means means;
  RunRequest r;
  r.traces = {trace};
  r.methods = {method};
  r.budgets = {budget};
  r.metrics = MetricSet::parse("error_output");
  r.cell = [&](const CellId& id, const CellResult& cell, const Layer&) {
    const Series& s = *cell.find(Metric::error_output);
    for (int row = 0; row < s.rows; ++row) {
      for (const float x : s.row(row)) {
        auto& [sum, n] = means.sums[{id.layer, row * id.n_kv_heads / id.n_heads}];
        sum += double(x);
        n += 1;
      }
    }
  };
  run(r);
  return means;
}

}  // namespace

TEST_CASE("low fidelities are cheap, look where something is evicted, and are skipped where nothing is saved") {
  const std::vector<Fidelity> large = fidelities({0, 1, 2, 3, 4, 5, 6, 7}, 4096, 512);
  REQUIRE(large.size() == 2);
  CHECK(large[0].layers == std::vector<int>{2, 6});
  CHECK(large[0].max_steps == 512 + 896);
  CHECK(large[1].layers.size() == 4);
  CHECK(large[1].max_steps > large[0].max_steps);
  CHECK(fidelities({3}, 128, 0).empty());
  CHECK(fidelities({}, 4096, 0).empty());
  for (const Fidelity& f : fidelities({0, 4, 8, 11}, 512, 256)) {
    CHECK(double(f.layers.size()) * f.max_steps <= 0.5 * 4 * 512);
    CHECK(f.max_steps > 256);
  }
}

TEST_CASE("what cannot follow layers or heads is tuned once, and it says why") {
  const auto grain = [](const std::string& method, const std::string& param, const std::string& objective = "error",
                        const std::string& other = "interval=1,2") {
    const Axis axis = Axis::parse(param, method, params_of(method));
    return grain_of(axis, {axis, Axis::parse(other, method, params_of(method))}, parse_method(method), 4,
                    Objective::parse(objective));
  };
  CHECK(grain("h2o", "window=1:8").grain == Grain::head);
  CHECK(grain("h2o", "window=1:8").why.empty());
  CHECK(grain("moment-kv", "alpha=0.3:0.9").grain == Grain::layer);
  CHECK(grain("moment-kv", "alpha=0.3:0.9").why.find("scope=layer") != std::string::npos);
  CHECK(grain("h2o", "window=10%:90%").grain == Grain::global);
  CHECK(grain("h2o", "mass=sum,mean").grain == Grain::global);
  CHECK(grain("h2o", "interval=1:8").grain == Grain::global);
  CHECK(grain("h2o+adakv", "alpha=0:1").grain == Grain::global);
  CHECK(grain("h2o", "window=1:8", "projected_error").grain == Grain::layer);
  // Where the scope itself is tuned, the method that is chosen may be of either.
  CHECK(grain("h2o", "window=1:8", "error", "scope=layer,kv_head").grain == Grain::layer);
  CHECK(grain("h2o", "window=1:8", "error", "scope=query_head").grain == Grain::head);
  CHECK(grain("moment-kv", "alpha=0.3:0.9", "error", "scope=kv_head").grain == Grain::layer);
}

TEST_CASE("the choice for everything, per layer and per KV head is that of separate runs") {
  Folder folder;
  const fs::path trace = small_trace(folder, "a.h5", 1);
  const TuneRequest r = request(trace, folder / "out");
  const TuneOutcome outcome = tune(r);
  REQUIRE(outcome.failed.empty());
  REQUIRE_FALSE(outcome.interrupted);
  REQUIRE_FALSE(fs::exists(folder / "out.part"));
  for (const char* name : {"train/summary.csv", "train/results.h5", "train/run.json", "tuned.json"}) {
    REQUIRE(fs::exists(folder / "out" / name));
  }
  const auto tuned = nlohmann::json::parse(content(folder / "out" / "tuned.json"));
  const auto& candidates = tuned["candidates"];
  CHECK(candidates.size() == 9);
  CHECK(candidates[0]["method"] == r.method);
  bool heads_differ = false;
  for (const auto& where : tuned["tuned"]) {
    const std::string budget = where["budgets"][0];
    std::vector<Means> means;
    for (const auto& c : candidates) {
      means.push_back(one_run(trace, c["method"], budget));
    }
    const auto best = [&](int layer, int head) {
      std::size_t at = 0;
      for (std::size_t c = 1; c < means.size(); ++c) {
        if (means[c].of(layer, head) < means[at].of(layer, head)) {
          at = c;
        }
      }
      return at;
    };
    CHECK(where["chosen"]["global"] == best(-1, -1));
    CHECK(where["global"] == candidates[best(-1, -1)]["method"]);
    const auto table = nlohmann::json::parse(content(folder / "out" / ("params/" + budget + "-head-alpha.json")));
    const auto by_layer = nlohmann::json::parse(content(folder / "out" / ("params/" + budget + "-layer-alpha.json")));
    std::map<int, std::vector<double>> errors;
    for (int layer = 0; layer < 2; ++layer) {
      const std::string l = std::to_string(layer);
      CHECK(where["chosen"]["layers"][l] == best(layer, -1));
      CHECK(by_layer[l] == std::stod(candidates[best(layer, -1)]["values"][0].get<std::string>()));
      for (int head = 0; head < 2; ++head) {
        const std::size_t b = best(layer, head);
        CHECK(where["chosen"]["heads"][l][std::size_t(head)] == b);
        CHECK(table[l][std::size_t(head)] == std::stod(candidates[b]["values"][0].get<std::string>()));
        errors[layer].push_back(means[b].of(layer, head));
        heads_differ = heads_differ || b != best(-1, -1);
      }
    }
    // And the method with the table has in every head the error that the head's own value has.
    const TunedMethods chosen = read_tuned(folder / "out" / "tuned.json");
    RunRequest check;
    check.traces = {trace};
    check.methods = {where["head"].get<std::string>()};
    check.budgets = {budget};
    check.tables = chosen.tables;
    check.metrics = MetricSet::parse("error_output");
    check.cell = [&](const CellId& id, const CellResult& cell, const Layer&) {
      const Objective o = Objective::parse("error_output");
      const std::vector<Sums> rows = o.measure(cell, id.n_heads, id.n_kv_heads);
      for (std::size_t head = 0; head < 2; ++head) {
        CHECK(o.value(rows[head]) == Approx(errors[id.layer][head]).epsilon(1e-12));
      }
    };
    CHECK(run(check).n_cells == 2);
  }
  CHECK(heads_differ);
}

TEST_CASE("the same command gives the same bytes with one thread and with two") {
  Folder folder;
  const fs::path trace = small_trace(folder, "a.h5", 1), other = small_trace(folder, "b.h5", 2);
  for (const int threads : {1, 2}) {
    TuneRequest r = request(trace, folder / ("out" + std::to_string(threads)));
    r.holdout = {other};
    r.threads = threads;
    tune(r);
  }
  for (const char* name : {"tuned.json", "train/summary.csv", "holdout/summary.csv", "params/16-head-alpha.json"}) {
    INFO(name);
    REQUIRE_FALSE(content(folder / "out1" / name).empty());
    CHECK(content(folder / "out1" / name) == content(folder / "out2" / name));
  }
}

TEST_CASE("values that do not fit a budget are left out there and counted") {
  Folder folder;
  TuneRequest r = request(small_trace(folder, "a.h5", 1), folder / "out");
  r.method = "h2o";
  r.params = {"window=8,24"};
  tune(r);
  const auto tuned = nlohmann::json::parse(content(folder / "out" / "tuned.json"));
  REQUIRE(tuned["left_out"].size() == 1);
  CHECK(tuned["left_out"][0]["method"] == "h2o:window=24");
  CHECK(tuned["left_out"][0]["budget"] == "16");
  CHECK(tuned["candidates"].size() == 3);
  REQUIRE(tuned["rounds"].size() == 1);  // a list is measured whole at once
  CHECK(tuned["rounds"][0]["n_methods"] == 3);
}

TEST_CASE("at equal bytes one choice is made between the budgets") {
  Folder folder;
  TuneRequest r = request(small_trace(folder, "a.h5", 1), folder / "out");
  r.method = "h2o";
  r.params = {"window=1:12"};
  r.objective = "error_output@bytes=3KiB";  // a token of these heads is 128 bytes
  tune(r);
  const auto tuned = nlohmann::json::parse(content(folder / "out" / "tuned.json"));
  REQUIRE(tuned["tuned"].size() == 1);
  CHECK(tuned["tuned"][0]["budgets"].size() == 2);
  CHECK(tuned["tuned"][0]["bytes"] == 3072);
  CHECK(tuned["tuned"][0]["n_not_reaching"] == 0);
  r.objective = "error_output@bytes=1MiB";
  r.out = folder / "far";
  CHECK_THROWS_AS(tune(r), ConfigError);
  CHECK_FALSE(fs::exists(folder / "far"));
  CHECK_FALSE(fs::exists(folder / "far.part"));
}

TEST_CASE("a tuning that is stopped leaves nothing") {
  Folder folder;
  TuneRequest r = request(small_trace(folder, "a.h5", 1), folder / "out");
  std::atomic<bool> stop = false;
  r.stop = &stop;
  int seen = 0;
  r.progress = [&](double, double, const std::string& what) {
    stop = stop || (what.starts_with("round 3") && ++seen > 1);
  };
  const TuneOutcome outcome = tune(r);
  CHECK(seen > 1);
  CHECK(outcome.interrupted);
  CHECK_FALSE(fs::exists(folder / "out"));
  CHECK_FALSE(fs::exists(folder / "out.part"));
}
