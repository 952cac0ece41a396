#include "sim/sweep/sweep.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <new>
#include <nlohmann/json.hpp>

#include "policies/errors.hpp"
#include "policies/method.hpp"
#include "sim/measure_layers.hpp"
#include "sim/results.hpp"
#include "sim/run.hpp"
#include "sim/sweep/rows.hpp"
#include "sim/sweep/tables.hpp"
#include "sim/version.hpp"
#include "sim/whole_file.hpp"
#include "traces/errors.hpp"
#include "traces/hash.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// sweep.json as it is; not an object where it is damaged.
Json json_of(const fs::path& folder) {
  const fs::path file = folder / "sweep.json";
  if (std::error_code error; !fs::is_regular_file(file, error)) {
    throw ConfigError(folder.string() + " is no folder of a sweep: it has no sweep.json");
  }
  return Json::parse(read_whole(file), nullptr, false);
}

void refuse_other(const Json& j, const fs::path& folder) {
  if (!j.is_object()) {
    return;
  }
  if (!j.contains("format") || j["format"] != "kvreplay-sweep") {
    throw ConfigError(folder.string() + " is no folder of a sweep: its sweep.json is of something else");
  }
  if (!j.contains("schema") || j["schema"] != kSweepSchema) {
    throw ConfigError(fmt::format("{} has schema {}, and this version of kvreplay has {}; name another folder",
                                  (folder / "sweep.json").string(), j.contains("schema") ? j["schema"].dump() : "none",
                                  kSweepSchema));
  }
}

class Sweeping {
 public:
  Sweeping(const SweepRequest& request, Team& team) : request_(request), team_(team) {}

  SweepOutcome operator()() {
    sweep_ = Sweep::from_json(Json::parse(team_.agree(team_.leads() ? resolve(request_).json().dump() : "")));
    out_.failed_traces = sweep_.failed_traces;
    out_.trace_failed = !sweep_.failed_traces.empty();
    if (team_.leads()) {
      prepare_folder();
    }
    // Once, and again where a finished item turns out to be damaged. It was set aside, or the next round would find it.
    for (bool again = true; again;) {
      const std::string units = team_.agree(team_.leads() ? find_units() : "");
      measure(team_.agree(team_.leads() ? find_units_to_measure(units) : ""));
      do_units(units);
      out_.interrupted = team_.any(stopped());
      out_.trace_failed = team_.any(out_.trace_failed);
      again = team_.agree(team_.leads() && !finish() ? "again" : "") == "again";
    }
    return std::move(out_);
  }

 private:
  void prepare_folder() {
    std::error_code error;
    if (fs::exists(request_.out / "sweep.json", error)) {
      refuse_other(json_of(request_.out), request_.out);
    } else if (fs::exists(request_.out, error) &&
               (!fs::is_directory(request_.out, error) || !fs::is_empty(request_.out, error)) &&
               !fs::is_directory(items(), error)) {
      throw ConfigError("--out " + request_.out.string() + " holds something else than a sweep; name another folder");
    }
    fs::create_directories(items(), error);
    if (error || ::access(items().c_str(), W_OK) != 0) {
      throw ConfigError("--out " + request_.out.string() + " cannot be written to" +
                        (error ? ": " + error.message() : ""));
    }
    for (const fs::path& folder : {request_.out, items(), request_.out / "runs"}) {
      remove_left_behind(folder);
    }
    write_sweep(request_.out, sweep_, request_.argv);
  }

  fs::path items() const { return request_.out / "items"; }

  std::string find_units() {
    Store store(items());
    const Units left = units_left(sweep_, store, request_.shard, request_.memory);
    if (first_) {
      out_.n_done_before = left.n_done;
      first_ = false;
    }
    name_damaged(store);
    return text_of(left.units);
  }

  std::string find_units_to_measure(const std::string& units) {
    Store store(items());
    const std::string left = text_of(units_to_measure(sweep_, store, units_of(units)));
    name_damaged(store);
    return left;
  }

  void name_damaged(const Store& store) {
    for (const std::string& sentence : store.damaged()) {
      if (std::find(out_.damaged.begin(), out_.damaged.end(), sentence) == out_.damaged.end()) {
        out_.damaged.push_back(sentence);
      }
    }
  }

