// The truth about selection: each method again, step by step in float64, as its paper or design
// says it.
//
// Two uses. Free: the reference evicts by its own scores, to be compared where no two tokens come
// near a tie. Forced: it follows recorded evictions and says how far each victim's score lay above
// the smallest.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "tests/support/reference.hpp"

namespace kvreplay::testing {

// One set at one step.
struct SetState {
  const ToyLayer* layer = nullptr;
  std::vector<int> kv_heads, q_heads;  // of the set
  Reduce group = Reduce::mean;
  Pos now = 0;
  int budget = 0;
  int asked = 0;              // before any allocator: what percentages refer to, and a cut before the allocator spoke
  std::vector<Pos> slots;     // what may leave, ascending; the current token is the last one
  std::vector<Pos> resident;  // what is attended: the slots, and the prompt where it is pinned
  bool at_prefill() const { return now < layer->options.prompt_len; }
  // Attention of the queries at `pos` over the resident tokens up to it, reduced over the set's
  // heads: (n_tokens).
  Eigen::VectorXd attention(Pos pos) const;
  // Of one query head: (n_tokens).
  Eigen::VectorXd head_attention(int q_head, Pos pos) const;
  double reduce(const std::vector<double>& by_head) const;
};

class ReferenceSelector {
 public:
  virtual ~ReferenceSelector() = default;
  virtual void prefill(const SetState&) {}
  virtual void observe(const SetState&) {}
  // How many slots have to go where eviction is due.
  virtual int surplus(const SetState& s) const { return static_cast<int>(s.slots.size()) - s.budget; }
  virtual std::vector<double> score(const SetState&) = 0;  // one per slot, +infinity protects
  virtual void evicted(const SetState&, const std::vector<Pos>&) {}
};
using MakeSelector = std::function<std::unique_ptr<ReferenceSelector>(const ToyLayer&)>;

// A number of tokens: as many, or a share of the budget.
struct ReferenceTokens {
  double value = 0;
  bool of_budget = false;
  int of(int budget) const;
};

MakeSelector reference_full();
MakeSelector reference_streaming(int sink = 4);
MakeSelector reference_h2o(ReferenceTokens window = {0.5, true}, bool by_age = false, int sink = 0);
MakeSelector reference_tova(int window = 0);
struct SnapKv {
  int obs_window = 32, pool = 7;
  bool pool_max = true, sum = true;
};
MakeSelector reference_snapkv(const SnapKv& settings);
MakeSelector reference_knorm();
MakeSelector reference_keydiff();
MakeSelector reference_momentum(double alpha = 0.97);
struct Residual {
  int sink = 1, window_prefill = 32, window_decode = 8;
  bool re_rank = true;  // false: attention alone cuts the prompt
  double ewma = 0;      // 0: the current query alone
  bool accumulate_prefill = true;
};
MakeSelector reference_residual(const Residual& settings = {});
MakeSelector reference_oracle_mass();
MakeSelector reference_oracle_greedy(int horizon);

struct SelectionRequest {
  Traits traits;
  MakeSelector select;
  int budget = 0;
  bool budgeted = true;
  std::vector<int> budgets;  // per set, where an allocator made them differ
  // A first selector that cuts the prompt, which is then pinned; needs pool=decode.
  MakeSelector prefill_select;
  int prefill_budget = 0;
};

struct SelectionResult {
  Evicted evicted_at;  // (n_sets, n_tokens)
  // Free: the smallest relative distance between the last victim's score and the first survivor's.
  double margin = 0;
  // Forced: the largest relative excess of a victim's score over what the reference would have let
  // go; infinity if the number of victims is wrong or a protected token left.
  double excess = 0;
};
SelectionResult reference_selection(const ToyLayer& layer, const SelectionRequest& request);
SelectionResult check_selection(const ToyLayer& layer, const SelectionRequest& request, const Evicted& recorded);

// Readers: what one query head attends of a full cache at a step, as positions' flags.
// The n tokens of highest attention; of a KV head's query heads together (mean) or of each alone.
std::vector<bool> reference_topk(const ToyLayer& layer, int q_head, Pos now, int n, bool together);
std::vector<bool> reference_quest(const ToyLayer& layer, int q_head, Pos now, int page, int n_pages);

// KIVI on a full cache: keys quantised per channel in groups of tokens, values per token in groups
// of channels, the latest tokens exact. Returns the attention output at a step.
struct Kivi {
  int bits = 2, group = 32, residual = 128;
};
Eigen::VectorXd reference_kivi(const ToyLayer& layer, const Kivi& settings, int q_head, int step);
// Min-max quantisation of one group with its constants in float16.
std::vector<double> quantised(const std::vector<double>& x, int bits);

}  // namespace kvreplay::testing
