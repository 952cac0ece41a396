#include "analysis/tuned_methods.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "policies/errors.hpp"
#include "sim/whole_file.hpp"

namespace kvreplay {
namespace {
namespace fs = std::filesystem;
using Json = nlohmann::json;
}  // namespace

TunedMethods read_tuned(const fs::path& file) {
  const fs::path path = fs::is_directory(file) ? file / "tuned.json" : file;
  if (!fs::exists(path)) {
    throw ConfigError("--params-from " + file.string() + ": cannot be opened; give the tuned.json of kvreplay tune");
  }
  const Json j = Json::parse(read_whole(path), nullptr, false);
  if (!j.is_object() || j.value("format", "") != "kvreplay-tuned" || !j.contains("tuned") || !j["tuned"].is_array()) {
    throw ConfigError("--params-from " + file.string() + " is not a tuned.json of kvreplay tune");
  }
  TunedMethods t;
  try {
    for (const Json& where : j["tuned"]) {
      const auto budgets = where.at("budgets").get<std::vector<std::string>>();
      for (const std::string& b : budgets) {
        if (std::find(t.budgets.begin(), t.budgets.end(), b) == t.budgets.end()) {
          t.budgets.push_back(b);
        }
      }
      for (const char* level : {"global", "layer", "head"}) {
        if (where.at(level).is_null()) {
          continue;
        }
        const auto method = where.at(level).get<std::string>();
        if (std::find(t.methods.begin(), t.methods.end(), method) == t.methods.end()) {
          t.methods.push_back(method);
        }
        std::vector<std::string>& own = t.budgets_of[method];
        for (const std::string& b : budgets) {
          if (std::find(own.begin(), own.end(), b) == own.end()) {
            own.push_back(b);
          }
        }
        // Tables of the tuner lie beside the file; those that the user wrote are where they were.
        for (std::size_t at = method.find("@params/"); at != std::string::npos; at = method.find("@params/", at + 1)) {
          const std::size_t end = std::min(method.find(".json", at), method.size() - 5) + 5;
          const std::string name = method.substr(at + 1, end - at - 1);
          t.tables[name] = path.parent_path() / name;
        }
      }
    }
  } catch (const nlohmann::json::exception&) {
    throw ConfigError("--params-from " + file.string() + " is not a whole tuned.json of kvreplay tune");
  }
  if (t.methods.empty()) {
    throw ConfigError("--params-from " + file.string() + " has no method");
  }
  return t;
}

}  // namespace kvreplay
