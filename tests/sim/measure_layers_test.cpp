// Budgets that layers and heads of a model share: what allocators that measure are shown, and runs whose budgets come
// of it or of a table of heads, against float64.
#include "sim/measure_layers.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <fstream>
#include <map>

#include "policies/errors.hpp"
#include "sim/load.hpp"
#include "sim/run.hpp"
#include "tests/support/reference_compare.hpp"
#include "tests/traces/fixtures.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

// Gives out all that it is shown.
class Shown final : public Allocator {
 public:
  struct Config {
    int queries = Needs::kAll;
  };
  static constexpr std::string_view kName = "shown", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array kParams{number<&Config::queries>("queries", -1, kUnbounded, "")};
  static Needs needs(const Config& c) { return {.prompt_queries = c.queries}; }
  explicit Shown(const Config&) {}
  bool measures() const override { return true; }
  std::vector<double> measure(const Prompt& prompt) const override {
    std::vector<double> all{static_cast<double>(prompt.layer), static_cast<double>(prompt.prompt_len)};
    for (const MatD& mass : prompt.column_mass) {
      all.insert(all.end(), mass.data(), mass.data() + mass.size());
    }
    return all;
  }
};
constinit const PartInfo shown = describe<Shown>();

// A selector that keeps what it was shown of each KV head.
class Seen final : public Selector {
 public:
  struct Config {
    int queries = Needs::kAll;
  };
  static constexpr std::string_view kName = "seen", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array kParams{number<&Config::queries>("queries", -1, kUnbounded, "")};
  static Needs needs(const Config& c) { return {.prompt_queries = c.queries}; }
  static std::map<int, MatD> by_head;
  Seen(const Config& config, const SetShape& shape) : queries_(config.queries), head_(shape.kv_head) {}
  void prefill(const View& view) override { by_head[head_] = view.column_mass(0, queries_); }
  void score(const View& view, std::span<float> out) override {
    std::copy(view.pos.begin(), view.pos.end(), out.begin());
  }

 private:
  int queries_, head_;
};
std::map<int, MatD> Seen::by_head;
constinit const PartInfo seen = describe<Seen>();

PartUse with_queries(const PartInfo& info, int queries) {
  return {&info, {Setting{info.params.data(), {static_cast<double>(queries), false, {}}, nullptr}}};
}

// Layers of one model: each a toy of its own.
std::vector<ToyLayer> toys(int group_size, Pos prompt_len, int n_layers = 4, Element element = Element::f32) {
  std::vector<ToyLayer> all;
  for (int l = 0; l < n_layers; ++l) {
    ToyOptions o;
    o.group_size = group_size;
    o.n_tokens = 80;
    o.prompt_len = prompt_len;
    o.v_head_dim = 12;
    o.element = element;
    o.seed = static_cast<unsigned>(100 * l + 10 * group_size + prompt_len);
    o.kind = l == 2 ? ToyKind::sharp : ToyKind::structured;
    all.push_back(make_toy_layer(o));
  }
  return all;
}

std::filesystem::path write(const std::filesystem::path& path, const std::vector<ToyLayer>& layers) {
  const ToyOptions& o = layers[0].options;
  TraceInfo meta;
  meta.model_name = "toy";
  meta.n_layers = static_cast<int>(layers.size());
  meta.n_heads = layers[0].n_heads();
  meta.n_kv_heads = o.n_kv_heads;
  meta.head_dim = o.head_dim;
  meta.v_head_dim = o.v_head_dim;
  meta.attention_scale = layers[0].scale;
  meta.prompt_len = o.prompt_len;
  meta.element = ElementType::f32;  // holds numbers of the shorter types as they are
  meta.sliding_window.assign(layers.size(), 0);
  for (int l = 0; l < meta.n_layers; ++l) {
    meta.layers.push_back(l);
  }
  WriterOptions options;
  options.queries = queries_all(o.n_tokens);
  TraceWriter writer(path, meta, o.n_tokens, options);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(o.n_tokens), 7);
  writer.append_tokens(ids);
  const auto flat = [](const std::vector<MatD>& heads) {
    std::vector<float> all;
    for (const MatD& m : heads) {
      for (Eigen::Index i = 0; i < m.size(); ++i) {
        all.push_back(static_cast<float>(m.data()[i]));
      }
    }
    return all;
  };
  for (int l = 0; l < meta.n_layers; ++l) {
    const ToyLayer& toy = layers[static_cast<std::size_t>(l)];
    writer.append(l, o.n_tokens, flat(toy.k), flat(toy.v), flat(toy.q));
  }
  writer.close();
  return path;
}

