#include "sim/cli/new_policy_command.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <utility>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/cli/new_policy_templates.hpp"
#include "sim/results.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using Lines = std::vector<std::string>;

constexpr std::size_t kLongestName = 32;  // lines with it stay within 120 columns
constexpr std::size_t kColumns = 120;

// What C++ or policies/*.hpp take already: a part is a variable of its name and a class of that name in CamelCase.
constexpr std::string_view kTaken[] = {
    "alignas",      "alignof",       "and",         "asm",          "auto",      "bool",      "break",
    "case",         "catch",         "char",        "class",        "const",     "consteval", "constexpr",
    "constinit",    "continue",      "decltype",    "default",      "delete",    "do",        "double",
    "else",         "enum",          "explicit",    "export",       "extern",    "false",     "float",
    "for",          "friend",        "goto",        "if",           "inline",    "int",       "long",
    "mutable",      "namespace",     "new",         "noexcept",     "not",       "nullptr",   "operator",
    "or",           "private",       "protected",   "public",       "register",  "requires",  "return",
    "short",        "signed",        "sizeof",      "static",       "struct",    "switch",    "template",
    "this",         "throw",         "true",        "try",          "typedef",   "typeid",    "typename",
    "union",        "unsigned",      "using",       "virtual",      "void",      "volatile",  "while",
    "xor",          "compl",         "bitand",      "bitor",        "choice",    "describe",  "detail",
    "flag",         "nearest",       "number",      "protect",      "room",      "split",     "test",
    "text",         "std",           "kvreplay",    "allocator",    "budget",    "cache",     "compensator",
    "config_error", "decode",        "estimate",    "foresight",    "future",    "leftover",  "loss",
    "method",       "moment_needs",  "moment_rows", "moment_track", "needs",     "order",     "oracle_selector",
    "param_info",   "param_type",    "param_value", "part_info",    "part_use",  "pool",      "pos",
    "preset",       "prompt_cut",    "reader",      "reduce",       "rewriter",  "rewriting", "role",
    "rotation",     "scale",         "scope",       "selector",     "set_shape", "setting",   "frontier",
    "token_span",   "tokens",        "traits",      "value_table",  "view",      "mat_d",     "mat_f",
    "vec_f",        "evicted_block", "config",      "what",         "soft_cap",  "room_of",   "parts",
    "edit_distance"};

struct File {
  fs::path path;
  std::string text;
  bool is_new;
};

std::string camel_case(const std::string& name) {
  std::string out;
  bool starts = true;
  for (const char c : name) {
    if (c != '_') {
      out += starts ? char(std::toupper(static_cast<unsigned char>(c))) : c;
    }
    starts = c == '_' || (starts && std::isdigit(static_cast<unsigned char>(c)) != 0);
  }
  return out;
}

void check_name(const std::string& name) {
  const bool is_name = !name.empty() && name.size() <= kLongestName && name[0] >= 'a' && name[0] <= 'z' &&
                       name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos &&
                       !name.ends_with('_') && name.find("__") == std::string::npos;
  if (!is_name) {
    throw ConfigError(
        fmt::format("'{}' is no name for a policy; it takes up to {} small letters, digits and single "
                    "'_', a letter first",
                    name, kLongestName));
  }
  if (find_part(name) != nullptr || find_preset(name) != nullptr) {
    throw ConfigError(
        fmt::format("a method called '{}' is there already; kvreplay policies {} says what it is", name, name));
  }
  if (std::find(std::begin(kTaken), std::end(kTaken), name) != std::end(kTaken)) {
    throw ConfigError(fmt::format("'{}' means something else in the C++ of a policy; choose another name", name));
  }
}

const PolicyTemplate& template_of(const std::string& role) {
  Lines roles;
  for (const PolicyTemplate& t : kPolicyTemplates) {
    if (t.role == role) {
      return t;
    }
    roles.emplace_back(t.role);
  }
  throw ConfigError(fmt::format("--role: '{}' is none of {}; the nearest is '{}'", role, fmt::join(roles, ", "),
                                nearest(role, roles)));
}

