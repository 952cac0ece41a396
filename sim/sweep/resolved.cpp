#include "sim/sweep/resolved.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <glob.h>
#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "policies/method.hpp"
#include "policies/settings.hpp"
#include "sim/load.hpp"
#include "sim/plugins.hpp"
#include "sim/run.hpp"
#include "sim/whole_file.hpp"
#include "traces/hash.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::size_t kMostMethods = 1000000;

// A name that glob() takes as it is.
std::string literal(const std::string& name) {
  std::string text;
  for (const char c : name) {
    text += std::string_view("*?[\\").find(c) == std::string_view::npos ? "" : "\\";
    text += c;
  }
  return text;
}

// Sorted; without what a glob finds twice.
std::vector<fs::path> found(const Plan& plan) {
  std::set<std::string> all;
  for (const std::string& pattern : plan.traces) {
    const fs::path whole = fs::path(literal(plan.folder.string())) / pattern;  // an absolute pattern stands for itself
    glob_t paths{};
    const int error = ::glob(whole.c_str(), 0, nullptr, &paths);  // NOLINT(concurrency-mt-unsafe): no thread beside it
    for (std::size_t i = 0; error == 0 && i < paths.gl_pathc; ++i) {
      all.insert(fs::path(paths.gl_pathv[i]).lexically_normal().string());
    }
    ::globfree(&paths);
    if (error != 0) {
      throw ConfigError(fmt::format("{}: no file is called '{}'", plan.name, (plan.folder / pattern).string()));
    }
  }
  return {all.begin(), all.end()};
}

std::string lines(const std::map<std::string, std::string>& files) {
  std::string text;
  for (const auto& [name, hash] : files) {
    text += fmt::format("file {} {}\n", name, hash);
  }
  return text;
}

class Resolving {
 public:
  explicit Resolving(const Plan& plan) : plan_(plan) {}

  Sweep operator()() {
    sweep_.seed = plan_.seed;
    sweep_.checkpoints = plan_.checkpoints;
    sweep_.statistics = plan_.statistics;
    sweep_.output_steps = plan_.output_steps;
    detail();
    metrics();
    try {
      compensators();
    } catch (const ConfigError& e) {
      throw ConfigError(plan_.name + ": " + e.what());
    }
    for (const PlanMethod& m : plan_.methods) {
      expand(m);
    }
    for (int m = 0; m < int(sweep_.methods.size()); ++m) {
      for (int b = 0; b < int(sweep_.methods[std::size_t(m)].budgets.size()); ++b) {
        sweep_.configs.push_back({m, b});
      }
    }
    traces();
    return std::move(sweep_);
  }

 private:
  void detail() {
    std::vector<std::string>& words = sweep_.detail;
    words = plan_.statistics;
    for (const auto& [word, on] :
         {std::pair{"heads", plan_.heads}, {"steps", plan_.steps}, {"retained", plan_.retained}}) {
      if (on) {
        words.emplace_back(word);
      }
    }
    if (plan_.outputs) {
      words.push_back(fmt::format("outputs {}", fmt::join(plan_.output_steps, ",")));
    }
    std::sort(words.begin(), words.end());
  }

  void metrics() {
    metrics_ = MetricSet::parse(plan_.metrics);
    for (const MetricInfo& i : all_metrics()) {
      if (metrics_.has(i.metric)) {
        sweep_.metrics.emplace_back(i.name);
      }
    }
  }

  // Tables lie where the plan does; they are called as the text calls them.
  ValueTable read_table(const std::string& name) {
    if (fs::path(name).is_relative() && !plan_.folder.empty()) {
      sweep_.tables[name] = (plan_.folder / name).lexically_normal().string();
    }
    return table_reader({sweep_.tables.begin(), sweep_.tables.end()})(name);
  }

  TableReader reader() {
    return [this](const std::string& name) { return read_table(name); };
  }

