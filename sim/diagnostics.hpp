// What a method will be missed for, beyond the error of the moment: attention to come on what has left, agreement with
// the full cache on what matters most, importance that returns. Made only where asked; docs/metrics.md defines each.
#pragma once
#include "sim/replay.hpp"
#include "sim/set.hpp"

namespace kvreplay {

inline constexpr int kHorizon = 32;               // steps that future_missed_mass looks ahead
inline constexpr int kTop = 16;                   // largest tokens that agreement is about
inline constexpr int kWindow = 8;                 // tokens per window, and steps per event, of importance
inline constexpr int kInactive = 4, kReturn = 8;  // events without importance before a run counts; in which it returns
inline constexpr double kLeastExisting = 1e-6;    // attention to come below which its share says nothing

// The kTop largest weights of each row and whose they are, the largest first; of equal ones the older token. Weights of
// 0 have no rank.
class TopTokens {
 public:
  void reset(int n_rows);
  // The weight that `token` has in a row.
  void offer(int row, Pos token, float weight);
  // The same for rows [begin, end), which lie behind one another.
  void offer(int begin, int end, Pos token, const float* weights);
  std::span<const Pos> of(int row) const {
    return {tokens_.data() + std::size_t(row) * kTop, std::size_t(n_[std::size_t(row)])};
  }

 private:
  std::vector<Pos> tokens_;     // (rows, kTop)
  std::vector<float> weights_;  // (rows, kTop)
  std::vector<int> n_;          // (rows)
  Eigen::ArrayXf least_;        // (rows) a weight below it has no place
};

// The full cache's attention as far as diagnostics ask for it, by KV head: one pass for all methods.
class FullAttention {
 public:
  FullAttention(const Layer&, const MetricSet&);
  bool asked() const { return future_ || top_ || importance_; }
  // After the exact pass of a block; KV heads may run side by side.
  void block(int kv_head, const ExactBlock&);

  struct Event {
    int step;   // its last
    MatD mass;  // (group_size, n_windows) attention that each whole window got in the decode so far
  };
  struct Head {
    // (group_size, n_steps): attention of the next kHorizon steps on the tokens that exist at a step, all of them and
    // without the first kHeadSink; rows of steps to come are not in yet.
    MatD existing, existing_no_sink;
    TopTokens top;              // of the block's rows
    MatD mass;                  // (group_size, n_windows) attention that each window got in the decode so far
    std::vector<Event> events;  // that end in the block
  };
  const Head& head(int kv_head) const { return heads_[std::size_t(kv_head)]; }

 private:
  void future(Head&, const ExactBlock&) const;
  void importance(Head&, const ExactBlock&) const;

  const Layer& layer_;
  bool future_, top_, importance_;
  std::vector<Head> heads_;
};

// One lane of one cell.
class Diagnostics {
 public:
  Diagnostics(const Layer&, const MetricSet&, const FullAttention&, CellResult&, int kv_row, int n_heads);
  // Whether anything here is asked for.
  static bool asked(const Layer&, const MetricSet&);
  // all: mass of all tokens, gone: of those that the lane has lost; both by row of the lane. With a reader `gone` is
  // not looked at.
  void block(const Set&, const Lane&, const Eigen::ArrayXd& all, const Eigen::ArrayXd& gone);

 private:
  struct Window {
    int run = 0;             // events in a row without importance
    bool important = false;  // at the latest event
    bool known = false;      // there was one
    bool lost = false;       // no token of it was left when the run came to count
    int n_gone = 0;          // tokens that have left
  };
  struct Counts {
    std::int64_t eligible = 0, returned = 0, lost = 0, lost_returned = 0;
    std::int64_t from[2] = {0, 0}, changed[2] = {0, 0};  // by whether the window was important
  };
  Series* find(Metric) const;
  void future(const Set&, const Lane&, const Eigen::ArrayXd& all, const Eigen::ArrayXd& gone);
  void agreement(const Set&, const Lane&);
  void importance(const Set&, const Lane&);
  void churn(const Set&, const Lane&) const;
  void lost_mass(const Set&, const Lane&, const Eigen::ArrayXd& all) const;

  const Layer& layer_;
  const FullAttention& full_;
  CellResult& cell_;
  int kv_row_;
  MatD missed_, missed_no_sink_;  // (heads of the lane, n_steps) attention of the next kHorizon steps on what has left
  std::vector<Eviction> sinks_;   // first tokens that have left
  TopTokens top_;                 // of the lane's rows
  std::vector<std::vector<Window>> windows_;  // per head of the lane
  std::vector<Counts> counts_;
  std::size_t n_counted_ = 0;  // evictions that are in Window::n_gone
  // At the last step of the block before.
  std::vector<std::vector<Pos>> read_before_;  // per head of the lane, with a reader
};

}  // namespace kvreplay