  // What allocators need of every layer. What cannot be measured is left to the cells that need it: they will say why.
  void measure(const std::string& text) {
    const std::vector<Unit> units = units_of(text);
    if (units.empty()) {
      return;
    }
    const Store store(items());
    team_.begin(units.size());
    for (std::optional<std::size_t> i; !stopped() && (i = team_.next());) {
      const Unit& unit = units[*i];
      const SweepTrace& trace = sweep_.traces[std::size_t(unit.trace)];
      if (request_.progress) {
        request_.progress(double(*i), double(units.size()),
                          fmt::format("{} layer {}, measured for allocators", trace.stem, unit.layer));
      }
      try {
        measure(unit, trace, store);
      } catch (const TraceError&) {
      } catch (const ConfigError&) {
      }
    }
    team_.wait();
  }

  void measure(const Unit& unit, const SweepTrace& trace, const Store& store) const {
    const auto measuring = sweep_.measuring();
    ItemHead head{.kind = ItemKind::measured, .id = sweep_.measured_group(trace, unit.layer)};
    std::vector<PartUse> parts;
    for (const int a : unit.configs) {
      const auto& [text_of_part, with_files] = *std::next(measuring.begin(), a);
      parts.push_back(
          parse_part(text_of_part, Role::allocate, table_reader({sweep_.tables.begin(), sweep_.tables.end()})));
      head.keys.push_back(Sweep::measured_key(head.id, with_files));
    }
    std::vector<const PartUse*> uses;
    for (const PartUse& part : parts) {
      uses.push_back(&part);
    }
    refuse_changed(trace);
    const auto numbers = measure_layer(TraceReader(trace.path), unit.layer, trace.prompt_len, uses, request_.threads);
    refuse_changed(trace);
    store.add(head, Json(numbers).dump(), unique_name(head.id));
  }

  // What an allocator measured in a layer; nothing where that is not known.
  std::vector<double> measured(const SweepTrace& trace, int layer, const std::string& allocator) const {
    const auto measuring = sweep_.measuring();
    const auto it = measuring.find(allocator);
    if (it == measuring.end()) {
      return {};
    }
    const std::string group = sweep_.measured_group(trace, layer), wanted = Sweep::measured_key(group, it->second);
    for (const ItemHead& head : store_->heads(group)) {
      const auto at = std::find(head.keys.begin(), head.keys.end(), wanted) - head.keys.begin();
      std::string body;
      if (at == std::ssize(head.keys) || !store_->body(head, body)) {
        continue;
      }
      const Json numbers = Json::parse(body, nullptr, false);
      std::vector<double> row;
      for (const Json& x : numbers.is_array() && std::ssize(numbers) > at ? numbers[std::size_t(at)] : Json()) {
        if (!x.is_number()) {
          return {};
        }
        row.push_back(x.get<double>());
      }
      return row;
    }
    return {};
  }

  RunRequest request_of(const SweepTrace& trace, int layer, const std::vector<int>& configs) const {
    RunRequest r = kvreplay::request_of(sweep_, trace, layer, configs);
    r.threads = request_.threads;
    r.memory = request_.memory;
    r.stop = request_.stop;
    r.argv = request_.argv;
    r.measured = [this, &trace](const fs::path&, int of_layer, const std::string& allocator) {
      return measured(trace, of_layer, allocator);
    };
    return r;
  }

  void do_units(const std::string& text) {
    const std::vector<Unit> units = units_of(text);
    total_ = done_ = 0;
    for (const Unit& u : units) {
      total_ += steps(u);
    }
    Store store(items());
    store_ = &store;
    team_.begin(units.size());
    while (!stopped()) {
      const std::optional<std::size_t> i = team_.next();
      if (!i) {
        break;
      }
      // Units that others did in the meantime count as done, since they are handed out in order.
      done_ = 0;
      for (std::size_t u = 0; u < *i; ++u) {
        done_ += steps(units[u]);
      }
      do_unit(units[*i]);
    }
    store_ = nullptr;
  }

  static std::string name_of_id(const std::string& id) { return id.substr(0, kIdLength); }

  bool stopped() const { return request_.stop != nullptr && *request_.stop; }

  double steps(const Unit& u) const { return double(u.configs.size()) * sweep_.traces[std::size_t(u.trace)].n_steps(); }

