#include "analysis/explain.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "analysis/attribution.hpp"
#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "sim/load.hpp"
#include "sim/measure.hpp"
#include "sim/plugins.hpp"
#include "traces/hash.hpp"
#include "traces/hdf5.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;

constexpr int kOutputSteps = 16;  // with vectors of output
constexpr const char* kMetrics =
    "evicted_mass,error,error_output,cos_retained_evicted,norm_ratio_evicted,error_parallel,error_orthogonal,"
    "logit_variance,logit_spread,error_corrected,cos_estimate,log_mass_ratio,error_exact_mass,error_exact_direction,"
    "resident,attended,bytes,retention";
constexpr const char* kTokensHeader =
    "trace,layer,kv_head,q_head,method,label,budget,token,id,text,n,evicted_at,age,damage,regret,missed,first_missed,"
    "lag,worst_step,worst_damage\n";

// run.json of the folder, as far as a replay needs it.
struct Recorded {
  struct Trace {
    std::string path, stem, model, content_hash;
    Pos n_tokens = 0, prompt_len = 0;
    std::vector<int> layers;
    std::size_t n_skipped = 0;  // layers that could not be replayed
  };
  struct RecordedMethod {
    std::string label, name;
    std::map<std::string, std::string> tables;  // path, hash
    std::vector<std::string> budgets;           // of this method
  };
  std::vector<Trace> traces;
  std::vector<RecordedMethod> methods;
  std::vector<std::string> budgets, compensators;
  std::map<std::string, std::pair<std::string, std::string>> plugins;  // by a part's name: the file it came from, hash
  std::map<std::string, fs::path> table_files;  // where a table lay that is not called like its file
  std::uint64_t seed = 0;
};

Recorded read_run(const fs::path& folder) {
  const fs::path path = folder / "run.json";
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    throw ConfigError(folder.string() + (fs::exists(folder, error) ? " is a file" : " does not exist") +
                      "; give the folder that `kvreplay run --out` wrote");
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw ConfigError(folder.string() +
                      " is not a results folder: it has no run.json; a run that ended has written one");
  }
  Recorded r;
  try {
    const json j = json::parse(in);
    for (const json& t : j.at("traces")) {
      r.traces.push_back({.path = t.at("path"),
                          .stem = t.at("stem"),
                          .model = t.at("model_name"),
                          .content_hash = t.at("content_hash"),
                          .n_tokens = t.at("n_tokens"),
                          .prompt_len = t.at("prompt_len"),
                          .layers = t.at("layers"),
                          .n_skipped = t.at("layers_skipped").size()});
    }
    r.budgets = j.at("budgets");
    for (const auto& [name, file] : j.value("table_files", std::map<std::string, std::string>())) {
      r.table_files[name] = file;
    }
    for (const json& p : j.value("plugins", json::array())) {
      for (const std::string part : p.at("parts")) {
        r.plugins[part] = {p.at("path"), p.at("sha256")};
      }
    }
    for (const json& m : j.at("methods")) {
      r.methods.push_back({.label = m.at("label"),
                           .name = m.at("method"),
                           .tables = m.at("value_tables"),
                           .budgets = m.value("budgets", r.budgets)});
    }
    r.compensators = j.at("compensators");
    r.seed = j.at("seed");
  } catch (const json::exception& e) {
    throw ConfigError(path.string() + " is not what `kvreplay run` writes: " + e.what());
  }
  if (r.traces.empty() || r.methods.empty()) {
    throw ConfigError(path.string() + " names no trace or no method");
  }
  for (const Recorded::Trace& t : r.traces) {
    if (t.prompt_len < 1 || t.prompt_len >= t.n_tokens) {
      throw ConfigError(fmt::format("{} says that {} has {} tokens, {} of them prompt, which cannot be", path.string(),
                                    t.stem, t.n_tokens, t.prompt_len));
    }
  }
  return r;
}

