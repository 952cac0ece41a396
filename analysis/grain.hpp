// How finely a parameter can be tuned.
#pragma once
#include <string>
#include <vector>

#include "analysis/objective.hpp"
#include "analysis/search.hpp"

namespace kvreplay {

// What one parameter can follow: one value for all, a value per layer, or a value per layer and KV head.
enum class Grain { global, layer, head };
// And why it is no finer, in a sentence; empty for heads.
struct GrainOf {
  Grain grain = Grain::head;
  std::string why;
};
// `axes`: all that is tuned together, since one of them may be the method's scope.
GrainOf grain_of(const Axis& axis, const std::vector<Axis>& axes, const Method& method, int n_kv_heads,
                 const Objective& objective);

}  // namespace kvreplay
