// Every merging method against the float64 reference: what comes out of slots that change, who is evicted where the
// selector sees them, and what they cost.
#include <catch2/catch.hpp>

#include "tests/support/reference_compare.hpp"
#include "tests/support/reference_merging.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

struct Case {
  std::string text;
  MakeMerger merger;
  MergedSelection selection;
  bool moves = true;              // at a small budget it changes what comes out
  MakeSelector select = nullptr;  // checked on the cache without merges: the prompt's cut alone
};

ToyOptions toy(int group_size, Pos prompt_len, Element element) {
  ToyOptions o;
  o.group_size = group_size;
  o.n_tokens = 60;
  o.prompt_len = prompt_len;
  o.v_head_dim = 12;
  o.element = element;
  o.seed = static_cast<unsigned>(1000 * group_size + 10 * prompt_len + static_cast<int>(element));
  return o;
}

CellResult replay_one(const Layer& layer, const Method& method, int budget) {
  Job job;
  job.method = &method;
  job.budget = budget;
  ReplayOptions options;
  options.block_steps = 16;
  return replay(layer, std::span(&job, 1), options).cells[0];
}

void check(const ToyOptions& options, const std::vector<Case>& cases, const std::vector<int>& budgets) {
  const ToyLayer toy = make_toy_layer(options);
  const Layer layer = engine_layer(toy);
  for (const Case& c : cases) {
    const Method method = parse_method(c.text);
    for (const int budget : budgets) {
      INFO(c.text << " at budget " << budget << ": group_size " << options.group_size << ", prompt_len "
                  << options.prompt_len << ", element " << static_cast<int>(options.element));
      const CellResult cell = replay_one(layer, method, budget);
      CHECK(cell.error == "");
      if (!cell.error.empty()) {
        continue;
      }
      const Evicted recorded = recorded_evictions(cell);
      MergingRequest request;
      request.traits = method.traits;
      request.budget = budget;
      request.merger = c.merger;
      request.selection = c.selection;
      const MergingResult own = reference_merging(toy, request, recorded);
      CHECK(own.excess <= kScoreTolerance);
      if (c.select) {
        SelectionRequest selection;
        selection.traits = method.traits;
        selection.select = c.select;
        selection.budget = budget;
        CHECK(check_selection(toy, selection, recorded).excess <= kScoreTolerance);
        const SelectionResult free = reference_selection(toy, selection);
        if (free.margin > 1e-4) {
          CHECK(free.evicted_at == recorded);
        }
      }
      MetricsRequest metrics;
      metrics.attends = attends_from(toy, method.traits.scope, recorded);
      metrics.rewritten = [&](int q_head, int step) -> Eigen::VectorXd {
        return own.output[static_cast<std::size_t>(q_head)].row(step);
      };
      const NamedSeries truth = reference_metrics(toy, metrics), found = engine_series(cell);
      for (const std::string& difference : differences(truth, found)) {
        FAIL_CHECK(difference);
      }
      const MatD resident = reference_resident(toy, method.traits.scope, recorded);
      const double number = element_bytes(options.element);
      CHECK(found.at("bytes") == number * ((options.head_dim + options.v_head_dim) * resident + own.biased));
      if (budget >= options.n_tokens) {
        CHECK(found.at("error").isZero(0));
        CHECK(found.at("error_output").isZero(0));
      } else if (budget == 9 && c.moves && options.prompt_len >= 40) {
        CHECK((truth.at("error_output") - truth.at("error")).cwiseAbs().maxCoeff() > 1e-3);
      }
    }
  }
}

KeepKv keep(KeepVariant variant, double threshold = 0.3, double alpha = 0.9, int window = 32) {
  KeepKv k;
  k.variant = variant;
  k.threshold = threshold;
  k.alpha = alpha;
  k.window = window;
  k.lambda_max = 1.5;  // beyond, the key divides by a small difference of logits, of which float32 has too little
  return k;
}