// Attention that the prompt's tokens received from its last queries: (n_heads, prompt_len).
MatD received(const ToyLayer& toy, int last) {
  const Pos prompt = toy.options.prompt_len;
  MatD mass = MatD::Zero(toy.n_heads(), prompt);
  for (int h = 0; h < toy.n_heads(); ++h) {
    for (Pos pos = std::max(0, prompt - last); pos < prompt; ++pos) {
      const std::vector<bool> all(static_cast<std::size_t>(pos) + 1, true);
      mass.row(h).head(pos + 1) +=
          softmax_over(logits_at(toy, h, pos), toy.v[static_cast<std::size_t>(toy.kv_head(h))], all).weight.transpose();
    }
  }
  return mass;
}

double d2o_statistic(const ToyLayer& toy) {
  const MatD mass = received(toy, toy.options.prompt_len);
  const Eigen::VectorXd mean = mass.rowwise().mean();
  const Eigen::VectorXd variance = (mass.colwise() - mean).rowwise().squaredNorm() / mass.cols();
  const double low = variance.minCoeff(), high = variance.maxCoeff();
  return high > low ? ((variance.array() - low) / (high - low)).mean() : 0;
}

double zigzag_statistic(const ToyLayer& toy, int last, double share) {
  const MatD mass = received(toy, last);
  double sum = 0;
  for (const auto& head : mass.rowwise()) {
    std::vector<double> sorted(head.begin(), head.end());
    std::sort(sorted.rbegin(), sorted.rend());
    const double total = head.sum();
    double held = 0;
    for (const double x : sorted) {
      ++sum;
      held += x;
      if (held >= share * total - 1e-6) {
        break;
      }
    }
  }
  return sum / static_cast<double>(mass.rows());
}

// HeadKV at beta 2 and a window of 3: what each of the model's heads keeps, by bisecting the pool's level, above which
// no head has room.
MatD headkv_budgets(const MatD& worth, int budget, Pos prompt_len, Pos n_tokens) {
  const double shared = budget - 3;
  if (shared < 1 || budget >= n_tokens) {
    return MatD::Constant(worth.rows(), worth.cols(), budget);
  }
  const double own = shared - std::floor(shared / 2), pool = std::floor(shared / 2) * static_cast<double>(worth.size());
  const double most = (budget <= prompt_len ? prompt_len : n_tokens) - 3 - own;
  double low = 0, high = (pool + most) / worth.minCoeff();
  for (int i = 0; i < 200; ++i) {
    const double level = (low + high) / 2;
    ((level * worth.array()).min(most).sum() < pool ? low : high) = level;
  }
  return (own + (low * worth.array()).min(most)).rint().max(-2) + 3;
}

struct Cells {
  std::map<int, Evicted> evicted;  // by layer
  std::map<int, int> budget;       // as results have it
  RunOutcome outcome;
};

RunRequest request_of(const std::filesystem::path& trace, const std::string& method, const std::string& budget) {
  RunRequest r;
  r.traces = {trace};
  r.methods = {method};
  r.budgets = {budget};
  r.metrics = MetricSet::parse("error,resident");
  return r;
}

Cells run_cells(RunRequest r) {
  Cells cells;
  r.cell = [&](const CellId& id, const CellResult& cell, const Layer&) {
    cells.evicted[id.layer] = recorded_evictions(cell);
    cells.budget[id.layer] = id.budget_tokens;
  };
  cells.outcome = run(r);
  return cells;
}

