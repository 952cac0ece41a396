// Parts from shared objects, loaded while the program runs and kept to its end. docs/plugins.md.
#pragma once
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "policies/part.hpp"

namespace kvreplay {

struct Plugin {
  std::filesystem::path path;  // as given
  std::string sha256;          // of the file, hex
  std::span<const PartInfo> parts;
};

// Adds the parts of a shared object to the catalogue; a file that is loaded already stays as it is. Not while another
// thread parses methods. ConfigError where it is no plug-in, was built for another kvreplay, or has a name that is
// taken.
void load_plugin(const std::filesystem::path&);
std::span<const std::unique_ptr<const Plugin>> loaded_plugins();  // in order of loading
nlohmann::json plugins_json();                                    // as results list them: path, sha256, parts of each
// The hash of the file that a part came from; empty for a built-in part. What identifies results beside the part's
// name.
std::string plugin_hash(const PartInfo&);

}  // namespace kvreplay
