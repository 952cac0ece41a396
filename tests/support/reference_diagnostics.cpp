#include "tests/support/reference_diagnostics.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

namespace kvreplay::testing {

MatD attention_rows(const ToyLayer& layer, int q_head) {
  MatD rows = MatD::Zero(layer.n_steps(), layer.options.n_tokens);
  for (int step = 0; step < layer.n_steps(); ++step) {
    const Pos pos = layer.options.prompt_len + step;
    const Eigen::VectorXd logits = logits_at(layer, q_head, pos);
    const Eigen::VectorXd weights = (logits.array() - logits.maxCoeff()).exp();
    rows.row(step).head(pos + 1) = weights / weights.sum();
  }
  return rows;
}

Eigen::VectorXd reference_future_missed(const MatD& rows, Pos prompt_len, int horizon, Pos sink, const Gone& gone) {
  const int n_steps = static_cast<int>(rows.rows());
  Eigen::VectorXd out(n_steps);
  for (int step = 0; step < n_steps; ++step) {
    double missed = 0, there = 0;
    for (int later = step + 1; later <= std::min(step + horizon, n_steps - 1); ++later) {
      for (Pos pos = sink; pos <= prompt_len + step; ++pos) {
        there += rows(later, pos);
        missed += gone(step, pos) ? rows(later, pos) : 0;
      }
    }
    out[step] = there > 0 ? missed / there : std::numeric_limits<double>::quiet_NaN();
  }
  return out;
}

std::vector<Pos> largest(const Eigen::VectorXd& row, std::size_t n) {
  std::vector<Pos> order;
  for (Pos pos = 0; pos < row.size(); ++pos) {
    if (row[pos] > 0) {
      order.push_back(pos);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](Pos a, Pos b) { return row[a] > row[b]; });
  order.resize(std::min(n, order.size()));
  return order;
}

ReferenceImportance reference_importance(const MatD& rows, Pos prompt_len, const Gone& gone,
                                         const std::function<int(int step)>& resident) {
  constexpr int kTokens = 8, kMissed = 4, kWithin = 8;
  const int n_events = static_cast<int>(rows.rows()) / kTokens, n_windows = static_cast<int>(rows.cols()) / kTokens;
  const auto last_step = [&](int event) { return kTokens * event + kTokens - 1; };
  const auto born = [&](int event, int window) { return kTokens * (window + 1) <= prompt_len + kTokens * event; };

  // (n_events, n_windows) 1: important, 0: not, -1: not whole yet
  Eigen::MatrixXi state = Eigen::MatrixXi::Constant(n_events, n_windows, -1);
  for (int event = 0; event < n_events; ++event) {
    std::vector<std::pair<double, int>> ranking;
    for (int window = 0; window < n_windows && born(event, window); ++window) {
      const double mass =
          rows.block(0, Eigen::Index{window} * kTokens, Eigen::Index{last_step(event)} + 1, kTokens).sum();
      ranking.emplace_back(-mass, window);
      state(event, window) = 0;
    }
    std::sort(ranking.begin(), ranking.end());
    const int n_kept = std::max(1, resident(last_step(event)) / kTokens);
    for (int i = 0; i < std::min(n_kept, static_cast<int>(ranking.size())); ++i) {
      state(event, ranking[static_cast<std::size_t>(i)].second) = 1;
    }
  }

  ReferenceImportance out;
  for (int window = 0; window < n_windows; ++window) {
    for (int event = 0; event + 1 < n_events; ++event) {
      const int from = state(event, window);
      if (from >= 0) {
        ++out.from[from];
        out.changed[from] += state(event + 1, window) != from ? 1 : 0;
      }
    }
    for (int start = 0; start < n_events; ++start) {
      if (state(start, window) != 0 || (start > 0 && state(start - 1, window) == 0)) {
        continue;
      }
      int end = start;
      while (end < n_events && state(end, window) == 0) {
        ++end;
      }
      if (end - start < kMissed || start + kMissed - 1 + kWithin >= n_events) {
        continue;
      }
      bool lost = true;
      for (Pos pos = kTokens * window; pos < kTokens * (window + 1); ++pos) {
        lost = lost && gone(last_step(start + kMissed - 1), pos);
      }
      const bool returned = end - start <= kMissed - 1 + kWithin;
      ++out.eligible;
      out.returned += returned ? 1 : 0;
      out.lost += lost ? 1 : 0;
      out.lost_returned += lost && returned ? 1 : 0;
    }
  }
  return out;
}

}  // namespace kvreplay::testing
