#include "sim/sweep/plan.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "policies/help.hpp"
#include "policies/values.hpp"
#include "sim/metrics.hpp"
#include "sim/run.hpp"
#include "sim/sweep/toml.hpp"
#include "sim/whole_file.hpp"

namespace kvreplay {
namespace {

constexpr int kMostValues = 100000;  // of one parameter
constexpr const char* kBudgets = "budgets";

// As `--budget` reads fractions: always with a point, never with an exponent.
std::string fraction(double x) {
  char buffer[1100];
  std::string text(buffer, std::to_chars(buffer, buffer + sizeof buffer, x, std::chars_format::fixed).ptr);
  return text.find('.') == std::string::npos ? text + ".0" : text;
}

// One table of the plan. What was asked for is what may be there: `finish` refuses the rest.
class Table {
 public:
  Table(const toml::table& table, std::string plan, std::string what)
      : table_(table), plan_(std::move(plan)), what_(std::move(what)) {}

  const toml::node* find(const std::string& key) {
    known_.push_back(key);
    return table_.get(key);
  }

  std::string where(const toml::node& node) const {
    return node.source().begin.line > 0 ? fmt::format("{} line {}", plan_, node.source().begin.line) : plan_;
  }
  std::string where() const { return where(table_); }

  [[noreturn]] void refuse(const toml::node& node, const std::string& key, const std::string& takes) const {
    throw ConfigError(fmt::format("{}: '{}' takes {}", where(node), key, takes));
  }

  void finish() const {
    for (const auto& [key, node] : table_) {
      const std::string name(key.str());
      if (std::find(known_.begin(), known_.end(), name) == known_.end()) {
        throw ConfigError(fmt::format("{}: '{}' is no key of {}; the nearest is '{}' of {}", where(node), name, what_,
                                      nearest(name, known_), fmt::join(known_, ", ")));
      }
    }
  }

  void read(const std::string& key, int& out, std::int64_t least, std::int64_t most) {
    std::int64_t x = out;
    read(key, x, least, most);
    out = int(x);
  }

  void read(const std::string& key, std::int64_t& out, std::int64_t least, std::int64_t most) {
    const toml::node* node = find(key);
    if (node == nullptr) {
      return;
    }
    const toml::value<std::int64_t>* x = node->as_integer();
    if (x == nullptr || x->get() < least || x->get() > most) {
      refuse(*node, key, fmt::format("a whole number from {} to {}", least, most));
    }
    out = x->get();
  }

  void read(const std::string& key, bool& out) {
    if (const toml::node* node = find(key)) {
      if (!node->is_boolean()) {
        refuse(*node, key, "true or false");
      }
      out = node->as_boolean()->get();
    }
  }

  // A text, or a list of texts and numbers; false where it is not there.
  bool read(const std::string& key, std::vector<std::string>& out, bool empty_is_fine = false) {
    const toml::node* node = find(key);
    if (node == nullptr) {
      return false;
    }
    out = node->is_array() ? texts(*node->as_array(), key) : std::vector{text(*node, key)};
    if (out.empty() && !empty_is_fine) {
      refuse(*node, key, "at least one value, but the list is empty");
    }
    return true;
  }

  std::vector<std::string> texts(const toml::array& list, const std::string& key) const {
    std::vector<std::string> all;
    for (const toml::node& node : list) {
      all.push_back(text(node, key));
    }
    return all;
  }

  // A value as a method's text writes it.
  std::string text(const toml::node& node, const std::string& key) const {
    if (const auto* s = node.as_string()) {
      return s->get();
    }
    if (const auto* i = node.as_integer()) {
      return fmt::to_string(i->get());
    }
    if (const auto* b = node.as_boolean()) {
      return b->get() ? "true" : "false";
    }
    if (const auto* x = node.as_floating_point(); x != nullptr && std::isfinite(x->get())) {
      return key == kBudgets ? fraction(x->get()) : format_number(x->get());
    }
    refuse(node, key, "numbers and texts, alone or in a list");
  }

