#include "policies/settings.hpp"

#include <algorithm>

#include "policies/catalogue.hpp"
#include "policies/pieces.hpp"

namespace kvreplay {
namespace {

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\n");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\n") + 1 - first);
}

// The parts that a piece's name stands for: itself, or a preset's.
std::vector<const PartInfo*> parts_named(const std::string& name) {
  if (const PartInfo* part = find_part(name)) {
    return {part};
  }
  std::vector<const PartInfo*> parts;
  for (const std::string& text : split_parts(std::string(find_preset(name)->expansion))) {
    for (const PartInfo* part : parts_named(split_piece(text).name)) {
      parts.push_back(part);
    }
  }
  return parts;
}

// The part as the method resolved it; nullptr if it stands for what happens anyway.
const PartUse* use_of(const Method& m, const PartInfo* part, bool prefill) {
  for (const PartUse* use : m.parts()) {
    const bool of_prompt =
        (m.prefill_select && use == &*m.prefill_select) || (m.prefill_allocate && use == &*m.prefill_allocate);
    if (use->info == part && of_prompt == prefill) {
      return use;
    }
  }
  return nullptr;
}

MethodParam described(const ParamInfo& param, const PartInfo* part, bool prefill, std::size_t phase,
                      std::size_t piece) {
  MethodParam p;
  p.name = std::string(param.name);
  p.part = part;
  p.param = &param;
  p.prefill = prefill;
  p.phase = phase;
  p.piece = piece;
  return p;
}

std::string long_name(const MethodParam& p) { return std::string(p.part->name) + "." + std::string(p.param->name); }

// The shortest name that means this parameter and no other.
void name_apart(std::vector<MethodParam>& params) {
  for (MethodParam& p : params) {
    const auto clashes = std::count_if(params.begin(), params.end(), [&](const MethodParam& o) {
      return o.param->name == p.param->name && o.prefill == p.prefill;
    });
    const bool both_phases = std::any_of(params.begin(), params.end(), [&](const MethodParam& o) {
      return o.param->name == p.param->name && o.prefill != p.prefill;
    });
    if (clashes > 1) {
      p.name = long_name(p);
    }
    if (p.prefill && both_phases) {
      p.name = "prefill." + p.name;
    }
  }
}

}  // namespace

std::vector<MethodParam> params_of(const std::string& method, const TableReader& read_table) {
  const Method m = parse_method(method, read_table);
  std::vector<MethodParam> params;
  const std::vector<std::string> phases = split_phases(trimmed(method));
  for (std::size_t phase = 0; phase < phases.size(); ++phase) {
    const bool prefill = phase + 1 < phases.size();
    const std::vector<std::string> pieces = split_parts(phases[phase]);
    for (std::size_t piece = 0; piece < pieces.size(); ++piece) {
      for (const PartInfo* part : parts_named(split_piece(pieces[piece]).name)) {
        const PartUse* use = use_of(m, part, prefill);
        if (use == nullptr) {
          continue;
        }
        const auto config = part->config();
        for (const Setting& s : use->settings) {
          if (!s.table) {
            s.param->set(config.get(), s.value);
          }
        }
        for (const ParamInfo& param : part->params) {
          MethodParam p = described(param, part, prefill, phase, piece);
          p.value = param.get(config.get());
          p.table = std::any_of(use->settings.begin(), use->settings.end(),
                                [&](const Setting& s) { return s.param == &param && s.table; });
          params.push_back(std::move(p));
        }
        if (part->role != Role::select) {
          continue;
        }
        for (const ParamInfo& param : engine_keys()) {
          if (prefill && param.name != "scope" && param.name != "group") {
            continue;
          }
          MethodParam p = described(param, part, prefill, phase, piece);
          p.engine = true;
          p.value = param.get(prefill ? &m.prefill_traits : &m.traits);
          params.push_back(std::move(p));
        }
      }
    }
  }
  name_apart(params);
  return params;
}

const MethodParam& param_named(const std::vector<MethodParam>& params, const std::string& method,
                               const std::string& name) {
  const std::string before = "prefill.";
  const bool prefill_only = name.starts_with(before);
  const std::string key = prefill_only ? name.substr(before.size()) : name;
  std::vector<const MethodParam*> found;
  for (const bool prefill : {false, true}) {
    for (const MethodParam& p : params) {
      if (p.prefill == prefill && (p.prefill || !prefill_only) && (p.param->name == key || long_name(p) == key)) {
        found.push_back(&p);
      }
    }
    if (!found.empty()) {
      break;
    }
  }
  if (found.size() == 1) {
    return *found.front();
  }
  std::vector<std::string> names;
  std::string all;
  for (const MethodParam& p : params) {
    if (found.empty() || std::find(found.begin(), found.end(), &p) != found.end()) {
      names.push_back(p.name);
      all += (all.empty() ? "" : found.empty() ? ", " : " or ") + p.name;
    }
  }
  if (found.empty()) {
    throw ConfigError(method + " has no key '" + name + "'; the nearest is '" + nearest(name, names) + "' of " + all);
  }
  throw ConfigError(method + ": '" + name + "' is in more than one part; write " + all);
}

std::string with_settings(const std::string& method, const std::vector<std::pair<MethodParam, std::string>>& settings) {
  std::vector<std::vector<Piece>> phases;
  for (const std::string& phase : split_phases(trimmed(method))) {
    phases.emplace_back();
    for (const std::string& piece : split_parts(phase)) {
      phases.back().push_back(split_piece(piece));
    }
  }
  for (const auto& [param, value] : settings) {
    Piece& piece = phases.at(param.phase).at(param.piece);
    const std::string key(param.param->name), whole = long_name(param);
    // A preset's key is written with its part where another of its parts has the same.
    const auto parts = parts_named(piece.name);
    const auto having = std::count_if(parts.begin(), parts.end(), [&](const PartInfo* part) {
      const auto named = [&](const ParamInfo& p) { return p.name == key; };
      return std::any_of(part->params.begin(), part->params.end(), named) ||
             (part->role == Role::select && std::any_of(engine_keys().begin(), engine_keys().end(), named));
    });
    const std::string written = having > 1 ? whole : key;
    bool set = false;
    std::vector<std::pair<std::string, std::string>> kept;
    for (const auto& s : piece.settings) {
      if (s.first != whole && (s.first != key || having > 1)) {
        kept.push_back(s);
      } else if (!set) {  // written twice, as key and as part.key: one is enough
        kept.emplace_back(written, value);
        set = true;
      }
    }
    piece.settings = std::move(kept);
    if (!set) {
      piece.settings.emplace_back(written, value);
    }
  }
  std::string text;
  for (std::size_t i = 0; i < phases.size(); ++i) {
    text += i == 0 ? "" : "/";
    for (std::size_t j = 0; j < phases[i].size(); ++j) {
      text += (j == 0 ? "" : "+") + text_of(phases[i][j]);
    }
  }
  return text;
}

}  // namespace kvreplay
