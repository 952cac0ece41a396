// Every part and preset, in the order tables print them. A new part is two mentions in catalogue.cpp and a line in
// CMakeLists.txt.
#pragma once
#include <span>
#include <string>
#include <string_view>

#include "policies/nearest.hpp"  // IWYU pragma: export
#include "policies/part.hpp"

namespace kvreplay {

struct Preset {
  std::string_view name, expansion, summary, paper, deviation;
};

std::span<const PartInfo* const> all_parts();
std::span<const Preset> all_presets();
const PartInfo* find_part(std::string_view name);  // nullptr if there is none
// A part from outside (a plug-in, a prototype), which must live as long as it is in use; all_parts() spans it from then
// on. Not while another thread parses methods. ConfigError if its name is taken or is no name.
void add_part(const PartInfo&);
const Preset* find_preset(std::string_view name);

// The keys that every selector takes beside its own: a table over Traits.
std::span<const ParamInfo> engine_keys();

}  // namespace kvreplay
