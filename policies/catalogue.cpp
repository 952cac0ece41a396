#include "policies/catalogue.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <numeric>
#include <vector>

namespace kvreplay {

extern const PartInfo full, random, streaming, h2o, tova, snapkv, knorm, keydiff, momentum, residual, given,
    oracle_mass, oracle_greedy, quest, topk, uniform, adakv, pyramid, kivi, none, mean, moments, gaussian, morphkv, rpc,
    longflow, vatp, scissorhands, expected, infinipot, gkv, rkv, scope, lazyeviction, raas, merging, cam, d2o, keepkv,
    lookm, selkv, selkv_score, kvmerger, kvmerger_sets, zsmerge, zsmerge_slots, weightedkv, whitelist, fair,
    surface_logic, headkv, turboquant, polarquant, tada, sals_score, sals_store, atoms, linear, clusters, grkv,
    match_keys, matching, sample, inverse_chance, d2o_layers, zigzag;

namespace {

constexpr const PartInfo* kParts[] = {
    // select
    &full,
    &random,
    &streaming,
    &h2o,
    &tova,
    &snapkv,
    &knorm,
    &keydiff,
    &momentum,
    &residual,
    &given,
    &oracle_mass,
    &oracle_greedy,
    &morphkv,
    &rpc,
    &longflow,
    &vatp,
    &scissorhands,
    &expected,
    &infinipot,
    &gkv,
    &rkv,
    &scope,
    &lazyeviction,
    &raas,
    &selkv_score,
    &kvmerger_sets,
    &zsmerge_slots,
    &match_keys,
    &sample,
    // read
    &quest,
    &topk,
    &sals_score,
    // allocate
    &uniform,
    &adakv,
    &pyramid,
    &whitelist,
    &fair,
    &surface_logic,
    &headkv,
    &d2o_layers,
    &zigzag,
    // rewrite
    &kivi,
    &keepkv,
    &merging,
    &cam,
    &d2o,
    &weightedkv,
    &lookm,
    &selkv,
    &kvmerger,
    &zsmerge,
    &turboquant,
    &polarquant,
    &tada,
    &sals_store,
    &grkv,
    &matching,
    &inverse_chance,
    // compensate
    &none,
    &mean,
    &moments,
    &gaussian,
    &atoms,
    &linear,
    &clusters,
};

constexpr Preset kPresets[] = {
    {"momentkv", "residual+adakv+moments",
     "MomentKV: count, means and value-key covariance of the evicted tokens choose what leaves and "
     "correct the output; not Moment-KV (preset moment-kv), a decayed sum of attention",
     "arXiv:2606.01563",
     "how heads share the budget the paper does not say: kvpress' Ada-KV; the rest as the parts say"},
    {"moment-kv", "momentum",
     "Moment-KV: a decayed sum of attention over decode tokens, the prompt pinned; not MomentKV "
     "(preset momentkv), which keeps statistical moments of the evicted tokens",
     "arXiv:2605.29873", "as the part momentum says"},
    {"snapkv-official", "snapkv:obs_window=32,pooling=max,kernel=7", "SnapKV with the values of its authors' code",
     "arXiv:2404.14469",
     "one set per KV head by the group's mean; means over the window where some codes sum, which "
     "ranks alike"},
    {"expected-attention", "expected:epsilon=0.01+adakv", "Expected Attention as kvpress ranks it among its methods",
     "arXiv:2510.00636", "as the parts say"},
    {"h2o-kvpress", "h2o:window=0,mass=mean", "H2O as a fork of kvpress runs it: mean attention since birth, no window",
     "arXiv:2306.14048", "as the part h2o says"},
    {"h2o-scope", "h2o:window=256,mass=current,scope=query_head",
     "H2O as SCOPE's code runs it: attention of the current query alone, prompt and decode tokens alike",
     "arXiv:2412.13649",
     "the prompt is cut by the attention of all its queries (the code: of its last 8); the code's budget is what it "
     "keeps "
     "of the prompt plus what it keeps of the decode tokens"},
    {"h2o-longflow", "h2o:mass=current,scope=layer,group=sum",
     "H2O as LongFlow's code runs it: it adds up, but selects by the current step's sums; one set per layer",
     "arXiv:2603.11504", "as the part h2o says"},
    {"h2o-gkv", "gkv:obs_window=1,smooth=sum,lambda=1",
     "H2O as G-KV's code runs it: a decayed sum, sampled with one query at each eviction", "arXiv:2512.00504",
     "with alpha=1 the code starts from the sums of all prompt queries; here it starts from the first eviction"},
    {"streaming-scope", "streaming:sink=0,window=256,pool=decode",
     "StreamingLLM as SCOPE's code runs it: the prompt, the first decode tokens and the latest 256", "arXiv:2412.13649",
     "the whole prompt stays (the code with its prompt compressed keeps as many first tokens)"},
    {"streaming-longflow", "streaming:sink=32", "StreamingLLM as LongFlow runs it: 32 sinks", "arXiv:2603.11504",
     "as the part streaming says"},
    {"streaming-gkv", "streaming:interval=128",
     "StreamingLLM as G-KV's code runs it: at every 128 steps; its window is 512, a budget of 516", "arXiv:2512.00504",
     "as the part streaming says"},
    {"snapkv-kvpress", "snapkv:interval=512,decode=evict",
     "SnapKV while decoding, as kvpress: every 512 steps the last 64 queries score anew", "arXiv:2404.14469",
     "a prompt above the budget is cut at its end (kvpress waits for the first interval)"},
    {"snapkv-rkv", "rkv:buffer=0,lambda=1",
     "SnapKV while decoding, as R-KV's code: logits of the group's best head, the last 8 queries, max pooling over 7",
     "arXiv:2505.24133", "as the part rkv says"},
    {"snapkv-gkv", "gkv:smooth=none,lambda=1,normalise=false,pooling=max",
     "SnapKV while decoding, as G-KV's code: the last 16 queries, max pooling over 5, nothing remembered",
     "arXiv:2512.00504", "as the part gkv says"},
    {"keepkv-paper", "h2o:sink=4+keepkv", "KeepKV on heavy hitters with sinks, its paper's operator",
     "arXiv:2504.09936",
     "the paper selects as PyramidInfer does and says that any selection will do; the rest as the parts say"},
    {"cam-paper", "streaming+cam", "CaM where it was shown: on sinks and a window, token by token",
     "ICML 2024, openreview.net/forum?id=LCTmppB165", "as the parts say"},
    {"d2o-paper", "h2o:sink=4+d2o_layers+d2o",
     "D2O: heavy hitters with sinks under budgets by layer, merging behind a gate", "arXiv:2406.13035",
     "the prompt is cut at its end, not at the first decode step; the rest as the parts say. h2o:sink=4+d2o is its "
     "token level alone"},
    {"weightedkv-paper", "h2o:window=0,mass=mean+weightedkv",
     "WeightedKV: the token of least mean attention leaves, its value goes to the next", "arXiv:2503.01330",
     "what the paper protects no source read here says: nothing; the rest as the parts say"},
    {"selkv-paper", "selkv_score+selkv", "SelKV: shared selection, gated merge in buckets, part of the mass given back",
     "arXiv:2607.16213", "as the parts say"},
    {"kvmerger-paper", "kvmerger_sets+kvmerger", "KVMerger: runs of similar neighbours become one token",
     "arXiv:2407.08454", "as the parts say"},
    {"zsmerge-paper", "zsmerge_slots+zsmerge",
     "ZSMerge: heavy tokens, a tail, and residual slots that take in the rest", "arXiv:2503.10714", "as the parts say"},
    {"surfacelogic-like", "snapkv:obs_window=32,pooling=max,kernel=7+surface_logic",
     "SurfaceLogic-like: SnapKV under budgets by what heads copy from spans and use of them; a reconstruction",
     "arXiv:2508.15806", "as the part surface_logic says; give it surface=@FILE and logic=@FILE"},
    {"sals", "full:scope=layer+sals_score:own_latent=false+sals_store",
     "SALS: keys of a layer as one latent before RoPE, by whose leading numbers the tokens to read are chosen, and "
     "values in few bits",
     "arXiv:2510.24273",
     "the 25% setting; the 12.5% setting is sals:sals_score.rank=0.125,sals_store.rank=0.125,bits=2; the rest as the "
     "parts say"},
    {"oracle_topk", "full+topk", "a reference for choosing at every step: the tokens of highest true attention", "",
     ""},
    {"attention-matching", "match_keys+matching",
     "Attention Matching: the most attended keys, with biases and values fitted to what the whole prompt gave",
     "arXiv:2602.16284",
     "the same budget for all heads, where the paper learns one per head; omp: choice=omp,least=-27.6,matching.most=7"},
    {"hajek", "sample+inverse_chance",
     "tokens sampled by attention and weighed by one over their chances, so that sums are right on average",
     "arXiv:2607.21475", "both parts must be given the same sink, window and obs_window, each by its part's name"},
    {"reskv", "snapkv+clusters",
     "ResKV: clusters of the evicted keys as more entries of the softmax, gated by sharpness and validated",
     "arXiv:2607.29591", "as the part clusters says"},
};

constexpr std::string_view kScopes[] = {"kv_head", "layer", "query_head"};
constexpr std::string_view kPools[] = {"all", "decode"};
constexpr std::string_view kReductions[] = {"mean", "max", "sum"};
constexpr std::string_view kOrders[] = {"after_attention", "before_attention"};
constexpr std::string_view kDecodes[] = {"evict", "grow"};

constexpr std::array kEngineKeys = {
    choice<&Traits::scope>("scope", kScopes, "whose tokens are kept together: one set for each"),
    choice<&Traits::pool>("pool", kPools, "decode: the prompt is pinned and the budget counts decode tokens"),
    choice<&Traits::group>("group", kReductions, "how the attention of a set's query heads becomes one number"),
    number<&Traits::interval>("interval", 1, kUnbounded, "evict at every so many decode steps", Scale::log),
    choice<&Traits::evict>("evict", kOrders, "before or after the attention of the same step"),
    choice<&Traits::decode>("decode", kDecodes, "grow: the prompt's cut stands and decode tokens stay"),
};

// The built-in parts, then those that were added.
std::vector<const PartInfo*>& parts() {
  static std::vector<const PartInfo*> all(std::begin(kParts), std::end(kParts));
  return all;
}

}  // namespace

std::span<const PartInfo* const> all_parts() { return parts(); }
std::span<const Preset> all_presets() { return kPresets; }
std::span<const ParamInfo> engine_keys() { return kEngineKeys; }

const PartInfo* find_part(std::string_view name) {
  const auto it = std::find_if(parts().begin(), parts().end(), [&](auto* p) { return p->name == name; });
  return it == parts().end() ? nullptr : *it;
}

void add_part(const PartInfo& part) {
  const std::string name(part.name);
  const bool is_name = !name.empty() && name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == name.npos &&
                       std::isalpha(static_cast<unsigned char>(name[0])) != 0;
  if (!is_name) {
    throw ConfigError("'" + name + "' is no name for a part; it takes small letters, digits and '_', a letter first");
  }
  if (find_part(name) != nullptr || find_preset(name) != nullptr) {
    throw ConfigError("a part called '" + name + "' is there already");
  }
  parts().push_back(&part);
}

const Preset* find_preset(std::string_view name) {
  const auto it = std::find_if(std::begin(kPresets), std::end(kPresets), [&](auto& p) { return p.name == name; });
  return it == std::end(kPresets) ? nullptr : &*it;
}

}  // namespace kvreplay