  // The tables, where this process is to write them. False where a finished item turned out to be damaged.
  bool finish() {
    Store store(items());
    bool sound = true;
    if (!out_.interrupted && request_.shard.n == 1) {
      sound = write_tables(sweep_, store, request_.out);
      out_.tables = sound;
    }
    const SweepState state = state_of(sweep_, store);
    name_damaged(store);
    if (request_.shard.n == 1) {
      out_.cells = state.counts;
      out_.failures = state.failures;  // of all members of the team
    } else {
      out_.cells = of_shard(store);
    }
    write_sweep(request_.out, sweep_, request_.argv, &state);
    return sound;
  }

  Counts of_shard(Store& store) const {
    Counts counts;
    for (const SweepTrace& trace : sweep_.traces) {
      for (const int layer : trace.layers) {
        if (request_.shard.has(trace, layer)) {
          const LayerState state = state_of(sweep_, store, trace, layer);
          counts.done += state.count(CellState::done);
          counts.failed += state.count(CellState::failed);
          counts.left += state.count(CellState::left);
        }
      }
    }
    return counts;
  }

  // ---- one unit ----

  using Failed = std::map<int, std::string>;  // config: sentence

  void do_unit(const Unit& unit) {
    const SweepTrace& trace = sweep_.traces[std::size_t(unit.trace)];
    Failed failed;
    ItemRows rows(sweep_);
    std::vector<int> finished;  // configs, as they came
    const std::string name = unique_name(sweep_.group(trace, unit.layer));
    const fs::path details = detailed() ? request_.out / "runs" / name : fs::path();  // what run() writes
    try {
      refuse_changed(trace);
      std::vector<int> sound;
      check(trace, unit.layer, unit.configs, sound, failed);
      if (!sound.empty()) {
        replay(unit, trace, sound, rows, finished, failed, part_of(details));
      }
      refuse_changed(trace);  // then what was measured is of another trace
    } catch (const TraceError& e) {
      out_.trace_failed = true;
      fail_all(unit, e.what(), finished, failed);
    } catch (const ConfigError& e) {
      fail_all(unit, e.what(), finished, failed);
    } catch (const std::bad_alloc&) {
      fail_all(unit, "out of memory; lower --memory", finished, failed);
    }
    if (!details.empty() && !finished.empty()) {
      fs::rename(part_of(details), details);
    } else if (!details.empty()) {
      std::error_code ignored;
      fs::remove_all(part_of(details), ignored);
    }
    keep(unit, trace, rows, finished, failed, name);
  }

  bool detailed() const { return sweep_.has("steps") || sweep_.has("retained") || !sweep_.output_steps.empty(); }
  static fs::path part_of(const fs::path& details) {
    return details.empty() ? fs::path() : fs::path(details.string() + ".part");
  }

  static void fail_all(const Unit& unit, const std::string& why, std::vector<int>& finished, Failed& failed) {
    finished.clear();
    for (const int c : unit.configs) {
      failed.emplace(c, why);
    }
  }

  static void refuse_changed(const SweepTrace& trace) {
    if (stamp_of(trace.path) != trace.stamp) {
      throw TraceError(trace.path + " has changed since the sweep began; start the sweep again");
    }
  }

  // Parts the cells that can run on this layer from those that cannot, by halves: rarely is there one.
  void check(const SweepTrace& trace, int layer, const std::vector<int>& configs, std::vector<int>& sound,
             Failed& failed) const {
    try {
      kvreplay::check(request_of(trace, layer, configs));
      sound.insert(sound.end(), configs.begin(), configs.end());
    } catch (const ConfigError& e) {
      if (configs.size() == 1) {
        failed.emplace(configs.front(), e.what());
        return;
      }
      const auto middle = configs.begin() + std::ptrdiff_t(configs.size() / 2);
      check(trace, layer, {configs.begin(), middle}, sound, failed);
      check(trace, layer, {middle, configs.end()}, sound, failed);
    }
  }

  void replay(const Unit& unit, const SweepTrace& trace, const std::vector<int>& configs, ItemRows& rows,
              std::vector<int>& finished, Failed& failed, const fs::path& out) {
    RunRequest r = request_of(trace, unit.layer, configs);
    std::map<std::pair<std::string, std::string>, int> index;  // label and budget: config
    for (const int c : configs) {
      index.emplace(std::pair(sweep_.method(c).label, sweep_.budget(c)), c);
    }
    r.out = out;
    r.cell = [&](const CellId& id, const CellResult& result, const Layer&) {
      rows.add(finished.size(), id, result);
      finished.push_back(index.at({id.label, id.budget}));
    };
    r.cell_failed = [&](const CellId& id, const std::string& why) {
      failed.emplace(index.at({id.label, id.budget}), why);
    };
    r.progress = [&](double done, double, const std::string& what) {
      team_.attend();
      if (request_.progress) {
        request_.progress(done_ + done, total_, what);
      }
    };
    if (run(r).trace_failed) {
      out_.trace_failed = true;
    }
  }

