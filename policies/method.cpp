#include "policies/method.hpp"

#include <algorithm>
#include <map>

#include "policies/catalogue.hpp"
#include "policies/pieces.hpp"
#include "policies/values.hpp"

namespace kvreplay {
namespace {

using Strings = std::vector<std::string>;
constexpr int kRoles = 5;
constexpr std::string_view kRoleNames[kRoles] = {"selector", "reader", "allocator", "rewriter", "compensator"};

std::string role_name(Role role) { return std::string(kRoleNames[static_cast<int>(role)]); }
std::string quoted(std::string_view s) { return std::string("'").append(s).append("'"); }
Strings names_that_start() {
  Strings names;
  for (const PartInfo* p : all_parts()) {
    if (p->role == Role::select) {
      names.emplace_back(p->name);
    }
  }
  for (const Preset& p : all_presets()) {
    names.emplace_back(p.name);
  }
  return names;
}

// ---- pieces into parts ----

// A method's text on one side of the "/", as it is read.
struct Phase {
  std::map<Role, PartUse> parts;
  std::vector<Setting> engine;  // the selector's engine keys, as written
  std::string preset;

  const Setting* written(std::string_view key) const {
    const auto it = std::find_if(engine.begin(), engine.end(), [&](const Setting& s) { return s.param->name == key; });
    return it == engine.end() ? nullptr : &*it;
  }
};

void put(std::vector<Setting>& settings, Setting s) {
  const auto it = std::find_if(settings.begin(), settings.end(), [&](const Setting& o) { return o.param == s.param; });
  if (it == settings.end()) {
    settings.push_back(std::move(s));
  } else {
    *it = std::move(s);
  }
}

const ParamInfo* find_param(std::span<const ParamInfo> table, std::string_view name) {
  const auto it = std::find_if(table.begin(), table.end(), [&](const ParamInfo& p) { return p.name == name; });
  return it == table.end() ? nullptr : &*it;
}

// What follows the last "/" of a value was meant to be a selector.
void refuse_unknown_phase(const std::string& owner, const std::string& text) {
  const std::size_t slash = text.rfind('/');
  if (slash == std::string::npos) {
    return;
  }
  const std::string_view name = name_at(text, slash + 1);
  throw ConfigError(owner + ": no selector is called " + quoted(name) + "; the nearest is " +
                    quoted(nearest(name, names_that_start())));
}

Setting read_setting(const std::string& owner, const ParamInfo& param, const std::string& text,
                     const TableReader& read_table, bool per_layer) {
  Setting s{&param, {}, nullptr};
  const bool number =
      param.type == ParamType::integer || param.type == ParamType::real || param.type == ParamType::tokens;
  const std::string key = owner + ": " + std::string(param.name) + "=" + text;
  if (!number || text.empty() || text.front() != '@') {
    if (param.type != ParamType::file) {
      refuse_unknown_phase(key, text);
    }
    s.value = parse_value(owner, param, text);
    return s;
  }
  if (!per_layer) {
    throw ConfigError(key + " takes one value for all layers, not a table");
  }
  if (!read_table) {
    throw ConfigError(key + ": tables cannot be read here");
  }
  s.table = std::make_shared<const ValueTable>(read_table(text.substr(1)));
  for (const auto& values : s.table->values) {
    for (double x : values) {
      checked_value(owner + " in " + s.table->path, param, x);
    }
  }
  return s;
}

// The parts that one name stands for: itself, or all of a preset's.
struct Targets {
  std::string name;
  std::vector<PartUse*> uses;
};

void assign(Phase& phase, const Targets& targets, const Piece& piece, const TableReader& read_table) {
  Strings seen, valid;
  for (const PartUse* use : targets.uses) {
    for (const ParamInfo& p : use->info->params) {
      valid.emplace_back(p.name);
    }
    if (use->info->role == Role::select) {
      for (const ParamInfo& p : engine_keys()) {
        valid.emplace_back(p.name);
      }
    }
  }
  for (const auto& [written, text] : piece.settings) {
    if (std::find(seen.begin(), seen.end(), written) != seen.end()) {
      throw ConfigError(targets.name + ": " + quoted(written) + " is given twice");
    }
    seen.push_back(written);
    const std::size_t dot = written.find('.');
    const std::string part = dot == std::string::npos ? "" : written.substr(0, dot);
    const std::string key = dot == std::string::npos ? written : written.substr(dot + 1);
    std::vector<std::pair<PartUse*, const ParamInfo*>> found;
    for (PartUse* use : targets.uses) {
      if (!part.empty() && part != use->info->name) {
        continue;
      }
      const ParamInfo* own = find_param(use->info->params, key);
      const ParamInfo* engine = use->info->role == Role::select ? find_param(engine_keys(), key) : nullptr;
      if (own != nullptr || engine != nullptr) {
        found.emplace_back(own != nullptr ? use : nullptr, own != nullptr ? own : engine);
      }
    }
    if (found.empty() && written == "budget") {
      refuse_unknown_phase(targets.name + ": budget=" + text, text);
      throw ConfigError(targets.name +
                        ": 'budget' is a key of the prompt's selector alone, before a '/'; other "
                        "methods get the run's budgets");
    }
    if (found.empty()) {
      std::string all;
      for (const std::string& v : valid) {
        all += (all.empty() ? "" : ", ") + v;
      }
      throw ConfigError(
          targets.name + " has no key " + quoted(written) +
          (valid.empty() ? "; it takes none" : "; the nearest is " + quoted(nearest(key, valid)) + " of " + all));
    }
    if (found.size() > 1) {
      std::string choices;
      for (const PartUse* use : targets.uses) {
        if (find_param(use->info->params, key) != nullptr ||
            (use->info->role == Role::select && find_param(engine_keys(), key) != nullptr)) {
          choices += (choices.empty() ? "" : " or ") + std::string(use->info->name) + "." + key;
        }
      }
      throw ConfigError(targets.name + ": " + quoted(key) + " is in more than one part; write " + choices);
    }
    const auto [use, param] = found.front();
    put(use != nullptr ? use->settings : phase.engine,
        read_setting(targets.name, *param, text, read_table, use != nullptr));
  }
}

[[noreturn]] void refuse_name(const std::string& name, bool first) {
  Strings valid = first ? names_that_start() : Strings{};
  for (const PartInfo* p : all_parts()) {
    if (!first && p->role != Role::select) {
      valid.emplace_back(p->name);
    }
  }
  if (name.empty()) {
    throw ConfigError(
        "a part of the method has no name; a method is [prefill_select[+allocate]/]select{+part}, for "
        "example h2o:window=128");
  }
  const std::size_t slash = name.rfind('/');
  const std::string last = slash == std::string::npos ? name : name.substr(slash + 1);
  throw ConfigError("no " + std::string(first ? "selector or preset" : "part") + " is called " + quoted(last) +
                    "; the nearest is " + quoted(nearest(last, valid)));
}

PartUse* add_part(Phase& phase, const std::string& name, bool first) {
  const PartInfo* info = find_part(name);
  if (info == nullptr && find_preset(name) != nullptr) {
    throw ConfigError("preset " + quoted(name) + " is a whole method and cannot follow a '+'");
  }
  if (info == nullptr) {
    refuse_name(name, first);
  }
  if (first && info->role != Role::select) {
    throw ConfigError(quoted(name) + " is " + (info->role == Role::allocate ? "an " : "a ") + role_name(info->role) +
                      "; a method starts with a selector, for example " +
                      (info->role == Role::read ? "full+" : "h2o+") + name);
  }
  if (const auto it = phase.parts.find(info->role); it != phase.parts.end()) {
    throw ConfigError(quoted(name) + " and " + quoted(it->second.info->name) + " are both " + role_name(info->role) +
                      "s; a method has at most one");
  }
  PartUse& use = phase.parts[info->role];
  use.info = info;
  return &use;
}

void read_phase(Phase& phase, const std::string& text, const TableReader& read_table) {
  const Strings texts = split_parts(text);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const Piece piece = split_piece(texts[i]);
    const bool first = phase.parts.empty();
    Targets targets{piece.name, {}};
    if (const Preset* preset = i == 0 && first ? find_preset(piece.name) : nullptr) {
      read_phase(phase, std::string(preset->expansion), read_table);
      phase.preset = piece.name;
      for (auto& [role, use] : phase.parts) {
        for (Setting& s : use.settings) {
          s.from_preset = true;
        }
        targets.uses.push_back(&use);
      }
    } else {
      targets.uses.push_back(add_part(phase, piece.name, first));
    }
    assign(phase, targets, piece, read_table);
  }
}

// ---- parts into a method ----

// Settings that change something, in table order.
void tidy(PartUse& use) {
  std::erase_if(use.settings, [&](const Setting& s) {
    if (s.table) {
      return false;
    }
    const auto config = use.info->config();
    const ParamValue before = s.param->get(config.get());
    s.param->set(config.get(), s.value);
    return equal(before, s.param->get(config.get()));
  });
  std::sort(use.settings.begin(), use.settings.end(),
            [](const Setting& a, const Setting& b) { return a.param < b.param; });
}

std::string setting_text(const Setting& s) {
  return std::string(s.param->name) + "=" + (s.table ? "@" + s.table->path : format_value(*s.param, s.value));
}

std::string part_text(const PartUse& use, const Strings& more) {
  std::string text;
  const auto add = [&](const std::string& s) { text += (text.empty() ? ":" : ",") + s; };
  for (const Setting& s : use.settings) {
    add(setting_text(s));
  }
  for (const std::string& s : more) {
    add(s);
  }
  return std::string(use.info->name) + text;
}

// The text of engine keys that differ from `defaults`.
Strings engine_text(const Traits& defaults, const Traits& traits) {
  Strings text;
  for (const ParamInfo& p : engine_keys()) {
    const ParamValue value = p.get(&traits);
    if (!equal(value, p.get(&defaults))) {
      text.push_back(std::string(p.name) + "=" + format_value(p, value));
    }
  }
  return text;
}

std::string budget_text(const Budget& b) {
  switch (b.unit) {
    case Budget::Unit::fraction: {
      const std::string text = format_number(b.value);
      return text.find('.') == std::string::npos ? format_number(b.value * 100) + "%" : text;
    }
    case Budget::Unit::bytes:
      return format_number(b.value) + "B";
    default:
      return format_number(b.value);
  }
}

// The layers that all of the part's tables have, in order; one that stands for any without tables.
std::vector<int> layers_of(const PartUse& use) {
  std::optional<std::vector<int>> layers;
  for (const Setting& s : use.settings) {
    if (!s.table) {
      continue;
    }
    std::vector<int> here = s.table->layers, both;
    std::sort(here.begin(), here.end());
    if (layers) {
      std::set_intersection(layers->begin(), layers->end(), here.begin(), here.end(), std::back_inserter(both));
    }
    layers = layers ? both : here;
  }
  if (layers && layers->empty()) {
    throw ConfigError(std::string(use.info->name) + ": its tables share no layer");
  }
  return layers.value_or(std::vector{0});
}

// To ask what is the same whatever a table's values; ConfigError as layers_of.
std::shared_ptr<void> any_config(const PartUse& use) { return use.config(layers_of(use).front()); }

// One Config per layer and KV head that the part's tables tell apart; one without tables. ConfigError as layers_of.
std::vector<std::shared_ptr<void>> configs(const PartUse& use) {
  std::size_t heads = 1;
  for (const Setting& s : use.settings) {
    for (std::size_t l = 0; s.table && l < s.table->values.size(); ++l) {
      heads = std::max(heads, s.table->values[l].size());
    }
  }
  std::vector<std::shared_ptr<void>> all;
  for (const int layer : layers_of(use)) {
    for (std::size_t head = 0; head < heads; ++head) {
      all.push_back(use.config(layer, static_cast<int>(head)));
    }
  }
  return all;
}

std::vector<const PartUse*> parts_of(const Method& m) {
  std::vector<const PartUse*> parts;
  for (const auto* part : {&m.prefill_select, &m.prefill_allocate}) {
    if (*part) {
      parts.push_back(&**part);
    }
  }
  parts.push_back(&m.select);
  for (const auto* part : {&m.read, &m.allocate, &m.rewrite, &m.compensate}) {
    if (*part) {
      parts.push_back(&**part);
    }
  }
  return parts;
}

void refuse_one_set(const std::string& label, const PartUse& allocator, const PartUse& select) {
  throw ConfigError(label + ": allocator " + quoted(allocator.info->name) +
                    " spreads a budget over the heads of a layer, but with scope=layer " + quoted(select.info->name) +
                    " keeps one set for all of them; write scope=kv_head or scope=query_head");
}

void refuse_combinations(const Method& m) {
  const std::string select = quoted(m.select.info->name);
  const bool pinned = m.traits.pool == Pool::decode;
  const std::string unpin = m.prefill_select ? "leave out the selector before the '/'" : "write pool=all";
  const auto refuse = [&](const std::string& why) { throw ConfigError(m.label + ": " + why); };
  if (m.allocate) {
    const std::string name = quoted(m.allocate->info->name);
    const auto allocator = any_allocator(*m.allocate);
    if (!m.select.info->budgeted(any_config(m.select).get())) {
      refuse("allocator " + name + " has nothing to spread, because " + select + " has no budget");
    }
    if (allocator->over_sets() && m.traits.scope == Scope::layer) {
      refuse_one_set(m.label, *m.allocate, m.select);
    }
    if ((allocator->over_sets() || allocator->ranks_tokens()) && pinned) {
      refuse("allocator " + name + " spreads a budget by the prompt's scores, but the prompt is pinned; " +
             (m.prefill_select ? "write it before the '/'" : unpin));
    }
  }
  if (m.prefill_allocate && any_allocator(*m.prefill_allocate)->over_sets() && m.prefill_traits.scope == Scope::layer) {
    refuse_one_set(m.label, *m.prefill_allocate, *m.prefill_select);
  }
  if (m.read && pinned) {
    refuse("reader " + quoted(m.read->info->name) + " chooses among all resident tokens, but the prompt is pinned; " +
           unpin);
  }
  for (const auto* part : {&m.read, &m.rewrite}) {
    if (*part && (*part)->info->across_heads && m.traits.scope != Scope::layer) {
      refuse(std::string(kRoleNames[static_cast<int>((*part)->info->role)]) + " " + quoted((*part)->info->name) +
             " joins the KV heads of a layer, so they need one set; write scope=layer at " + select);
    }
  }
  if (m.prefill_select && m.prefill_traits.scope == Scope::query_head && m.traits.scope != Scope::query_head) {
    refuse("with scope=query_head before the '/' every query head keeps its own prompt; write scope=query_head at " +
           select + " too");
  }
  if (pinned && m.traits.decode == Decode::grow) {
    refuse("with pool=decode and decode=grow nothing would ever be evicted; write decode=evict");
  }
}

Method build(const std::string& label, Phase& phase, Phase* prefill, const Budget& prompt_budget) {
  Method m;
  m.label = label;
  m.prefill_budget = prompt_budget;
  m.preset = phase.preset;
  const auto take = [](Phase& from, Role role) {
    std::optional<PartUse> use;
    if (const auto it = from.parts.find(role); it != from.parts.end()) {
      use = std::move(it->second);
    }
    if (use && use->info->is_default) {
      use.reset();  // says what happens anyway, and is left out like any default
    }
    if (use) {
      tidy(*use);
    }
    return use;
  };
  m.select = *take(phase, Role::select);
  m.read = take(phase, Role::read);
  m.allocate = take(phase, Role::allocate);
  m.rewrite = take(phase, Role::rewrite);
  m.compensate = take(phase, Role::compensate);

  Traits defaults = m.select.info->traits(any_config(m.select).get());
  if (prefill != nullptr) {
    const Setting* pool = phase.written("pool");
    if (pool != nullptr && pool->value.number != static_cast<double>(Pool::decode)) {
      throw ConfigError(label + ": the selector after the '/' owns the decode tokens alone, so pool=all cannot be");
    }
    defaults.pool = Pool::decode;
  }
  m.traits = defaults;
  for (const Setting& s : phase.engine) {
    s.param->set(&m.traits, s.value);
  }

  if (prefill != nullptr) {
    m.prefill_select = take(*prefill, Role::select);
    m.prefill_allocate = take(*prefill, Role::allocate);
    const auto config = any_config(*m.prefill_select);
    const Traits prefill_defaults = m.prefill_select->info->traits(config.get());
    if (prefill_defaults.pool == Pool::decode || !m.prefill_select->info->budgeted(config.get())) {
      throw ConfigError(label + ": " + quoted(m.prefill_select->info->name) +
                        " keeps the whole prompt, so it cannot stand before the '/'");
    }
    m.prefill_traits = prefill_defaults;
    for (const Setting& s : prefill->engine) {
      if (s.param->name != "scope" && s.param->name != "group") {
        throw ConfigError(label + ": " + quoted(s.param->name) +
                          " has no meaning before the '/', where the prompt is cut once; only "
                          "scope and group have");
      }
      s.param->set(&m.prefill_traits, s.value);
    }
    Strings more = engine_text(prefill_defaults, m.prefill_traits);
    if (m.prefill_budget.unit != Budget::Unit::none) {
      more.push_back("budget=" + budget_text(m.prefill_budget));
    }
    m.name = part_text(*m.prefill_select, more);
    m.name += (m.prefill_allocate ? "+" + part_text(*m.prefill_allocate, {}) : "") + "/";
  }
  m.name += part_text(m.select, engine_text(defaults, m.traits));
  for (const auto* part : {&m.read, &m.allocate, &m.rewrite, &m.compensate}) {
    if (*part) {
      m.name += "+" + part_text(**part, {});
    }
  }
  return m;
}

// Takes "budget=..." out of the prefill selector's text, which alone has that key.
Budget take_budget(std::string& phase) {
  Budget budget;
  const std::string first = split_parts(phase).front();
  Piece piece = split_piece(first);
  std::erase_if(piece.settings, [&](const auto& setting) {
    if (setting.first != "budget") {
      return false;
    }
    if (budget.unit != Budget::Unit::none) {
      throw ConfigError(piece.name + ": 'budget' is given twice");
    }
    budget = Budget::parse(setting.second);
    return true;
  });
  phase = text_of(piece) + phase.substr(first.size());
  return budget;
}

// What the user wrote for sinks and windows must fit; defaults shrink when the method runs.
void check_protected(const PartUse& use, int budget) {
  const ParamInfo* sink = find_param(use.info->params, "sink");
  for (const auto& config : configs(use)) {
    const auto tokens = [&](const ParamInfo& p) {
      const ParamValue v = p.get(config.get());
      return Tokens{v.number, v.percent}.of(budget);
    };
    for (const Setting& s : use.settings) {
      const bool window = s.param->name == "window" || s.param->name == "obs_window";
      if (s.param->type != ParamType::tokens || s.from_preset || !(window || s.param == sink)) {
        continue;
      }
      const int beside = window && sink != nullptr && sink->type == ParamType::tokens ? tokens(*sink) : 0;
      if (tokens(*s.param) + beside <= budget) {
        continue;
      }
      throw ConfigError(std::string(use.info->name) + ": " + setting_text(s) +
                        (beside > 0 ? " beside sink=" + std::to_string(beside) : "") + " protects " +
                        std::to_string(tokens(*s.param) + beside) + " tokens, more than the budget of " +
                        std::to_string(budget));
    }
  }
}

}  // namespace

