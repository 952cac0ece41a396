// How ZSMerge divides its cache: residual slots that take in what leaves, tokens of high score, and a tail. Shared by
// what selects and what merges, which both follow the same scores.
#pragma once
#include <numeric>

#include "policies/params.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {

class ZsMergeCache {
 public:
  ZsMergeCache(const SetShape& shape, Tokens residual, Tokens tail, double decay)
      : residual_(residual.of(shape.budget)),
        tail_(tail.of(shape.budget)),
        decay_(decay),
        score_(static_cast<std::size_t>(shape.n_tokens), 0) {}

  // Prompt queries that still count: those before weigh less than 1e-4 of the last.
  static int n_queries(double decay) {
    return decay < 1 ? std::max(1, static_cast<int>(std::ceil(std::log(1e-4) / std::log(decay)))) : Needs::kAll;
  }

  // Once per step, before a slot is rewritten.
  void meet(const View& view) {
    if (view.now == now_ || view.pos.empty()) {
      return;
    }
    now_ = view.now;
    if (view.at_prefill()) {
      begin(view);
      return;
    }
    attn_.resize(view.pos.size());
    view.attention(attn_);
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      double& score = score_[static_cast<std::size_t>(view.pos[i])];
      score = decay_ * score + static_cast<double>(attn_[i]);
    }
  }
  double score(const View& view, int slot) const {
    return score_[static_cast<std::size_t>(view.pos[static_cast<std::size_t>(slot)])];
  }

  // The budget bounds both, the residual slots first.
  int n_residual(const View& view) const { return std::min(std::max(1, residual_), view.budget); }
  int n_tail(const View& view) const { return std::min(tail_, view.budget - n_residual(view)); }

  // The first cut: what is neither tail nor among the highest scores, in runs of equal length, one for each residual
  // slot; of each run the token with the highest score lends its slot. Empty where nothing has to leave.
  struct Run {
    std::vector<int> slots;
    int host = -1;
  };
  std::vector<Run> runs(const View& view) const {
    const int n = static_cast<int>(view.pos.size()), n_residual = this->n_residual(view);
    const int n_old = n - n_tail(view), n_top = view.budget - n_tail(view) - n_residual;
    if (n <= view.budget) {
      return {};
    }
    std::vector<int> order(static_cast<std::size_t>(n_old));
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + n_top, order.end(), [&](int a, int b) {
      const double x = score(view, a), y = score(view, b);
      return x != y ? x > y : a > b;
    });
    std::vector<int> rest(order.begin() + n_top, order.end());
    std::sort(rest.begin(), rest.end());
    const int length = static_cast<int>(rest.size()) / n_residual, longer = static_cast<int>(rest.size()) % n_residual;
    std::vector<Run> out(static_cast<std::size_t>(n_residual));
    auto next = rest.begin();
    for (int i = 0; i < n_residual; ++i) {
      Run& run = out[static_cast<std::size_t>(i)];
      const auto end = next + length + (i < longer ? 1 : 0);
      run.slots.assign(next, end);
      run.host = *std::max_element(next, end, [&](int a, int b) { return score(view, a) < score(view, b); });
      next = end;
    }
    return out;
  }

 private:
  // Decayed sum of what the last prompt queries gave, each softmaxed over its own past.
  void begin(const View& view) {
    if (decay_ >= 1) {
      const Eigen::RowVectorXd mass = reduce_heads(view.group, column_mass_of_set(view, Needs::kAll));
      std::copy(mass.begin(), mass.end(), score_.begin());
      return;
    }
    const auto n = static_cast<Eigen::Index>(view.pos.size());
    MatD sums = MatD::Zero(view.n_lanes * view.n_heads, n);
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      MatF k(n, view.head_dim);
      for (Eigen::Index i = 0; i < n; ++i) {
        k.row(i) = view.key(lane, static_cast<int>(i));
      }
      const MatF q = view.queries(lane, n_queries(decay_));
      const MatF logits = q * k.transpose();
      const Eigen::Index n_past = q.rows() / view.n_heads;
      for (Eigen::Index r = 0; r < q.rows(); ++r) {
        const Eigen::Index back = n_past - 1 - r / view.n_heads;
        const auto seen = logits.row(r).head(n - back).array();
        const Eigen::Array<double, 1, Eigen::Dynamic> w = (seen - seen.maxCoeff()).template cast<double>().exp();
        sums.row(lane * view.n_heads + r % view.n_heads).head(n - back).array() +=
            w * (std::pow(decay_, static_cast<double>(back)) / w.sum());
      }
    }
    const Eigen::RowVectorXd mass = reduce_heads(view.group, sums);
    for (Eigen::Index i = 0; i < n; ++i) {
      score_[static_cast<std::size_t>(view.pos[static_cast<std::size_t>(i)])] = mass[i];
    }
  }

  int residual_, tail_;
  double decay_;
  Pos now_ = -1;
  std::vector<double> score_;  // (n_tokens)
  std::vector<float> attn_;    // (n_slots)
};

}  // namespace kvreplay