[[noreturn]] void refuse(const std::string& what, const std::string& asked, const std::vector<std::string>& there,
                         const fs::path& folder) {
  throw ConfigError(fmt::format("{}: '{}' is not in {}, which has {}; the nearest is '{}'", what, asked,
                                folder.string(), fmt::join(there, ", "), nearest(asked, there)));
}

void check_name(const std::string& what, const std::string& asked, const std::vector<std::string>& there,
                const fs::path& folder) {
  if (std::find(there.begin(), there.end(), asked) == there.end()) {
    refuse(what, asked, there, folder);
  }
}

// The run's own text for a method, asked for by that text or by its canonical one.
const Recorded::RecordedMethod& find_method(const Recorded& recorded, const std::string& option,
                                            const std::string& asked, const fs::path& folder) {
  std::vector<std::string> labels;
  for (const auto& m : recorded.methods) {
    if (m.label == asked || m.name == asked) {
      return m;
    }
    labels.push_back(m.label);
  }
  refuse(option, asked, labels, folder);
}

Method parse(const Recorded& recorded, const Recorded::RecordedMethod& m) {
  for (const auto& [part, plugin] : recorded.plugins) {
    if (m.name.find(part) != std::string::npos && find_part(part) == nullptr) {
      throw ConfigError(
          fmt::format("{} was run with the plug-in {}; add --plugin {}", m.label, plugin.first, plugin.first));
    }
  }
  Method method = parse_method(m.label, table_reader(recorded.table_files));
  for (const PartUse* part : method.parts()) {
    const auto plugin = recorded.plugins.find(std::string(part->info->name));
    if (plugin_hash(*part->info) != (plugin == recorded.plugins.end() ? "" : plugin->second.second)) {
      throw ConfigError(fmt::format("{}: '{}' is not the one that the run had{}", m.label, part->info->name,
                                    plugin == recorded.plugins.end() ? "" : ", from " + plugin->second.first));
    }
    for (const Setting& s : part->settings) {
      const auto it = s.table ? m.tables.find(s.table->path) : m.tables.end();
      if (it != m.tables.end() && it->second != s.table->hash) {
        throw ConfigError(s.table->path + " is not the file that " + m.label + " was run with; put that one back");
      }
    }
  }
  return method;
}

int tokens_of(const std::string& budget, const Recorded& recorded, const TraceInfo& trace) {
  return Budget::parse(budget).tokens(recorded.traces[0].prompt_len, slot_bytes(trace), {}, 1);
}

// Where methods differ most: not at the run's largest budget, where little is lost, nor at its smallest.
std::string middle_budget(const std::vector<std::string>& budgets, const Recorded& recorded, const TraceInfo& trace) {
  std::vector<std::pair<int, std::string>> sorted;
  for (const std::string& text : budgets) {
    sorted.emplace_back(tokens_of(text, recorded, trace), text);
  }
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return sorted[(sorted.size() - 1) / 2].second;
}

fs::path find_trace(const Recorded::Trace& t, const ExplainRequest& request) {
  std::error_code ignored;
  const fs::path path = request.traces_in.empty() ? fs::path(t.path) : request.traces_in / fs::path(t.path).filename();
  if (fs::exists(path, ignored)) {
    return path;
  }
  throw TraceError(fmt::format("{}: the trace {} of {} is not there; name the folder that holds it with --traces-in",
                               path.string(), t.stem, request.results.string()));
}

