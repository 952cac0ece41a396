// Measures what one lane of a set did in a block: the sums over retained and evicted tokens, and the metrics from them.
#pragma once
#include "sim/checkpoints.hpp"
#include "sim/diagnostics.hpp"
#include "sim/replay.hpp"
#include "sim/set.hpp"

namespace kvreplay {

// Differences to the full output of one cell's heads in a block, for the output projection; NaN rows have no output.
struct HeadErrors {
  MatF full, plain, output;     // (steps, n_heads * v_head_dim)
  std::vector<MatF> corrected;  // per compensator
};

// What a cell's compensators are made from.
struct CellCompensators {
  std::vector<const PartUse*> parts;
  int acting = -1;
};

// Per-lane measuring state of one cell. Writes only its own rows of the cell's series.
class Meter {
 public:
  Meter(const Layer&, const ReplayOptions&, const CellCompensators&, CellResult&, Checkpoints&, const FullAttention&,
        const Set&, int lane);
  void block(const Set&, Lane&, HeadErrors*);
  double state_bytes(std::size_t compensator) const { return compensators_[compensator]->state_bytes(); }

 private:
  struct Rows;
  struct Sums;
  float* out(Metric, int row, int compensator = -1);  // the series' first step of this block, nullptr if not asked
  void show_prompt(const Set&, const Lane&);
  template <class ForEach>
  Eigen::ArrayXd top_weights(const Set&, const Lane&, const Rows&, ForEach attended) const;
  std::vector<Pos> retained_at(const Set&, const Lane&, int row, int n_gone) const;
  template <class Row, class ForEach>
  double sum_anew(const Lane&, const Rows&, int row, double max_logit, Row&& num, ForEach for_each) const;
  void query_heads(const Set&, Lane&, const Rows&, HeadErrors*);
  void kv_head(const Set&, const Lane&);
  void keep_attended(const Set&, const Lane&);
  void retention(const Set&, const Lane&);
  void checkpoints(const Set&, const Lane&);
  void logits(const Set&, const Lane&, const Rows&, std::span<const int> n_missing, Eigen::ArrayXd& variance,
              Eigen::ArrayXd& spread) const;

  const Layer& layer_;
  const ReplayOptions& options_;
  CellResult& cell_;
  Checkpoints& checkpoints_;
  int acting_, row_;  // row_: of KV-head series
  std::vector<std::unique_ptr<Compensator>> compensators_;
  std::vector<int> prompt_queries_;  // per compensator, what it needs of the prompt
  bool sees_retained_ = false;       // any of them
  std::unique_ptr<MomentTrack> moments_;
  std::unique_ptr<Diagnostics> diagnostics_;
  std::vector<int> span_evicted_;  // per span, tokens evicted so far
  Pos begin_ = 0;                  // of the block
};

// Adds an empty series for everything asked to be measured. kv_rows: rows of KV-head series (query_head scope: one per
// query head until fold_query_heads).
void add_series(CellResult&, const Layer&, const ReplayOptions&, int kv_rows);
// query_head scope: KV-head series become one row per KV head; tokens and bytes add up, the rest is averaged.
void fold_query_heads(CellResult&, const Layer&);
std::vector<int> checkpoint_steps(int n_steps, int n_checkpoints);

}  // namespace kvreplay
