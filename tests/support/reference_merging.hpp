// The truth about caches whose slots change: following recorded evictions, every merge again in float64 from its
// formula, and what each query head then returns.
#pragma once
#include <map>
#include <memory>

#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

struct MergedSlot {
  Eigen::VectorXd k, v;
  double bias = 0;
};
struct MergeLane {
  int kv_head = 0;
  std::vector<int> q_heads;
  std::map<Pos, MergedSlot> slots;
  std::vector<Pos> pinned;  // attended too, and never changed
};
// One set at one step.
struct MergeState {
  const ToyLayer* layer = nullptr;
  int set = 0;
  Pos now = 0;
  std::vector<MergeLane> lanes;
  bool at_prefill() const { return now < layer->options.prompt_len; }
  double logit(int q_head, Pos query, const Eigen::VectorXd& k) const;  // without a bias
  // Of one query head's query at `now`, over all that is resident.
  std::map<Pos, double> attention(const MergeLane& lane, int q_head) const;
  Eigen::VectorXd output(const MergeLane& lane, int q_head) const;
  // Mean over the lane's heads.
  std::map<Pos, double> mean_attention(const MergeLane& lane) const;
};

class ReferenceMerger {
 public:
  virtual ~ReferenceMerger() = default;
  // At the prompt's end and at every step, with all slots there and nothing merged yet.
  virtual void observe(const MergeState&) {}
  virtual void merge(MergeState& state, const std::vector<Pos>& gone) = 0;  // they are still there
  // Of each slot, where selection and merge belong together: see MergedSelection::by_merger.
  virtual std::map<Pos, double> score(const MergeState&) { return {}; }
};
using MakeMerger = std::function<std::unique_ptr<ReferenceMerger>()>;

enum class KeepVariant { zip, convex, soft, additive };
struct KeepKv {
  KeepVariant variant = KeepVariant::zip;
  double threshold = 0.8, alpha = 0.9;
  int window = 32;
  bool attention_domain = false, as_written = false;
  double lambda_max = 1e300;
};
MakeMerger reference_keepkv(const KeepKv& settings = {});
MakeMerger reference_kvpress_merging(double threshold = 0, double fraction = 1, bool always = false);
enum class LookMWeights { pivot, weighted, average };
MakeMerger reference_lookm(LookMWeights weights, bool always);
MakeMerger reference_d2o(bool paper, double alpha = 0.5, double beta = 0.5);
enum class CamMode { bernoulli, expected, deterministic };
enum class CamAttention { cumulative, decode, current };
struct Cam {
  int window = 32;
  CamMode mode = CamMode::bernoulli;
  CamAttention attention = CamAttention::cumulative;
  bool max = false, prompt = false;
};
MakeMerger reference_cam(const Cam& settings = {});
MakeMerger reference_weightedkv(bool sum, bool votes);
MakeMerger reference_selkv(int window = 32, int bucket = 32, bool gate = true, double alpha = 0.5);
MakeSelector reference_selkv_score(int window = 32, int kernel = 5, int recent = 16);
// Neighbours that may join, after what is protected.
struct KvMerger {
  int heavy = 0, recent = 0;  // tokens
  double delta = -1;
  enum class Sigma { rms, two_pass, mean_dist } sigma = Sigma::rms;
  bool size_scale = false, always = false;
};
MakeMerger reference_kvmerger(const KvMerger& settings, int budget);
struct ZsMerge {
  int residual = 1, tail = 0;
  double decay = 0.98, scale_factor = 1;
  bool l2 = false;
};
MakeMerger reference_zsmerge(const ZsMerge& settings, int budget);
MakeSelector reference_kvmerger_sets(int heavy, int recent);  // joined to the budget

// Selectors that see the merged slots, and so have to be checked here.
enum class MergedSelection { elsewhere, h2o, tova, by_merger };
struct MergingRequest {
  Traits traits;
  int budget = 0;
  MakeMerger merger;
  MergedSelection selection = MergedSelection::elsewhere;
};
struct MergingResult {
  std::vector<MatD> output;  // per query head (n_steps, v_head_dim)
  MatD biased;               // (n_kv_heads, n_steps) slots with a bias, summed over the sets of each KV head
  double excess = 0;         // as in SelectionResult
};
MergingResult reference_merging(const ToyLayer& layer, const MergingRequest& request, const Evicted& recorded);

}  // namespace kvreplay::testing