// Name of a folder for what is explained. A long one is cut, and a hash tells it from others: file systems take 255
// bytes, and two of these stand in one name.
std::string slug(const std::string& text) {
  constexpr std::size_t kLongest = 96, kHashed = 12;
  std::string out;
  for (char c : text) {
    const bool plain =
        (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
    out += plain ? c : '-';
  }
  if (out.size() > kLongest) {
    out = out.substr(0, kLongest - kHashed - 1) + "-" + sha256(text).substr(0, kHashed);
  }
  return out;
}

// A piece as UTF-8, whatever bytes the tokenizer made it of.
std::string as_utf8(const std::string& piece) {
  return json::parse(json(piece).dump(-1, ' ', false, json::error_handler_t::replace)).get<std::string>();
}

// attribution.h5 and the rows of tokens.csv.
class AttributionWriter {
 public:
  AttributionWriter(const fs::path& folder, int top) : folder_(folder), top_(top), tokens_(kTokensHeader) {}
  AttributionWriter(AttributionWriter&&) = delete;
  ~AttributionWriter() {
    try {
      if (file_) {
        file_->discard();
      }
    } catch (const std::exception&) {  // nothing more can be done, and nothing has a final name
    }
  }

  void add_trace(const TraceInfo& info, Pos n_tokens) {
    const hdf5::Group group = open().group("tokens").create_group(fmt::format("{:06d}", n_traces_++));
    group.set("trace", info.stem);
    group.write_column("id", std::span<const std::int32_t>(info.token_ids).first(std::size_t(n_tokens)));
    if (!info.pieces.empty()) {
      std::vector<std::string> pieces;
      for (Pos t = 0; t < n_tokens; ++t) {
        pieces.push_back(as_utf8(info.pieces[std::size_t(t)]));
      }
      group.write_column("piece", pieces);
    }
  }

  void add(const CellId& id, const TraceInfo& info, const std::vector<LaneAttribution>& lanes) {
    const hdf5::Group group = open().group("cells").create_group(fmt::format("{:06d}", n_cells_++));
    std::vector<std::int32_t> kv_head, q_head;
    for (const LaneAttribution& l : lanes) {
      kv_head.push_back(l.kv_head);
      q_head.push_back(l.q_head);
      add_rows(id, info, l);
    }
    group.write_column("kv_head", kv_head);
    group.write_column("q_head", q_head);
    write(group, "evicted_at", hdf5::Type::i32, lanes, &LaneAttribution::evicted_at);
    write(group, "damage", hdf5::Type::f64, lanes, &LaneAttribution::damage);
    write(group, "regret", hdf5::Type::f64, lanes, &LaneAttribution::regret);
    write(group, "missed", hdf5::Type::i32, lanes, &LaneAttribution::missed);
    write(group, "first_missed", hdf5::Type::i32, lanes, &LaneAttribution::first_missed);
    write(group, "worst_step", hdf5::Type::i32, lanes, &LaneAttribution::worst_step);
    write(group, "worst_damage", hdf5::Type::f64, lanes, &LaneAttribution::worst_damage);
    write(group, "step_missed", hdf5::Type::i32, lanes, &LaneAttribution::step_missed);
    write(group, "step_missed_mass", hdf5::Type::f64, lanes, &LaneAttribution::step_missed_mass);
    write(group, "culprit", hdf5::Type::i32, lanes, &LaneAttribution::culprit);
    write(group, "culprit_damage", hdf5::Type::f64, lanes, &LaneAttribution::culprit_damage);
  }

  void publish() {
    open().set("format", "kvreplay-attribution");
    open().set("format_version", "1.0");
    open().set("n_culprits", kCulprits);
    file_->publish();
    file_.reset();
    write_whole(folder_ / "tokens.csv", tokens_);
  }

 private:
  // The folder is there once the run has begun.
  const hdf5::Group& open() {
    if (!file_) {
      file_ = hdf5::File::create(folder_ / "attribution.h5");
      file_->root().create_group("tokens");
      file_->root().create_group("cells");
    }
    return file_->root();
  }

  // (n_lanes, numbers of a lane)
  template <class T>
  static void write(const hdf5::Group& group, const char* name, hdf5::Type type,
                    const std::vector<LaneAttribution>& lanes, std::vector<T> LaneAttribution::*member) {
    std::vector<T> all;
    for (const LaneAttribution& l : lanes) {
      all.insert(all.end(), (l.*member).begin(), (l.*member).end());
    }
    const std::uint64_t n = all.size() / lanes.size();
    group.create(name, type, {lanes.size(), n}, {{1, n}, 4, false}).write(hdf5::bytes_of(all));
  }

  // The lane's tokens of largest damage, one row each, and one row for all others together.
  void add_rows(const CellId& id, const TraceInfo& info, const LaneAttribution& l) {
    std::vector<Pos> order;
    for (Pos t = 0; t < Pos(l.damage.size()); ++t) {
      if (l.regret[std::size_t(t)] > 0) {
        order.push_back(t);
      }
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](Pos a, Pos b) { return l.damage[std::size_t(a)] > l.damage[std::size_t(b)]; });
    const std::string head = fmt::format("{},{},{},{},{},{},{}", csv_field(id.trace), id.layer, l.kv_head,
                                         l.q_head < 0 ? "" : fmt::to_string(l.q_head), csv_field(id.method),
                                         csv_field(id.label), csv_field(id.budget));
    const std::size_t n_listed = std::min(order.size(), std::size_t(top_));
    for (std::size_t i = 0; i < n_listed; ++i) {
      const auto t = std::size_t(order[i]);
      const int n_steps = int(l.step_missed.size()), at = l.evicted_at[t], first = l.first_missed[t];
      const bool left = at < n_steps;  // else a reader left it out while it was there
      const auto step = [](int s) { return s < 0 ? std::string() : fmt::to_string(s); };
      tokens_ += fmt::format("{},{},{},{},1,{},{},{:.9g},{:.9g},{},{},{},{},{:.9g}\n", head, t, info.token_ids[t],
                             info.pieces.empty() ? "" : csv_field(as_utf8(info.pieces[t])), left ? step(at) : "",
                             left ? fmt::to_string(id.prompt_len + at - int(t)) : "", l.damage[t], l.regret[t],
                             l.missed[t], step(first), left && first >= 0 ? fmt::to_string(first - at) : "",
                             step(l.worst_step[t]), l.worst_damage[t]);
    }
    if (n_listed < order.size()) {
      double damage = 0, regret = 0;
      std::int64_t missed = 0;
      for (std::size_t i = n_listed; i < order.size(); ++i) {
        const auto t = std::size_t(order[i]);
        damage += l.damage[t];
        regret += l.regret[t];
        missed += l.missed[t];
      }
      tokens_ +=
          fmt::format("{},,,,{},,,{:.9g},{:.9g},{},,,,\n", head, order.size() - n_listed, damage, regret, missed);
    }
  }

  fs::path folder_;
  int top_, n_traces_ = 0, n_cells_ = 0;
  std::optional<hdf5::File> file_;
  std::string tokens_;  // rows of tokens.csv so far
};

