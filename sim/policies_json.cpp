#include "sim/policies_json.hpp"

#include <cmath>
#include <nlohmann/json.hpp>

#include "policies/help.hpp"
#include "policies/method.hpp"
#include "policies/values.hpp"

namespace kvreplay {
namespace {

using Json = nlohmann::ordered_json;

Json json_of(std::span<const ParamInfo> table, const void* config) {
  Json keys = Json::array();
  for (const ParamInfo& p : table) {
    Json key = {{"name", p.name}, {"type", type_name(p.type)}, {"doc", p.doc}, {"scale", scale_name(p.scale)}};
    const ParamValue v = p.get(config);
    switch (p.type) {
      case ParamType::choice:
        key["default"] = format_value(p, v);
        key["choices"] = std::vector<std::string>(p.choices.begin(), p.choices.end());
        break;
      case ParamType::boolean:
        key["default"] = v.number != 0;
        break;
      case ParamType::file:
        key["default"] = v.text.empty() ? Json() : Json(v.text);
        break;
      default: {
        const Json number = v.number == std::floor(v.number) && p.type != ParamType::real
                                ? Json(static_cast<std::int64_t>(v.number))
                                : Json(v.number);
        key["default"] = v.percent ? Json(format_value(p, v)) : number;
        key["min"] = p.lo <= -kUnbounded ? Json() : Json(p.lo);
        key["max"] = p.hi >= kUnbounded ? Json() : Json(p.hi);
      }
    }
    if (p.scale == Scale::one_minus && v.number > 0 && v.number < 1) {
      key["half_life_steps"] = std::log(0.5) / std::log(v.number);
    }
    keys.push_back(std::move(key));
  }
  return keys;
}

Json json_of(const PartInfo& part) {
  const auto config = part.config();
  const Needs needs = part.needs(config.get());
  Json out = {{"name", part.name},
              {"role", role_name(part.role)},
              {"summary", part.summary},
              {"paper", part.paper},
              {"deviation", part.deviation},
              {"foresight", foresight_name(part.foresight)},
              {"keys", json_of(part.params, config.get())}};
  if (part.role == Role::rewrite) {
    out["rewriting"] = part.rewriting == Rewriting::merging      ? "merging"
                       : part.rewriting == Rewriting::correction ? "correction"
                                                                 : "encoding";
  }
  if (part.role == Role::select) {
    const Traits traits = part.traits(config.get());
    out["engine_keys"] = json_of(engine_keys(), &traits);
    out["budgeted"] = part.budgeted(config.get());
  }
  out["needs"] = {{"prompt_queries", needs.prompt_queries == Needs::kAll ? Json("all") : Json(needs.prompt_queries)},
                  {"pre_rope", needs.pre_rope},
                  {"spans", needs.spans}};
  return out;
}

Json json_of(const Preset& preset) {
  return {{"name", preset.name},
          {"expansion", preset.expansion},
          {"method", parse_method(std::string(preset.expansion)).name},
          {"summary", preset.summary},
          {"paper", preset.paper},
          {"deviation", preset.deviation}};
}

}  // namespace

std::string policies_json(const std::string& name) {
  if (const PartInfo* part = find_part(name)) {
    return json_of(*part).dump(2);
  }
  if (const Preset* preset = find_preset(name)) {
    return json_of(*preset).dump(2);
  }
  if (!name.empty()) {
    help_text(name);
  }  // says what is nearest
  Json parts = Json::array(), presets = Json::array();
  for (const PartInfo* p : all_parts()) {
    parts.push_back(json_of(*p));
  }
  for (const Preset& p : all_presets()) {
    presets.push_back(json_of(p));
  }
  return Json({{"parts", parts}, {"presets", presets}}).dump(2);
}

}  // namespace kvreplay
