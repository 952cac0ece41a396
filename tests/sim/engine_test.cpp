// What holds of the engine whatever the method: the same bits for any company and number of
// threads, the same numbers for any block size, and right answers at the edges of float32.
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/support/reference_compare.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

const std::vector<std::string> kTexts = {"full",
                                         "streaming",
                                         "h2o",
                                         "tova",
                                         "tova:scope=query_head",
                                         "h2o:window=2,interval=3",
                                         "momentum",
                                         "residual",
                                         "streaming:evict=before_attention+moments"};

ToyOptions toy_options(ToyKind kind = ToyKind::structured) {
  ToyOptions o;
  o.group_size = 2;
  o.n_tokens = 90;
  o.prompt_len = 20;
  o.v_head_dim = 12;
  o.hidden = 20;
  o.kind = kind;
  return o;
}

struct Run {
  std::vector<Method> methods;
  std::vector<Method> beside;
  LayerResult result;
};

Run run(const Layer& layer, const std::vector<std::string>& texts, int budget, int threads, int block_steps,
        const std::vector<std::string>& beside = {"mean", "moments", "gaussian"}) {
  Run r;
  for (const std::string& text : texts) {
    r.methods.push_back(parse_method(text));
  }
  for (const std::string& text : beside) {
    r.beside.push_back(parse_method("full+" + text));
  }
  std::vector<Job> jobs;
  for (const Method& m : r.methods) {
    Job job;
    job.method = &m;
    job.budget = budget;
    jobs.push_back(job);
  }
  ReplayOptions options;
  options.threads = threads;
  options.block_steps = block_steps;
  for (const Method& m : r.beside) {
    options.compensators.push_back(&*m.compensate);
  }
  r.result = replay(layer, jobs, options);
  return r;
}

}  // namespace

TEST_CASE("one thread and two give the same bits") {
  const Layer layer = engine_layer(make_toy_layer(toy_options()));
  const Run one = run(layer, kTexts, 11, 1, 64), two = run(layer, kTexts, 11, 2, 64);
  for (std::size_t i = 0; i < kTexts.size(); ++i) {
    INFO(kTexts[i]);
    CHECK(one.result.cells[i].error.empty());
    CHECK(first_bit_difference(one.result.cells[i], two.result.cells[i]).empty());
  }
}

TEST_CASE("a method gives the same bits alone and in company") {
  const Layer layer = engine_layer(make_toy_layer(toy_options()));
  const Run all = run(layer, kTexts, 11, 2, 16);
  for (std::size_t i = 0; i < kTexts.size(); ++i) {
    INFO(kTexts[i]);
    const Run alone = run(layer, {kTexts[i]}, 11, 2, 16);
    CHECK(first_bit_difference(alone.result.cells[0], all.result.cells[i]).empty());
  }
}

TEST_CASE("blocks of 1, 7 and 64 steps agree") {
  const Layer layer = engine_layer(make_toy_layer(toy_options()));
  const Run blocks = run(layer, kTexts, 11, 2, 64);
  for (const int block_steps : {1, 7}) {
    const Run other = run(layer, kTexts, 11, 2, block_steps);
    for (std::size_t i = 0; i < kTexts.size(); ++i) {
      INFO(kTexts[i] << " in blocks of " << block_steps);
      CHECK(other.result.cells[i].evicted_at == blocks.result.cells[i].evicted_at);
      for (const std::string& d :
           differences(engine_series(blocks.result.cells[i]), engine_series(other.result.cells[i]))) {
        FAIL_CHECK(d);
      }
    }
  }
}