// Tokens of the prompt that a set still has at the first step.
int kept(const Evicted& evicted, Eigen::Index set, Pos prompt_len) {
  return static_cast<int>((evicted.row(set).head(prompt_len).array() > 0).count());
}

}  // namespace

TEST_CASE("an allocator that measures is shown what a selector is shown, to the bit", "[layers]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 30);
  const int queries = GENERATE(-1, 1, 7, 64);  // -1: all
  const kvreplay::test::TemporaryFolder folder;
  const std::vector<ToyLayer> layers = toys(group_size, prompt_len, 2);
  const TraceReader trace(write(folder / "toy.h5", layers));
  const PartUse allocator = with_queries(shown, queries), other = with_queries(shown, 3);
  const std::vector<const PartUse*> both{&other, &allocator};
  const auto measured = measure_layer(trace, 1, prompt_len, both, 1);
  REQUIRE(measured.size() == 2);
  CHECK(measured[1][0] == 1);
  CHECK(measured[1][1] == prompt_len);

  Method method = parse_method("h2o");
  method.select = with_queries(seen, queries);
  Seen::by_head.clear();
  const Layer layer = load_layer(trace, 1, {.prompt_len = prompt_len, .scores = {}});
  Job job;
  job.method = &method;
  job.budget = 9;
  const LayerResult result = replay(layer, std::span(&job, 1), {});
  REQUIRE(result.cells[0].error == "");
  std::vector<double> expected;
  for (const auto& [head, mass] : Seen::by_head) {
    expected.insert(expected.end(), mass.data(), mass.data() + mass.size());
  }
  CHECK(std::vector<double>(measured[1].begin() + 2, measured[1].end()) == expected);

  const MatD truth = received(layers[1], queries == Needs::kAll ? prompt_len : std::min(queries, prompt_len));
  REQUIRE(truth.size() == std::ssize(expected));
  for (Eigen::Index i = 0; i < truth.size(); ++i) {
    CHECK(expected[static_cast<std::size_t>(i)] == Approx(truth.data()[i]).margin(1e-5));
  }
}

TEST_CASE("layers evict to the budgets that float64 gives them", "[layers]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 48);
  const int budget = GENERATE(1, 9, 80);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  const kvreplay::test::TemporaryFolder folder;
  const std::vector<ToyLayer> layers = toys(group_size, prompt_len, 4, element);
  const auto trace = write(folder / "toy.h5", layers);
  const auto n = static_cast<Eigen::Index>(layers.size());
  Eigen::ArrayXd f(n), tokens(n);
  for (Eigen::Index l = 0; l < n; ++l) {
    f[l] = d2o_statistic(layers[static_cast<std::size_t>(l)]);
    tokens[l] = zigzag_statistic(layers[static_cast<std::size_t>(l)], 5, 0.8);
  }
  INFO("F " << f.transpose() << ", tokens " << tokens.transpose());
  const Cells d2o = run_cells(request_of(trace, "h2o+d2o_layers:first=1", std::to_string(budget)));
  const Cells zigzag = run_cells(request_of(trace, "h2o+zigzag:obs_window=5,share=0.8", std::to_string(budget)));
  REQUIRE(d2o.evicted.size() == layers.size());
  int total = 0;
  for (Eigen::Index l = 0; l < n; ++l) {
    const int layer = static_cast<int>(l);
    const double room = budget <= prompt_len ? prompt_len : 80;
    const double share = std::exp(-f[l]) / (-f).exp().sum() * static_cast<double>(n) * budget;
    const double held = std::clamp(share, std::max(1.0, 0.01 * prompt_len), room);
    const bool whole = l == 0 || l == n - 1 || budget >= 80;
    CHECK(d2o.budget.at(layer) == (whole ? 80 : static_cast<int>(std::rint(held))));

    const double part = std::min(room, tokens[l] / tokens.sum() * static_cast<double>(n) * budget);
    CHECK(std::abs(zigzag.budget.at(layer) - (budget >= 80 ? 80 : part)) <= 1.0);
    total += zigzag.budget.at(layer);
    for (const Cells* cells : {&d2o, &zigzag}) {
      SelectionRequest selection;
      selection.select = reference_h2o();
      selection.budget = selection.budgets.emplace_back(cells->budget.at(layer));
      selection.budgets.resize(2, selection.budget);
      CHECK(check_selection(layers[static_cast<std::size_t>(l)], selection, cells->evicted.at(layer)).excess <= 1e-5);
    }
  }
  CHECK(total == n * budget);
}