  static void add_files(const PartUse& part, std::map<std::string, std::string>& files) {
    if (const std::string hash = plugin_hash(*part.info); !hash.empty()) {  // the code is what the numbers depend on
      files["plug-in " + std::string(part.info->name)] = hash;
    }
    for (const Setting& s : part.settings) {
      if (s.table) {
        files[s.table->path] = s.table->hash;
      }
    }
  }

  void compensators() {
    sweep_.compensators_given = plan_.compensators_given;
    for (const std::string& text : plan_.compensators) {
      const PartUse part = parse_part(text, Role::compensate, reader());
      if (part.info->is_default) {
        continue;
      }
      if (std::find(sweep_.compensators.begin(), sweep_.compensators.end(), canonical(part)) !=
          sweep_.compensators.end()) {
        throw ConfigError("the compensator '" + text + "' is given twice");
      }
      sweep_.compensators.push_back(canonical(part));
      add_files(part, sweep_.files);
    }
  }

  // Every combination of the method's axes.
  void expand(const PlanMethod& m) {
    try {
      const std::vector<MethodParam> params = params_of(m.text, reader());
      std::vector<std::vector<std::vector<std::string>>> texts;  // by group, by axis
      std::vector<std::vector<MethodParam>> of;
      std::size_t n = 1;
      for (const auto& group : m.axes) {
        texts.emplace_back();
        of.emplace_back();
        for (const GridAxis& axis : group) {
          const MethodParam& p = param_named(params, m.text, axis.param);
          of.back().push_back(p);
          texts.back().push_back(axis.texts(p.param->type != ParamType::real));
        }
        n *= texts.back().front().size();
        if (n > kMostMethods) {
          throw ConfigError(fmt::format("'{}' makes more than {} methods", m.text, kMostMethods));
        }
      }
      for (std::size_t i = 0; i < n; ++i) {
        std::vector<std::pair<MethodParam, std::string>> settings;
        SweepMethod method;
        std::size_t at = i, below = n;  // the last axis runs fastest
        for (std::size_t g = 0; g < texts.size(); ++g) {
          below /= texts[g].front().size();
          const std::size_t value = at / below;
          at %= below;
          for (std::size_t a = 0; a < texts[g].size(); ++a) {
            settings.emplace_back(of[g][a], texts[g][a][value]);
            method.params.emplace_back(m.axes[g][a].param, texts[g][a][value]);
          }
        }
        method.label = settings.empty() ? m.text : with_settings(m.text, settings);
        add(m, std::move(method));
      }
    } catch (const ConfigError& e) {
      throw ConfigError(m.where + ": " + e.what());
    }
  }

  void add(const PlanMethod& from, SweepMethod method) {
    Method m = parse_method(method.label, reader());
    if (const std::string recorded = m.needs().evicted_at; !recorded.empty() && fs::path(recorded).is_relative()) {
      method.label = here(method.label, recorded);
      m = parse_method(method.label, reader());
    }
    method.label = m.label;
    method.name = m.name;
    method.divides = divides_over_layers(m);
    const std::vector<std::string>& asked = from.own_budgets ? from.budgets : plan_.budgets;
    method.budgets = m.budgeted() ? asked : std::vector<std::string>{""};
    for (std::size_t i = 0; m.budgeted() && i < asked.size(); ++i) {
      Budget::parse(asked[i]);
      if (std::find(asked.begin(), asked.begin() + std::ptrdiff_t(i), asked[i]) != asked.begin() + std::ptrdiff_t(i)) {
        throw ConfigError("the budget " + asked[i] + " is given twice");
      }
    }
    if (method.budgets.empty()) {
      throw ConfigError(m.label + " needs a budget; add for example budgets = [64, \"25%\"]");
    }
    if (const auto it = index_.find(m.name); it != index_.end()) {  // two ways to one method: it is there once
      SweepMethod& known = sweep_.methods[it->second];
      for (const std::string& b : method.budgets) {
        if (std::find(known.budgets.begin(), known.budgets.end(), b) == known.budgets.end()) {
          known.budgets.push_back(b);
        }
      }
      return;
    }
    for (const PartUse* part : m.parts()) {
      std::map<std::string, std::string> files;
      add_files(*part, files);
      if (part->info->role == Role::allocate && any_allocator(*part)->measures()) {
        method.measuring[canonical(*part)] = canonical(*part) + "\n" + lines(files);
      }
      method.files.merge(files);
    }
    if (const std::string recorded = m.needs().evicted_at; !recorded.empty()) {
      method.files[recorded] = sha256(read_whole(recorded));
    }
    index_[m.name] = sweep_.methods.size();
    sweep_.methods.push_back(std::move(method));
    if (sweep_.methods.size() > kMostMethods) {
      throw ConfigError(fmt::format("the plan makes more than {} methods", kMostMethods));
    }
  }

