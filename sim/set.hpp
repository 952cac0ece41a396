// The state of one method on one set of heads, and how it turns a block of steps into columns to multiply.
#pragma once
#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "policies/method.hpp"
#include "policies/moments.hpp"
#include "sim/exact.hpp"

namespace kvreplay {

// What all methods share while one layer is replayed.
struct Shared {
  const Layer& layer;
  std::vector<ExactBlock> exact;  // per KV head
  std::vector<MatD> future;       // per KV head (group_size, n_tokens): attention from queries after this block
  std::vector<MatD> full;         // per KV head (n_steps * group_size, v_head_dim) exact outputs, for horizons
  // Results of column_mass by KV head and number of queries: those that methods announced are there before any set
  // asks.
  std::map<std::pair<int, int>, MatD> mass;
  std::mutex mass_mutex;

  int n_votes(int last) const { return last < 0 ? layer.prompt_len : std::min<int>(last, layer.prompt_len); }
};

// Weights, key and value that some slot had during some steps of the block. Everything a method can do to its cache in
// a block is a list of columns: appending opens one, evicting ends one, merging and encoding end one and open another.
// Columns of tokens as they are in the trace point into shared arrays.
struct Column {
  const float* weights;  // (rows of the exact block)
  const float* value;    // (v_head_dim)
  int begin, end;        // steps of the block during which the method attends it
  int plain_end;         // steps 0..plain_end during which the token is retained as it was; 0 for a rewritten copy
  Pos token;             // whose slot it is
  const float* key;      // (head_dim), and what is added to its logits
  float bias;
};

struct Stored {  // key and value of a rewritten slot
  Eigen::VectorXf k, v;
  float bias = 0;
  bool own_logits = false;  // false: key and bias are as in the trace, so the weights are too
  bool merged = false;      // the slot holds more than its own token
  double bytes = 0;
};

struct Eviction {
  Pos token, missing_from;  // missing_from: position of the first query that misses the token
};

struct Lane {
  int kv_head = 0, first_head = 0;  // first_head within the group
  struct Slot {
    const float* weights;  // of its open column
    int column, plain_column;
  };
  std::vector<Slot> slots;
  std::vector<Column> columns;  // of this block, ended ones included
  std::unordered_map<Pos, Stored> stored;
  std::vector<Stored> retired;    // earlier versions that this block still multiplies
  std::vector<MatF> own_weights;  // weights of rewritten slots
  Eigen::ArrayXd z;               // (rows of the exact block) sum of attended weights
  std::vector<Pos> pinned;        // what a prompt's cut left, if another selector owns the decode tokens
  std::vector<Eviction> evicted;  // since the start, in order of missing_from
  std::size_t n_measured = 0;     // how many of these earlier blocks have measured
  double bytes = 0;               // of all slots and pinned tokens
  // With a reader, per row of the lane: what it attended, and of how many tokens.
  MatD read_num, read_plain_num;
  Eigen::ArrayXd read_z, read_plain_z;
  std::vector<std::vector<Pos>> read;  // per row, ascending
  // Per step of the block.
  std::vector<int> n_resident;
  std::vector<double> step_bytes, step_bytes_read;
};

// What a set is made from: one selector, and what goes with it.
struct SetPlan {
  const PartUse* select = nullptr;
  const PartUse* read = nullptr;
  const PartUse* rewrite = nullptr;
  const Allocator* allocate = nullptr;
  Traits traits;
  int budget = 1;
  std::uint64_t seed = 0;
  // Where `given` replays recorded evictions: per set (n_tokens).
  const std::vector<std::vector<std::int32_t>>* evicted_at = nullptr;
};

class Set final : public Cache, public Future {
 public:
  Set(Shared&, const SetPlan&, int index);
  Set(Set&&) = delete;                                   // parts hold views of it
  static int count(Scope, int n_heads, int n_kv_heads);  // sets per layer
  static int count(const Layer& l, Scope scope) { return count(scope, l.n_heads, l.n_kv_heads); }

  // The prompt's end. scores: of all slots, where the set is over its budget, else empty.
  void prefill_scores(std::vector<float>& scores);
  void prefill_evict(std::vector<float>& scores);
  // What another set's cut of the prompt left of one query head's prompt.
  void pin(int lane, const std::vector<Pos>& kept);

  void begin_block(int n_steps);
  // A decode step, in the order in which it runs; evict_scores leaves `scores` empty if nothing has to go.
  void arrive(int step);  // the selector observes
  void attend();          // the reader chooses
  void evict_scores(std::vector<float>& scores);
  void evict(std::vector<float>& scores);  // as the allocator leaves them
  void finish();
  bool evicts_before() const { return traits.evict == Order::before_attention; }

  // View, Cache, Future
  void attention(std::span<float> out) const override;
  void head_attention(int lane, int head, std::span<float> out) const override;
  VecF key(int lane, int slot) const override;
  VecF value(int lane, int slot) const override;
  MatF queries(int lane, int last) const override;
  MatD column_mass(int lane, int last) const override;
  float bias(int lane, int slot) const override;
  double bytes(int lane, int slot) const override;
  void rewrite(int lane, int slot, const Eigen::VectorXf& k, const Eigen::VectorXf& v, float bias,
               double bytes) override;
  void attention_to_come(const View&, std::span<float> out) const override;
  Horizon horizon(const View&, int lane, int steps) const override;

  const ExactBlock& exact(const Lane& lane) const { return shared_->exact[lane.kv_head]; }
  const Layer& layer() const { return shared_->layer; }
  int group_size() const { return shared_->layer.group_size; }
  bool reads() const { return read_ != nullptr; }
  bool rewrites() const { return rewrite_ != nullptr; }
  // The whole prompt is resident without being slots: its sums are the exact pass's prefix sums.
  bool prompt_by_prefix() const { return traits.pool == Pool::decode && !pinned_by_list_; }
  std::span<const Pos> positions() const { return positions_; }

  Traits traits;
  int n_steps = 0;
  std::vector<Lane> lanes;

 private:
  int add_column(Lane&, Column);
  void end_column(Lane&, int column);
  Column as_in_trace(const Lane&, Pos) const;
  void append(Pos);
  void attach_stored(Lane&);
  void run_reader();
  void repair_z(Lane&, int from);
  void resident_logits(const Lane&, int lane, int head, std::span<double> out) const;
  void head_weights(int lane, int head, std::span<float> out) const;
  const Stored* find(const Lane&, int slot) const;

  Shared* shared_;
  std::unique_ptr<Selector> select_;
  std::unique_ptr<Reader> read_;
  std::unique_ptr<Rewriter> rewrite_;
  const Allocator* allocate_;
  std::vector<Pos> positions_;
  std::vector<Pos> rewritten_, rewritten_before_;  // in this step, in the one before
  bool pinned_by_list_ = false;
  int step_ = 0, effect_ = 0;  // effect: first step of the block that feels a change made now
};

}  // namespace kvreplay