  // Onto disk, finished cells first; failures of before that this unit tried again are no more.
  void keep(const Unit& unit, const SweepTrace& trace, const ItemRows& rows, const std::vector<int>& finished,
            const Failed& failed, const std::string& name) {
    const std::string group = sweep_.group(trace, unit.layer);
    std::vector<std::string> tried;
    for (const int c : finished) {
      tried.push_back(sweep_.key(group, trace, c));
    }
    if (!finished.empty()) {
      ItemHead head{.kind = ItemKind::cells, .id = group, .keys = tried};
      std::string body;
      rows.write(head, body);
      store_->add(head, body, name);
    }
    std::string kept;
    if (!failed.empty()) {
      ItemHead head{.kind = ItemKind::failed, .id = group};
      Json sentences = Json::array();
      for (const auto& [c, sentence] : failed) {
        head.keys.push_back(sweep_.key(group, trace, c));
        sentences.push_back(sentence);
        report(trace, unit.layer, c, sentence);
      }
      tried.insert(tried.end(), head.keys.begin(), head.keys.end());
      std::string all;
      for (const std::string& key : head.keys) {
        all += key;
      }
      kept = name_of_id(group) + "-" + name_of_id(sha256(all));  // the same failures replace each other
      store_->add(head, sentences.dump(-1, ' ', false, Json::error_handler_t::replace), kept);
    }
    std::sort(tried.begin(), tried.end());
    for (const ItemHead& old : store_->heads(group)) {
      const bool again = std::all_of(old.keys.begin(), old.keys.end(), [&](const std::string& key) {
        return std::binary_search(tried.begin(), tried.end(), key);
      });
      if (old.kind == ItemKind::failed && again && old.file.stem() != kept) {
        store_->remove(old);
      }
    }
  }

  void report(const SweepTrace& trace, int layer, int config, const std::string& sentence) {
    const auto it = std::find_if(out_.failures.begin(), out_.failures.end(),
                                 [&](const Failure& f) { return f.sentence == sentence; });
    if (it != out_.failures.end()) {
      ++it->n_cells;
    } else {
      out_.failures.push_back({sentence, name_of(sweep_, trace, layer, config), 1});
    }
  }

  const SweepRequest& request_;
  Team& team_;
  Sweep sweep_;
  SweepOutcome out_;
  Store* store_ = nullptr;       // as it was before the units
  double done_ = 0, total_ = 0;  // decode steps of one method
  bool first_ = true;
};

}  // namespace

SweepOutcome sweep(const SweepRequest& request, Team& team) { return Sweeping(request, team)(); }

Sweep resolve(const SweepRequest& request) {
  Plan plan = read_plan(request.plan);
  plan.heads = plan.heads || request.heads;
  return resolve(plan);
}

Sweep read_sweep(const fs::path& folder) {
  const Json j = json_of(folder);
  refuse_other(j, folder);
  try {
    return Sweep::from_json(j.at("plan"));
  } catch (const nlohmann::json::exception&) {
    throw ConfigError((folder / "sweep.json").string() + " is damaged; start the sweep again, which writes it anew");
  }
}

void write_sweep(const fs::path& folder, const Sweep& sweep, const std::vector<std::string>& argv,
                 const SweepState* state) {
  Json j;
  j["format"] = "kvreplay-sweep";
  j["schema"] = kSweepSchema;
  j["tool"] = "kvreplay";
  j["version"] = kVersion;
  j["git"] = kGitHash;
  j["build_flags"] = kBuildFlags;
  j["argv"] = argv;
  if (state != nullptr) {  // as the last to finish saw it
    j["cells"] = {{"done", state->counts.done}, {"failed", state->counts.failed}, {"left", state->counts.left}};
    j["failed"] = Json::array();
    for (const Failure& f : state->failures) {
      j["failed"].push_back({{"cells", f.n_cells}, {"first", f.first}, {"why", f.sentence}});
    }
  }
  j["plan"] = sweep.json();
  write_whole(folder / "sweep.json", j.dump(1, ' ', false, Json::error_handler_t::replace) + "\n",
              folder / (unique_name("sweep.json") + ".part"));
}

}  // namespace kvreplay
