#include "tests/support/matrix.hpp"

#include <catch2/catch.hpp>
#include <memory>

namespace kvreplay::testing {
namespace {

const std::vector<std::pair<std::string, ReferenceCompensator>>& compensators() {
  static const std::vector<std::pair<std::string, ReferenceCompensator>> all = {
      {"mean", {"mean", Compensation::mean}},
      {"moments", {"moments", Compensation::moments}},
      // Clips need radii, of which the engine keeps bounds: see engine_test.
      {"gaussian:clip=false", {"gaussian:clip=false", Compensation::gaussian, false, 1, true, false}},
      {"gaussian:variance=full,strength=0.5,clip=false",
       {"gaussian:variance=full,clip=false,strength=0.5", Compensation::gaussian, true, 0.5, true, false}},
      {"gaussian:freeze=false,clip=false",
       {"gaussian:freeze=false,clip=false", Compensation::gaussian, false, 1, false, false}},
  };
  return all;
}

std::vector<ReferenceCompensator> measured() {
  std::vector<ReferenceCompensator> out;
  for (const auto& [text, c] : compensators()) {
    out.push_back(c);
  }
  return out;
}

// Compensators to measure, as the engine takes them.
struct EngineCompensators {
  std::vector<Method> methods;
  std::vector<const PartUse*> parts;
  EngineCompensators() {
    for (const auto& [text, c] : compensators()) {
      methods.push_back(parse_method("full+" + text));
    }
    for (const Method& m : methods) {
      parts.push_back(&*m.compensate);
    }
  }
};

void check_traits(const Case& c, const Method& method) {
  INFO(c.text);
  CHECK(method.traits.scope == c.traits.scope);
  CHECK(method.traits.pool == c.traits.pool);
  CHECK(method.traits.group == c.traits.group);
  CHECK(method.traits.interval == c.traits.interval);
  CHECK(method.traits.evict == c.traits.evict);
  CHECK(method.traits.decode == c.traits.decode);
}

}  // namespace

Traits traits(Scope scope, Pool pool, Order order, Decode decode) {
  Traits t;
  t.scope = scope;
  t.pool = pool;
  t.evict = order;
  t.decode = decode;
  return t;
}

ToyOptions options(int group_size, Pos prompt_len, Element element) {
  ToyOptions o;
  o.group_size = group_size;
  o.n_tokens = 72;
  o.prompt_len = prompt_len;
  o.v_head_dim = 12;
  o.hidden = 20;
  o.element = element;
  o.seed = static_cast<unsigned>(100 * group_size + prompt_len + static_cast<int>(element));
  return o;
}

std::string describe(const ToyOptions& o) {
  const char* elements[] = {"f32", "f16", "bf16"};
  return "group_size " + std::to_string(o.group_size) + ", prompt_len " + std::to_string(o.prompt_len) + ", n_tokens " +
         std::to_string(o.n_tokens) + ", " + elements[static_cast<int>(o.element)] + ", kind " +
         std::to_string(static_cast<int>(o.kind)) + ", seed " + std::to_string(o.seed);
}

SelectionRequest request_of(const Case& c, int budget) {
  SelectionRequest r;
  r.traits = c.traits;
  r.select = c.select;
  r.budget = budget;
  r.budgeted = c.budgeted;
  return r;
}

void check_layer(const ToyOptions& options, const std::vector<Case>& cases, const std::vector<int>& budgets,
                 bool with_compensators) {
  const ToyLayer toy = make_toy_layer(options);
  const Layer layer = engine_layer(toy);
  std::vector<Method> methods;
  for (const Case& c : cases) {
    methods.push_back(parse_method(c.text));
    check_traits(c, methods.back());
  }
  std::vector<Job> jobs;
  std::vector<const Case*> case_of;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    for (const int budget : budgets) {
      if (budget < cases[i].least_budget) {
        continue;
      }
      Job job;
      job.method = &methods[i];
      job.budget = budget;
      jobs.push_back(job);
      case_of.push_back(&cases[i]);
    }
  }
  const EngineCompensators beside;
  ReplayOptions replay_options;
  replay_options.threads = 2;
  replay_options.block_steps = 16;
  if (with_compensators) {
    replay_options.compensators = beside.parts;
  }
  const LayerResult result = replay(layer, jobs, replay_options);
  REQUIRE(result.cells.size() == jobs.size());
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    const Case& c = *case_of[i];
    const int budget = jobs[i].budget;
    const CellResult& cell = result.cells[i];
    INFO(c.text << " at budget " << budget << ": " << describe(options));
    CHECK(cell.error == "");
    if (!cell.error.empty()) {
      continue;
    }
    const Evicted recorded = recorded_evictions(cell);
    const SelectionRequest selection = request_of(c, budget);
    CHECK(check_selection(toy, selection, recorded).excess <= kScoreTolerance);
    const SelectionResult own = reference_selection(toy, selection);
    if (own.margin > 1e-4) {
      CHECK(own.evicted_at == recorded);
    }

    MetricsRequest metrics;
    metrics.attends = attends_from(toy, c.traits.scope, recorded);
    if (with_compensators) {
      metrics.measured = measured();
    }
    const NamedSeries truth = reference_metrics(toy, metrics), found = engine_series(cell);
    for (const std::string& difference : differences(truth, found)) {
      FAIL_CHECK(difference);
    }
    CHECK(found.at("resident") == reference_resident(toy, c.traits.scope, recorded));
    // Attended is of one query head, resident of the KV head's sets together.
    const double sets = c.traits.scope == Scope::query_head ? options.group_size : 1;
    CHECK((found.at("attended") * sets - found.at("resident")).cwiseAbs().maxCoeff() < 1e-4);
    const double slot = (options.head_dim + options.v_head_dim) * element_bytes(options.element);
    CHECK(found.at("bytes") == slot * found.at("resident"));
    CHECK(found.at("bytes_read") == found.at("bytes"));
    if (budget >= options.n_tokens || !c.budgeted) {
      CHECK(found.at("error").isZero(0));
      CHECK(found.at("error_output").isZero(0));
      CHECK(found.at("evicted_mass").isZero(0));
    }
  }
}

}  // namespace kvreplay::testing