  // The method's text with the file of recorded evictions where the plan lies, the same from every working folder.
  std::string here(const std::string& text, const std::string& recorded) {
    for (const MethodParam& p : params_of(text, reader())) {
      if (p.param->type == ParamType::file && p.value.text == recorded) {
        return with_settings(text, {{p, fs::absolute(plan_.folder / recorded).lexically_normal().string()}});
      }
    }
    return text;
  }

  void traces() {
    std::map<std::string, std::string> stems;
    std::set<int> layers;  // that any trace has
    for (const fs::path& path : found(plan_)) {
      try {
        Json(path.string()).dump();
      } catch (const Json::type_error&) {
        throw ConfigError(path.string() + ": the name is no UTF-8 text, as results need; rename it");
      }
      const auto [other, first] = stems.emplace(path.stem().string(), path.string());
      if (!first) {
        throw ConfigError(fmt::format("{} and {} are both called '{}'; rename one, results name them so", other->second,
                                      path.string(), path.stem().string()));
      }
      try {
        add_trace(path, layers);
      } catch (const TraceError& e) {
        sweep_.failed_traces.emplace_back(path.string(), e.what());
      }
    }
    for (const int layer : plan_.layers) {
      if (!layers.empty() && layers.count(layer) == 0) {
        throw ConfigError(
            fmt::format("{}: no trace has a layer {}; there are {}", plan_.name, layer, fmt::join(layers, ", ")));
      }
    }
    if (sweep_.traces.empty()) {
      throw TraceError(sweep_.failed_traces.front().second);
    }
  }

  void add_trace(const fs::path& path, std::set<int>& all_layers) {
    SweepTrace t;
    t.stamp = stamp_of(path);
    const TraceReader reader(path);
    const TraceInfo& info = reader.info();
    t.path = path.string();
    t.stem = info.stem;
    t.prompt_len = plan_.prompt_len > 0 ? plan_.prompt_len : info.prompt_len;
    t.n_heads = info.n_heads;
    t.n_kv_heads = info.n_kv_heads;
    t.head_dim = info.head_dim;
    t.v_head_dim = info.v_head_dim;
    if (t.prompt_len >= info.n_tokens) {
      throw TraceError(fmt::format("{}: a prompt of {} tokens leaves no decode step of the trace's {} tokens",
                                   path.string(), t.prompt_len, info.n_tokens));
    }
    t.n_tokens = plan_.max_steps > 0 ? std::min(info.n_tokens, t.prompt_len + plan_.max_steps) : info.n_tokens;
    all_layers.insert(info.layers.begin(), info.layers.end());
    for (const int layer : plan_.layers.empty() ? info.layers : plan_.layers) {
      if (std::find(info.layers.begin(), info.layers.end(), layer) == info.layers.end()) {
        t.skipped.emplace_back(layer, "the trace has no such layer");
      } else if (const int window = short_window(info, layer, t.n_tokens); window > 0) {
        t.skipped.emplace_back(layer, fmt::format("its sliding window of {} tokens is shorter than the trace", window));
      } else {
        t.layers.push_back(layer);
      }
    }
    if (t.layers.empty()) {
      throw TraceError(path.string() + ": no layer of the plan can be replayed; " + t.skipped.front().second);
    }
    if (info.logit_softcap == 0 || plan_.compensators_given) {
      t.compensators = sweep_.compensators;
    }
    t.content_hash = info.content_hash.empty() ? hash_trace(reader).content : info.content_hash;
    sweep_.traces.push_back(std::move(t));
  }