struct OpenTrace {
  TraceReader reader;
  Pos n_tokens = 0;  // of the run
};

// The folder that files are made in before they replace those of an earlier explanation.
struct Draft {
  explicit Draft(const fs::path& folder) : path(folder.string() + ".part") { forget(); }  // one that was killed
  Draft(const Draft&) = delete;
  ~Draft() { forget(); }

  void publish(const fs::path& folder) const {
    fs::create_directories(folder);
    // explain.json makes it an explanation: it goes first and comes last. Nothing else may describe other results.
    fs::remove(folder / "explain.json");
    fs::remove(folder / "explain.html");
    for (const char* name : {"results.h5", "summary.csv", "run.json", "attribution.h5", "tokens.csv", "explain.json"}) {
      fs::rename(path / name, folder / name);
    }
  }

  const fs::path path;

 private:
  void forget() const {
    std::error_code ignored;
    fs::remove_all(path, ignored);
    if (fs::is_directory(fs::symlink_status(path.parent_path(), ignored))) {
      fs::remove(path.parent_path(), ignored);  // where nothing else is in it
    }
  }
};

class Explain {
 public:
  explicit Explain(const ExplainRequest& request) : request_(request), recorded_(read_run(request.results)) {}

  // Everything is made in a draft beside its place: an explanation that is there stays whole until another one is.
  ExplainOutcome operator()() {
    choose_traces();
    choose_methods();
    const fs::path folder = this->folder();
    std::error_code error;
    if (fs::exists(folder, error) && !fs::is_directory(folder, error)) {
      throw ConfigError(folder.string() + " is not a folder; move it away");
    }
    const Draft draft(folder);
    run_.out = draft.path;
    AttributionWriter writer(run_.out, request_.top);
    run_.cell = [&](const CellId& id, const CellResult& cell, const Layer& layer) {
      const OpenTrace& t = open_.at(id.trace);
      if (seen_.insert(id.trace).second) {
        writer.add_trace(t.reader.info(), t.n_tokens);
      }
      writer.add(id, t.reader.info(), attribute(layer, cell, request_.threads));
    };
    ExplainOutcome outcome{.folder = folder, .run = run(run_)};
    if (outcome.run.failed.empty() && !outcome.run.interrupted) {
      writer.publish();
      write_whole(run_.out / "explain.json", explain_json());
      draft.publish(folder);
    }
    return outcome;
  }