TEST_CASE("the evicted output is right to 1e-4 where it holds 1e-6 of the mass") {
  const ToyLayer toy = make_toy_layer(toy_options(ToyKind::small_evicted));
  const Layer layer = engine_layer(toy);
  const Run r = run(layer, {"streaming:sink=2"}, 6, 1, 64);
  REQUIRE(r.result.cells[0].error.empty());
  MetricsRequest request;
  request.attends = attends_from(toy, Scope::kv_head, recorded_evictions(r.result.cells[0]));
  const NamedSeries truth = reference_metrics(toy, request), found = engine_series(r.result.cells[0]);
  int n = 0;
  for (Eigen::Index i = 0; i < truth.at("evicted_mass").size(); ++i) {
    const double mass = truth.at("evicted_mass").data()[i];
    CHECK(mass < 1e-5);
    if (mass < 1.01e-6) {
      continue;
    }
    ++n;
    for (const char* name : {"evicted_mass", "error", "cos_retained_evicted", "norm_ratio_evicted", "error_parallel",
                             "error_orthogonal"}) {
      INFO(name << " at evicted mass " << mass);
      const double expected = truth.at(name).data()[i], size = name[0] == 'c' || name[0] == 'n' ? 1 : expected;
      CHECK(std::abs(found.at(name).data()[i] - expected) <= 1e-4 * std::abs(size));
    }
  }
  CHECK(n > 50);
}

TEST_CASE("logits of 1e4 either way: rows with usable retained mass are right, the others are left out") {
  const ToyLayer toy = make_toy_layer(toy_options(ToyKind::huge_logits));
  const Layer layer = engine_layer(toy);
  const std::vector<std::string> texts = {"streaming", "h2o", "tova", "momentum"};
  // Estimates multiply logits of 1e4 that float32 statistics hold to 1e-7 only: without
  // compensators.
  const Run r = run(layer, texts, 7, 2, 16, {});
  for (std::size_t i = 0; i < texts.size(); ++i) {
    INFO(texts[i]);
    REQUIRE(r.result.cells[i].error.empty());
    MetricsRequest request;
    request.attends = attends_from(toy, r.methods[i].traits.scope, recorded_evictions(r.result.cells[i]));
    const NamedSeries truth = reference_metrics(toy, request);
    if (texts[i] == "streaming") {
      CHECK(truth.at("error").array().isNaN().count() > 10);
    }
    for (const std::string& d : differences(truth, engine_series(r.result.cells[i]))) {
      FAIL_CHECK(d);
    }
  }
}

TEST_CASE("equal keys: ties drop the older token, and every estimate is exact") {
  const ToyLayer toy = make_toy_layer(toy_options(ToyKind::equal_keys));
  const Run r = run(engine_layer(toy), {"tova"}, 7, 1, 16);
  const CellResult& cell = r.result.cells[0];
  const Evicted at = recorded_evictions(cell);
  for (Pos pos = 0; pos < toy.options.n_tokens; ++pos) {
    CHECK(at(0, pos) == std::clamp(pos + 8 - toy.options.prompt_len, 0, toy.n_steps()));
  }
  const NamedSeries found = engine_series(cell);
  for (const char* name : {"error_corrected.mean", "error_corrected.moments", "error_corrected.gaussian"}) {
    CHECK(found.at(name).maxCoeff() < 1e-5);
  }
  CHECK(found.at("error").minCoeff() > 0.01);
}

TEST_CASE("sharp heads are as right as smooth ones") {
  const ToyLayer toy = make_toy_layer(toy_options(ToyKind::sharp));
  const Layer layer = engine_layer(toy);
  const std::vector<std::string> texts = {"streaming", "h2o", "tova"};
  const Run r = run(layer, texts, 9, 2, 16, {});
  for (std::size_t i = 0; i < texts.size(); ++i) {
    INFO(texts[i]);
    REQUIRE(r.result.cells[i].error.empty());
    MetricsRequest request;
    request.attends = attends_from(toy, r.methods[i].traits.scope, recorded_evictions(r.result.cells[i]));
    for (const std::string& d : differences(reference_metrics(toy, request), engine_series(r.result.cells[i]))) {
      FAIL_CHECK(d);
    }
  }
}