TEST_CASE("heads evict to the shares of the model's pool that float64 gives them", "[layers]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const int budget = GENERATE(1, 9, 20, 80);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  const kvreplay::test::TemporaryFolder folder;
  const std::vector<ToyLayer> layers = toys(group_size, prompt_len, 4, element);
  const auto trace = write(folder / "toy.h5", layers);
  MatD worth(4, 2);
  worth << 0.013, 0.291, 0.107, 0.057, 0.7219, 0.0031, 0.1301, 0.2113;
  std::ofstream table(folder / "s.json");
  for (int l = 0; l < 4; ++l) {
    table << (l == 0 ? "{\"" : ", \"") << l << "\": [" << worth(l, 0) << ", " << worth(l, 1) << "]";
  }
  table << "}";
  table.close();
  const MatD budgets = headkv_budgets(worth, budget, prompt_len, 80);
  const Cells cells = run_cells(request_of(
      trace, "h2o:window=0+headkv:beta=2,window=3,scores=@" + (folder / "s.json").string(), std::to_string(budget)));
  REQUIRE(cells.evicted.size() == layers.size());
  for (int l = 0; l < 4; ++l) {
    INFO("layer " << l << " of " << budgets << " at " << budget << ", prompt " << prompt_len);
    CHECK(cells.budget.at(l) == static_cast<int>(std::rint(budgets.row(l).mean())));
    SelectionRequest selection;
    selection.traits.scope = Scope::kv_head;
    selection.select = reference_h2o({0, false});
    selection.budget = cells.budget.at(l);
    selection.budgets = {static_cast<int>(budgets(l, 0)), static_cast<int>(budgets(l, 1))};
    CHECK(check_selection(layers[static_cast<std::size_t>(l)], selection, cells.evicted.at(l)).excess <= 1e-5);
  }
}

TEST_CASE("numbers that are known are not measured again, and give the same cells", "[layers]") {
  const kvreplay::test::TemporaryFolder folder;
  const auto trace = write(folder / "toy.h5", toys(3, 48));
  const std::string method = "h2o:budget=20+zigzag:obs_window=5/momentum:scope=kv_head+d2o_layers:first=0,last=0";
  const Cells plain = run_cells(request_of(trace, method, "9"));
  RunRequest told = request_of(trace, method, "9");
  std::vector<std::string> asked;
  const TraceReader reader(trace);
  const Method m = parse_method(method);
  told.measured = [&](const std::filesystem::path& path, int layer, const std::string& allocator) {
    CHECK(path == trace);
    asked.push_back(std::to_string(layer) + " " + allocator);
    const PartUse& use = allocator == canonical(*m.allocate) ? *m.allocate : *m.prefill_allocate;
    const PartUse* one = &use;
    return measure_layer(reader, layer, 48, std::span(&one, 1), 1)[0];
  };
  CHECK(run_cells(told).evicted == plain.evicted);
  CHECK(asked.size() == 8);  // four layers, two allocators, once each
  CHECK(asked[0] == "0 d2o_layers:first=0,last=0");
  CHECK(asked[1] == "0 zigzag:obs_window=5");

  // Nothing else goes into the division: other numbers, other budgets.
  told.measured = [](const auto&, int layer, const std::string&) {
    return std::vector<double>{layer == 1 ? 3 * std::log(2.0) : 0.0};
  };
  const Cells other = run_cells(told);
  CHECK(other.budget == std::map<int, int>{{0, 12}, {1, 1}, {2, 12}, {3, 12}});  // 36 * 8 / 25 = 11.5; 36 / 25 = 1.4

  // Layers that are not replayed are measured all the same.
  RunRequest some = request_of(trace, method, "9");
  some.replay = {1, 3};
  const Cells two = run_cells(some);
  REQUIRE(two.evicted.size() == 2);
  CHECK(two.evicted.at(1) == plain.evicted.at(1));
  CHECK(two.evicted.at(3) == plain.evicted.at(3));
  CHECK(two.budget.at(3) == plain.budget.at(3));
}

