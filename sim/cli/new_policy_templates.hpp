// The files of sim/cli/templates, as `kvreplay new-policy` writes them once @NAME@, @CLASS@, @HEADER@ and @END@ are
// filled in.
#pragma once
#include <string_view>

namespace kvreplay {

struct PolicyTemplate {
  // rows: those of the role's tables in docs/methods.md, a blank line between tables.
  std::string_view role, source, test, rows;
};
extern const PolicyTemplate kPolicyTemplates[5];  // in the order of Role
extern const std::string_view kPluginLists;       // a plug-in's CMakeLists.txt

}  // namespace kvreplay
