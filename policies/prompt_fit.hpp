// What a cache is fitted to: the last queries, each over the slots of its own past.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "policies/policy.hpp"
#include "policies/soft_cap.hpp"
#include "policies/weights.hpp"

namespace kvreplay {

struct FitRows {
  MatD q;       // (rows, head_dim) softmax scale folded in, heads of one token adjacent
  MatD logits;  // (rows, n_slots) -infinity where the slot is younger than the query
};

// Of one lane, in double. Queries that see none of the slots `seen` (all slots: empty) are left out.
inline FitRows fit_rows(const View& view, int lane, int last, const std::vector<int>& seen = {}) {
  const int n = static_cast<int>(view.pos.size());
  const MatF q = view.queries(lane, last);
  MatF k(n, view.head_dim);
  for (int i = 0; i < n; ++i) {
    k.row(i) = view.key(lane, i);
  }
  FitRows rows{q.cast<double>(), q.cast<double>() * k.cast<double>().transpose()};
  soft_cap(view.logit_softcap, rows.logits.array());
  const Pos first = view.now - static_cast<Pos>(q.rows()) / view.n_heads + 1;
  std::vector<Eigen::Index> usable;
  for (Eigen::Index r = 0; r < q.rows(); ++r) {
    const Pos own = first + static_cast<Pos>(r) / view.n_heads;
    const auto past = std::upper_bound(view.pos.begin(), view.pos.end(), own) - view.pos.begin();
    rows.logits.row(r).tail(n - past).setConstant(-std::numeric_limits<double>::infinity());
    if (seen.empty() ? past > 0 : seen.front() < past) {
      usable.push_back(r);
    }
  }
  if (static_cast<Eigen::Index>(usable.size()) < q.rows()) {
    rows = {rows.q(usable, Eigen::all), rows.logits(usable, Eigen::all)};
  }
  return rows;
}

// Rows become softmax weights.
inline MatD softmax_rows(const MatD& logits) {
  MatD weights = logits;
  exp_rows(weights, Eigen::ArrayXd(logits.rowwise().maxCoeff()));
  weights.array().colwise() /= Eigen::ArrayXd(weights.rowwise().sum());
  return weights;
}

// Values of slots: (slots, v_head_dim).
inline MatD values_of(const View& view, int lane, const std::vector<int>& slots) {
  MatD v(static_cast<Eigen::Index>(slots.size()), view.v_head_dim);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    v.row(static_cast<Eigen::Index>(i)) = view.value(lane, slots[i]).cast<double>();
  }
  return v;
}

}  // namespace kvreplay