TEST_CASE("each half of a method divides its own budget over the layers", "[layers]") {
  const kvreplay::test::TemporaryFolder folder;
  const std::vector<ToyLayer> layers = toys(2, 40);
  const auto trace = write(folder / "toy.h5", layers);
  const std::string pyramid = "+pyramid:window=0,beta=4";
  // kvpress: of 20 from 35 down to 5, of 8 from 14 to 2.
  const std::vector<int> prompt{35, 25, 15, 5}, decode{14, 10, 6, 2};
  const Cells first = run_cells(request_of(trace, "h2o:budget=20" + pyramid + "/momentum:scope=kv_head", "8"));
  const Cells second = run_cells(request_of(trace, "h2o:budget=20/momentum:scope=kv_head" + pyramid, "8"));
  const Cells both = run_cells(request_of(trace, "h2o:budget=50%" + pyramid + "/h2o:window=1" + pyramid, "8"));
  const Cells shared = run_cells(request_of(trace, "h2o/momentum:scope=kv_head" + pyramid, "8"));
  for (int l = 0; l < 4; ++l) {
    const auto i = static_cast<std::size_t>(l);
    INFO("layer " << l);
    for (int set = 0; set < 2; ++set) {
      CHECK(kept(first.evicted.at(l), set, 40) == prompt[i]);
      CHECK(kept(second.evicted.at(l), set, 40) == 20);
      CHECK(kept(both.evicted.at(l), set, 40) == prompt[i]);
      CHECK(kept(shared.evicted.at(l), set, 40) == 8);  // the prompt's half is not divided
    }
    CHECK(first.budget.at(l) == 8);
    CHECK(second.budget.at(l) == decode[i]);
    CHECK(both.budget.at(l) == decode[i]);
    SelectionRequest selection;
    selection.traits.pool = Pool::decode;
    selection.select = reference_momentum();
    selection.budget = 8;
    selection.prefill_select = reference_h2o();
    selection.prefill_budget = prompt[i];
    CHECK(check_selection(layers[i], selection, first.evicted.at(l)).excess <= 1e-5);
  }
}

TEST_CASE("budgets that come of measuring are refused before anything is written", "[layers]") {
  const kvreplay::test::TemporaryFolder folder;
  const auto trace = write(folder / "toy.h5", toys(1, 40));
  RunRequest r = request_of(trace, "h2o:window=5+d2o_layers:first=0,last=0,least=0", "8");
  r.out = folder / "out";
  r.measured = [](const auto&, int layer, const std::string&) { return std::vector<double>{layer == 2 ? 9.0 : 0.0}; };
  CHECK_THROWS_WITH(run(r), Catch::Contains("window=5") && Catch::Contains("budget of 1"));
  CHECK_FALSE(std::filesystem::exists(r.out));
  r.leave_out_unfit = true;
  r.methods.emplace_back("streaming:sink=0");
  CHECK(run(r).left_out.size() == 1);

  std::atomic<bool> stop{true};
  RunRequest stopped = request_of(trace, "h2o+d2o_layers", "8");
  stopped.out = folder / "stopped";
  stopped.stop = &stop;
  CHECK(run(stopped).interrupted);
  CHECK_FALSE(std::filesystem::exists(stopped.out));
}