 private:
  const toml::table& table_;
  std::string plan_, what_;
  std::vector<std::string> known_;
};

double number(Table& table, const std::string& key, double otherwise) {
  const toml::node* node = table.find(key);
  if (node == nullptr) {
    return otherwise;
  }
  const auto x = node->value<double>();
  if (!node->is_number() || !x || !std::isfinite(*x)) {
    table.refuse(*node, key, "a number");
  }
  return *x;
}

// {from = 16, to = 64, step = 16}
GridRange range(const toml::table& toml, const std::string& plan, const std::string& param) {
  Table table(toml, plan, "a range of values");
  GridRange r;
  const double none = std::nan("");
  r.from = number(table, "from", none);
  r.to = number(table, "to", none);
  r.step = number(table, "step", 0);
  table.read("count", r.count, 1, kMostValues);
  int draws = 0;
  table.read("random", draws, 1, kMostValues);
  std::int64_t seed = 0;
  table.read("seed", seed, 0, std::numeric_limits<std::int64_t>::max());
  r.seed = std::uint64_t(seed);
  std::vector<std::string> scale{"lin"};
  table.read("scale", scale);
  table.finish();
  const auto refuse = [&](const std::string& why) {
    throw ConfigError(fmt::format("{}: the range of '{}' {}", table.where(), param, why));
  };
  if (std::isnan(r.from) || std::isnan(r.to)) {
    refuse("needs from and to");
  }
  if (!std::isfinite(r.to - r.from) || !std::isfinite(r.to / (r.from == 0 ? 1 : r.from))) {
    refuse(fmt::format("goes from {} to {}, further than numbers reach", r.from, r.to));
  }
  if (r.from > r.to) {
    refuse(fmt::format("goes from {} down to {}; write the smaller end first", r.from, r.to));
  }
  if (int(toml.contains("step")) + int(r.count > 0) + int(draws > 0) != 1) {
    refuse("needs one of step, count and random");
  }
  if (toml.contains("step") && !(r.step > 0 && (r.to - r.from) / r.step < kMostValues)) {
    refuse(fmt::format("takes a step above 0 that gives at most {} values", kMostValues));
  }
  r.random = draws > 0;
  r.count = std::max(r.count, draws);
  if (toml.contains("seed") && !r.random) {
    refuse("has a seed, but nothing random");
  }
  std::vector<std::string> names;
  for (const Scale s : {Scale::lin, Scale::log, Scale::one_minus}) {
    names.emplace_back(scale_name(s));
  }
  const auto it = std::find(names.begin(), names.end(), scale.front());
  if (it == names.end() || scale.size() != 1) {
    refuse(fmt::format("has the scale '{}'; the nearest is '{}' of {}", scale.front(), nearest(scale.front(), names),
                       fmt::join(names, ", ")));
  }
  r.scale = Scale(it - names.begin());
  if (r.scale != Scale::lin && r.step > 0) {
    refuse("has steps, which are even; with a scale give count or random");
  }
  if (r.scale == Scale::log && r.from <= 0) {
    refuse("has the scale log, which needs from above 0");
  }
  if (r.scale == Scale::one_minus && r.to >= 1) {
    refuse("has the scale one_minus, which needs to below 1");
  }
  return r;
}

std::vector<GridAxis> axes(const toml::node& node, const std::string& plan, Table& owner, const std::string& key) {
  const toml::table* table = node.as_table();
  if (table == nullptr) {
    owner.refuse(node, key, "a table of parameters, as alpha = [0.9, 0.95]");
  }
  std::vector<GridAxis> all;
  for (const auto& [name, values] : *table) {
    GridAxis axis{std::string(name.str()), {}, {}};
    if (const toml::table* of_range = values.as_table()) {
      axis.range = range(*of_range, plan, axis.param);
    } else if (const toml::array* list = values.as_array(); list != nullptr && !list->empty()) {
      axis.values = owner.texts(*list, axis.param);
    } else {
      owner.refuse(values, axis.param, "a list of values or a range, as {from = 16, to = 64, step = 16}");
    }
    all.push_back(std::move(axis));
  }
  // In the order of the file, which the library does not keep.
  std::stable_sort(all.begin(), all.end(), [&](const GridAxis& a, const GridAxis& b) {
    const auto at = [&](const GridAxis& axis) {
      const toml::source_position p = table->get(axis.param)->source().begin;
      return std::pair(p.line, p.column);
    };
    return at(a) < at(b);
  });
  return all;
}

std::size_t length(const GridAxis& axis) { return axis.texts(false).size(); }

PlanMethod method(const toml::table& toml, const std::string& plan) {
  Table table(toml, plan, "a method");
  PlanMethod m;
  m.where = table.where();
  std::vector<std::string> text;
  if (!table.read("text", text) || text.size() != 1) {
    throw ConfigError(m.where + ": a method needs its text, as text = \"h2o:window=32\"");
  }
  m.text = text.front();
  m.own_budgets = table.read(kBudgets, m.budgets);
  if (const toml::node* grid = table.find("grid")) {
    for (GridAxis& axis : axes(*grid, plan, table, "grid")) {
      m.axes.push_back({std::move(axis)});
    }
  }
  if (const toml::node* zip = table.find("zip")) {
    std::vector<const toml::node*> groups;
    if (const toml::array* several = zip->as_array()) {
      for (const toml::node& node : *several) {
        groups.push_back(&node);
      }
    } else {
      groups.push_back(zip);
    }
    for (const toml::node* group : groups) {
      std::vector<GridAxis> together = axes(*group, plan, table, "zip");
      for (const GridAxis& axis : together) {
        if (length(axis) != length(together.front())) {
          throw ConfigError(fmt::format(
              "{}: zip goes through its parameters together, but '{}' has {} values and "
              "'{}' has {}",
              table.where(*group), together.front().param, length(together.front()), axis.param, length(axis)));
        }
      }
      if (!together.empty()) {
        m.axes.push_back(std::move(together));
      }
    }
  }
  table.finish();
  std::vector<std::string> names;
  for (const auto& group : m.axes) {
    for (const GridAxis& axis : group) {
      if (std::find(names.begin(), names.end(), axis.param) != names.end()) {
        throw ConfigError(fmt::format("{}: '{}' is both in grid and in zip", m.where, axis.param));
      }
      names.push_back(axis.param);
    }
  }
  return m;
}

void read_detail(Plan& p, Table& table) {
  std::vector<std::string> words, steps;
  const std::vector<std::string> valid{"heads", "steps", "retained", "outputs"};
  table.read("detail", words, true);
  for (const std::string& word : words) {
    const auto it = std::find(valid.begin(), valid.end(), word);
    if (it == valid.end()) {
      throw ConfigError(fmt::format("{}: detail '{}' is none; the nearest is '{}' of {}", p.name, word,
                                    nearest(word, valid), fmt::join(valid, ", ")));
    }
    (word == "heads" ? p.heads : word == "steps" ? p.steps : word == "retained" ? p.retained : p.outputs) = true;
  }
  table.read("output_steps", steps);
  for (const std::string& list : steps) {
    for (const int step : parse_integers(p.name + ": output_steps", list)) {
      p.output_steps.push_back(step);
    }
  }
  std::sort(p.output_steps.begin(), p.output_steps.end());
  p.output_steps.erase(std::unique(p.output_steps.begin(), p.output_steps.end()), p.output_steps.end());
  if (p.outputs == p.output_steps.empty()) {
    throw ConfigError(p.name + ": detail 'outputs' and output_steps go together: outputs are written at these steps");
  }
}

void read_metrics(Plan& p, Table& table) {
  std::vector<std::string> list;
  if (table.read("metrics", list)) {
    p.metrics = fmt::format("{}", fmt::join(list, ","));
  }
  MetricSet::parse(p.metrics);  // ConfigError
  if (table.read("statistics", list)) {
    const std::vector<std::string> valid(std::begin(kStatistics), std::end(kStatistics));
    for (const std::string& s : list) {
      if (std::find(valid.begin(), valid.end(), s) == valid.end()) {
        throw ConfigError(fmt::format("{}: '{}' is no statistic; the nearest is '{}' of {}", p.name, s,
                                      nearest(s, valid), fmt::join(valid, ", ")));
      }
    }
    p.statistics.clear();
    std::copy_if(valid.begin(), valid.end(), std::back_inserter(p.statistics),
                 [&](const std::string& s) { return std::find(list.begin(), list.end(), s) != list.end(); });
  }
}

}  // namespace

Plan parse_plan(std::string_view text, const std::string& name) {
  const toml::table root = parse_toml(text, name);
  Table table(root, name, "a plan");
  Plan p;
  p.name = name;
  if (!table.read("traces", p.traces)) {
    throw ConfigError(name + ": no trace is given; add for example traces = [\"traces/*.h5\"]");
  }
  std::vector<std::string> methods;
  table.read("methods", methods);
  for (const std::string& list : methods) {
    for (const std::string& m : split_methods(list)) {
      p.methods.push_back({.text = m, .budgets = {}, .axes = {}, .where = name});
    }
  }
  if (const toml::node* several = table.find("method")) {
    const toml::array* list = several->as_array();
    if (list == nullptr) {
      table.refuse(*several, "method", "one table per method; write [[method]]");
    }
    for (const toml::node& node : *list) {
      if (!node.is_table()) {
        table.refuse(node, "method", "one table per method; write [[method]], or methods = [\"h2o\"] for texts alone");
      }
      p.methods.push_back(method(*node.as_table(), name));
    }
  }
  table.read(kBudgets, p.budgets, true);
  p.compensators_given = table.read("compensators", p.compensators, true);
  std::vector<std::string> compensators;
  for (const std::string& list : p.compensators) {
    for (std::string& c : split_methods(list)) {
      compensators.push_back(std::move(c));
    }
  }
  p.compensators = compensators == std::vector<std::string>{"none"} ? std::vector<std::string>{} : compensators;
  read_metrics(p, table);
  std::vector<std::string> layers;
  table.read("layers", layers);
  for (const std::string& list : layers) {
    for (const int layer : parse_integers(name + ": layers", list)) {
      p.layers.push_back(layer);
    }
  }
  std::sort(p.layers.begin(), p.layers.end());
  p.layers.erase(std::unique(p.layers.begin(), p.layers.end()), p.layers.end());
  table.read("prompt_len", p.prompt_len, 1, 1 << 30);
  table.read("max_steps", p.max_steps, 1, 1 << 30);
  table.read("checkpoints", p.checkpoints, 1, 1 << 20);
  std::int64_t seed = 0;
  table.read("seed", seed, 0, std::numeric_limits<std::int64_t>::max());
  p.seed = std::uint64_t(seed);
  read_detail(p, table);
  table.finish();
  if (p.methods.empty()) {
    throw ConfigError(name + ": no method is given; add for example methods = [\"h2o\", \"snapkv\"]");
  }
  return p;
}

Plan read_plan(const std::filesystem::path& file) {
  Plan p = parse_plan(read_whole(file), file.string());
  p.folder = file.parent_path();
  return p;
}

}  // namespace kvreplay