TEST_CASE("a soft-cap bends every logit") {
  ToyOptions o = toy_options();
  o.softcap = 2;
  const ToyLayer toy = make_toy_layer(o);
  const std::vector<std::string> texts = {"streaming", "h2o", "tova"};
  const Run r = run(engine_layer(toy), texts, 9, 2, 16, {});
  for (std::size_t i = 0; i < texts.size(); ++i) {
    INFO(texts[i]);
    REQUIRE(r.result.cells[i].error.empty());
    MetricsRequest request;
    request.attends = attends_from(toy, r.methods[i].traits.scope, recorded_evictions(r.result.cells[i]));
    for (const std::string& d : differences(reference_metrics(toy, request), engine_series(r.result.cells[i]))) {
      FAIL_CHECK(d);
    }
  }
}

TEST_CASE("the Gaussian's clips bind only where exact radii would, and never bind harder") {
  ToyOptions few = toy_options();
  few.prompt_len = 1;  // clips bind where few tokens have left
  const ToyLayer toy = make_toy_layer(few);
  const ReferenceCompensator tight{"gaussian", Compensation::gaussian};
  ReferenceCompensator loose{"gaussian:clip=false", Compensation::gaussian};
  loose.clip = false;
  const Run r = run(engine_layer(toy), {"h2o"}, 9, 2, 16, {"gaussian", "gaussian:clip=false"});
  REQUIRE(r.result.cells[0].error.empty());
  MetricsRequest request;
  request.attends = attends_from(toy, Scope::kv_head, recorded_evictions(r.result.cells[0]));
  request.measured = {tight, loose};
  const NamedSeries truth = reference_metrics(toy, request), found = engine_series(r.result.cells[0]);
  int n_same = 0, n_clipped = 0;
  for (const char* name : {"error_corrected", "cos_estimate", "log_mass_ratio"}) {
    const MatD &low = truth.at(name + std::string(".gaussian")),
               &high = truth.at(name + std::string(".gaussian:clip=false")),
               &got = found.at(name + std::string(".gaussian"));
    for (Eigen::Index i = 0; i < low.size(); ++i) {
      if (std::isnan(low.data()[i])) {
        continue;
      }
      // Mass and value are clipped apart: the corrected error sees either.
      const bool clipped = std::abs(truth.at("error_corrected.gaussian").data()[i] -
                                    truth.at("error_corrected.gaussian:clip=false").data()[i]) > 1e-9;
      if (!clipped) {
        ++n_same;
        CHECK(got.data()[i] == Approx(low.data()[i]).epsilon(1e-4).margin(1e-4));
        continue;
      }
      ++n_clipped;
      if (name[0] == 'l') {
        CHECK(got.data()[i] <= low.data()[i] + 1e-4);
        CHECK(got.data()[i] >= high.data()[i] - 1e-4);
      }
    }
  }
  CHECK(n_same > 100);
  CHECK(n_clipped > 0);
}

TEST_CASE("a method's own compensator makes its output") {
  const ToyLayer toy = make_toy_layer(toy_options());
  const std::vector<std::string> texts = {"h2o+mean", "h2o+moments", "tova:scope=query_head+moments"};
  const std::vector<ReferenceCompensator> acting = {
      {"mean", Compensation::mean}, {"moments", Compensation::moments}, {"moments", Compensation::moments}};
  const Run r = run(engine_layer(toy), texts, 9, 2, 16, {});
  for (std::size_t i = 0; i < texts.size(); ++i) {
    INFO(texts[i]);
    REQUIRE(r.result.cells[i].error.empty());
    MetricsRequest request;
    request.attends = attends_from(toy, r.methods[i].traits.scope, recorded_evictions(r.result.cells[i]));
    request.acting = acting[i];
    request.measured = {acting[i]};
    for (const std::string& d : differences(reference_metrics(toy, request), engine_series(r.result.cells[i]))) {
      FAIL_CHECK(d);
    }
  }
}