double ValueTable::at(int layer, int kv_head) const {
  const auto it = std::find(layers.begin(), layers.end(), layer);
  if (it == layers.end()) {
    throw ConfigError(path + " has no value for layer " + std::to_string(layer));
  }
  const auto& row = values.at(static_cast<std::size_t>(it - layers.begin()));
  if (row.size() == 1) {
    return row.front();
  }
  if (kv_head < 0 || kv_head >= static_cast<int>(row.size())) {
    throw ConfigError(path + " has " + std::to_string(row.size()) + " values for layer " + std::to_string(layer) +
                      " and none for KV head " + std::to_string(kv_head));
  }
  return row[static_cast<std::size_t>(kv_head)];
}

std::shared_ptr<void> PartUse::config(int layer, int kv_head) const {
  auto config = info->config();
  for (const Setting& s : settings) {
    s.param->set(config.get(), s.table ? ParamValue{s.table->at(layer, kv_head), false, {}} : s.value);
  }
  return config;
}

bool Method::budgeted() const {
  return read || (prefill_select && prefill_budget.unit == Budget::Unit::none) ||
         select.info->budgeted(any_config(select).get());
}

Foresight Method::foresight() const {
  for (const PartUse* part : parts_of(*this)) {
    if (part->info->foresight == Foresight::oracle) {
      return Foresight::oracle;
    }
  }
  return Foresight::none;
}

