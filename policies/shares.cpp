#include "policies/shares.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "policies/errors.hpp"

namespace kvreplay {

std::vector<int> split(int total, std::span<const double> weights, std::span<const int> most, Leftover leftover) {
  KVREPLAY_CHECK(weights.size() == most.size());
  constexpr double kRound = 1e-9;  // 3 of 3 parts is 3
  std::vector<int> shares(weights.size(), 0);
  std::vector<std::size_t> open(weights.size());  // not yet full
  std::iota(open.begin(), open.end(), std::size_t{0});
  std::vector<double> exact(weights.size());
  int left = total;
  for (bool filled = true; filled && !open.empty();) {
    double sum = 0;
    for (std::size_t i : open) {
      sum += weights[i];
    }
    for (std::size_t i : open) {
      exact[i] = sum > 0 ? left * (weights[i] / sum) : left / static_cast<double>(open.size());
    }
    const auto full = std::stable_partition(open.begin(), open.end(),
                                            [&](std::size_t i) { return exact[i] < static_cast<double>(most[i]); });
    filled = full != open.end();
    for (auto it = full; it != open.end(); ++it) {
      shares[*it] = most[*it];
      left -= most[*it];
    }
    open.erase(full, open.end());
  }
  for (std::size_t i : open) {
    shares[i] = static_cast<int>(std::floor(exact[i] + kRound));
    left -= shares[i];
  }
  if (leftover == Leftover::remainder) {
    std::stable_sort(open.begin(), open.end(), [&](std::size_t a, std::size_t b) {
      return exact[a] - shares[a] > exact[b] - shares[b] + kRound;
    });
  } else {
    std::reverse(open.begin(), open.end());
  }
  for (std::size_t i : open) {  // less than one for each; to the last, all that fits
    const int more = std::min({left, most[i] - shares[i], leftover == Leftover::remainder ? 1 : left});
    shares[i] += more;
    left -= more;
  }
  return shares;
}

int room(const Allocator::Layers& l) {
  return std::max(l.budget, l.budget <= l.prompt_len ? l.prompt_len : l.n_tokens);
}

std::vector<int> split_over_layers(const Allocator::Layers& l, std::span<const double> weights) {
  const auto n = l.index.size();
  if (l.budget >= l.n_tokens) {
    return std::vector<int>(n, l.budget);  // nobody has to do without
  }
  std::vector<int> budgets = split(static_cast<int>(n) * l.budget, weights, std::vector<int>(n, room(l)));
  for (int& b : budgets) {
    if (b == 0) {
      --*std::max_element(budgets.begin(), budgets.end());
      b = 1;
    }
  }
  return budgets;
}

}  // namespace kvreplay
