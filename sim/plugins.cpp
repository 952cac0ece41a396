#include "sim/plugins.hpp"

#include <dlfcn.h>
#include <elf.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "policies/catalogue.hpp"
#include "policies/plugin.hpp"
#include "traces/hash.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;

std::vector<std::unique_ptr<const Plugin>>& plugins() {
  static std::vector<std::unique_ptr<const Plugin>> all;
  return all;
}

std::string hash_of(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) {  // a pipe would be waited for
    throw ConfigError(
        fmt::format("plug-in {} {}", path.string(), fs::exists(path, error) ? "is not a file" : "does not exist"));
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw ConfigError("plug-in " + path.string() + " cannot be opened");
  }
  Sha256 hash;
  std::vector<char> chunk(1 << 16);
  while (in.read(chunk.data(), std::ssize(chunk)), in.gcount() > 0) {
    hash.add(std::as_bytes(std::span(chunk.data(), std::size_t(in.gcount()))));
  }
  return hash.hex();
}

// The loader maps what the header says and dies of a bus error where a copy was cut short. Sections come last in a
// file.
void check_whole(const fs::path& file, const std::string& who) {
  Elf64_Ehdr header{};
  std::ifstream in(file, std::ios::binary);
  if (!in.read(reinterpret_cast<char*>(&header), sizeof header) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 ||
      header.e_ident[EI_CLASS] != ELFCLASS64) {
    return;  // the loader says what it is
  }
  if (header.e_shoff > fs::file_size(file) ||
      fs::file_size(file) - header.e_shoff < std::uint64_t(header.e_shnum) * header.e_shentsize) {
    throw ConfigError(who + " cannot be loaded: it is cut short; copy or build it anew");
  }
}

// The loader's words without the path that they begin with, on one line.
std::string loader_error(const fs::path& file) {
  const char* said = dlerror();  // NOLINT(concurrency-mt-unsafe): glibc keeps it per thread
  std::string text = said != nullptr ? said : "no reason is given";
  const std::string start = file.string() + ": ";
  text = text.starts_with(start) ? text.substr(start.size()) : text;
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

void check_keys(const PartInfo& part, const std::string& who) {
  std::set<std::string_view> keys;
  if (part.role == Role::select) {
    keys.insert("budget");
    for (const ParamInfo& k : engine_keys()) {
      keys.insert(k.name);
    }
  }
  for (const ParamInfo& k : part.params) {
    if (!keys.insert(k.name).second) {
      throw ConfigError(
          fmt::format("{}: the key '{}' of '{}' is there twice, or one of every selector", who, k.name, part.name));
    }
  }
}

}  // namespace

void load_plugin(const fs::path& path) {
  const std::string who = "plug-in " + path.string();
  const std::string sha256 = hash_of(path);
  const fs::path file = fs::canonical(path);  // with a slash, or the system's folders would be searched
  check_whole(file, who);
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  const std::string failed = library == nullptr ? loader_error(file) : "";
  if (library == nullptr) {  // where it calls what is not here, its interface may say why
    library = dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL);
  }
  if (library == nullptr) {
    throw ConfigError(fmt::format("{} cannot be loaded: {}", who, failed));
  }
  const auto* exports = static_cast<const PluginExports*>(dlsym(library, kPluginSymbol));
  if (exports == nullptr) {
    throw ConfigError(
        fmt::format("{} is a shared object, but no plug-in: it does not export {}, which "
                    "KVREPLAY_PLUGIN(...) of policies/plugin.hpp makes",
                    who, kPluginSymbol));
  }
  if (exports->interface != kPluginInterface) {
    throw ConfigError(
        fmt::format("{} was built for interface {} and this kvreplay has interface {}; build it anew with the headers "
                    "of this kvreplay",
                    who, exports->interface, kPluginInterface));
  }
  static constexpr AbiText kOurs = plugin_abi();
  if (std::string_view(exports->abi) != kOurs.text) {
    throw ConfigError(
        fmt::format("{} was built for ({}) and this kvreplay for ({}); build it with the compiler, Eigen "
                    "and flags of this kvreplay, as find_package(kvreplay) does",
                    who, exports->abi, kOurs.text));
  }
  if (!failed.empty()) {
    throw ConfigError(fmt::format("{} uses what this kvreplay does not have: {}", who, failed));
  }
  const auto is_same = [&](const auto& p) { return p->parts.data() == exports->parts; };
  if (std::any_of(plugins().begin(), plugins().end(), is_same)) {
    return;
  }
  const std::span parts(exports->parts, std::size_t(exports->n_parts));
  for (const PartInfo& part : parts) {
    check_keys(part, who);
    try {
      add_part(part);
    } catch (const ConfigError& e) {
      throw ConfigError(who + ": " + e.what());
    }
  }
  plugins().push_back(std::make_unique<const Plugin>(Plugin{path, sha256, parts}));
}

std::span<const std::unique_ptr<const Plugin>> loaded_plugins() { return plugins(); }

nlohmann::json plugins_json() {
  nlohmann::json all = nlohmann::json::array();
  for (const auto& plugin : plugins()) {
    nlohmann::json parts = nlohmann::json::array();
    for (const PartInfo& part : plugin->parts) {
      parts.push_back(part.name);
    }
    all.push_back({{"path", plugin->path.string()}, {"sha256", plugin->sha256}, {"parts", parts}});
  }
  return all;
}

std::string plugin_hash(const PartInfo& part) {
  for (const auto& p : plugins()) {
    if (std::any_of(p->parts.begin(), p->parts.end(), [&](const PartInfo& own) { return &own == &part; })) {
      return p->sha256;
    }
  }
  return "";
}

}  // namespace kvreplay