std::string filled(std::string_view text, const std::string& name, bool plugin) {
  const std::string type = camel_case(name);
  const std::string end = plugin ? fmt::format(
                                       "}}  // namespace\n}}  // namespace kvreplay\n\n"
                                       "KVREPLAY_PLUGIN(kvreplay::{});",
                                       type)
                                 : fmt::format(
                                       "}}  // namespace\n\nextern const PartInfo {0};\n"
                                       "constinit const PartInfo {0} = describe<{1}>();\n\n"
                                       "}}  // namespace kvreplay",
                                       name, type);
  const std::pair<std::string, std::string> values[] = {
      {"@NAME@", name},
      {"@CLASS@", type},
      {"@HEADER@", plugin ? "policies/plugin.hpp" : "policies/part.hpp"},
      {"@END@", end}};
  std::string out(text);
  for (const auto& [key, value] : values) {
    for (auto at = out.find(key); at != std::string::npos; at = out.find(key, at + value.size())) {
      out.replace(at, key.size(), value);
    }
  }
  return out;
}

Lines read_lines(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw ConfigError(path.string() + " cannot be opened");
  }
  Lines lines;
  for (std::string line; std::getline(in, line);) {
    lines.push_back(std::move(line));
  }
  return lines;
}

std::string joined(const Lines& lines) { return fmt::format("{}\n", fmt::join(lines, "\n")); }

[[noreturn]] void refuse_layout(const fs::path& path, const std::string& what) {
  throw ConfigError(fmt::format(
      "{}: {} was not found, so nothing is written; add the policy by hand, as README.md says", path.string(), what));
}

// Adds `entry` to the sorted entries of a CMake list that begin and end alike; ")" may stand behind the last.
File listed(const fs::path& path, const std::string& start, const std::string& end, const std::string& entry) {
  Lines lines = read_lines(path);
  const auto is_entry = [&](const std::string& line) {
    return line.starts_with(start) && (line.ends_with(end) || line.ends_with(end + ")"));
  };
  const auto first = std::find_if(lines.begin(), lines.end(), is_entry);
  if (first == lines.end()) {
    refuse_layout(path, "a line as '" + start + "..." + end + "'");
  }
  const auto last = std::find_if_not(first, lines.end(), is_entry);
  const auto at = std::upper_bound(first, last, entry);
  if (at == last && (last - 1)->ends_with(')')) {
    (last - 1)->pop_back();
    lines.insert(at, entry + ")");
  } else {
    lines.insert(at, entry);
  }
  return {path, joined(lines), false};
}

// The two mentions of a part: its declaration, and its place behind the others of its role.
File catalogued(const fs::path& path, const std::string& role, const std::string& name) {
  Lines lines = read_lines(path);
  auto at =
      std::find_if(lines.begin(), lines.end(), [](const auto& l) { return l.starts_with("extern const PartInfo "); });
  at = std::find_if(at, lines.end(), [](const auto& l) { return l.ends_with(';'); });
  if (at == lines.end()) {
    refuse_layout(path, "'extern const PartInfo ...;'");
  }
  at->back() = ',';
  if (at->size() + name.size() + 2 <= kColumns) {
    *at += " " + name + ";";
  } else {
    lines.insert(at + 1, "    " + name + ";");
  }
  at = std::find(lines.begin(), lines.end(), "    // " + role);
  if (at == lines.end()) {
    refuse_layout(path, "'// " + role + "'");
  }
  at = std::find_if_not(at + 1, lines.end(), [](const auto& l) { return l.starts_with("    &"); });
  lines.insert(at, "    &" + name + ",");
  return {path, joined(lines), false};
}

