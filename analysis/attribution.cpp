#include "analysis/attribution.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "policies/errors.hpp"
#include "sim/exact.hpp"
#include "sim/parallel.hpp"

namespace kvreplay {
namespace {

constexpr int kSteps = 64;   // of a block
constexpr int kChunk = 256;  // tokens multiplied at once

// One lane while its layer is attributed.
class Lane {
 public:
  Lane(const Layer& layer, const CellResult& cell, int kv_head, int first_head, int n_heads)
      : layer_(layer),
        cell_(cell),
        kv_head_(kv_head),
        first_head_(first_head),
        heads_(n_heads),
        reads_(!cell.attended.empty()) {
    const auto n_tokens = std::size_t(layer.n_tokens), n_steps = std::size_t(layer.n_steps());
    const int head = kv_head * layer.group_size + first_head;
    const std::size_t n_sets = cell.evicted_at.size();
    KVREPLAY_CHECK(n_sets == 1 || n_sets == std::size_t(layer.n_kv_heads) || n_sets == std::size_t(layer.n_heads));
    out_.kv_head = kv_head;
    out_.q_head = n_heads < layer.group_size ? head : -1;
    out_.evicted_at = cell.evicted_at[n_sets == 1                               ? 0
                                      : n_sets == std::size_t(layer.n_kv_heads) ? std::size_t(kv_head)
                                                                                : std::size_t(head)];
    for (auto* per_token : {&out_.damage, &out_.regret, &out_.worst_damage}) {
      per_token->assign(n_tokens, 0);
    }
    out_.missed.assign(n_tokens, 0);
    out_.first_missed.assign(n_tokens, -1);
    out_.worst_step.assign(n_tokens, -1);
    out_.step_missed.assign(n_steps, 0);
    out_.step_missed_mass.assign(n_steps, 0);
    out_.culprit.assign(n_steps * kCulprits, -1);
    out_.culprit_damage.assign(n_steps * kCulprits, 0);
    error_ = cell.find(Metric::error);
    KVREPLAY_CHECK(error_ != nullptr);
  }

  void block(const ExactBlock& e) {
    begin_ = e.begin;
    first_step_ = e.begin - layer_.prompt_len;
    steps_ = e.steps;
    rows_ = steps_ * heads_;
    inv_z_.resize(rows_);
    pick(e, e.z, inv_z_);
    inv_z_ = inv_z_.inverse().eval();
    sort_tokens();
    find_directions(e);
    add_damage(e);
    add_missed(e);
  }

  LaneAttribution take() { return std::move(out_); }

 private:
  // The lane's rows of something that has a number for every row of the exact block.
  template <class Numbers, class Out>
  void pick(const ExactBlock& e, const Numbers& all, Out&& out) const {
    const auto* from = all.data();
    if (heads_ == e.group_size) {
      for (int r = 0; r < rows_; ++r) {
        out[r] = double(from[r]);
      }
      return;
    }
    for (int r = 0; r < rows_; ++r) {
      out[r] = double(from[(r / heads_) * e.group_size + first_head_ + r % heads_]);
    }
  }

  int head_of(int r) const { return kv_head_ * layer_.group_size + first_head_ + r % heads_; }  // of a row
  int step_of(int r) const { return first_step_ + r / heads_; }

  // Whether the row does not attend the token, which is born.
  bool gone(Pos token, int r) const {
    const int step = step_of(r), head = head_of(r);
    if (!reads_) {
      return out_.evicted_at[std::size_t(token)] <= step;
    }
    const std::size_t n_bytes = (std::size_t(layer_.n_tokens) + 7) / 8;
    const std::uint8_t byte =
        cell_.attended[(std::size_t(head) * std::size_t(layer_.n_steps()) + std::size_t(step)) * n_bytes +
                       std::size_t(token / 8)];
    return ((byte >> (token % 8)) & 1) == 0;
  }

  // Sets to 0 where the row does not miss the token, or (with `missing` false) does not attend it.
  template <class Row>
  void mask(Pos token, bool missing, Row&& row) const {
    if (!reads_) {  // gone from one step on
      const int from = std::clamp(out_.evicted_at[std::size_t(token)] - first_step_, 0, steps_) * heads_;
      if (missing) {
        row.head(from).setZero();
      } else {
        row.tail(rows_ - from).setZero();
      }
      return;
    }
    for (int r = 0; r < rows_; ++r) {
      if (gone(token, r) != missing) {
        row[r] = 0;
      }
    }
  }