 private:
  void choose_traces() {
    std::vector<std::string> stems;
    bool one_model = true;
    for (const Recorded::Trace& t : recorded_.traces) {
      stems.push_back(t.stem);
      one_model &= t.model == recorded_.traces[0].model;
    }
    for (const std::string& name : request_.traces) {
      check_name("--trace", name, stems, request_.results);
    }
    std::vector<Recorded::Trace> chosen;
    for (const Recorded::Trace& t : recorded_.traces) {
      const bool asked = std::find(request_.traces.begin(), request_.traces.end(), t.stem) != request_.traces.end();
      if (asked || (request_.traces.empty() && (one_model || chosen.empty()))) {
        chosen.push_back(t);
      }
    }
    recorded_.traces = chosen;
    for (const Recorded::Trace& t : recorded_.traces) {
      const fs::path path = find_trace(t, request_);
      OpenTrace open{.reader = TraceReader(path), .n_tokens = t.n_tokens};
      const TraceInfo& info = open.reader.info();
      if (info.content_hash != t.content_hash || info.n_tokens < t.n_tokens) {
        throw TraceError(fmt::format(
            "{}: this is not the trace that {} was made from: its content is {}, the run recorded {}; name the folder "
            "of that one with --traces-in",
            path.string(), request_.results.string(), info.content_hash.empty() ? "unnamed" : info.content_hash,
            t.content_hash.empty() ? "none" : t.content_hash));
      }
      if (t.n_tokens < info.n_tokens) {
        run_.max_steps = t.n_tokens - t.prompt_len;
      }
      if (t.prompt_len != info.prompt_len) {
        run_.prompt_len = t.prompt_len;
      }
      run_.traces.push_back(path);
      open_.emplace(info.stem, std::move(open));
      check_layers(t);
    }
    choose_layers();
  }

  // Those asked for, else those of the run: all that a trace has, unless the run was made with --layers.
  void choose_layers() {
    run_.layers = request_.layers;
    bool all = run_.layers.empty();
    for (const Recorded::Trace& t : recorded_.traces) {
      all &= t.layers.size() + t.n_skipped == open_.at(t.stem).reader.info().layers.size();
    }
    for (std::size_t i = 0; run_.layers.empty() && !all && i < recorded_.traces.size(); ++i) {
      run_.layers = recorded_.traces[i].layers;
    }
  }

  void check_layers(const Recorded::Trace& t) const {
    for (int layer : request_.layers) {
      if (std::find(t.layers.begin(), t.layers.end(), layer) == t.layers.end()) {
        throw ConfigError(fmt::format("--layers: {} has no layer {} of {}; it has {}", request_.results.string(), layer,
                                      t.stem, fmt::join(t.layers, ", ")));
      }
    }
  }

