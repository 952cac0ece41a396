// Attention that prompt tokens received, as one number per token of a set.
#pragma once
#include "policies/policy.hpp"

namespace kvreplay {

// Reduces (heads, n) to (n) as the set's `group` key says.
template <class Rows>
Eigen::RowVectorXd reduce_heads(Reduce group, const Rows& rows) {
  switch (group) {
    case Reduce::max:
      return rows.colwise().maxCoeff();
    case Reduce::sum:
      return rows.colwise().sum();
    case Reduce::mean:
      break;
  }
  return rows.colwise().mean();
}

// View::column_mass of all lanes, one above the other: (n_lanes * n_heads, prompt_len).
inline MatD column_mass_of_set(const View& view, int last) {
  MatD all(view.n_lanes * view.n_heads, view.prompt_len);
  for (int lane = 0; lane < view.n_lanes; ++lane) {
    all.middleRows(lane * view.n_heads, view.n_heads) = view.column_mass(lane, last);
  }
  return all;
}

}  // namespace kvreplay