  const Plan& plan_;
  Sweep sweep_;
  MetricSet metrics_;
  std::map<std::string, std::size_t> index_;  // of a method by its canonical text
};

Json json_of(const std::map<std::string, std::string>& map) {
  Json j = Json::object();
  for (const auto& [key, value] : map) {
    j[key] = value;
  }
  return j;
}

}  // namespace

std::string stamp_of(const fs::path& path) {
  struct stat s {};
  return ::stat(path.c_str(), &s) == 0 ? fmt::format("{} {}.{:09}", s.st_size, s.st_mtim.tv_sec, s.st_mtim.tv_nsec)
                                       : "";
}

Sweep resolve(const Plan& plan) { return Resolving(plan)(); }

bool Sweep::has(const std::string& word) const { return std::binary_search(detail.begin(), detail.end(), word); }

const std::string& Sweep::budget(int config) const {
  return method(config).budgets[std::size_t(configs[std::size_t(config)].budget)];
}

std::size_t Sweep::n_cells() const {
  std::size_t n = 0;
  for (const SweepTrace& t : traces) {
    n += t.layers.size() * configs.size();
  }
  return n;
}

std::string Sweep::group(const SweepTrace& t, int layer) const {
  return sha256(
      fmt::format("kvreplay cells {}\ntrace {}\nlayer {}\nprompt_len {}\nn_tokens {}\ncompensators {}\n{}"
                  "metrics {}\ncheckpoints {}\nseed {}\n",
                  kSweepSchema, t.content_hash, layer, t.prompt_len, t.n_tokens, fmt::join(t.compensators, ","),
                  lines(files), fmt::join(metrics, ","), checkpoints, seed));
}

std::string Sweep::key(const std::string& group, const SweepTrace& t, int config) const {
  const SweepMethod& m = method(config);
  return sha256(fmt::format("{}\nmethod {}\nbudget {}\n{}{}", group, m.name, budget(config), lines(m.files),
                            m.divides ? fmt::format("layers {}\n", fmt::join(t.layers, ",")) : ""));
}

std::map<std::string, std::string> Sweep::measuring() const {
  std::map<std::string, std::string> all;
  for (const SweepMethod& m : methods) {
    all.insert(m.measuring.begin(), m.measuring.end());
  }
  return all;
}

std::string Sweep::measured_group(const SweepTrace& t, int layer) const {
  return sha256(fmt::format("kvreplay measured {}\ntrace {}\nlayer {}\nprompt_len {}\n", kSweepSchema, t.content_hash,
                            layer, t.prompt_len));
}

std::string Sweep::measured_key(const std::string& group, const std::string& allocator_with_files) {
  return sha256(group + "\nallocator " + allocator_with_files);
}