  // Tokens that some row of the block misses, and those that some row attends.
  void sort_tokens() {
    missing_.clear();
    present_.clear();
    for (Pos t = 0; t < begin_ + steps_; ++t) {
      const int at = out_.evicted_at[std::size_t(t)];
      if (reads_ || at < first_step_ + steps_) {
        missing_.push_back(t);
      }
      if (reads_ || at > first_step_) {
        present_.push_back(t);
      }
    }
  }

  // Calls use(tokens of the chunk, attention, values): attention (tokens, rows) of the exact pass where the row misses
  // the token (or, with `missing` false, attends it), 0 elsewhere; values (tokens, v_head_dim).
  template <class Use>
  void chunks(const ExactBlock& e, bool missing, Use use) {
    const std::vector<Pos>& tokens = missing ? missing_ : present_;
    for (std::size_t first = 0; first < tokens.size(); first += kChunk) {
      const std::span<const Pos> chunk(tokens.data() + first, std::min<std::size_t>(kChunk, tokens.size() - first));
      attention_.resize(Eigen::Index(chunk.size()), rows_);
      values_.resize(Eigen::Index(chunk.size()), layer_.v_head_dim);
      for (std::size_t i = 0; i < chunk.size(); ++i) {
        auto row = attention_.row(Eigen::Index(i));
        pick(e, e.weights.row(chunk[i]), row);
        row.array() *= inv_z_.transpose();
        mask(chunk[i], missing, row);
        values_.row(Eigen::Index(i)) = layer_.v[std::size_t(kv_head_)].row(chunk[i]).cast<double>();
      }
      use(chunk, attention_, values_);
    }
  }

  // What sums over one side of V are, as shares of Z.
  struct Side {
    MatD num;             // (rows, v_head_dim)
    Eigen::ArrayXd mass;  // (rows)
  };
  Side side(const ExactBlock& e, bool missing) {
    Side s{MatD::Zero(rows_, layer_.v_head_dim), Eigen::ArrayXd::Zero(rows_)};
    chunks(e, missing, [&](std::span<const Pos>, const MatD& attention, const MatD& values) {
      s.num.noalias() += attention.transpose() * values;
      s.mass += attention.colwise().sum().transpose().array();
    });
    return s;
  }

  // direction_: (f - f_R) / (|f - f_R| |f|), offset_: f_R along it. Both 0 where nothing is lost, and where `error`
  // does not count. Each side is summed by itself: a difference would lose a small one.
  void find_directions(const ExactBlock& e) {
    const Side lost = side(e, true), kept = side(e, false);
    direction_.setZero(rows_, layer_.v_head_dim);
    offset_.setZero(rows_);
    Eigen::RowVectorXd f_r, difference;
    for (int r = 0; r < rows_; ++r) {
      const int step = step_of(r);
      const bool counts = !std::isnan(error_->row(head_of(r))[std::size_t(step)]);
      if (!counts || lost.mass[r] <= 0 || kept.mass[r] <= 0) {
        continue;
      }
      f_r = kept.num.row(r) / kept.mass[r];
      difference = lost.num.row(r) - lost.mass[r] * f_r;
      const double error = difference.norm(), size = (lost.num.row(r) + kept.num.row(r)).norm();
      if (error > 0 && size > 0) {
        direction_.row(r) = difference / (error * size);
        offset_[r] = f_r.dot(direction_.row(r));
      }
    }
  }

  void add_damage(const ExactBlock& e) {
    chunks(e, true, [&](std::span<const Pos> tokens, const MatD& attention, const MatD& values) {
      along_.noalias() = values * direction_.transpose();
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        const auto mine = attention.row(Eigen::Index(i)).array();
        const Eigen::ArrayXd damage =
            (mine * (along_.row(Eigen::Index(i)).array() - offset_.transpose())).matrix().transpose();
        const auto token = std::size_t(tokens[i]);
        out_.regret[token] += mine.sum();
        for (int s = 0; s < steps_; ++s) {
          const double d = damage.segment(Eigen::Index(s) * heads_, heads_).sum();
          out_.damage[token] += d;
          if (d > out_.worst_damage[token]) {
            out_.worst_damage[token] = d;
            out_.worst_step[token] = first_step_ + s;
          }
          blame(tokens[i], s, d);
        }
      }
    });
  }

  // Keeps the step's list of culprits, largest first; of equals the older token, which comes first.
  void blame(Pos token, int step, double damage) {
    const std::size_t first = std::size_t(first_step_ + step) * kCulprits;
    int place = kCulprits;
    while (place > 0 && damage > out_.culprit_damage[first + std::size_t(place) - 1]) {
      --place;
    }
    if (place == kCulprits) {
      return;
    }
    for (std::size_t i = kCulprits - 1; i > std::size_t(place); --i) {
      out_.culprit[first + i] = out_.culprit[first + i - 1];
      out_.culprit_damage[first + i] = out_.culprit_damage[first + i - 1];
    }
    out_.culprit[first + std::size_t(place)] = token;
    out_.culprit_damage[first + std::size_t(place)] = damage;
  }

