// Atoms, clusters and the linear state in the engine, on its own evictions, against float64.
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/support/matrix.hpp"
#include "tests/support/reference_atoms.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

struct CompensatorCase {
  std::string text;
  // With budget 0, where nothing depends on it.
  std::function<Estimator(const ToyLayer&, Scope, const Evicted&, int budget)> reference;
};

CompensatorCase atoms_case(const std::string& text, const ReferenceAtoms& a) {
  return {text, [a](const ToyLayer& toy, Scope scope, const Evicted& evicted, int) {
            return reference_atoms(toy, scope, evicted, a);
          }};
}
CompensatorCase clusters_case(const std::string& text, double share, const ReferenceClusters& c) {
  return {text, [c, share](const ToyLayer& toy, Scope scope, const Evicted& evicted, int budget) {
            ReferenceClusters own = c;
            own.entries = share > 0 ? static_cast<int>(std::floor(share * budget + 1e-9)) : c.entries;
            return reference_clusters(toy, scope, evicted, own);
          }};
}

// Clips need radii, of which the product keeps bounds; low rank is cut anew whenever tokens join: see atoms_test.
std::vector<CompensatorCase> cases() {
  using Kappa = ReferenceAtoms::Kappa;
  using Assign = ReferenceAtoms::Assign;
  std::vector<CompensatorCase> all;
  all.push_back(atoms_case("atoms:clip=false", {}));
  all.push_back(atoms_case("atoms:assign=one,kappa=none,tilt=full,clip=false",
                           {.assign = Assign::one, .kappa = Kappa::none, .tilt = true}));
  all.push_back(atoms_case("atoms:atoms=4,assign=blocks,tilt=full,strength=0.5,clip=false",
                           {.assign = Assign::blocks, .most = 4, .tilt = true, .strength = 0.5}));
  all.push_back(atoms_case("atoms:atoms=3,kappa=lowrank,tilt=lowrank,rank=16,freeze=false,clip=false",
                           {.most = 3, .kappa = Kappa::full, .tilt = true, .freeze = false}));
  all.push_back(atoms_case("atoms:atoms=5,tilt=full,freeze=false,clip=false,decay=0.9",
                           {.most = 5, .tilt = true, .freeze = false, .decay = 0.9}));
  all.push_back(clusters_case("clusters", 0.2, {}));
  all.push_back(clusters_case("clusters:entries=4,validate=false,fit=0,gate=false", 0,
                              {.entries = 4, .fit = 0, .validate = false, .gate = false}));
  all.push_back(
      clusters_case("clusters:entries=6,fit=8,judge=4,every=7", 0, {.entries = 6, .fit = 8, .judge = 4, .every = 7}));
  all.push_back(clusters_case("clusters:entries=4,validate=false,threshold=0.5,sharpness=4,least_gate=0.1", 0,
                              {.entries = 4, .validate = false, .threshold = 0.5, .sharpness = 4, .least_gate = 0.1}));
  all.push_back({"linear", [](const ToyLayer& toy, Scope scope, const Evicted& evicted, int) {
                   return reference_linear(toy, scope, evicted, 8, ReplayOptions().seed);
                 }});
  return all;
}

void check_compensators(const ToyOptions& options, const std::vector<std::string>& methods,
                        const std::vector<int>& budgets) {
  const ToyLayer toy = make_toy_layer(options);
  const Layer layer = engine_layer(toy);
  const std::vector<CompensatorCase> all = cases();
  std::vector<Method> carriers;
  for (const CompensatorCase& c : all) {
    carriers.push_back(parse_method("full+" + c.text));
  }
  ReplayOptions replay_options;
  replay_options.block_steps = 16;
  for (const Method& m : carriers) {
    replay_options.compensators.push_back(&*m.compensate);
  }
  for (const std::string& text : methods) {
    for (const int budget : budgets) {
      const Method method = parse_method(text);
      Job job;
      job.method = &method;
      job.budget = budget;
      const CellResult cell = replay(layer, std::span(&job, 1), replay_options).cells[0];
      INFO(text << " at budget " << budget << ": " << describe(options));
      REQUIRE(cell.error == "");
      const Evicted recorded = recorded_evictions(cell);
      const NamedSeries found = engine_series(cell);
      for (std::size_t i = 0; i < all.size(); ++i) {
        const Scope scope = method.traits.scope;
        const NamedSeries truth = estimate_metrics(toy, scope, recorded, cell.compensators[i],
                                                   all[i].reference(toy, scope, recorded, budget));
        for (const std::string& difference : differences(truth, found)) {
          FAIL_CHECK(difference);
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("atoms, clusters and the linear state estimate what the reference does") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  check_compensators(options(group_size, prompt_len, element), {"h2o", "streaming:interval=5"}, {1, 9, 72});
}

TEST_CASE("atoms, clusters and the linear state follow every scope") {
  check_compensators(options(3, 30, Element::f32), {"h2o:scope=query_head", "tova"}, {20});
}

TEST_CASE("atoms, clusters and the linear state stand huge logits and equal keys") {
  ToyOptions o = options(1, 12, Element::f32);
  o.kind = GENERATE(ToyKind::equal_keys, ToyKind::sharp, ToyKind::huge_logits);
  const ToyLayer toy = make_toy_layer(o);
  const Layer layer = engine_layer(toy);
  const std::vector<CompensatorCase> all = cases();
  for (const CompensatorCase& c : all) {
    for (const int budget : {1, 9}) {
      const Method method = parse_method("streaming+" + c.text);
      Job job;
      job.method = &method;
      job.budget = budget;
      const CellResult cell = replay(layer, std::span(&job, 1), {}).cells[0];
      INFO(c.text << " at budget " << budget << ": " << describe(o));
      REQUIRE(cell.error == "");
      const MatD error = engine_series(cell).at("error_output");
      for (Eigen::Index i = 0; i < error.size(); ++i) {
        CHECK(!std::isinf(error.data()[i]));
      }
    }
  }
}
