// What a method sees and says. A method is a selector plus optional parts; an absent part does nothing.
//
// Slot:   one kept token: a position, and per lane a key, a value and a bias on the logit.
// Set:    slots that are kept together. The scope says for which heads: one KV head, a layer, one query head.
// Lane:   a set's part in one KV head (a layer-wide set has n_kv_heads lanes, any other has one).
// View:   a set at one step, present and past only; the argument of every call.
#pragma once
#include <Eigen/Dense>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policies/rotation.hpp"

namespace kvreplay {

using Pos = std::int32_t;  // absolute token position; a slot keeps its own for life
using MatF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using MatD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using VecF = Eigen::Map<const Eigen::VectorXf>;

enum class Scope { kv_head, layer, query_head };
enum class Pool { all, decode };
enum class Reduce { mean, max, sum };
enum class Order { after_attention, before_attention };
enum class Decode { evict, grow };

// The engine keys of a selector: its paper's values, unless the user wrote others.
struct Traits {
  Scope scope = Scope::kv_head;
  Pool pool = Pool::all;        // decode: the prompt is pinned and the budget counts decode tokens
  Reduce group = Reduce::mean;  // how the attention of the set's query heads becomes one number
  int interval = 1;             // evict at every so many decode steps
  Order evict = Order::after_attention;
  Decode decode = Decode::evict;  // grow: the prompt's cut stands and decode tokens stay
};

// What a part needs of the trace beyond the decode queries, keys and values. An unmet need is refused before the run.
struct Needs {
  static constexpr int kAll = -1;
  int prompt_queries = 0;         // that many last queries of the prompt; kAll: all of them
  bool pre_rope = false;          // keys and queries before RoPE
  std::string scores;             // an external score stored in the trace under this name
  std::string evicted_at;         // a file of recorded evictions
  bool future_attention = false;  // Future::attention_to_come: oracles only
  bool future_outputs = false;    // Future::horizon: oracles only
  bool spans = false;             // named spans of tokens
};

// A named range of the trace's tokens, such as an instruction or a needle.
struct TokenSpan {
  std::string name;
  Pos begin, end;  // half-open
};

// The set that a part is made for. Parts keep their state by position, so that eviction moves nothing.
struct SetShape {
  int layer = 0;                 // the model's own layer number
  int n_model_layers = 0;        // of the model, not of the run
  int set = 0;                   // index of the set within its layer
  int kv_head = 0;               // of the first lane
  int n_lanes = 1, n_heads = 1;  // n_heads: query heads per lane
  int head_dim = 0, v_head_dim = 0;
  Pos n_tokens = 0, prompt_len = 0;
  int budget = 0;         // tokens per set as asked for, before any allocator; at least 1
  int element_bytes = 2;  // of one stored number in the trace
  float scale = 1;        // softmax scale of the trace; View::queries has it folded in
  std::uint64_t seed = 0;
  const Rotation* rotation = nullptr;     // nullptr if the trace does not say; there where Needs::pre_rope asked for it
  std::span<const TokenSpan> spans = {};  // of the trace
  bool exact_scores = false;              // all scores are compared, not only those of the lowest
  // Where the part asked for them (Needs): per lane (n_tokens) external scores; (n_tokens) first decode step without.
  std::vector<std::vector<float>> scores;
  std::vector<std::int32_t> evicted_at;
};

class View {
 public:
  virtual ~View() = default;
  Pos now = 0;  // position of the current token, whose slot is the last one
  Pos prompt_len = 0;
  int head_dim = 0, v_head_dim = 0, n_lanes = 0, n_heads = 0;  // n_heads: query heads per lane
  int budget = 0;                                              // slots this set may keep, as allocated
  std::span<const Pos> pos;                                    // (n_slots) ascending: slot i is older than slot i + 1
  bool at_prefill() const { return now < prompt_len; }
  std::span<const Pos> rewritten;  // tokens whose key or value was rewritten since the previous step