std::vector<Case> cases() {
  const auto h2o = MergedSelection::h2o, tova = MergedSelection::tova, elsewhere = MergedSelection::elsewhere;
  KeepKv defaults;
  KeepKv prob = keep(KeepVariant::soft);
  prob.attention_domain = true;
  KeepKv written = keep(KeepVariant::zip);
  written.as_written = true;
  return {
      {"h2o+keepkv", reference_keepkv(defaults), h2o, false},
      {"h2o+keepkv:threshold=0.3,lambda_max=1.5", reference_keepkv(keep(KeepVariant::zip)), h2o},
      {"h2o+keepkv:threshold=0.3,alpha=0,lambda_max=1.5", reference_keepkv(keep(KeepVariant::zip, 0.3, 0)), h2o},
      {"h2o+keepkv:threshold=0.3,ema_correction=as_written,lambda_max=1.5", reference_keepkv(written), h2o},
      {"tova+keepkv:variant=official_convex_votes,threshold=0.3", reference_keepkv(keep(KeepVariant::convex)), tova},
      {"h2o+keepkv:variant=soft_votes,threshold=0,window=5", reference_keepkv(keep(KeepVariant::soft, 0, 0.9, 5)), h2o},
      {"h2o:scope=query_head+keepkv:variant=soft_votes,threshold=0.3,ema_domain=attention_prob", reference_keepkv(prob),
       h2o},
      {"h2o+keepkv:variant=additive,threshold=0.3", reference_keepkv(keep(KeepVariant::additive)), h2o},
      {"streaming:evict=before_attention,interval=5,pool=decode+keepkv:variant=soft_votes,threshold=0.3",
       reference_keepkv(keep(KeepVariant::soft)), elsewhere},
      {"h2o+merging", reference_kvpress_merging(), h2o, false},
      {"tova+merging:similarity_threshold=0.2,merge_fraction=0.6,at=always", reference_kvpress_merging(0.2, 0.6, true),
       tova},
      {"h2o+cam", reference_cam(), h2o},
      {"streaming+cam:mode=expected,window=4,prompt=1", reference_cam({4, CamMode::expected, {}, false, true}),
       elsewhere},
      {"h2o+cam:mode=deterministic,window=3,attention=current",
       reference_cam({3, CamMode::deterministic, CamAttention::current}), h2o},
      {"tova+cam:window=5,attention=decode,against=max",
       reference_cam({5, CamMode::bernoulli, CamAttention::decode, true}), tova},
      {"streaming+cam:window=3,attention=current,against=all",
       reference_cam({3, CamMode::bernoulli, CamAttention::current, false, false, true}), elsewhere},
      {"h2o+d2o", reference_d2o(false), h2o},
      {"tova+d2o:weights=paper,alpha=0.3,beta=0.7", reference_d2o(true, 0.3, 0.7), tova},
      {"h2o+weightedkv", reference_weightedkv(false, false), h2o},
      {"tova+weightedkv:after=sum", reference_weightedkv(true, false), tova},
      {"h2o+weightedkv:votes=1", reference_weightedkv(false, true), h2o},
      {"h2o:scope=query_head+weightedkv:after=sum,votes=1", reference_weightedkv(true, true), h2o},
      {"h2o+lookm", reference_lookm(LookMWeights::pivot, false), h2o, false},
      {"tova+lookm:weights=weighted,at=always", reference_lookm(LookMWeights::weighted, true), tova},
      {"h2o+lookm:weights=average,at=always", reference_lookm(LookMWeights::average, true), h2o},
  };
}

}  // namespace