  void choose_methods() {
    std::vector<std::pair<std::string, std::string>> asked{{"--method", request_.method}};
    if (!request_.against.empty()) {
      asked.emplace_back("--against", request_.against);
    }
    std::vector<Method> methods;
    std::vector<std::string> budgets = recorded_.budgets;  // that all of the methods ran at
    for (const auto& [option, text] : asked) {
      const Recorded::RecordedMethod& m = find_method(recorded_, option, text, request_.results);
      if (!run_.methods.empty() && run_.methods[0] == m.label) {
        throw ConfigError("--against: '" + text + "' is the method itself; name another one");
      }
      methods.push_back(parse(recorded_, m));
      run_.methods.push_back(m.label);
      if (methods.back().budgeted()) {
        std::erase_if(budgets, [&m](const std::string& b) {
          return std::find(m.budgets.begin(), m.budgets.end(), b) == m.budgets.end();
        });
      }
    }
    if (budgets.empty() && !recorded_.budgets.empty()) {
      throw ConfigError(
          fmt::format("{} has no budget that {} ran at", request_.results.string(), fmt::join(run_.methods, " and ")));
    }
    if (!request_.budget.empty() && budgets.empty()) {
      throw ConfigError("--budget: " + request_.results.string() + " has no budgets; leave it away");
    }
    if (!request_.budget.empty()) {
      check_name("--budget", request_.budget, budgets, request_.results);
    }
    run_.tables = recorded_.table_files;
    const TraceInfo& trace = open_.at(recorded_.traces[0].stem).reader.info();
    for (const Method& method : methods) {
      if (method.budgeted() && run_.budgets.empty() && !budgets.empty()) {  // else run() says so
        run_.budgets = {request_.budget.empty() ? middle_budget(budgets, recorded_, trace) : request_.budget};
      }
      check_allocator(method);
    }
    run_.compensators = recorded_.compensators.empty() ? std::vector<std::string>{"mean", "moments", "gaussian"}
                                                       : recorded_.compensators;
    run_.metrics = MetricSet::parse(kMetrics);
    run_.detail = {.steps = true, .retained = true, .outputs = true};
    run_.output_steps = output_steps();
    run_.threads = request_.threads;
    run_.seed = recorded_.seed;
    run_.memory = request_.memory;
    run_.force = true;
    run_.argv = request_.argv;
    run_.stop = request_.stop;
    run_.progress = request_.progress;
  }

  // Steps that all traces have, evenly spaced, for the view of principal planes.
  std::vector<int> output_steps() const {
    int n_steps = std::numeric_limits<int>::max();
    for (const Recorded::Trace& t : recorded_.traces) {
      n_steps = std::min<int>(n_steps, t.n_tokens - t.prompt_len);
    }
    return checkpoint_steps(n_steps, kOutputSteps);
  }

  // An allocator over layers gives a layer what the others do not need: with fewer layers it would give other budgets.
  void check_allocator(const Method& method) const {
    const auto& traces = recorded_.traces;
    if (!request_.layers.empty() && divides_over_layers(method) &&
        std::any_of(traces.begin(), traces.end(), [](const Recorded::Trace& t) { return t.layers.size() > 1; })) {
      throw ConfigError("--layers: " + method.label +
                        " spreads its budget over all layers of the run, and may have another one on fewer; leave "
                        "--layers away");
    }
  }

  // Where the explanation goes; run() makes it.
  fs::path folder() const {
    std::string name = slug(run_.methods[0]);
    if (run_.methods.size() > 1) {
      name += "_vs_" + slug(run_.methods[1]);
    }
    if (!run_.budgets.empty()) {
      name += "_at_" + slug(run_.budgets[0]);
    }
    return request_.results / "explain" / name;
  }

  std::string explain_json() const {
    json j;
    j["results"] = request_.results.string();
    j["method"] = run_.methods[0];
    j["against"] = run_.methods.size() > 1 ? json(run_.methods[1]) : json();
    j["budget"] = run_.budgets.empty() ? "" : run_.budgets[0];
    j["top"] = request_.top;
    j["n_culprits"] = kCulprits;
    return j.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
  }

  const ExplainRequest& request_;
  Recorded recorded_;
  RunRequest run_;
  std::map<std::string, OpenTrace> open_;  // by stem
  std::set<std::string> seen_;
};

}  // namespace

ExplainOutcome explain(const ExplainRequest& request) { return Explain(request)(); }

}  // namespace kvreplay
