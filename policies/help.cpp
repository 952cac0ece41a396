#include "policies/help.hpp"

#include <algorithm>
#include <cstdio>
#include <vector>

#include "policies/method.hpp"
#include "policies/values.hpp"

namespace kvreplay {
namespace {

constexpr std::string_view kRoles[] = {"select", "read", "allocate", "rewrite", "compensate"};
constexpr std::string_view kRoleIdeas[] = {"which tokens stay",
                                           "which resident tokens a head attends at a step; nothing leaves",
                                           "how a total is spread over layers or heads", "how kept tokens are stored",
                                           "what is remembered of the evicted tokens and added to the output"};

std::string padded(std::string_view s, std::size_t width) {
  return std::string(s) + std::string(s.size() < width ? width - s.size() : 1, ' ');
}

// Breaks `text` at spaces; later lines start with `indent` spaces.
std::string wrapped(std::string_view text, std::size_t indent, std::size_t width = 100) {
  std::string out;
  std::size_t column = indent;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(' '), text.size());
    if (column > indent && column + 1 + end > width) {
      out.append("\n").append(indent, ' ');
      column = indent;
    } else if (column > indent) {
      out += ' ';
      ++column;
    }
    out += text.substr(0, end);
    column += end;
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return out;
}

void add_field(std::string& out, std::string_view name, std::string_view text) {
  if (!text.empty()) {
    out += "  " + padded(name, 10) + wrapped(text, 12) + "\n";
  }
}

std::string key_text(const ParamInfo& p, const void* config) {
  std::string text = std::string(p.doc) + "; default ";
  text += default_text(p, config);
  if (const std::string half = half_life_text(p, config); !half.empty()) {
    text += " (" + half + ")";
  }
  text += "; " + std::string(type_name(p.type));
  if (p.type != ParamType::boolean && p.type != ParamType::file) {
    text += ", " + allowed(p);
  }
  if (p.scale != Scale::lin) {
    text += "; tuned on a " + std::string(scale_name(p.scale)) + " scale";
  }
  return text;
}

void add_keys(std::string& out, std::string_view title, std::span<const ParamInfo> table, const void* config) {
  if (table.empty()) {
    return;
  }
  out += "  " + std::string(title) + "\n";
  std::size_t width = 12;
  for (const ParamInfo& p : table) {
    width = std::max(width, p.name.size() + 2);
  }
  for (const ParamInfo& p : table) {
    out += "    " + padded(p.name, width) + wrapped(key_text(p, config), width + 4) + "\n";
  }
}

Traits default_traits(const PartInfo& part) { return part.traits(part.config().get()); }

std::string part_help(const PartInfo& part) {
  std::string out = std::string(part.name) + " (" + std::string(kRoles[static_cast<int>(part.role)]) + ": " +
                    std::string(kRoleIdeas[static_cast<int>(part.role)]) + ")\n";
  add_field(out, "idea", part.summary);
  add_field(out, "paper", part.paper);
  add_field(out, "deviation", part.deviation);
  if (part.foresight == Foresight::oracle) {
    add_field(out, "foresight", "oracle: it knows more than a real cache can");
  }
  add_field(out, "needs", needs_text(part));
  const auto config = part.config();
  add_keys(out, "keys", part.params, config.get());
  if (part.role == Role::select) {
    const Traits traits = default_traits(part);
    add_keys(out, "engine keys", engine_keys(), &traits);
  }
  return out;
}

std::string preset_help(const Preset& preset) {
  std::string out = std::string(preset.name) + " (preset)\n";
  add_field(out, "is", preset.expansion);
  add_field(out, "idea", preset.summary);
  add_field(out, "paper", preset.paper);
  add_field(out, "deviation", preset.deviation);
  out += "  It takes the keys of its parts; a key of more than one is written part.key.\n";
  const Method m = parse_method(std::string(preset.expansion));
  const auto add = [&](const PartUse& use) { out.append("\n").append(part_help(*use.info)); };
  add(m.select);
  for (const auto* use : {&m.read, &m.allocate, &m.rewrite, &m.compensate}) {
    if (*use) {
      add(**use);
    }
  }
  return out;
}

// A table's cell: "|" would end it.
std::string cell(std::string_view text) {
  std::string out;
  for (char c : text) {
    out += c == '|' ? std::string("\\|") : std::string(1, c);
  }
  return out.empty() ? "" : out;
}

void add_row(std::string& out, const std::vector<std::string>& cells) {
  for (const std::string& c : cells) {
    out.append("| ").append(c).append(c.empty() ? "" : " ");
  }
  out += "|\n";
}

std::string code(std::string_view s) { return std::string("`").append(s).append("`"); }

}  // namespace

std::string_view role_name(Role role) { return kRoles[static_cast<int>(role)]; }

std::string_view foresight_name(Foresight from) { return from == Foresight::oracle ? "oracle" : "none"; }

std::string_view type_name(ParamType type) {
  constexpr std::string_view kNames[] = {"integer", "real", "boolean", "choice", "text", "tokens"};
  return kNames[static_cast<int>(type)];
}

std::string_view scale_name(Scale scale) {
  constexpr std::string_view kNames[] = {"lin", "log", "one_minus"};
  return kNames[static_cast<int>(scale)];
}

