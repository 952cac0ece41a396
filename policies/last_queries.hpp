// What the last queries say about the tokens that are resident now: selectors that look again at every eviction.
#pragma once
#include "policies/column_mass.hpp"
#include "policies/errors.hpp"
#include "policies/protect.hpp"
#include "policies/soft_cap.hpp"

namespace kvreplay {

// Slots older than the last `window` positions: those that a window of such a width judges.
inline Eigen::Index slots_before(const View& view, int window) {
  auto n = static_cast<Eigen::Index>(view.pos.size());
  while (n > 0 && view.pos[static_cast<std::size_t>(n - 1)] > view.now - window) {
    --n;
  }
  return n;
}

// Logits of the last `last` queries with the first n slots: (voters * n_heads, n), heads of one token adjacent. There
// are fewer voters than asked at the start of the sequence.
inline MatF last_logits(const View& view, int lane, int last, Eigen::Index n) {
  MatF k(n, view.head_dim);
  for (Eigen::Index i = 0; i < n; ++i) {
    k.row(i) = view.key(lane, static_cast<int>(i));
  }
  MatF logits = view.queries(lane, last) * k.transpose();
  soft_cap(view.logit_softcap, logits.array());
  for (Eigen::Index i = 0; i < n; ++i) {
    logits.col(i).array() += view.bias(lane, static_cast<int>(i));
  }
  return logits;
}

// Their softmax, each over the slots that its own token could see: (voters * n_heads, n_slots), 0 for the others.
inline MatD last_attention(const View& view, int lane, int last) {
  const auto n = static_cast<Eigen::Index>(view.pos.size());
  MatF logits = last_logits(view, lane, last, n);
  MatD attn = MatD::Zero(logits.rows(), n);
  const int voters = static_cast<int>(logits.rows()) / view.n_heads;
  Eigen::Index past = 0;  // slots that this voter can see
  for (Eigen::Index r = 0; r < logits.rows(); ++r) {
    const Pos voter = view.now - voters + 1 + static_cast<Pos>(r) / view.n_heads;
    while (past < n && view.pos[static_cast<std::size_t>(past)] <= voter) {
      ++past;
    }
    if (past == 0) {
      continue;
    }
    auto row = logits.row(r).head(past);
    row = (row.array() - row.maxCoeff()).exp();
    attn.row(r).head(past) = row.cast<double>() / row.cast<double>().sum();
  }
  return attn;
}

// Rows of one voter from all lanes, reduced over the heads of the set as its `group` key says: (voters, columns).
template <class Rows>
MatD reduce_voters(const View& view, const std::vector<Rows>& lanes) {
  const Eigen::Index voters = lanes[0].rows() / view.n_heads;
  MatD out(voters, lanes[0].cols()), heads(view.n_lanes * view.n_heads, lanes[0].cols());
  for (Eigen::Index t = 0; t < voters; ++t) {
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      heads.middleRows(lane * view.n_heads, view.n_heads) =
          lanes[static_cast<std::size_t>(lane)].middleRows(t * view.n_heads, view.n_heads).template cast<double>();
    }
    out.row(t) = reduce_heads(view.group, heads);
  }
  return out;
}

// Neighbours stay together: each column becomes the mean (zeros beyond the ends) or the maximum of the `kernel` columns
// around it.
enum class Pooling { avg, max, none };
inline constexpr std::string_view kPoolings[] = {"avg", "max", "none"};
inline MatD pool_neighbours(const MatD& rows, Pooling pooling, int kernel) {
  if (pooling == Pooling::none) {
    return rows;
  }
  const Eigen::Index n = rows.cols(), half = kernel / 2;
  MatD out(rows.rows(), n);
  for (Eigen::Index i = 0; i < n; ++i) {
    const Eigen::Index begin = std::max<Eigen::Index>(0, i - half), end = std::min(n, i + half + 1);
    const auto near = rows.middleCols(begin, end - begin);
    if (pooling == Pooling::max) {
      out.col(i) = near.rowwise().maxCoeff();
    } else {
      out.col(i) = near.rowwise().sum() / kernel;
    }
  }
  return out;
}
inline void check_kernel(std::string_view part, int kernel) {
  if (kernel % 2 == 0) {
    throw ConfigError(std::string(part) + ": kernel=" + std::to_string(kernel) +
                      " is even; pooling is centred, so kernel must be odd");
  }
}

// Scores of the first slots; the others, which are the window's, stand above them all, and those that the budget holds
// are protected.
inline void score_before_window(const View& view, const Eigen::RowVectorXd& s, int window, std::span<float> out) {
  std::fill(out.begin(), out.end(), s.size() > 0 ? static_cast<float>(s.maxCoeff()) + 1 : 0.0F);
  std::transform(s.begin(), s.end(), out.begin(), [](double x) { return static_cast<float>(x); });
  protect(view, 0, window, out);
}

}  // namespace kvreplay
