#include "analysis/grain.hpp"

#include <algorithm>

#include "policies/values.hpp"

namespace kvreplay {
namespace {

// Whether a method that competes has scope=layer where it decides about this phase: as it is, or because that is tuned.
bool may_share_sets(const Method& method, const std::vector<Axis>& axes, bool prefill) {
  return (prefill ? method.prefill_traits : method.traits).scope == Scope::layer ||
         std::any_of(axes.begin(), axes.end(), [&](const Axis& a) {
           return a.param.engine && a.param.prefill == prefill && a.param.param->name == "scope" &&
                  std::find(a.values.begin(), a.values.end(), "layer") != a.values.end();
         });
}

}  // namespace

GrainOf grain_of(const Axis& axis, const std::vector<Axis>& axes, const Method& method, int n_kv_heads,
                 const Objective& objective) {
  const ParamInfo& p = *axis.param.param;
  const bool number = p.type == ParamType::integer || p.type == ParamType::real || p.type == ParamType::tokens;
  const std::string who = axis.param.name;
  if (!number) {
    return {Grain::global, who + " is a choice, which takes one value for all layers"};
  }
  if (axis.param.engine) {
    return {Grain::global, who + " is an engine key, which takes one value for all layers"};
  }
  if (axis.param.part->role == Role::allocate) {
    return {Grain::global, who + " is the allocator's, which spreads one total over layers or heads"};
  }
  const bool plain = !axis.percent && std::all_of(axis.values.begin(), axis.values.end(), [](const std::string& v) {
    double x = 0;
    return parse_number(v, x);
  });
  if (!plain) {
    return {Grain::global, who + " was given in percent or as a table; only plain numbers can differ by layer"};
  }
  if (may_share_sets(method, axes, false) || (axis.param.prefill && may_share_sets(method, axes, true))) {
    return {Grain::layer, who + " differs by layer alone, because with scope=layer the heads of a layer share one set"};
  }
  if (!objective.per_head()) {
    return {Grain::layer, who + " differs by layer alone, because the objective is of whole layers"};
  }
  if (n_kv_heads == 1) {
    return {Grain::layer, who + " differs by layer alone, because there is one KV head"};
  }
  return {Grain::head, ""};
}

}  // namespace kvreplay
