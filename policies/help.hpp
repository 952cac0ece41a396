// What a user reads about parts and presets: one text each from the parameter tables, so that none
// can be out of date.
#pragma once
#include <string>
#include <string_view>

#include "policies/catalogue.hpp"

namespace kvreplay {

std::string_view role_name(Role role);            // "select"
std::string_view foresight_name(Foresight from);  // "oracle"
std::string_view type_name(ParamType type);       // "integer"
std::string_view scale_name(Scale scale);         // "one_minus"
std::string default_text(const ParamInfo& param, const void* config);
// Steps until a decay of x has halved what it decays; empty where that means nothing.
std::string half_life_text(const ParamInfo& param, const void* config);
std::string needs_text(const PartInfo& part);  // of its defaults; empty: nothing beyond the decode steps

std::string list_text();                         // all parts by role, and the presets
std::string help_text(const std::string& name);  // of one part or preset; ConfigError
std::string markdown();                          // for docs/methods.md

}  // namespace kvreplay