  // Softmax weights of the current queries over all that is resident, reduced over the query heads of the set as its
  // `group` key says: (n_slots).
  virtual void attention(std::span<float> out) const = 0;
  // The same of one query head: (n_slots).
  virtual void head_attention(int lane, int head, std::span<float> out) const = 0;
  virtual VecF key(int lane, int slot) const = 0;    // (head_dim) as stored now
  virtual VecF value(int lane, int slot) const = 0;  // (v_head_dim)
  // The last `last` queries up to now, oldest first, heads of one token adjacent: (last * n_heads, head_dim).
  // The softmax scale is folded in: logit = q . k, but for soft-cap and bias. Fewer rows at the start of the sequence.
  virtual MatF queries(int lane, int last) const = 0;
  // Attention that each token received from the last `last` prompt queries (kAll: all), each softmaxed over its own
  // past, summed over these queries: (n_heads, prompt_len). Computed once for all methods; prefill only.
  virtual MatD column_mass(int lane, int last) const = 0;
  // On the slot's logit, after the soft-cap.
  virtual float bias(int /*lane*/, int /*slot*/) const { return 0; }
  Reduce group = Reduce::mean;
  float logit_softcap = 0;  // of the trace, on every logit (soft_cap.hpp); 0: none
};

// A view whose slots may be changed, from the next step on. Logits of other slots are never recomputed.
class Cache : public View {
 public:
  // bytes: what this slot's key and value now cost to keep, constants included.
  virtual void rewrite(int lane, int slot, const Eigen::VectorXf& k, const Eigen::VectorXf& v, float bias,
                       double bytes) = 0;
  virtual double bytes(int lane, int slot) const = 0;
};

// Which tokens stay.
class Selector {
 public:
  virtual ~Selector() = default;
  virtual void prefill(const View&) {}  // once, at the last prompt token, with the whole prompt resident
  virtual void observe(const View&) {}  // every decode step, after its token was appended
  // How many slots have to go now; asked at the prompt's end and whenever `interval` says so.
  virtual int surplus(const View& view) const { return static_cast<int>(view.pos.size()) - view.budget; }
  // Higher = keep. The lowest leave, ties drop the older token; +infinity protects, NaN is refused.
  virtual void score(const View&, std::span<float> out) = 0;
  virtual void evicted(const View&, std::span<const int> /*slots*/) {}  // just before these slots go
};

// Later steps. Only an oracle is ever handed one.
class Future {
 public:
  virtual ~Future() = default;
  // Attention over all tokens that each slot will receive from all later queries, summed over the set: (n_slots).
  virtual void attention_to_come(const View&, std::span<float> out) const = 0;
  // The next `steps` decode steps of one lane (fewer at the end). Row r is step r / n_heads, head r % n_heads.
  struct Horizon {
    MatF weights;   // (rows, n_slots + steps) exp(logit - max): the slots, then the tokens yet to come; 0 before birth
    MatF arrivals;  // (steps, v_head_dim) values of the tokens yet to come
    MatD full;      // (rows, v_head_dim) exact attention output
    // What a pinned prompt adds to the sums of weights and of weights times values, on the same scale; empty if the
    // prompt is not pinned.
    Eigen::ArrayXd pinned_mass;  // (rows)
    MatD pinned_sum;             // (rows, v_head_dim)
    int steps = 0;
  };
  virtual Horizon horizon(const View&, int lane, int steps) const = 0;
};
class OracleSelector : public Selector {
 public:
  virtual void reveal(const Future&) = 0;  // once, before prefill
};

// Which resident tokens a query head attends at this step; nothing leaves. Slots come out in any order.
class Reader {
 public:
  virtual ~Reader() = default;
  // Once, at the last prompt token, after the cut and before anything is rewritten.
  virtual void prefill(const View&) {}
  virtual void choose(const View&, int lane, int head, std::vector<int>& slots) = 0;
  // Beyond the slots themselves, per KV head at a cache of n slots: what is kept, and what is read to choose.
  virtual double metadata_bytes(int /*n_slots*/) const { return 0; }
  virtual double scoring_bytes(int /*n_slots*/) const { return 0; }
};

// How kept tokens are stored: merging and encoding alike.
class Rewriter {
 public:
  virtual ~Rewriter() = default;
  virtual void step(Cache&) {}                           // prefill and every decode step, after eviction
  virtual void evicted(Cache&, std::span<const int>) {}  // just before these slots go
};

// How a total is spread, over the layers of the run and over the sets of a layer.
class Allocator {
 public:
  virtual ~Allocator() = default;
  // Mean budget of each layer of the run: (layers). Same sum as budget * layers up to rounding.
  struct Layers {
    std::span<const int> index;  // model layer numbers in the run
    int n_layers = 0;            // of the model
    Pos prompt_len = 0;
    int budget = 0;
    Pos n_tokens = 0;    // of the run
    MatD worth = {};     // (layers of the run, KV heads) what the allocators made for them say
    MatD measured = {};  // (layers of the run, numbers) what measure() gave; empty if it does not measure
  };
  // One layer's prompt, for an allocator that measures every layer of the run before it divides. Its Needs say which
  // prompt queries count.
  struct Prompt {
    int layer = 0;  // the model's own layer number
    Pos prompt_len = 0;
    // Per KV head: attention that each token received from these queries, each softmaxed over its own past, summed over
    // them (n_heads, prompt_len).
    std::vector<MatD> column_mass;
  };
  virtual bool measures() const { return false; }                          // the same whatever the values
  virtual std::vector<double> measure(const Prompt&) const { return {}; }  // as many numbers in every layer
  // What one KV head is worth to the allocator made with its layer's and head's values.
  virtual double worth() const { return 1; }
  // True, whatever the values, if the other layers of the run do not matter: over_layers and over_heads are asked as if
  // each were alone, with its own values, and a sweep keeps the cells of a layer when others are added.
  virtual bool per_layer() const { return false; }
  virtual std::vector<int> over_layers(const Layers& l) const { return std::vector<int>(l.index.size(), l.budget); }
  // Budgets of the KV heads of the run's `layer`-th layer, each for every set of the head: (KV heads); empty: all
  // alike.
  virtual std::vector<int> over_heads(const Layers&, std::size_t /*layer*/) const { return {}; }
  // True if sets of one layer get different budgets: from over_heads, else from their scores at the prompt's cut.
  virtual bool over_sets() const { return false; }
  virtual std::vector<int> assign(const std::vector<std::vector<float>>& /*scores*/, int /*mean_budget*/) const {
    return {};
  }
  // ConfigError where the trace's spans or the budget of a set do not suit it.
  virtual void check_spans(std::span<const TokenSpan>, Pos /*prompt_len*/, int /*budget*/) const {}
  // True if over_tokens compares scores with each other.
  virtual bool ranks_tokens() const { return false; }
  // Spreads a set's budget over its tokens: may raise or lower scores that a selector gave, before the n_drop lowest
  // leave.
  virtual void over_tokens(const View&, std::span<const TokenSpan> /*spans*/, int /*n_drop*/,
                           std::span<float> /*scores*/) const {}
};

// What is remembered of the evicted tokens of one lane and added to the output. Called once per block of steps, for
// speed: row r of q is head r % n_heads of step r / n_heads, and sees the losses of older blocks and those of this
// block with step <= its own.
struct Loss {
  int step;  // of the block: the first that misses the token; the next block's first at most
  const float *k, *v;
  Pos pos = 0;  // of the token
};
struct Estimate {
  Eigen::ArrayXd log_mass;  // (rows) ln of the estimated evicted mass with unshifted logits; -inf: nothing to add
  MatD value;               // (rows, v_head_dim) estimated attention output over the evicted tokens
};
struct MomentRows;  // policies/moments.hpp: statistics of the evicted set as each row sees it
struct EvictedBlock {
  Eigen::Ref<const MatF> q;  // (rows, head_dim) softmax scale folded in
  int n_heads;
  std::span<const Loss> losses;  // of this block, in order of step
  const MomentRows& moments;     // kept once per lane, shared by all compensators beside each other
  // Where a compensator sees_retained: ln of the attended mass and the largest attended logit, both unshifted (rows).
  Eigen::ArrayXd log_retained = {}, top_retained = {};
};
// The cut of a prompt in one lane, tokens in order of position. Rows of q as in EvictedBlock, the last one last.
struct PromptCut {
  MatF q;  // (last prompt queries * n_heads, head_dim) softmax scale folded in
  int n_heads;
  MatF retained_k, evicted_k;     // (tokens, head_dim)
  MatF retained_v, evicted_v;     // (tokens, v_head_dim)
  std::vector<Pos> evicted = {};  // positions of the evicted
};
struct MomentNeeds;
class Compensator {
 public:
  virtual ~Compensator() = default;
  virtual MomentNeeds needs() const = 0;  // of EvictedBlock::moments
  virtual bool sees_retained() const { return false; }
  // Once, before the first estimate, if the part needs queries of the prompt and the prompt was not pinned. As many
  // queries as the part asked for, fewer where the trace has fewer.
  virtual void prompt(const PromptCut&) {}
  virtual void estimate(const EvictedBlock&, Estimate& out) = 0;
  virtual double state_bytes() const = 0;  // per KV head
};

}  // namespace kvreplay
