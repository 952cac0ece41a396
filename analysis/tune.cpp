#include "analysis/tune.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "analysis/fidelity.hpp"
#include "analysis/grain.hpp"
#include "analysis/objective.hpp"
#include "analysis/search.hpp"
#include "policies/errors.hpp"
#include "policies/help.hpp"
#include "policies/values.hpp"
#include "sim/load.hpp"
#include "sim/plugins.hpp"
#include "sim/run.hpp"
#include "sim/version.hpp"
#include "traces/reader.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// What one candidate measured at one budget: by layer, a row per KV head and one of the whole layer.
using ByLayer = std::map<int, std::vector<Sums>>;

// A method that competes: as it is (the first), or with other values.
struct Candidate {
  std::string text;
  std::vector<std::string> values;  // per axis
  int round = 0;                    // in which it was thought of; 0: the method as it is
};

// Where one choice is made: at one budget, or at equal bytes between several.
struct Case {
  std::vector<std::string> budgets;
  std::string name;  // in file names: the budget without what a path or a method's text cannot hold
};

constexpr int kAll = -1;

std::string file_name(const std::string& budget) {
  std::string name;
  for (const char c : budget) {
    name += c == '%' ? "pct" : std::string(1, c);
  }
  return name;
}

std::vector<std::string> stems(const std::vector<fs::path>& paths) {
  std::vector<std::string> all;
  for (const fs::path& p : paths) {
    all.push_back(TraceReader(p).info().stem);
  }
  return all;
}

class Tuning {
 public:
  explicit Tuning(const TuneRequest& request)
      : request_(request), objective_(Objective::parse(request.objective)), part_(part_folder(request.out)) {}

  TuneOutcome operator()() {
    parse();
    open_traces();
    refuse_used_folder(request_.out, request_.force);
    try {
      make_part();
      if (look() && choose_and_check()) {
        publish();
        return outcome_;
      }
    } catch (...) {
      remove_part();
      throw;
    }
    remove_part();
    return outcome_;
  }

 private:
  // ---- what is asked for ----

  void parse() {
    if (request_.traces.empty()) {
      throw ConfigError("no trace is given; add for example --traces a.h5");
    }
    if (request_.holdout_share > 0 && !request_.holdout.empty()) {
      throw ConfigError("--holdout and --holdout-steps exclude each other: hold out other traces, or the last steps");
    }
    base_ = parse_method(request_.method, read_value_table);
    const std::vector<MethodParam> params = params_of(request_.method, read_value_table);
    if (request_.params.empty()) {
      std::vector<std::string> names;
      for (const MethodParam& p : params) {
        names.push_back(p.name);
      }
      throw ConfigError(fmt::format("no --param is given; {} has {}", base_.label, fmt::join(names, ", ")));
    }
    for (const std::string& text : request_.params) {
      axes_.push_back(Axis::parse(text, base_.label, params, read_value_table));
      for (std::size_t i = 0; i + 1 < axes_.size(); ++i) {
        if (axes_[i].param.name == axes_.back().param.name) {
          throw ConfigError("--param " + text + ": " + axes_.back().param.name + " is given twice");
        }
      }
    }
    budgets_ = request_.budgets;
    if (!base_.budgeted()) {
      budgets_ = {""};
    }
    if (budgets_.empty()) {
      throw ConfigError(base_.label + " needs a budget; add for example --budget 128");
    }
    if (objective_.bytes > 0) {
      if (budgets_.size() < 2) {
        throw ConfigError("--objective " + objective_.text +
                          ": equal bytes are found between budgets, so give at least two with --budget");
      }
      cases_.push_back({budgets_, "bytes"});
    } else {
      for (const std::string& b : budgets_) {
        cases_.push_back({{b}, b.empty() ? "all" : file_name(b)});
      }
    }
    Candidate asis{base_.label, {}, 0};
    for (const Axis& a : axes_) {
      asis.values.push_back(a.param.table ? "@" : format_value(*a.param.param, a.param.value));
    }
    candidates_.push_back(std::move(asis));
  }

