// What a sweep keeps on disk: nothing damaged or foreign is ever taken for finished.
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

#include "sim/sweep/resolved.hpp"
#include "sim/sweep/state.hpp"
#include "sim/sweep/store.hpp"

using namespace kvreplay;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

struct Folder {
  fs::path path = fs::temp_directory_path() / ("kvreplay-store-" + std::to_string(std::random_device{}()));
  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
};

const std::string kId(64, 'a');

ItemHead head_of(const std::vector<std::string>& keys, ItemKind kind = ItemKind::cells) {
  ItemHead head{.kind = kind, .id = kId, .keys = keys};
  head.detail = {"heads", "mean"};
  head.statistics = {"mean"};
  head.columns = {{Metric::error, "", ""}, {Metric::retention, "a \"span\", really", "clusters:k=4"}};
  return head;
}

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void change(const fs::path& path, std::size_t at) {
  std::string text = contents(path);
  text.at(at) = text[at] == 'x' ? 'y' : 'x';
  std::ofstream(path, std::ios::binary) << text;
}

Sweep example() {
  Sweep s;
  s.traces.push_back({.path = "a.h5",
                      .stem = "a",
                      .content_hash = "sha256:1",
                      .stamp = "1 2",
                      .prompt_len = 8,
                      .n_tokens = 16,
                      .n_heads = 2,
                      .n_kv_heads = 1,
                      .head_dim = 8,
                      .v_head_dim = 8,
                      .layers = {0, 2},
                      .skipped = {{1, "its window is short"}},
                      .compensators = {"mean"}});
  s.failed_traces = {{"b.h5", "b.h5: no trace"}};
  s.methods.push_back(
      {.label = "h2o:window=4", .name = "h2o:window=4", .budgets = {"8", "25%"}, .params = {{"window", "4"}}});
  s.methods.push_back({.label = "full",
                       .name = "full",
                       .budgets = {""},
                       .files = {{"a.json", "0123"}},
                       .divides = true,
                       .measuring = {{"x", "x\n"}}});
  s.compensators = {"mean"};
  s.tables = {{"a.json", "/plan/a.json"}};
  s.metrics = {"error", "resident"};
  s.statistics = {"mean"};
  s.detail = {"mean"};
  s.configs = {{0, 0}, {0, 1}, {1, 0}};
  return s;
}

}  // namespace

TEST_CASE("an item comes back as it was") {
  const Folder folder;
  Store(folder.path).add(head_of({"k1", "k2"}), "0,1\n1,2\n", unique_name(kId));
  Store store(folder.path);
  const auto heads = store.heads(kId);
  REQUIRE(heads.size() == 1);
  CHECK(heads[0].kind == ItemKind::cells);
  CHECK(heads[0].keys == std::vector<std::string>{"k1", "k2"});
  CHECK(heads[0].detail == head_of({}).detail);
  CHECK(heads[0].columns == head_of({}).columns);
  std::string body;
  CHECK(store.body(heads[0], body));
  CHECK(body == "0,1\n1,2\n");
  CHECK(store.damaged().empty());
  CHECK(store.heads(std::string(64, 'b')).empty());
}

TEST_CASE("any change of any byte of an item is noticed") {
  const Folder folder;
  const std::string name = unique_name(kId);
  Store(folder.path).add(head_of({"k1"}), "0,1\n", name);
  const fs::path path = folder.path / (name + ".cells");
  const std::string whole = contents(path);
  for (std::size_t at = 0; at < whole.size(); ++at) {
    change(path, at);
    Store store(folder.path);
    const auto heads = store.heads(kId);
    std::string body;
    CHECK((heads.empty() || !store.body(heads[0], body)));
    REQUIRE(store.damaged().size() == 1);
    CHECK_THAT(store.damaged()[0], Contains(path.string()));
    fs::remove(path.string() + ".damaged");
    std::ofstream(path, std::ios::binary) << whole;
  }
  for (std::size_t bytes = 0; bytes < whole.size(); ++bytes) {
    std::ofstream(path, std::ios::binary) << whole.substr(0, bytes);
    Store store(folder.path);
    CHECK(store.heads(kId).empty());
    CHECK(store.damaged().size() == 1);
  }
}

TEST_CASE("an item whose numbers are damaged is set aside, and not seen again") {
  const Folder folder;
  const std::string name = unique_name(kId);
  Store(folder.path).add(head_of({"k1"}), "0,1\n", name);
  const fs::path path = folder.path / (name + ".cells");
  change(path, contents(path).size() - 2);
  Store store(folder.path);
  std::string body;
  CHECK_FALSE(store.body(store.heads(kId).at(0), body));
  CHECK(store.heads(kId).empty());
  CHECK(Store(folder.path).heads(kId).empty());
  CHECK(fs::exists(path.string() + ".damaged"));
}