Needs Method::needs(std::span<const PartUse> compensators) const {
  std::vector<const PartUse*> all_parts = parts_of(*this);
  for (const PartUse& part : compensators) {
    all_parts.push_back(&part);
  }
  Needs all;
  for (const PartUse* part : all_parts) {
    // A selector of a pinned prompt never sees it; a compensator has nothing to remember of it unless it was cut.
    const bool pinned =
        traits.pool == Pool::decode && (part == &select || (part->info->role == Role::compensate && !prefill_select));
    for (const auto& config : configs(*part)) {
      const Needs n = part->info->needs(config.get());
      if (!pinned && all.prompt_queries != Needs::kAll) {
        all.prompt_queries =
            n.prompt_queries == Needs::kAll ? Needs::kAll : std::max(all.prompt_queries, n.prompt_queries);
      }
      all.pre_rope = all.pre_rope || n.pre_rope;
      all.spans = all.spans || n.spans;
      all.future_attention = all.future_attention || n.future_attention;
      all.future_outputs = all.future_outputs || n.future_outputs;
      if (!n.scores.empty()) {
        all.scores = n.scores;
      }
      if (!n.evicted_at.empty()) {
        all.evicted_at = n.evicted_at;
      }
    }
  }
  return all;
}

std::vector<const PartUse*> Method::parts() const { return parts_of(*this); }

