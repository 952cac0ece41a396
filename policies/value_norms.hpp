// Norms of a set's values by position: once per token, and again where a value was rewritten.
#pragma once
#include <algorithm>

#include "policies/policy.hpp"

namespace kvreplay {

enum class Norm { l1, l2 };
inline constexpr std::string_view kNorms[] = {"l1", "l2"};

class ValueNorms {
 public:
  ValueNorms(const SetShape& shape, Norm norm)
      : norm_(norm),
        lanes_(static_cast<std::size_t>(shape.n_lanes),
               std::vector<float>(static_cast<std::size_t>(shape.n_tokens), 0.0F)) {}

  // Once a step, before `of`: tokens that arrived since the last call, and those rewritten since.
  void meet(const View& view) {
    for (int i = static_cast<int>(view.pos.size()); i-- > 0 && view.pos[static_cast<std::size_t>(i)] > newest_;) {
      take(view, i);
    }
    newest_ = view.pos.empty() ? newest_ : view.pos.back();
    for (const Pos pos : view.rewritten) {
      const auto slot = std::lower_bound(view.pos.begin(), view.pos.end(), pos);
      if (slot != view.pos.end() && *slot == pos) {
        take(view, static_cast<int>(slot - view.pos.begin()));
      }
    }
  }

  float of(int lane, Pos pos) const { return lanes_[static_cast<std::size_t>(lane)][static_cast<std::size_t>(pos)]; }
  // Mean over the lanes.
  float mean(Pos pos) const {
    float sum = 0;
    for (const auto& lane : lanes_) {
      sum += lane[static_cast<std::size_t>(pos)];
    }
    return sum / static_cast<float>(lanes_.size());
  }

 private:
  void take(const View& view, int slot) {
    for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
      const VecF v = view.value(static_cast<int>(lane), slot);
      lanes_[lane][static_cast<std::size_t>(view.pos[static_cast<std::size_t>(slot)])] =
          norm_ == Norm::l1 ? v.lpNorm<1>() : v.norm();
    }
  }

  Norm norm_;
  std::vector<std::vector<float>> lanes_;  // per lane (n_tokens)
  Pos newest_ = -1;
};

}  // namespace kvreplay