TEST_CASE("a foreign file is named and left alone; a temporary one of a process that is no more is removed") {
  const Folder folder;
  std::ofstream(folder.path / "notes.txt") << "hello";
  std::ofstream(folder.path / (std::string(32, 'a') + "-x.cells")) << "hello\n" << std::string(1000, 'x');
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  const std::string mine = unique_name(kId) + ".cells.part";
  std::ofstream(folder.path / mine) << "being written";
  Store store(folder.path);
  CHECK(store.heads(kId).empty());
  REQUIRE(store.damaged().size() == 2);
  remove_left_behind(folder.path);
  CHECK(fs::exists(folder.path / mine));  // this process is still there
  std::string old = mine;
  old.replace(old.find("-" + std::to_string(::getpid()) + "-"), std::to_string(::getpid()).size() + 2, "-4194305-");
  fs::rename(folder.path / mine, folder.path / old);
  remove_left_behind(folder.path);
  CHECK_FALSE(fs::exists(folder.path / old));
  CHECK(fs::exists(folder.path / "notes.txt"));
}

TEST_CASE("a cell's key is what its numbers depend on, and nothing else") {
  const Sweep s = example();
  const SweepTrace& t = s.traces[0];
  const auto key = [](const Sweep& sweep, int config) {
    const SweepTrace& trace = sweep.traces[0];
    return sweep.key(sweep.group(trace, trace.layers[0]), trace, config);
  };
  CHECK(key(s, 0).size() == 64);
  CHECK(key(s, 0) != key(s, 1));
  CHECK(key(s, 0) != key(s, 2));
  CHECK(s.group(t, 0) != s.group(t, 2));
  const auto changed = [&](auto edit, int config) {
    Sweep other = example();
    edit(other);
    return key(other, config) != key(s, config);
  };
  CHECK(changed([](Sweep& o) { o.traces[0].content_hash = "sha256:2"; }, 0));
  CHECK(changed([](Sweep& o) { o.traces[0].prompt_len = 9; }, 0));
  CHECK(changed([](Sweep& o) { o.traces[0].n_tokens = 15; }, 0));
  CHECK(changed([](Sweep& o) { o.traces[0].compensators = {}; }, 0));
  CHECK(changed([](Sweep& o) { o.methods[0].name = "h2o:window=5"; }, 0));
  CHECK(changed([](Sweep& o) { o.methods[0].budgets[0] = "9"; }, 0));
  CHECK(changed([](Sweep& o) { o.methods[1].files["a.json"] = "4567"; }, 2));
  CHECK(changed([](Sweep& o) { o.traces[0].layers = {0}; }, 2));  // it divides over layers
  CHECK(changed([](Sweep& o) { o.metrics = {"error"}; }, 0));
  CHECK(changed([](Sweep& o) { o.checkpoints = 8; }, 0));
  CHECK(changed([](Sweep& o) { o.seed = 1; }, 0));
  CHECK(changed([](Sweep& o) { o.files["b.json"] = "89"; }, 0));
  CHECK_FALSE(changed([](Sweep& o) { o.traces[0].layers = {0}; }, 0));
  CHECK_FALSE(changed([](Sweep& o) { o.traces[0].path = "/elsewhere/a.h5"; }, 0));
  CHECK_FALSE(changed([](Sweep& o) { o.methods[0].label = "H2O"; }, 0));
  CHECK_FALSE(changed([](Sweep& o) { o.methods[1].name = "tova"; }, 0));
  CHECK_FALSE(changed([](Sweep& o) { o.detail = {"heads", "mean"}; }, 0));
}

TEST_CASE("a resolved plan goes through its file and comes back") {
  const Sweep s = example();
  const Sweep back = Sweep::from_json(nlohmann::ordered_json::parse(s.json().dump()));
  CHECK(back.json() == s.json());
  CHECK(back.configs.size() == 3);
  CHECK(back.n_cells() == 6);
  CHECK(back.budget(1) == "25%");
  CHECK(back.method(2).name == "full");
}

TEST_CASE("cells are finished, failed or left, and finished ones must have what is asked for") {
  const Folder folder;
  Sweep s = example();
  const SweepTrace& t = s.traces[0];
  const std::string group = s.group(t, 0);
  Store writer(folder.path);
  ItemHead failed{.kind = ItemKind::failed, .id = group, .keys = {s.key(group, t, 0), s.key(group, t, 1)}};
  writer.add(failed, R"(["why 0", "why 1"])", "" + group.substr(0, 32) + "-f");
  ItemHead cells{.kind = ItemKind::cells, .id = group, .keys = {"of another plan", s.key(group, t, 0)}};
  cells.detail = {"mean", "p90"};
  writer.add(cells, "0,\n1,\n", unique_name(group));
  {
    Store store(folder.path);
    const LayerState state = state_of(s, store, t, 0);
    CHECK(state.cells == std::vector{CellState::done, CellState::failed, CellState::left});
    CHECK(state.line[0] == 1);
    CHECK(state.sentences[1] == "why 1");
    const SweepState all = state_of(s, store);
    CHECK((all.counts.done == 1 && all.counts.failed == 1 && all.counts.left == 4));
    REQUIRE(all.failures.size() == 1);
    CHECK(all.failures[0].first == "a layer 0, h2o:window=4 at budget 25%");
  }
  s.detail = {"heads", "mean"};
  Store store(folder.path);
  CHECK(state_of(s, store, t, 0).count(CellState::done) == 0);
}
