// Who stays where some slots leave.
#pragma once
#include <span>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay {

// Slots that are not among those that leave; both ascending.
inline std::vector<int> staying_slots(const View& view, std::span<const int> leaving) {
  std::vector<int> out;
  std::size_t next = 0;
  for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
    if (next < leaving.size() && leaving[next] == i) {
      ++next;
    } else {
      out.push_back(i);
    }
  }
  return out;
}

}  // namespace kvreplay