TEST_CASE("spans are retained as far as their tokens are") {
  const ToyLayer toy = make_toy_layer(toy_options());
  Layer layer = engine_layer(toy);
  layer.spans = {{"needle", 5, 12}, {"instruction", 0, 3}};
  const std::vector<std::string> texts = {"h2o", "tova", "tova:scope=query_head", "momentum"};
  const Run r = run(layer, texts, 9, 2, 16, {});
  for (std::size_t i = 0; i < texts.size(); ++i) {
    INFO(texts[i]);
    const Scope scope = r.methods[i].traits.scope;
    const Evicted at = recorded_evictions(r.result.cells[i]);
    const NamedSeries found = engine_series(r.result.cells[i]);
    CHECK((found.at("retention.needle") - reference_retention(toy, scope, at, 5, 12)).cwiseAbs().maxCoeff() < 1e-6);
    CHECK((found.at("retention.instruction") - reference_retention(toy, scope, at, 0, 3)).cwiseAbs().maxCoeff() < 1e-6);
  }
}

TEST_CASE("subspaces and centroids at checkpoints are those of the reference") {
  const ToyLayer toy = make_toy_layer(toy_options());
  const Run r = run(engine_layer(toy), {"h2o"}, 24, 2, 16, {});
  const CellResult& cell = r.result.cells[0];
  const Evicted at = recorded_evictions(cell);
  int n = 0;
  for (const kvreplay::Series& s : cell.series) {
    const std::string name(info(s.metric).name);
    if (!info(s.metric).at_checkpoints) {
      continue;
    }
    REQUIRE(s.steps.size() == 16);
    CHECK(s.steps.back() == toy.n_steps() - 1);
    const bool of_keys = name.find("_k") != std::string::npos;
    for (int kv = 0; kv < toy.options.n_kv_heads; ++kv) {
      for (std::size_t i = 0; i < s.steps.size(); ++i) {
        const Pos now = toy.options.prompt_len + s.steps[i];
        const MatD& x = (of_keys ? toy.k : toy.v)[static_cast<std::size_t>(kv)];
        std::vector<Eigen::Index> kept, lost;
        for (Pos pos = 0; pos <= now; ++pos) {
          (s.steps[i] < at(kv, pos) ? kept : lost).push_back(pos);
        }
        const float found = s.row(kv)[i];
        if (kept.size() < 8 || lost.size() < 8) {
          CHECK(std::isnan(found));
          continue;
        }
        INFO(name << " at step " << s.steps[i]);
        ++n;
        if (name.find("chance") != std::string::npos) {
          // Random splits of equal sizes: between the smallest and the largest of many.
          double least = 1e300, most = -1e300;
          std::vector<Eigen::Index> all = kept;
          all.insert(all.end(), lost.begin(), lost.end());
          unsigned state = 7;
          for (int split = 0; split < 60; ++split) {
            for (std::size_t j = all.size(); j-- > 1;) {
              state = state * 1664525u + 1013904223u;
              std::swap(all[j], all[(state >> 8) % (j + 1)]);
            }
            const std::vector<Eigen::Index> r_side(all.begin(), all.begin() + static_cast<long>(kept.size())),
                e_side(all.begin() + static_cast<long>(kept.size()), all.end());
            const Subspaces sub = reference_subspaces(x(r_side, Eigen::all), x(e_side, Eigen::all));
            const double value = name.find("energy") != std::string::npos ? sub.outside_energy : sub.subspace_cos;
            least = std::min(least, value);
            most = std::max(most, value);
          }
          CHECK(found >= least - 0.1);
          CHECK(found <= most + 0.1);
          continue;
        }
        const Subspaces sub = reference_subspaces(x(kept, Eigen::all), x(lost, Eigen::all));
        const double expected = name.find("energy") != std::string::npos     ? sub.outside_energy
                                : name.find("subspace") != std::string::npos ? sub.subspace_cos
                                                                             : sub.centroid_cos;
        CHECK(found == Approx(expected).margin(1e-4));
      }
    }
  }
  CHECK(n > 200);
}
