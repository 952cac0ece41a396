// Parts that throw on purpose, in every function that the engine calls, at several steps, on any number of threads:
// their cell says so, and every other cell is the same to the last bit.
#include <atomic>
#include <catch2/catch.hpp>
#include <filesystem>
#include <limits>
#include <new>
#include <set>
#include <stdexcept>

#include "policies/catalogue.hpp"
#include "policies/moments.hpp"
#include "sim/parallel.hpp"
#include "sim/run.hpp"
#include "tests/support/reference_compare.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

enum class Kind { sentence, silent, memory, number };

// What throws next, where, and from which position on. Set before a replay, read by its threads.
struct Fault {
  std::string_view where;
  Pos at = 0;
  Kind kind = Kind::sentence;
};
Fault fault;
std::atomic<bool> reached;

void pass(std::string_view where, Pos now) {
  if (where != fault.where || now < fault.at) {
    return;
  }
  reached = true;
  switch (fault.kind) {
    case Kind::sentence:
      throw std::runtime_error("thrown on purpose");
    case Kind::silent:
      throw std::runtime_error("");
    case Kind::memory:
      throw std::bad_alloc();
    case Kind::number:
      throw 42;
  }
}

constexpr Pos kAlways = 1 << 20;  // of functions that know no position

struct Empty {};

template <class Base>
class Chooser : public Base {
 public:
  using Config = Empty;
  static constexpr std::string_view kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  Chooser(const Config&, const SetShape&) { pass("selector", kAlways); }
  void prefill(const View& view) override { pass("prefill", view.now); }
  void observe(const View& view) override { pass("observe", view.now); }
  int surplus(const View& view) const override {
    pass("surplus", view.now);
    return Selector::surplus(view);
  }
  void score(const View& view, std::span<float> out) override {
    pass("score", view.now);
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(view.pos[i]);
    }
  }
  void evicted(const View& view, std::span<const int>) override { pass("evicted", view.now); }
};

class ThrowSelect final : public Chooser<Selector> {
 public:
  static constexpr std::string_view kName = "throw_select";
  using Chooser::Chooser;
};

class ThrowOracle final : public Chooser<OracleSelector> {
 public:
  static constexpr std::string_view kName = "throw_oracle";
  static constexpr Foresight kForesight = Foresight::oracle;
  using Chooser::Chooser;
  static Needs needs(const Config&) { return {.future_attention = true}; }
  void reveal(const Future&) override { pass("reveal", kAlways); }
};

class ThrowRead final : public Reader {
 public:
  using Config = Empty;
  static constexpr std::string_view kName = "throw_read", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  ThrowRead(const Config&, const SetShape&) { pass("reader", kAlways); }
  void prefill(const View& view) override { pass("reader prefill", view.now); }
  void choose(const View& view, int, int, std::vector<int>& slots) override {
    pass("choose", view.now);
    slots.push_back(static_cast<int>(view.pos.size()) - 1);
  }
  double metadata_bytes(int) const override {
    pass("metadata_bytes", kAlways);
    return 0;
  }
  double scoring_bytes(int) const override {
    pass("scoring_bytes", kAlways);
    return 0;
  }
};

class ThrowRewrite final : public Rewriter {
 public:
  using Config = Empty;
  static constexpr std::string_view kName = "throw_rewrite", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  ThrowRewrite(const Config&, const SetShape&) { pass("rewriter", kAlways); }
  void step(Cache& cache) override { pass("step", cache.now); }
  void evicted(Cache& cache, std::span<const int>) override { pass("rewriter evicted", cache.now); }
};

class ThrowAllocate final : public Allocator {
 public:
  using Config = Empty;
  static constexpr std::string_view kName = "throw_allocate", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  explicit ThrowAllocate(const Config&) { pass("allocator", kAlways); }
  bool over_sets() const override {
    pass("over_sets", kAlways);
    return true;
  }
  std::vector<int> assign(const std::vector<std::vector<float>>& scores, int mean_budget) const override {
    pass("assign", kAlways);
    return std::vector<int>(scores.size(), mean_budget);
  }
  bool ranks_tokens() const override {
    pass("ranks_tokens", kAlways);
    return true;
  }
  void over_tokens(const View& view, std::span<const TokenSpan>, int, std::span<float>) const override {
    pass("over_tokens", view.now);
  }
};

class ThrowCompensate final : public Compensator {
 public:
  using Config = Empty;
  static constexpr std::string_view kName = "throw_compensate", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  static Needs needs(const Config&) { return {.prompt_queries = 2}; }
  ThrowCompensate(const Config&, const SetShape& shape) : width_(shape.v_head_dim) { pass("compensator", kAlways); }
  MomentNeeds needs() const override {
    pass("needs", kAlways);
    return {};
  }
  bool sees_retained() const override {
    pass("sees_retained", kAlways);
    return true;
  }
  void prompt(const PromptCut&) override { pass("prompt", kAlways); }
  void estimate(const EvictedBlock& block, Estimate& out) override {
    pass("estimate", block.losses.empty() ? 0 : block.losses.back().pos);
    out.log_mass = Eigen::ArrayXd::Constant(block.q.rows(), -std::numeric_limits<double>::infinity());
    out.value = MatD::Zero(block.q.rows(), width_);
  }
  double state_bytes() const override {
    pass("state_bytes", kAlways);
    return 0;
  }

 private:
  int width_;
};