void Method::check(int budget, int prompt_budget) const {
  for (const PartUse* part : parts_of(*this)) {
    const bool cuts_prompt =
        (prefill_select && part == &*prefill_select) || (prefill_allocate && part == &*prefill_allocate);
    const int own = cuts_prompt && prompt_budget > 0 ? prompt_budget : budget;
    const auto all = configs(*part);
    if (part->info->role == Role::select && part->info->budgeted(all.front().get())) {
      check_protected(*part, own);
    }
    for (const auto& config : all) {
      part->info->check(config.get(), own);
    }
  }
}

Method parse_method(const std::string& text, const TableReader& read_table) {
  const auto first = text.find_first_not_of(" \t\n");
  if (first == std::string::npos) {
    throw ConfigError("the method is empty; write for example h2o:window=128 or snapkv+adakv");
  }
  const std::string label = text.substr(first, text.find_last_not_of(" \t\n") + 1 - first);
  if (text.find('\0') != std::string::npos) {  // what is said of it would end there
    throw ConfigError("a method's text has a character of code 0");
  }
  Strings texts = split_phases(label);
  if (texts.size() > 2) {
    throw ConfigError(label + ": at most one '/' separates the prompt's selector from the decode tokens'");
  }
  Budget prompt_budget;
  std::optional<Phase> prefill;
  if (texts.size() == 2) {
    prompt_budget = take_budget(texts[0]);
    prefill.emplace();
    read_phase(*prefill, texts[0], read_table);
    for (const auto& [role, use] : prefill->parts) {
      if (role != Role::select && role != Role::allocate) {
        throw ConfigError(label + ": " + role_name(role) + " " + quoted(use.info->name) +
                          " cannot stand before the '/', where a selector cuts the prompt and an allocator may divide "
                          "its budget");
      }
    }
  }
  Phase phase;
  read_phase(phase, texts.back(), read_table);
  Method m = build(label, phase, prefill ? &*prefill : nullptr, prompt_budget);
  refuse_combinations(m);
  for (const PartUse* part : parts_of(m)) {  // combinations of keys that no budget allows
    for (const auto& config : configs(*part)) {
      part->info->check(config.get(), std::numeric_limits<int>::max());
    }
  }
  return m;
}