  // The traces' common ground: their model, layers that all have and that can be replayed, decode steps.
  void open_traces() {
    std::set<std::string> hashes;
    int least = 0;  // decode steps of the shortest trace that is tuned on
    for (const std::vector<fs::path>* paths : {&request_.traces, &request_.holdout}) {
      for (const fs::path& path : *paths) {
        const TraceReader reader(path);
        const TraceInfo& i = reader.info();
        const bool first = model_.empty();
        if (first) {
          model_ = i.model_name;
          n_kv_heads_ = i.n_kv_heads;
          first_trace_ = path.string();
        }
        if (i.model_name != model_ || i.n_kv_heads != n_kv_heads_) {
          throw ConfigError(fmt::format(
              "{} is of {} with {} KV heads and {} of {} with {}: a method is tuned for one model at a time",
              first_trace_, model_, n_kv_heads_, path.string(), i.model_name, i.n_kv_heads));
        }
        const Pos prompt_len = request_.prompt_len > 0 ? request_.prompt_len : i.prompt_len;
        const Pos n_tokens =
            request_.max_steps > 0 ? std::min(i.n_tokens, prompt_len + request_.max_steps) : i.n_tokens;
        std::vector<int> layers;
        for (const int layer : i.layers) {
          const bool asked = request_.layers.empty() ||
                             std::find(request_.layers.begin(), request_.layers.end(), layer) != request_.layers.end();
          if (asked && short_window(i, layer, n_tokens) == 0) {
            layers.push_back(layer);
          }
        }
        if (paths == &request_.holdout) {
          if (hashes.count(i.content_hash) > 0) {
            throw ConfigError("--holdout " + path.string() +
                              " is one of the traces that are tuned on; hold out another one, or leave --holdout out");
          }
          holdout_layers_.insert(layers.begin(), layers.end());
          continue;
        }
        if (!i.content_hash.empty()) {
          hashes.insert(i.content_hash);
        }
        least = least == 0 ? n_tokens - prompt_len : std::min(least, n_tokens - prompt_len);
        n_steps_ = std::max(n_steps_, n_tokens - prompt_len);
        prompt_len_ = std::max(prompt_len_, prompt_len);
        std::vector<int> common;
        std::set_intersection(common_layers_.begin(), common_layers_.end(), layers.begin(), layers.end(),
                              std::back_inserter(common));
        common_layers_ = train_layers_.empty() ? layers : common;
        train_layers_.insert(layers.begin(), layers.end());
      }
    }
    if (request_.holdout_share > 0) {
      tuned_steps_ = int((1 - request_.holdout_share) * least) / kBlockSteps * kBlockSteps;
      if (tuned_steps_ < kBlockSteps || least - tuned_steps_ < kBlockSteps) {
        throw ConfigError(fmt::format(
            "--holdout-steps {}: of {} decode steps that leaves less than one block of {} to tune on or to hold out",
            request_.holdout_share, least, kBlockSteps));
      }
      n_steps_ = tuned_steps_;
    }
    if (!request_.holdout.empty()) {
      layers_to_hold_out();  // ConfigError where there are none, before anything runs
    }
  }

  void make_part() const {
    std::error_code error;
    fs::remove_all(part_, error);  // of a run that was killed
    fs::create_directories(part_, error);
    if (error || ::access(part_.c_str(), W_OK) != 0) {
      throw ConfigError("--out " + request_.out.string() +
                        " cannot be made: " + (error ? error.message() : std::string("no permission to write there")));
    }
  }

  void remove_part() const {
    std::error_code ignored;
    fs::remove_all(part_, ignored);
  }

  static fs::path part_folder(const fs::path& out) {
    const fs::path whole = out.has_filename() ? out : out.parent_path();
    return whole.string() + ".part";
  }

  // ---- the search ----