// The rows at the ends of the role's two tables and, of a selector, of the table of engine keys.
File documented(const fs::path& path, const std::string& role, const std::string& rows) {
  Lines lines = read_lines(path);
  auto at =
      std::find_if(lines.begin(), lines.end(), [&](const auto& l) { return l.starts_with("### " + role + ": "); });
  bool at_heading = true;
  const auto next_table_end = [&] {
    at = std::find_if(at, lines.end(), [](const auto& l) { return l.starts_with("| "); });
    at = std::find_if_not(at, lines.end(), [](const auto& l) { return l.starts_with("| "); });
    at_heading = false;
  };
  std::size_t table = 0;
  for (std::size_t begin = 0; begin < rows.size();) {
    const std::size_t end = std::min(rows.find('\n', begin), rows.size());
    const std::string row = rows.substr(begin, end - begin);
    begin = end + 1;
    if (row.empty()) {
      if (++table == 2) {
        at = std::find(at, lines.end(), "### Engine keys of the selectors");
      }
      at_heading = true;
      continue;
    }
    if (at_heading) {
      next_table_end();
    }
    if (at == lines.end()) {
      refuse_layout(path, "a table of role " + role);
    }
    at = lines.insert(at, row) + 1;
  }
  return {path, joined(lines), false};
}

// The source tree that the working directory lies in.
fs::path checkout() {
  for (fs::path folder = fs::current_path();; folder = folder.parent_path()) {
    std::error_code error;
    if (fs::is_regular_file(folder / "policies" / "catalogue.cpp", error)) {
      return folder;
    }
    if (folder == folder.parent_path()) {
      throw ConfigError("new-policy: " + fs::current_path().string() +
                        " is not within kvreplay's source tree; go there, or write a plug-in with --plugin FOLDER");
    }
  }
}

std::vector<File> in_tree(const fs::path& root, const PolicyTemplate& t, const std::string& name) {
  const std::string role(t.role);
  std::vector<File> files{
      {root / "policies" / role / (name + ".cpp"), filled(t.source, name, false), true},
      {root / "tests" / "policies" / (name + "_test.cpp"), filled(t.test, name, false), true},
      listed(root / "policies" / "CMakeLists.txt", "    " + role + "/", ".cpp", "    " + role + "/" + name + ".cpp"),
      listed(root / "tests" / "policies" / "CMakeLists.txt", "  ", "_test.cpp", "  " + name + "_test.cpp"),
      catalogued(root / "policies" / "catalogue.cpp", role, name),
      documented(root / "docs" / "methods.md", role, filled(t.rows, name, false))};
  return files;
}

void write(const std::vector<File>& files) {
  for (const File& file : files) {
    std::error_code error;
    if (file.is_new && fs::exists(file.path, error)) {
      throw ConfigError(file.path.string() + " is there already; nothing is written");
    }
  }
  for (const File& file : files) {
    fs::create_directories(file.path.parent_path());
    write_whole(file.path, file.text);
    fmt::print("{} {}\n", file.is_new ? "wrote " : "edited", file.path.string());
  }
}

}  // namespace

void add_new_policy_command(CLI::App& app) {
  struct Options {
    std::string name, role = "select", plugin;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("new-policy", "Write a working method to start from, with its test");
  command->add_option("NAME", o->name, "What it will be called, as my_policy")->required();
  command->add_option("--role", o->role, "select, read, allocate, rewrite or compensate (default: select)");
  CLI::Option* plugin = command->add_option(
      "--plugin", o->plugin, "Write a plug-in into this new folder, instead of a part into kvreplay's source tree");
  command->callback([o, plugin] {
    check_name(o->name);
    const PolicyTemplate& t = template_of(o->role);
    const std::string use = std::string(t.role == "select" ? "" : t.role == "read" ? "full+" : "h2o+") + o->name;
    if (plugin->count() > 0) {
      if (o->plugin.empty()) {
        throw ConfigError("--plugin: the folder's name is empty");
      }
      const fs::path folder = o->plugin;
      write({{folder / (o->name + ".cpp"), filled(t.source, o->name, true), true},
             {folder / "CMakeLists.txt", filled(kPluginLists, o->name, true), true}});
      fmt::print("CMakeLists.txt says how it is built; then: kvreplay run --plugin {} --method {}\n",
                 quoted((folder / "build" / (o->name + ".so")).string()), use);
    } else {
      write(in_tree(checkout(), t, o->name));
      fmt::print("It works as it is: scripts/build, then kvreplay run --method {}\n", use);
    }
  });
}

}  // namespace kvreplay