  // Tokens that the block's steps miss although their attention is among the |R| largest. Of equals the newer is kept,
  // as selectors do.
  void add_missed(const ExactBlock& e) {
    const Eigen::Index n_all = begin_ + steps_;
    MatD mean(steps_, n_all);  // attention, mean over the heads
    Eigen::ArrayXd attention(rows_);
    for (Pos t = 0; t < n_all; ++t) {
      pick(e, e.weights.row(t), attention);
      attention *= inv_z_;
      for (int s = 0; s < steps_; ++s) {
        mean(s, t) = attention.segment(Eigen::Index(s) * heads_, heads_).sum() / heads_;
      }
    }
    std::vector<Pos> order;
    std::vector<char> is_gone;
    for (int s = 0; s < steps_; ++s) {
      const Pos n = begin_ + s + 1;
      is_gone.assign(std::size_t(n), 1);
      int n_kept = 0;
      for (Pos t = 0; t < n; ++t) {
        // A reader's heads choose for themselves: the token is there where one of them attends it.
        for (int r = s * heads_; is_gone[std::size_t(t)] && r < s * heads_ + (reads_ ? heads_ : 1); ++r) {
          is_gone[std::size_t(t)] = gone(t, r);
        }
        n_kept += !is_gone[std::size_t(t)];
      }
      if (n_kept == n) {
        continue;
      }
      order.resize(std::size_t(n));
      std::iota(order.begin(), order.end(), 0);
      const double* of = mean.row(s).data();
      std::nth_element(order.begin(), order.begin() + n_kept, order.end(),
                       [of](Pos a, Pos b) { return of[a] != of[b] ? of[a] > of[b] : a > b; });
      const int step = first_step_ + s;
      std::sort(order.begin(), order.begin() + n_kept);  // sums do not depend on how the library partitions
      for (int i = 0; i < n_kept; ++i) {
        const auto token = std::size_t(order[std::size_t(i)]);
        if (!is_gone[token] || mean(s, order[std::size_t(i)]) <= 0) {
          continue;
        }
        ++out_.missed[token];
        if (out_.first_missed[token] < 0) {
          out_.first_missed[token] = step;
        }
        ++out_.step_missed[std::size_t(step)];
        out_.step_missed_mass[std::size_t(step)] += mean(s, order[std::size_t(i)]);
      }
    }
  }

  const Layer& layer_;
  const CellResult& cell_;
  const Series* error_;
  int kv_head_, first_head_, heads_;
  bool reads_;  // E is what is not attended
  LaneAttribution out_;
  // Of the block. A row is step * heads + head of the lane.
  Pos begin_ = 0;
  int first_step_ = 0, steps_ = 0, rows_ = 0;
  Eigen::ArrayXd inv_z_;  // (rows)
  std::vector<Pos> missing_, present_;
  MatD direction_;                   // (rows, v_head_dim)
  Eigen::ArrayXd offset_;            // (rows)
  MatD attention_, values_, along_;  // (chunk, rows), (chunk, v_head_dim), (chunk, rows)
};

}  // namespace

std::vector<LaneAttribution> attribute(const Layer& layer, const CellResult& cell, int threads) {
  // Where every query head has its own evictions it is a lane by itself.
  const bool per_head = cell.evicted_at.size() == std::size_t(layer.n_heads) && layer.n_heads > layer.n_kv_heads;
  const int per_kv_head = per_head ? layer.group_size : 1;
  std::vector<LaneAttribution> all(std::size_t(layer.n_kv_heads) * std::size_t(per_kv_head));
  parallel(layer.n_kv_heads, threads, [&](int h) {
    std::vector<Lane> lanes;
    lanes.reserve(std::size_t(per_kv_head));
    for (int i = 0; i < per_kv_head; ++i) {
      lanes.emplace_back(layer, cell, h, i, per_head ? 1 : layer.group_size);
    }
    ExactBlock e;
    for (Pos begin = layer.prompt_len; begin < layer.n_tokens; begin += kSteps) {
      e.compute(layer, h, begin, std::min<int>(kSteps, layer.n_tokens - begin), ValueProduct::none, false);
      for (Lane& lane : lanes) {
        lane.block(e);
      }
    }
    for (int i = 0; i < per_kv_head; ++i) {
      all[std::size_t(h) * std::size_t(per_kv_head) + std::size_t(i)] = lanes[std::size_t(i)].take();
    }
  });
  return all;
}

}  // namespace kvreplay