Json Sweep::json() const {
  Json j;
  j["traces"] = Json::array();
  for (const SweepTrace& t : traces) {
    Json skipped_layers = Json::array();
    for (const auto& [layer, reason] : t.skipped) {
      skipped_layers.push_back({{"layer", layer}, {"reason", reason}});
    }
    j["traces"].push_back({{"path", t.path},
                           {"stem", t.stem},
                           {"content_hash", t.content_hash},
                           {"stamp", t.stamp},
                           {"prompt_len", t.prompt_len},
                           {"n_tokens", t.n_tokens},
                           {"n_heads", t.n_heads},
                           {"n_kv_heads", t.n_kv_heads},
                           {"head_dim", t.head_dim},
                           {"v_head_dim", t.v_head_dim},
                           {"layers", t.layers},
                           {"layers_skipped", skipped_layers},
                           {"compensators", t.compensators}});
  }
  j["failed_traces"] = Json::array();
  for (const auto& [path, sentence] : failed_traces) {
    j["failed_traces"].push_back({{"path", path}, {"failed", sentence}});
  }
  j["methods"] = Json::array();
  for (const SweepMethod& m : methods) {
    Json params = Json::object();
    for (const auto& [name, value] : m.params) {
      params[name] = value;
    }
    j["methods"].push_back({{"label", m.label},
                            {"method", m.name},
                            {"budgets", m.budgets},
                            {"params", params},
                            {"files", json_of(m.files)},
                            {"divides", m.divides},
                            {"measuring", json_of(m.measuring)}});
  }
  j["compensators"] = compensators;
  j["compensators_given"] = compensators_given;
  j["files"] = json_of(files);
  j["tables"] = json_of(tables);
  j["metrics"] = metrics;
  j["statistics"] = statistics;
  j["checkpoints"] = checkpoints;
  j["seed"] = seed;
  j["detail"] = detail;
  j["output_steps"] = output_steps;
  return j;
}

Sweep Sweep::from_json(const Json& j) {
  Sweep s;
  for (const Json& t : j.at("traces")) {
    SweepTrace& trace = s.traces.emplace_back();
    trace.path = t.at("path");
    trace.stem = t.at("stem");
    trace.content_hash = t.at("content_hash");
    trace.stamp = t.at("stamp");
    trace.prompt_len = t.at("prompt_len");
    trace.n_tokens = t.at("n_tokens");
    trace.n_heads = t.at("n_heads");
    trace.n_kv_heads = t.at("n_kv_heads");
    trace.head_dim = t.at("head_dim");
    trace.v_head_dim = t.at("v_head_dim");
    trace.layers = t.at("layers").get<std::vector<int>>();
    for (const Json& skipped : t.at("layers_skipped")) {
      trace.skipped.emplace_back(skipped.at("layer"), skipped.at("reason"));
    }
    trace.compensators = t.at("compensators").get<std::vector<std::string>>();
  }
  for (const Json& t : j.at("failed_traces")) {
    s.failed_traces.emplace_back(t.at("path"), t.at("failed"));
  }
  for (const Json& m : j.at("methods")) {
    SweepMethod& method = s.methods.emplace_back();
    method.label = m.at("label");
    method.name = m.at("method");
    method.budgets = m.at("budgets").get<std::vector<std::string>>();
    for (const auto& [name, value] : m.at("params").items()) {
      method.params.emplace_back(name, value.get<std::string>());
    }
    method.files = m.at("files").get<std::map<std::string, std::string>>();
    method.divides = m.at("divides");
    method.measuring = m.at("measuring").get<std::map<std::string, std::string>>();
    for (int b = 0; b < int(method.budgets.size()); ++b) {
      s.configs.push_back({int(s.methods.size()) - 1, b});
    }
  }
  s.compensators = j.at("compensators").get<std::vector<std::string>>();
  s.compensators_given = j.at("compensators_given");
  s.files = j.at("files").get<std::map<std::string, std::string>>();
  s.tables = j.at("tables").get<std::map<std::string, std::string>>();
  s.metrics = j.at("metrics").get<std::vector<std::string>>();
  s.statistics = j.at("statistics").get<std::vector<std::string>>();
  s.checkpoints = j.at("checkpoints");
  s.seed = j.at("seed");
  s.detail = j.at("detail").get<std::vector<std::string>>();
  s.output_steps = j.at("output_steps").get<std::vector<int>>();
  return s;
}

}  // namespace kvreplay