std::unique_ptr<Allocator> any_allocator(const PartUse& allocator) {
  return allocator.info->allocate(any_config(allocator).get());
}

bool divides_over_layers(const Method& m) {
  const auto divides = [](const std::optional<PartUse>& use) { return use && !any_allocator(*use)->per_layer(); };
  return divides(m.prefill_allocate) || divides(m.allocate);
}

MatD head_worth(const PartUse& allocator, std::span<const int> layers, int n_kv_heads) {
  MatD worth(std::ssize(layers), n_kv_heads);
  for (Eigen::Index l = 0; l < worth.rows(); ++l) {
    for (int h = 0; h < n_kv_heads; ++h) {
      const auto config = allocator.config(layers[static_cast<std::size_t>(l)], h);
      worth(l, h) = allocator.info->allocate(config.get())->worth();
    }
  }
  return worth;
}

PartUse parse_part(const std::string& text, Role role, const TableReader& read_table) {
  const Piece piece = split_piece(text);
  const PartInfo* info = find_part(piece.name);
  if (info == nullptr || info->role != role) {
    Strings valid;
    for (const PartInfo* p : all_parts()) {
      if (p->role == role) {
        valid.emplace_back(p->name);
      }
    }
    throw ConfigError("no " + role_name(role) + " is called " + quoted(piece.name) + "; the nearest is " +
                      quoted(nearest(piece.name, valid)));
  }
  Phase phase;
  PartUse use{info, {}};
  assign(phase, {piece.name, {&use}}, piece, read_table);
  tidy(use);
  return use;
}

std::string canonical(const PartUse& use) { return part_text(use, {}); }

std::vector<std::string> split_methods(const std::string& list) {
  Strings methods;
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t end = std::min(list.find(',', begin), list.size());
    const std::string piece = list.substr(begin, end - begin);
    begin = end + 1;
    const std::size_t mark = piece.find_first_of("=:+/");
    if (!methods.empty() && mark != std::string::npos && piece[mark] == '=') {
      methods.back() += "," + piece;
    } else {
      methods.push_back(piece);
    }
  }
  return methods;
}

}  // namespace kvreplay