// Methods whose selection and merge go together.
std::vector<Case> pairs(int budget) {
  const auto elsewhere = MergedSelection::elsewhere;
  KvMerger thirds{2, 3};
  KvMerger two_pass = thirds, mean = {};
  two_pass.sigma = KvMerger::Sigma::two_pass;
  two_pass.size_scale = true;
  mean.sigma = KvMerger::Sigma::mean_dist;
  mean.delta = 0.4;
  mean.always = true;
  const KvMerger tenths{budget / 10, budget / 10};
  return {
      {"selkv-paper", reference_selkv(), elsewhere, false, reference_selkv_score()},
      {"selkv_score:obs_window=6,kernel=3,window=2+selkv:obs_window=6,bucket=8,gate=0,alpha=1",
       reference_selkv(6, 8, false, 1), elsewhere, true, reference_selkv_score(6, 3, 2)},
      {"h2o:scope=query_head+selkv:obs_window=5,bucket=64", reference_selkv(5, 64), MergedSelection::h2o, true},
      {"kvmerger-paper", reference_kvmerger(tenths, budget), elsewhere, true,
       reference_kvmerger_sets(budget / 10, budget / 10)},
      {"kvmerger_sets:heavy=2,recent=3+kvmerger:heavy=2,recent=3", reference_kvmerger(thirds, budget), elsewhere, true,
       reference_kvmerger_sets(2, 3)},
      {"kvmerger_sets:heavy=2,recent=3,scope=kv_head+kvmerger:heavy=2,recent=3,sigma=two_pass,value_scale=size",
       reference_kvmerger(two_pass, budget), elsewhere, true, reference_kvmerger_sets(2, 3)},
      {"zsmerge-paper", reference_zsmerge({1, budget / 10}, budget), MergedSelection::by_merger},
      {"zsmerge_slots:residual=3,tail=2,decay=0.9,scope=layer+zsmerge:residual=3,tail=2,decay=0.9,metric=l2",
       reference_zsmerge({3, 2, 0.9, 1, true}, budget), MergedSelection::by_merger},
      {"zsmerge_slots:residual=2,decay=1+zsmerge:residual=2,decay=1,scale_factor=0.5",
       reference_zsmerge({2, budget / 10, 1, 0.5}, budget), MergedSelection::by_merger},
      {"tova+kvmerger:heavy=0,recent=0,delta=0.4,sigma=mean_dist,at=always", reference_kvmerger(mean, budget),
       MergedSelection::tova, true},
  };
}

TEST_CASE("selections that belong to a merge choose and merge as the reference does", "[merging]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 40);
  const Element element = GENERATE(Element::f32, Element::bf16);
  for (const int budget : {1, 9, 60}) {
    check(toy(group_size, prompt_len, element), pairs(budget), {budget});
  }
}

TEST_CASE("every merging method returns what the reference's merged cache returns", "[merging]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 40);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  check(toy(group_size, prompt_len, element), cases(), {1, 9, 60});
}

TEST_CASE("merging methods agree with the reference on equal keys and one-sided attention", "[merging]") {
  ToyOptions o = toy(3, 40, Element::f32);
  o.kind = GENERATE(ToyKind::equal_keys, ToyKind::small_evicted, ToyKind::sharp);
  std::vector<Case> calm;
  for (Case c : cases()) {
    if (c.text.find("ema_correction") == std::string::npos) {
      c.moves = false;
      calm.push_back(c);
    }
  }
  check(o, calm, {1, 9});
}

TEST_CASE("merging methods stand logits of 1e4", "[merging]") {
  ToyOptions o = toy(2, 24, Element::f32);
  o.kind = GENERATE(ToyKind::huge_logits, ToyKind::sharp);
  const Layer layer = engine_layer(make_toy_layer(o));
  for (const std::vector<Case>& some : {cases(), pairs(9)}) {
    for (const Case& c : some) {
      INFO(c.text);
      const Method method = parse_method(c.text);
      const CellResult cell = replay_one(layer, method, 9);
      CHECK(cell.error == "");
      const NamedSeries found = engine_series(cell);
      for (Eigen::Index i = 0; i < found.at("error").size(); ++i) {  // both or neither
        CHECK(std::isnan(found.at("error").data()[i]) == std::isnan(found.at("error_output").data()[i]));
      }
    }
  }
}

TEST_CASE("KeepKV scores slots that a pinned prompt outshines", "[merging]") {
  ToyOptions o = toy(3, 24, Element::f32);
  o.kind = ToyKind::sharp;
  o.seed = GENERATE(1, 2, 3);
  KeepKv prob = keep(KeepVariant::soft, -1);
  prob.attention_domain = true;
  check(o,
        {{"streaming:pool=decode+keepkv:variant=soft_votes,threshold=-1", reference_keepkv(keep(KeepVariant::soft, -1)),
          MergedSelection::elsewhere},
         {"streaming:pool=decode+keepkv:variant=soft_votes,threshold=-1,ema_domain=attention_prob",
          reference_keepkv(prob), MergedSelection::elsewhere}},
        {1, 3});
}