std::string default_text(const ParamInfo& param, const void* config) {
  const ParamValue v = param.get(config);
  return param.type == ParamType::file && v.text.empty() ? "none" : format_value(param, v);
}

std::string half_life_text(const ParamInfo& param, const void* config) {
  const double x = param.get(config).number;
  if (param.scale != Scale::one_minus || !(x > 0 && x < 1)) {
    return {};
  }
  char text[48];
  std::snprintf(text, sizeof text, "half-life %.3g steps", std::log(0.5) / std::log(x));
  return text;
}

std::string needs_text(const PartInfo& part) {
  const auto config = part.config();
  const Needs n = part.needs(config.get());
  std::string text;
  const auto add = [&](const std::string& what) { text += (text.empty() ? "" : "; ") + what; };
  const bool pinned = part.role == Role::select && part.traits(config.get()).pool == Pool::decode;
  if (n.prompt_queries == Needs::kAll) {
    add("the queries of the whole prompt");
  } else if (n.prompt_queries > 0) {
    add(n.prompt_queries == 1 ? "the prompt's last query"
                              : "the prompt's last " + std::to_string(n.prompt_queries) + " queries");
  }
  if (!text.empty() && pinned) {
    text += ", with pool=all only";
  }
  if (n.pre_rope) {
    add("keys and queries before RoPE");
  }
  if (n.spans) {
    add("named spans of tokens");
  }
  return text;
}

std::string list_text() {
  std::string out;
  for (std::size_t r = 0; r < std::size(kRoles); ++r) {
    out += std::string(kRoles[r]) + ": " + std::string(kRoleIdeas[r]) + "\n";
    for (const PartInfo* p : all_parts()) {
      if (static_cast<std::size_t>(p->role) != r) {
        continue;
      }
      out += "  " + padded(p->name, 17) + wrapped(p->summary, 19) + "\n";
    }
  }
  out += "presets: names of papers, and what they stand for\n";
  for (const Preset& p : all_presets()) {
    out += "  " + padded(p.name, 17) + wrapped(std::string(p.expansion) + ": " + std::string(p.summary), 19) + "\n";
  }
  return out;
}

std::string help_text(const std::string& name) {
  if (const PartInfo* part = find_part(name)) {
    return part_help(*part);
  }
  if (const Preset* preset = find_preset(name)) {
    return preset_help(*preset);
  }
  std::vector<std::string> valid;
  for (const PartInfo* p : all_parts()) {
    valid.emplace_back(p->name);
  }
  for (const Preset& p : all_presets()) {
    valid.emplace_back(p.name);
  }
  throw ConfigError("no part or preset is called '" + name + "'; the nearest is '" + nearest(name, valid) + "'");
}

std::string markdown() {
  std::string out;
  for (std::size_t r = 0; r < std::size(kRoles); ++r) {
    out += "### " + std::string(kRoles[r]) + ": " + std::string(kRoleIdeas[r]) + "\n\n";
    add_row(out, {"name", "idea", "paper", "deviation", "needs"});
    add_row(out, {"---", "---", "---", "---", "---"});
    std::vector<const PartInfo*> parts;
    for (const PartInfo* p : all_parts()) {
      if (static_cast<std::size_t>(p->role) == r) {
        parts.push_back(p);
      }
    }
    for (const PartInfo* p : parts) {
      const std::string oracle = p->foresight == Foresight::oracle ? " (oracle)" : "";
      add_row(out, {code(p->name), cell(p->summary) + oracle, cell(p->paper), cell(p->deviation), needs_text(*p)});
    }
    out += "\n";
    add_row(out, {"part", "key", "default", "type", "allowed", "scale", "meaning"});
    add_row(out, {"---", "---", "---", "---", "---", "---", "---"});
    for (const PartInfo* p : parts) {
      const auto config = p->config();
      for (const ParamInfo& k : p->params) {
        const std::string half = half_life_text(k, config.get());
        add_row(out,
                {code(p->name), code(k.name), code(default_text(k, config.get())) + (half.empty() ? "" : ", " + half),
                 std::string(type_name(k.type)), allowed(k), std::string(scale_name(k.scale)), cell(k.doc)});
      }
    }
    out += "\n";
  }
  out += "### Engine keys of the selectors\n\n";
  std::vector<std::string> head{"selector"}, line{"---"};
  for (const ParamInfo& k : engine_keys()) {
    head.push_back(code(k.name));
    line.emplace_back("---");
  }
  add_row(out, head);
  add_row(out, line);
  for (const PartInfo* p : all_parts()) {
    if (p->role != Role::select) {
      continue;
    }
    const Traits traits = default_traits(*p);
    std::vector<std::string> row{code(p->name)};
    for (const ParamInfo& k : engine_keys()) {
      row.push_back(default_text(k, &traits));
    }
    add_row(out, row);
  }
  out += "\n";
  for (const ParamInfo& k : engine_keys()) {
    out += "- " + code(k.name) + " (" + allowed(k) + "): " + std::string(k.doc) + ".\n";
  }
  out += "\n### Presets\n\n";
  add_row(out, {"name", "is", "idea", "paper", "deviation"});
  add_row(out, {"---", "---", "---", "---", "---"});
  for (const Preset& p : all_presets()) {
    add_row(out, {code(p.name), code(p.expansion), cell(p.summary), cell(p.paper), cell(p.deviation)});
  }
  return out;
}

}  // namespace kvreplay
