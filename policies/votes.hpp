// Votes of several queries on the tokens that are resident now: what selectors with an observation window share.
#pragma once
#include <algorithm>

#include "policies/errors.hpp"
#include "policies/policy.hpp"

namespace kvreplay {

// Keys of the first n slots: (n, head_dim).
inline MatF first_keys(const View& view, int lane, Eigen::Index n) {
  MatF k(n, view.head_dim);
  for (Eigen::Index i = 0; i < n; ++i) {
    k.row(i) = view.key(lane, static_cast<int>(i)).transpose();
  }
  return k;
}

// Slots whose tokens lie before position `end`.
inline Eigen::Index slots_older_than(const View& view, Pos end) {
  return std::lower_bound(view.pos.begin(), view.pos.end(), end) - view.pos.begin();
}

// Each row of logits becomes its softmax; a row without columns stays as it is.
template <class Rows>
void softmax_rows(Rows&& logits) {
  for (Eigen::Index r = 0; r < logits.rows() && logits.cols() > 0; ++r) {
    auto row = logits.row(r).array();
    row = (row - row.maxCoeff()).exp();
    row /= static_cast<float>(row.template cast<double>().sum());
  }
}

// Mean over a centred kernel of odd width, zeros beyond the ends.
inline Eigen::RowVectorXd pooled_mean(const Eigen::RowVectorXd& x, int kernel) {
  Eigen::RowVectorXd out(x.size());
  for (Eigen::Index i = 0; i < x.size(); ++i) {
    const Eigen::Index begin = std::max<Eigen::Index>(0, i - kernel / 2);
    out[i] = x.segment(begin, std::min(x.size(), i + kernel / 2 + 1) - begin).sum() / kernel;
  }
  return out;
}

inline void check_odd_kernel(std::string_view owner, int kernel) {
  if (kernel % 2 == 0) {
    throw ConfigError(std::string(owner) + ": kernel=" + std::to_string(kernel) +
                      " is even; pooling is centred, so kernel must be odd");
  }
}

}  // namespace kvreplay