constinit const PartInfo kParts[] = {describe<ThrowSelect>(),  describe<ThrowOracle>(),   describe<ThrowRead>(),
                                     describe<ThrowRewrite>(), describe<ThrowAllocate>(), describe<ThrowCompensate>()};

void add_parts() {
  static const bool added = [] {
    for (const PartInfo& part : kParts) {
      add_part(part);
    }
    return true;
  }();
  (void)added;
}

const std::vector<std::string> kCompany = {"h2o", "tova:scope=query_head", "streaming+moments", "h2o:scope=layer"};

std::vector<CellResult> replayed(const Layer& layer, const std::vector<std::string>& texts, int threads,
                                 const Fault& armed = {}) {
  std::vector<Method> methods;
  for (const std::string& text : texts) {
    methods.push_back(parse_method(text));
  }
  std::vector<Job> jobs;
  for (const Method& m : methods) {
    Job job;
    job.method = &m;
    job.budget = 9;
    jobs.push_back(job);
  }
  ReplayOptions options;
  options.threads = threads;
  options.block_steps = 16;
  fault = armed;
  reached = false;
  std::vector<CellResult> cells = replay(layer, jobs, options).cells;
  fault = {};
  return cells;
}

struct Case {
  std::string text;
  std::vector<std::string_view> places;
};
const std::vector<Case> kCases = {
    {"throw_select", {"selector", "prefill", "observe", "surplus", "score", "evicted"}},
    {"throw_oracle", {"selector", "reveal", "prefill", "observe", "score"}},
    {"h2o+throw_read", {"reader", "reader prefill", "choose", "metadata_bytes", "scoring_bytes"}},
    {"h2o+throw_rewrite", {"rewriter", "step", "rewriter evicted"}},
    {"h2o+throw_allocate", {"allocator", "over_sets", "assign", "over_tokens"}},
    {"h2o+throw_compensate", {"compensator", "needs", "sees_retained", "prompt", "estimate", "state_bytes"}},
};

}  // namespace

TEST_CASE("a part that throws fails its own cell, and no other notices") {
  add_parts();
  ToyOptions o;
  o.n_kv_heads = 3;
  o.group_size = 2;
  o.n_tokens = 80;
  o.prompt_len = 30;
  o.hidden = 12;
  const Layer layer = engine_layer(make_toy_layer(o));
  const std::vector<CellResult> healthy = replayed(layer, kCompany, 1);
  int n_felt = 0;
  for (const Case& c : kCases) {
    std::vector<std::string> texts = kCompany;
    texts.insert(texts.begin() + 2, c.text);
    REQUIRE(replayed(layer, texts, 2)[2].error == "");
    for (const std::string_view place : c.places) {
      bool somewhere = false;
      for (const Pos at : {0, 29, 30, 31, 46, 60, 79}) {
        for (const int threads : {1, 3}) {
          for (const Kind kind : {Kind::sentence, Kind::silent, Kind::memory, Kind::number}) {
            if (kind != Kind::sentence && (at != 46 || threads == 1)) {
              continue;
            }
            INFO(c.text << " throws in " << place << " from position " << at << " on, " << threads << " threads");
            const std::vector<CellResult> cells = replayed(layer, texts, threads, {place, at, kind});
            CHECK(cells[2].error.empty() != reached);
            somewhere |= reached;
            if (reached) {
              ++n_felt;
              CHECK(cells[2].error == (kind == Kind::sentence ? "thrown on purpose"
                                       : kind == Kind::silent ? "it failed and did not say why"
                                       : kind == Kind::memory
                                           ? "out of memory; lower --memory or replay fewer methods at once"
                                           : "it failed with something that is no std::exception"));
            }
            for (std::size_t i = 0; i < healthy.size(); ++i) {
              const CellResult& other = cells[i < 2 ? i : i + 1];
              CHECK(other.error == "");
              CHECK(first_bit_difference(healthy[i], other).empty());
            }
          }
        }
      }
      INFO(c.text << ": " << place);
      CHECK(somewhere);
    }
  }
  CHECK(n_felt > 200);
}

TEST_CASE("a run names the cell that failed and keeps the others") {
  add_parts();
  RunRequest request;
  request.traces = {std::filesystem::path(KVREPLAY_SAMPLES) / "stories260k-512.h5"};
  request.methods = {"streaming", "throw_select", "tova"};
  request.budgets = {"16", "32"};
  request.layers = {1};
  request.max_steps = 10;
  request.threads = 2;
  const Kind kind = GENERATE(Kind::sentence, Kind::memory, Kind::number);
  fault = {"score", 0, kind};
  std::multiset<std::string> seen;
  request.cell = [&](const CellId& id, const CellResult&, const Layer&) { seen.insert(id.label); };
  const RunOutcome outcome = run(request);
  fault = {};
  CHECK(outcome.n_cells == 4);
  CHECK(seen == std::multiset<std::string>{"streaming", "streaming", "tova", "tova"});
  REQUIRE(outcome.failed.size() == 2);
  CHECK(outcome.failed[0].starts_with("stories260k-512 layer 1, throw_select at budget 16: "));
  CHECK(outcome.failed[1].starts_with("stories260k-512 layer 1, throw_select at budget 32: "));
}

TEST_CASE("the first exception of a team of threads comes out after all tasks") {
  for (const int threads : {1, 2, 5}) {
    std::atomic<int> n = 0;
    const auto team = [&] {
      parallel(100, threads, [&](int i) {
        ++n;
        if (i % 7 == 3) {
          throw i;
        }
      });
    };
    CHECK_THROWS_AS(team(), int);
    CHECK(n == 100);
  }
}
