// Which neighbours in the cache KVMerger may join to one set: shared by what selects and what merges.
#pragma once
#include <limits>
#include <numeric>

#include "policies/params.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {

class KvMergerLinks {
 public:
  KvMergerLinks(const SetShape& shape, Tokens heavy, Tokens recent)
      : heavy_(heavy.of(shape.budget)), recent_(recent.of(shape.budget)), received_(shape, true) {}
  void meet(const View& view) { received_.meet(view); }

  // Attention that a token received, mean over the lanes.
  double attention(const View& view, int slot) {
    double sum = 0;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      sum += received_.of(lane, view.pos[static_cast<std::size_t>(slot)]) / view.n_lanes;
    }
    return sum;
  }

  // The latest tokens and those of most attention, which stay as they are; never more than the budget.
  std::vector<char> protected_slots(const View& view) {
    const int n = static_cast<int>(view.pos.size());
    const int recent = std::min({recent_, view.budget, n}),
              heavy = std::min({heavy_, view.budget - recent, n - recent});
    std::vector<char> out(view.pos.size(), 0);
    std::fill(out.end() - recent, out.end(), 1);
    std::vector<int> order(static_cast<std::size_t>(n - recent));
    std::vector<double> a;
    for (int i = 0; i < n - recent; ++i) {
      order[static_cast<std::size_t>(i)] = i;
      a.push_back(attention(view, i));
    }
    const auto more = [&](int i, int j) {
      const double x = a[static_cast<std::size_t>(i)], y = a[static_cast<std::size_t>(j)];
      return x != y ? x > y : i > j;
    };
    std::nth_element(order.begin(), order.begin() + heavy, order.end(), more);
    for (int i = 0; i < heavy; ++i) {
      out[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = 1;
    }
    return out;
  }

  // Cosine of the keys of slots i and i + 1, mean over the lanes; kNone beside a protected one: (n_slots - 1).
  static constexpr double kNone = -std::numeric_limits<double>::infinity();
  std::vector<double> links(const View& view) {
    const std::vector<char> kept = protected_slots(view);
    std::vector<double> out(view.pos.empty() ? 0 : view.pos.size() - 1, kNone);
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (kept[i] || kept[i + 1]) {
        continue;
      }
      out[i] = 0;
      for (int lane = 0; lane < view.n_lanes; ++lane) {
        const int slot = static_cast<int>(i);
        out[i] += cosine(view.key(lane, slot), view.key(lane, slot + 1)) / view.n_lanes;
      }
    }
    return out;
  }

 private:
  int heavy_, recent_;
  ReceivedAttention received_;
};

}  // namespace kvreplay