  std::string text_of(const std::vector<std::string>& values) const {
    std::vector<std::pair<MethodParam, std::string>> settings;
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      settings.emplace_back(axes_[a].param, values[a]);
    }
    return with_settings(base_.label, settings);
  }

  // Decode steps before which no candidate can differ, because nothing has to leave yet.
  int first_eviction() const {
    bool pinned = base_.traits.pool == Pool::decode;
    for (const Axis& a : axes_) {
      pinned = pinned || a.param.param->name == "pool";
    }
    int first = 0;
    for (const std::string& text : budgets_) {
      if (text.empty()) {
        continue;
      }
      const Budget b = Budget::parse(text);
      const int tokens = b.unit == Budget::Unit::bytes ? n_steps_ : b.tokens(prompt_len_, 1, {}, 1);
      first = std::max(first, pinned ? tokens : tokens - prompt_len_);
    }
    return std::min(first, n_steps_);
  }

  // All rounds; false where it was stopped or something failed.
  bool look() {
    rounds_ = fidelities(common_layers_, n_steps_, first_eviction());
    SearchOptions options{.n_candidates = request_.n_candidates,
                          .n_rounds = int(rounds_.size()),
                          .seed = request_.seed,
                          .identity = [this](const std::vector<std::string>& values) { return identity(values); }};
    bool whole = true;
    const std::vector<Point> points = search(axes_, options, [&](std::span<const Point> these, int round) {
      std::vector<Candidate> shown{candidates_.front()};
      for (const Point& p : these) {
        shown.push_back({text_of(p.values), p.values, round + 1});
        if (std::none_of(candidates_.begin(), candidates_.end(),
                         [&](const Candidate& c) { return c.text == shown.back().text; })) {
          candidates_.push_back(shown.back());
        }
      }
      played_.emplace_back(rounds_[std::size_t(round)], int(shown.size()));
      std::vector<std::vector<double>> values(these.size(), std::vector<double>(cases_.size(), std::nan("")));
      if (!whole) {
        return values;
      }
      const auto measured = replay(shown, rounds_[std::size_t(round)], round, {});
      whole = measured.has_value();
      for (std::size_t i = 0; whole && i < these.size(); ++i) {
        for (std::size_t c = 0; c < cases_.size(); ++c) {
          values[i][c] = value((*measured)[i + 1], cases_[c], kAll, kAll);
        }
      }
      return values;
    });
    if (!whole) {
      return false;
    }
    for (const Point& p : points) {
      Candidate c{text_of(p.values), p.values, int(rounds_.size()) + 1};
      if (std::none_of(candidates_.begin(), candidates_.end(), [&](const Candidate& o) { return o.text == c.text; })) {
        candidates_.push_back(std::move(c));
      }
    }
    if (candidates_.size() == 1) {
      throw ConfigError(refused_.empty() ? "--param " + request_.params.front() + ": the only value is the one that " +
                                               base_.label + " has; give a wider range"
                                         : refused_);
    }
    auto measured = replay(candidates_, {request_.layers, 0}, int(rounds_.size()), part_ / "train");
    if (measured) {
      measured_ = std::move(*measured);
    }
    return measured.has_value();
  }

  // The canonical text of a candidate; nothing where it is the method as it is, or cannot be.
  std::optional<std::string> identity(const std::vector<std::string>& values) {
    try {
      const std::string name = parse_method(text_of(values), read_value_table).name;
      return name == base_.name ? std::nullopt : std::optional(name);
    } catch (const ConfigError& e) {
      refused_ = e.what();
      refused_texts_.insert(text_of(values));
      return std::nullopt;
    }
  }

  // One pass over the training traces: per candidate, per budget. Nothing where it was stopped or failed.
  std::optional<std::vector<std::vector<ByLayer>>> replay(const std::vector<Candidate>& shown, const Fidelity& fidelity,
                                                          int round, const fs::path& out) {
    RunRequest r = run_request(fmt::format("round {} of {}, ", round + 1, rounds_.size() + 1));
    r.traces = request_.traces;
    r.layers = fidelity.layers.empty() ? request_.layers : fidelity.layers;
    r.max_steps = fidelity.max_steps > 0 ? fidelity.max_steps : tuned_steps_ > 0 ? tuned_steps_ : request_.max_steps;
    r.out = out;
    if (budgets_.front().empty()) {
      r.budgets.clear();
    } else {
      r.budgets = budgets_;
    }
    std::map<std::string, std::size_t> index;
    for (const Candidate& c : shown) {
      index[c.text] = r.methods.size();
      r.methods.push_back(c.text);
    }
    std::vector<std::vector<ByLayer>> measured(shown.size(), std::vector<ByLayer>(budgets_.size()));
    r.cell = [&](const CellId& id, const CellResult& cell, const Layer&) {
      const auto b = std::find(budgets_.begin(), budgets_.end(), id.budget) - budgets_.begin();
      std::vector<Sums>& rows = measured[index.at(id.label)][std::size_t(b)][id.layer];
      const std::vector<Sums> more = objective_.measure(cell, id.n_heads, id.n_kv_heads);
      rows.resize(more.size());
      for (std::size_t i = 0; i < more.size(); ++i) {
        rows[i].add(more[i]);
      }
    };
    if (!done(run(r), out.empty() ? nullptr : &left_out_)) {
      return std::nullopt;
    }
    return measured;
  }

  RunRequest run_request(const std::string& what) const {
    RunRequest r;
    r.compensators = objective_.compensators();
    r.compensators_given = true;
    r.metrics = objective_.metrics();
    r.prompt_len = request_.prompt_len;
    r.max_steps = request_.max_steps;
    r.detail.steps = objective_.needs_steps();
    r.leave_out_unfit = true;
    r.threads = request_.threads;
    r.seed = request_.seed;
    r.memory = request_.memory;
    r.argv = request_.argv;
    r.stop = request_.stop;
    if (request_.progress) {
      r.progress = [this, what](double n, double total, const std::string& where) {
        request_.progress(n, total, what + where);
      };
    }
    return r;
  }

  bool done(const RunOutcome& o, std::vector<RunOutcome::LeftOut>* left_out) {
    outcome_.interrupted = o.interrupted;
    outcome_.trace_failed = o.trace_failed;
    outcome_.failed = o.failed;
    if (left_out != nullptr) {
      *left_out = o.left_out;
    }
    return !o.interrupted && o.failed.empty();
  }

  // ---- the choice ----

  // The objective of one candidate in a region of one case: all layers or one, all heads of it or one.
  double value(const std::vector<ByLayer>& candidate, const Case& where, int layer, int head) const {
    std::vector<Sums> by_budget;
    for (const std::string& b : where.budgets) {
      const ByLayer& layers = candidate[std::size_t(std::find(budgets_.begin(), budgets_.end(), b) - budgets_.begin())];
      Sums sums{.weighted = std::vector<double>(objective_.terms.size(), 0),
                .n = std::vector<double>(objective_.terms.size(), 0)};
      for (const auto& [number, rows] : layers) {
        if (layer != kAll && number != layer) {
          continue;
        }
        for (std::size_t r = 0; r < rows.size(); ++r) {
          if (head == kAll || int(r) == head) {
            sums.add(rows[r]);
          }
        }
      }
      by_budget.push_back(std::move(sums));
    }
    return objective_.bytes > 0 ? objective_.value_at_bytes(by_budget) : objective_.value(by_budget.front());
  }

  // The candidate of the smallest value among those allowed; of equals the first, so that the method as it is stays.
  std::optional<std::size_t> best(const Case& where, int layer, int head, const std::vector<bool>& allowed) const {
    std::optional<std::size_t> at;
    double low = 0;
    for (std::size_t c = 0; c < candidates_.size(); ++c) {
      const double x = allowed[c] ? value(measured_[c], where, layer, head) : std::nan("");
      if (!std::isnan(x) && (!at || x < low)) {
        at = c;
        low = x;
      }
    }
    return at;
  }

  // Candidates that a table of this grain can express beside the choice `like`: values that cannot follow are those
  // of `like`, the others are plain numbers.
  std::vector<bool> expressible(Grain grain, std::size_t like) const {
    std::vector<bool> allowed(candidates_.size(), true);
    for (std::size_t c = 0; c < candidates_.size(); ++c) {
      for (std::size_t a = 0; a < axes_.size(); ++a) {
        double number = 0;
        const std::string& text = candidates_[c].values[a];
        const bool fits = grains_[a].grain >= grain ? parse_number(text, number) : text == candidates_[like].values[a];
        allowed[c] = allowed[c] && fits;
      }
    }
    return allowed;
  }

  bool follows(Grain grain) const {
    return std::any_of(grains_.begin(), grains_.end(), [&](const GrainOf& g) { return g.grain >= grain; });
  }

  // Chooses for every case, writes the tables, runs the held-out traces and tuned.json; false where it was stopped.
  bool choose_and_check() {
    for (const Axis& a : axes_) {
      grains_.push_back(grain_of(a, axes_, base_, n_kv_heads_, objective_));
    }
    fs::create_directories(part_ / "params");
    RunRequest holdout = run_request("held out, ");
    holdout.traces = held_out();
    holdout.out = part_ / "holdout";
    add(holdout, base_.label, budgets_);
    Json tuned = Json::array();
    for (const Case& where : cases_) {
      tuned.push_back(choose(where, holdout));
    }
    if (!holdout.traces.empty()) {
      holdout.layers = layers_to_hold_out();
      if (!done(run(holdout), &held_left_out_)) {
        return false;
      }
    }
    if (fs::is_empty(part_ / "params")) {
      fs::remove(part_ / "params");
    }
    write_whole(part_ / "tuned.json", description(tuned).dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
    return true;
  }

  static void add(RunRequest& r, const std::string& text, const std::vector<std::string>& budgets) {
    if (std::find(r.methods.begin(), r.methods.end(), text) == r.methods.end()) {
      r.methods.push_back(text);
    }
    std::vector<std::string>& own = r.budgets_of[text];
    for (const std::string& b : budgets) {
      if (!b.empty() && std::find(own.begin(), own.end(), b) == own.end()) {
        own.push_back(b);
      }
    }
  }

  Json choose(const Case& where, RunRequest& holdout) const {
    const std::vector<bool> all(candidates_.size(), true);
    const auto global = best(where, kAll, kAll, all);
    if (!global) {
      throw ConfigError(nothing_to_choose(where));
    }
    Json j;
    j["budgets"] = where.budgets.front().empty() ? Json::array() : Json(where.budgets);
    if (objective_.bytes > 0) {
      j["bytes"] = objective_.bytes;
      int n = 0;
      for (const auto& candidate : measured_) {
        n += std::isnan(value(candidate, where, kAll, kAll)) ? 1 : 0;
      }
      j["n_not_reaching"] = n;
    }
    j["default"] = base_.label;
    j["global"] = candidates_[*global].text;
    j["layer"] = nullptr;
    j["head"] = nullptr;
    j["chosen"] = {{"global", *global}};
    add(holdout, candidates_[*global].text, where.budgets);
    if (!follows(Grain::layer)) {
      return j;
    }
    // layer -> candidate of each head; a layer (or head) without a value of its own takes the choice above it.
    std::map<int, std::vector<std::size_t>> per_layer, per_head;
    const std::vector<bool> in_layers = expressible(Grain::layer, *global);
    const auto fallback = best(where, kAll, kAll, in_layers);
    if (!fallback) {
      return j;
    }
    Json layers = Json::object(), heads = Json::object();
    for (const int layer : train_layers_) {
      const std::size_t l = best(where, layer, kAll, in_layers).value_or(*fallback);
      per_layer[layer] = {l};
      layers[std::to_string(layer)] = l;
      if (!follows(Grain::head)) {
        continue;
      }
      const std::vector<bool> in_heads = expressible(Grain::head, l);
      for (int head = 0; head < n_kv_heads_; ++head) {
        per_head[layer].push_back(best(where, layer, head, in_heads).value_or(l));
      }
      heads[std::to_string(layer)] = per_head[layer];
    }
    j["layer"] = with_tables(where, "layer", *global, per_layer, per_layer);
    j["chosen"]["layers"] = layers;
    add(holdout, j["layer"], where.budgets);
    if (follows(Grain::head)) {
      j["head"] = with_tables(where, "head", *global, per_head, per_layer);
      j["chosen"]["heads"] = heads;
      add(holdout, j["head"], where.budgets);
    }
    for (const auto& [text, file] : tables_) {
      holdout.tables[text] = file;
    }
    return j;
  }

  std::string nothing_to_choose(const Case& where) const {
    if (objective_.bytes == 0) {
      return "--objective " + objective_.text + ": nothing counted at budget " + where.budgets.front() +
             "; give a smaller budget, at which something is evicted, or traces that hold what the metric needs";
    }
    double low = 0, high = 0;
    for (const auto& candidate : measured_) {
      for (const ByLayer& layers : candidate) {
        Sums sums;
        for (const auto& [layer, rows] : layers) {
          for (const Sums& s : rows) {
            sums.add(s);
          }
        }
        const double bytes = sums.bytes_steps > 0 ? sums.bytes / sums.bytes_steps : 0;
        low = bytes > 0 && (low == 0 || bytes < low) ? bytes : low;
        high = std::max(high, bytes);
      }
    }
    return fmt::format(
        "--objective {}: no candidate has budgets below and above {:.0f} bytes; those of --budget measured {:.0f} to "
        "{:.0f} bytes per KV head",
        objective_.text, objective_.bytes, low, high);
  }

  // The method's text with a table for every parameter that can follow, and the tables' files. What cannot follow
  // heads has its value per layer, what cannot follow layers the global one.
  std::string with_tables(const Case& where, const std::string& level, std::size_t global,
                          const std::map<int, std::vector<std::size_t>>& finest,
                          const std::map<int, std::vector<std::size_t>>& per_layer) const {
    std::vector<std::string> values = candidates_[global].values;
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      if (grains_[a].grain == Grain::global) {
        continue;
      }
      const bool heads = level == "head" && grains_[a].grain == Grain::head;
      Json table = Json::object();
      for (const auto& [layer, chosen] : heads ? finest : per_layer) {
        Json row = Json::array();
        for (const std::size_t c : chosen) {
          double x = 0;
          parse_number(candidates_[c].values[a], x);
          row.push_back(x == std::floor(x) && std::abs(x) < 1e15 ? Json(std::int64_t(x)) : Json(x));
        }
        table[std::to_string(layer)] = heads ? row : row.front();
      }
      const std::string name = "params/" + where.name + "-" + level + "-" + axes_[a].param.name + ".json";
      write_whole(part_ / name, table.dump(2) + "\n");
      tables_[name] = part_ / name;
      values[a] = "@" + name;
    }
    // Of the first candidate, whose unchanged values may be a table of its own, only what was tuned is set.
    std::vector<std::pair<MethodParam, std::string>> settings;
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      if (grains_[a].grain != Grain::global || global != 0) {
        settings.emplace_back(axes_[a].param, values[a]);
      }
    }
    return with_settings(base_.label, settings);
  }

  const std::vector<fs::path>& held_out() const { return tuned_steps_ > 0 ? request_.traces : request_.holdout; }

  // Held-out layers that were tuned; empty where that is what they have anyway.
  std::vector<int> layers_to_hold_out() const {
    if (tuned_steps_ > 0 ||
        (request_.layers.empty() &&
         std::includes(train_layers_.begin(), train_layers_.end(), holdout_layers_.begin(), holdout_layers_.end()))) {
      return request_.layers;
    }
    std::vector<int> both;
    for (const fs::path& path : request_.holdout) {  // of every held-out trace
      const std::vector<int> layers = TraceReader(path).info().layers;
      const std::set<int> has(layers.begin(), layers.end());
      std::vector<int> tuned;
      const std::set<int> before =
          path == request_.holdout.front() ? train_layers_ : std::set<int>(both.begin(), both.end());
      std::set_intersection(before.begin(), before.end(), has.begin(), has.end(), std::back_inserter(tuned));
      both = tuned;
    }
    if (both.empty()) {
      throw ConfigError("--holdout: these traces share no layer with those that are tuned on");
    }
    return both;
  }

  // ---- what is written ----

  static Json as_json(const std::vector<RunOutcome::LeftOut>& left_out) {
    Json all = Json::array();
    for (const RunOutcome::LeftOut& l : left_out) {
      all.push_back({{"method", l.label}, {"budget", l.budget}, {"why", l.why}});
    }
    return all;
  }

  Json description(const Json& tuned) const {
    Json j;
    j["format"] = "kvreplay-tuned";
    j["format_version"] = "1.0";
    j["version"] = kVersion;
    j["git"] = kGitHash;
    j["argv"] = request_.argv;
    j["method"] = base_.label;
    j["name"] = base_.name;
    Json terms = Json::array();
    for (const Term& t : objective_.terms) {
      terms.push_back({{"name", name_of(t)},
                       {"weight", t.weight},
                       {"metric", std::string(info(t.metric).name) + (t.span.empty() ? "" : ":" + t.span)},
                       {"compensator", t.compensator},
                       {"statistic", name_of(t.statistic)}});
    }
    j["objective"] = {{"text", objective_.text},
                      {"terms", terms},
                      {"bytes", objective_.bytes > 0 ? Json(objective_.bytes) : Json()},
                      {"from_steps", objective_.needs_steps()},
                      {"per_head", objective_.per_head()}};
    j["params"] = Json::array();
    constexpr const char* kGrains[] = {"global", "layer", "head"};
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      const Axis& x = axes_[a];
      Json p = {{"name", x.param.name},
                {"part", x.param.part->name},
                {"type", type_name(x.param.param->type)},
                {"scale", scale_name(x.scale)},
                {"default", candidates_.front().values[a]}};
      p["values"] = x.listed() ? Json(x.values) : Json();
      p["lo"] = x.listed() ? Json() : Json(x.lo);
      p["hi"] = x.listed() ? Json() : Json(x.hi);
      p["grain"] = kGrains[static_cast<std::size_t>(grains_[a].grain)];
      p["why"] = grains_[a].why;
      j["params"].push_back(p);
    }
    j["rounds"] = Json::array();
    for (const auto& [fidelity, n_methods] : played_) {
      j["rounds"].push_back({{"layers", fidelity.layers}, {"steps", fidelity.max_steps}, {"n_methods", n_methods}});
    }
    j["rounds"].push_back({{"layers", std::vector<int>(train_layers_.begin(), train_layers_.end())},
                           {"steps", n_steps_},
                           {"n_methods", candidates_.size()}});
    j["candidates"] = Json::array();
    for (const Candidate& c : candidates_) {
      j["candidates"].push_back({{"method", c.text}, {"values", c.values}, {"round", c.round}});
    }
    j["left_out"] = as_json(left_out_);
    j["holdout_left_out"] = as_json(held_left_out_);
    j["n_refused"] = refused_texts_.size();
    j["refused"] = refused_;
    j["traces"] = stems(request_.traces);
    j["holdout"] = stems(held_out());
    j["holdout_from_step"] = tuned_steps_;
    j["n_kv_heads"] = n_kv_heads_;
    j["heads_share_budget"] = base_.allocate || base_.prefill_allocate;
    j["seed"] = request_.seed;
    j["plugins"] = plugins_json();
    j["tuned"] = tuned;
    return j;
  }

  void publish() const {
    const fs::path out = request_.out.has_filename() ? request_.out : request_.out.parent_path();
    std::error_code ignored;
    if (fs::is_empty(out, ignored)) {
      fs::remove(out, ignored);
    }
    if (!fs::exists(out)) {
      fs::rename(part_, out);
      return;
    }
    // --force: what an earlier run left is replaced; tuned.json, which names the rest, goes first and comes last.
    for (const char* name : {"tuned.json", "tune.json", "figures", "train", "holdout", "params"}) {
      fs::remove_all(out / name);
    }
    for (const char* name : {"train", "holdout", "params", "tuned.json"}) {
      if (fs::exists(part_ / name)) {
        fs::rename(part_ / name, out / name);
      }
    }
    fs::remove_all(part_, ignored);
  }

  const TuneRequest& request_;
  Objective objective_;
  fs::path part_;  // where everything is written until it is whole
  Method base_;
  std::vector<Axis> axes_;
  std::vector<GrainOf> grains_;  // per axis
  std::vector<std::string> budgets_;
  std::vector<Case> cases_;
  std::string model_, first_trace_;
  int n_kv_heads_ = 0, n_steps_ = 0;
  int tuned_steps_ = 0;  // the later ones of the same traces are held out; 0: none of these
  Pos prompt_len_ = 0;
  std::vector<int> common_layers_;                // that all training traces have
  std::set<int> train_layers_, holdout_layers_;   // that some of them have
  std::vector<Fidelity> rounds_;                  // before the last
  std::vector<std::pair<Fidelity, int>> played_;  // those that the search asked for, and how many methods it showed
  std::vector<Candidate> candidates_;             // the method as it is comes first
  std::vector<std::vector<ByLayer>> measured_;    // [candidate][budget], everything
  std::vector<RunOutcome::LeftOut> left_out_, held_left_out_;
  std::string refused_;  // the last sentence of a candidate that cannot be
  std::set<std::string> refused_texts_;
  mutable std::map<std::string, fs::path> tables_;  // as methods name them -> where they lie
  TuneOutcome outcome_;
};

}  // namespace

TuneOutcome tune(const TuneRequest& request) { return Tuning(request)(); }

}  // namespace kvreplay
