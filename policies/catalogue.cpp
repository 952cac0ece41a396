#include "policies/catalogue.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

namespace kvreplay {

extern const PartInfo full, random, streaming, h2o, tova, snapkv, knorm, keydiff, momentum, residual, given,
    oracle_mass, oracle_greedy, quest, topk, uniform, adakv, pyramid, kivi, none, mean, moments, gaussian;
extern const PartInfo atoms, linear, clusters, grkv, match_keys, matching, sample, inverse_chance;

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
    &match_keys,
    &sample,
    // read
    &quest,
    &topk,
    // allocate
    &uniform,
    &adakv,
    &pyramid,
    // rewrite
    &kivi,
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

// Insertions, deletions, substitutions and swaps of neighbours.
int edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) {
    for (std::size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = static_cast<int>(i + j);
        continue;
      }
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

}  // namespace

std::span<const PartInfo* const> all_parts() { return kParts; }
std::span<const Preset> all_presets() { return kPresets; }
std::span<const ParamInfo> engine_keys() { return kEngineKeys; }

const PartInfo* find_part(std::string_view name) {
  const auto it = std::find_if(std::begin(kParts), std::end(kParts), [&](auto* p) { return p->name == name; });
  return it == std::end(kParts) ? nullptr : *it;
}

const Preset* find_preset(std::string_view name) {
  const auto it = std::find_if(std::begin(kPresets), std::end(kPresets), [&](auto& p) { return p.name == name; });
  return it == std::end(kPresets) ? nullptr : &*it;
}

std::string nearest(std::string_view name, std::span<const std::string> valid) {
  const auto it = std::min_element(valid.begin(), valid.end(), [&](const auto& a, const auto& b) {
    return edit_distance(name, a) < edit_distance(name, b);
  });
  return it == valid.end() ? std::string() : *it;
}

}  // namespace kvreplay
