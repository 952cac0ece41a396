#include "sim/run.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "policies/help.hpp"
#include "sim/load.hpp"
#include "sim/measure_layers.hpp"
#include "sim/plugins.hpp"
#include "sim/set.hpp"
#include "sim/version.hpp"
#include "sim/whole_file.hpp"
#include "traces/hash.hpp"
#include "traces/hdf5.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;

constexpr const char* kOpenLoop =
    "Replay is open-loop (teacher-forced): queries come from the uncompressed run, so errors do not compound across "
    "layers and steps.";

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday,
                     utc.tm_hour, utc.tm_min, utc.tm_sec);
}

std::string host_name() {
  char name[256] = "";
  return ::gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

// One trace of the run, opened and checked.
struct Input {
  TraceReader reader;
  Pos prompt_len = 0, n_tokens = 0;  // n_tokens: of the trace's tokens the first so many
  std::vector<int> layers;
  std::vector<std::pair<int, std::string>> skipped;  // layer, reason
  std::map<std::string, MatD> measured;              // by allocator's text: (layers, numbers) Allocator::measure

  int n_steps() const { return n_tokens - prompt_len; }
};

// One method at one budget, for one trace.
struct Column {
  const Method* method;
  Budget budget;
};

class Run {
 public:
  explicit Run(const RunRequest& request) : request_(request), start_(std::chrono::steady_clock::now()) {}

  // Up to where something would be written or replayed; false where it was stopped.
  bool check() {
    parse();
    open_traces();
    check_needs();
    check_memory();
    if (!request_.out.empty()) {
      refuse_used_folder(request_.out, request_.force);  // rather than after the layers were measured
    }
    if (!measure_layers()) {
      return false;
    }
    check_budgets();
    return true;
  }

  RunOutcome operator()() {
    started_ = utc_now();
    if (!check()) {
      outcome_.interrupted = true;
      return outcome_;
    }
    if (!request_.out.empty()) {
      prepare_folder();
      writer_.emplace(request_.out, request_.detail);
    }
    replay_all();
    if (writer_) {
      writer_->publish(run_json());
    }
    return outcome_;
  }

 private:
  void parse() {
    const TableReader read_table = table_reader(request_.tables);
    for (const std::string& text : request_.methods) {
      methods_.push_back(std::make_unique<Method>(parse_method(text, read_table)));
      for (std::size_t i = 0; i + 1 < methods_.size(); ++i) {
        if (methods_[i]->name == methods_.back()->name) {
          throw ConfigError("'" + methods_[i]->label + "' and '" + text + "' are the same method, " +
                            methods_.back()->name);
        }
      }
    }
    if (methods_.empty()) {
      throw ConfigError("no method is given; add for example --method h2o");
    }
    for (std::size_t i = 0; i < request_.budgets.size(); ++i) {
      const auto begin = request_.budgets.begin();
      if (std::find(begin, begin + std::ptrdiff_t(i), request_.budgets[i]) != begin + std::ptrdiff_t(i)) {
        throw ConfigError("--budget: " + request_.budgets[i] + " is given twice");
      }
      Budget::parse(request_.budgets[i]);  // refused even where no method uses it
    }
    budgets_ = request_.budgets;
    for (const std::string& text : request_.compensators) {
      compensators_.push_back(parse_part(text, Role::compensate, read_table));
      if (compensators_.back().info->is_default) {  // nothing to measure
        compensators_.pop_back();
        continue;
      }
      for (std::size_t i = 0; i + 1 < compensators_.size(); ++i) {
        if (canonical(compensators_[i]) == canonical(compensators_.back())) {
          throw ConfigError("--compensators: '" + text + "' is given twice");
        }
      }
    }
    for (std::size_t i = 0; i < methods_.size(); ++i) {
      const Method& m = *methods_[i];
      const auto own = request_.budgets_of.find(request_.methods[i]);
      const auto& budgets = own == request_.budgets_of.end() ? request_.budgets : own->second;
      if (!m.budgeted()) {
        columns_.push_back({&m, {}});
      } else if (budgets.empty()) {
        throw ConfigError(m.label + " needs a budget; add for example --budget 128");
      }
      for (const std::string& b : m.budgeted() ? budgets : std::vector<std::string>{}) {
        columns_.push_back({&m, Budget::parse(b)});
        if (std::find(budgets_.begin(), budgets_.end(), b) == budgets_.end()) {
          budgets_.push_back(b);
        }
      }
    }
  }

  void open_traces() {
    if (request_.traces.empty()) {
      throw ConfigError("no trace is given");
    }
    std::set<std::string> stems;
    for (const fs::path& path : request_.traces) {
      Input input{.reader = TraceReader(path),
                  .prompt_len = request_.prompt_len,
                  .n_tokens = 0,
                  .layers = {},
                  .skipped = {},
                  .measured = {}};
      const TraceInfo& info = input.reader.info();
      if (!stems.insert(info.stem).second) {
        throw ConfigError("two traces of this run are called '" + info.stem + "'; rename one, results name them so");
      }
      if (input.prompt_len == 0) {
        input.prompt_len = info.prompt_len;
      }
      if (input.prompt_len >= info.n_tokens) {
        throw ConfigError(fmt::format("{}: a prompt of {} tokens leaves no decode step of the trace's {} tokens",
                                      path.string(), input.prompt_len, info.n_tokens));
      }
      input.n_tokens = info.n_tokens;
      if (request_.max_steps > 0) {
        input.n_tokens = std::min(input.n_tokens, input.prompt_len + request_.max_steps);
      }
      check_output_steps(input);
      choose_layers(input);
      inputs_.push_back(std::make_unique<Input>(std::move(input)));
    }
  }

  void check_output_steps(const Input& input) const {
    const int n_steps = input.n_steps();
    for (int step : request_.output_steps) {
      if (step >= n_steps) {
        throw ConfigError(fmt::format("outputs are asked for at step {}, but the last of {}'s {} decode steps is {}",
                                      step, input.reader.info().path.string(), n_steps, n_steps - 1));
      }
    }
  }

  void choose_layers(Input& input) const {
    const TraceInfo& info = input.reader.info();
    for (int layer : request_.layers) {
      if (std::find(info.layers.begin(), info.layers.end(), layer) == info.layers.end()) {
        throw ConfigError(fmt::format("--layers: {} has no layer {}; it has {}", info.path.string(), layer,
                                      fmt::join(info.layers, ", ")));
      }
    }
    for (int layer : request_.layers.empty() ? info.layers : request_.layers) {
      if (const int window = short_window(info, layer, input.n_tokens); window > 0) {
        input.skipped.emplace_back(layer,
                                   fmt::format("its sliding window of {} tokens is shorter than the trace", window));
      } else {
        input.layers.push_back(layer);
      }
    }
    std::sort(input.layers.begin(), input.layers.end());
    input.layers.erase(std::unique(input.layers.begin(), input.layers.end()), input.layers.end());
    if (input.layers.empty()) {
      throw ConfigError(info.path.string() +
                        ": every layer has a sliding window shorter than the trace, nothing can be "
                        "replayed");
    }
  }

  // What the methods need of a trace: before anything is measured or runs.
  void check_needs() const {
    for (const auto& input : inputs_) {
      const TraceInfo& info = input->reader.info();
      if (info.logit_softcap > 0 && request_.compensators_given && !compensators_.empty()) {
        throw ConfigError(info.path.string() +
                          ": its model has a logit soft-cap, under which compensators in closed form do not hold; use "
                          "--compensators none");
      }
      for (const PartUse& c : compensators_) {
        check_tables(*input, c, to_replay(*input), Scope::kv_head);
      }
      for (const Column& c : columns_) {
        const Method& m = *c.method;
        const Needs needs = m.needs(compensators_);
        const std::string who = info.path.string() + ": " + m.label + " needs ";
        const std::vector<int> layers = layers_of(*input, m);
        for (int layer : layers) {
          const Pos first = first_stored_query(input->reader, layer);
          const Pos want = first_query(needs, input->prompt_len);
          if (first > want) {
            const bool beside = first <= first_query(m.needs(), input->prompt_len);
            throw ConfigError(
                fmt::format("{}the queries from position {} on, but layer {} has {}; capture with --queries {}",
                            beside ? info.path.string() + ": a compensator beside " + m.label + " needs " : who, want,
                            layer, first == info.n_tokens ? "none" : fmt::format("them from {} on", first),
                            want < input->prompt_len ? "all" : "decode"));
          }
          if (needs.pre_rope && !(info.rope.present && info.rope.invertible)) {
            throw ConfigError(who + "keys before RoPE, but the trace has no invertible /model/rope");
          }
          if (needs.spans && info.spans.empty()) {
            throw ConfigError(who + "named spans of tokens, but the trace has none; kvtrace.py writes them");
          }
          const auto names = input->reader.score_names(layer);
          if (!needs.scores.empty() && std::find(names.begin(), names.end(), needs.scores) == names.end()) {
            throw ConfigError(fmt::format(
                "{}scores '{}', but layer {} has {}", who, needs.scores, layer,
                names.empty() ? "none; kvtrace.py writes them" : fmt::format("only {}", fmt::join(names, ", "))));
          }
        }
        if (info.logit_softcap > 0 && m.compensate) {
          throw ConfigError(info.path.string() + ": " + m.label +
                            " has a compensator in closed form, which does not hold under the model's logit soft-cap");
        }
        for (const PartUse* part : m.parts()) {
          const bool cuts_prompt =
              (m.prefill_select && part == &*m.prefill_select) || (m.prefill_allocate && part == &*m.prefill_allocate);
          check_tables(*input, *part, layers, cuts_prompt ? m.prefill_traits.scope : m.traits.scope);
        }
        for (int layer : needs.evicted_at.empty() ? std::vector<int>{} : layers) {
          read_evicted_at(*input, m, needs.evicted_at, layer);
        }
      }
    }
  }

  // What allocators measure in every layer over which they divide; false: stopped.
  bool measure_layers() {
    for (const auto& input : inputs_) {
      std::map<std::string, const PartUse*> allocators;  // that measure, by their text
      for (const Column& c : columns_) {
        for (const auto* part : {&c.method->prefill_allocate, &c.method->allocate}) {
          if (*part && any_allocator(**part)->measures()) {
            allocators.emplace(canonical(**part), &**part);
          }
        }
      }
      for (std::size_t l = 0; l < input->layers.size() && !allocators.empty(); ++l) {
        if (request_.stop && request_.stop->load()) {
          return false;
        }
        measure(*input, l, allocators);
      }
    }
    return true;
  }

  void measure(Input& input, std::size_t l, const std::map<std::string, const PartUse*>& allocators) const {
    const TraceInfo& info = input.reader.info();
    const int layer = input.layers[l];
    std::vector<std::string> texts;
    std::vector<const PartUse*> unknown;
    std::map<std::string, std::vector<double>> numbers;
    for (const auto& [text, use] : allocators) {
      std::vector<double> known;
      if (request_.measured) {
        known = request_.measured(info.path, layer, text);
      }
      if (known.empty()) {
        texts.push_back(text);
        unknown.push_back(use);
      } else {
        numbers[text] = known;
      }
    }
    if (!unknown.empty()) {
      if (request_.progress) {
        request_.progress(0, 1, fmt::format("{} layer {}, measured for allocators", info.stem, layer));
      }
      const auto found = measure_layer(input.reader, layer, input.prompt_len, unknown, request_.threads);
      for (std::size_t i = 0; i < found.size(); ++i) {
        numbers[texts[i]] = found[i];
      }
    }
    for (const auto& [text, row] : numbers) {
      MatD& all = input.measured[text];
      if (l == 0) {
        all.resize(std::ssize(input.layers), std::ssize(row));
      }
      KVREPLAY_CHECK(std::ssize(row) == all.cols());
      all.row(Eigen::Index(l)) = Eigen::Map<const Eigen::RowVectorXd>(row.data(), all.cols());
    }
  }

  // Whether budgets fit: before anything runs.
  void check_budgets() {
    for (const auto& input : inputs_) {
      std::vector<Column> fit;
      std::copy_if(columns_.begin(), columns_.end(), std::back_inserter(fit),
                   [&](const Column& c) { return fits(*input, c); });
      columns_ = std::move(fit);
    }
    if (columns_.empty()) {
      throw ConfigError(outcome_.left_out.front().why);
    }
  }

  // Whether a column's budget holds what its method protects; ConfigError, or left out where the request says so.
  bool fits(const Input& input, const Column& c) {
    const Method& m = *c.method;
    try {
      for (std::size_t l = 0; l < input.layers.size(); ++l) {
        if (const int layer = input.layers[l]; replayed(layer)) {
          const int whole = share(input, c, l).layer, prompt = prompt_share(input, c, l).layer;
          m.check(whole, m.prefill_select ? prompt : 0);
          check_spans(input, m.allocate, layer, whole);
          check_spans(input, m.prefill_allocate, layer, prompt);
        }
      }
      return true;
    } catch (const ConfigError& e) {
      if (!request_.leave_out_unfit) {
        throw;
      }
      outcome_.left_out.push_back({m.label, c.budget.text, e.what()});
      return false;
    }
  }

  static void check_spans(const Input& input, const std::optional<PartUse>& allocator, int layer, int budget) {
    if (allocator) {
      allocator_of(*allocator, layer)->check_spans(spans_of(input), input.prompt_len, budget);
    }
  }

  // A table has every one of these layers, with one value or one per KV head.
  static void check_tables(const Input& input, const PartUse& part, std::span<const int> layers, Scope scope) {
    const int n_kv_heads = input.reader.info().n_kv_heads;
    for (const Setting& s : part.settings) {
      if (!s.table) {
        continue;
      }
      for (int layer : layers) {
        s.table->at(layer, 0);  // ConfigError where the layer is missing
        const auto row = std::find(s.table->layers.begin(), s.table->layers.end(), layer) - s.table->layers.begin();
        const std::size_t n = s.table->values[std::size_t(row)].size();
        if (n != 1 && (n != std::size_t(n_kv_heads) || scope == Scope::layer)) {
          throw ConfigError(fmt::format("{}: layer {} has {} values; it takes 1{}", s.table->path, layer, n,
                                        scope == Scope::layer ? ", since the layer's heads share one set"
                                                              : fmt::format(", or {}, one per KV head", n_kv_heads)));
        }
      }
    }
  }

  static Pos first_query(const Needs& needs, Pos prompt_len) {
    return needs.prompt_queries == Needs::kAll ? 0 : std::max<Pos>(0, prompt_len - needs.prompt_queries);
  }

  // What a compensator remembers beside one set of so many slots of a layer.
  static double state_bytes(const Input& input, const PartUse& compensator, int layer, int budget) {
    const TraceInfo& info = input.reader.info();
    const SetShape shape{.head_dim = info.head_dim,
                         .v_head_dim = info.v_head_dim,
                         .n_tokens = input.n_tokens,
                         .prompt_len = input.prompt_len,
                         .budget = budget,
                         .scores = {},
                         .evicted_at = {}};
    return compensator.info->compensate(compensator.config(layer).get(), shape)->state_bytes();
  }

  static int tokens(const Input& input, const Method& m, int layer, const Budget& budget, Scope scope) {
    const TraceInfo& info = input.reader.info();
    const auto state = [&](int n) { return m.compensate ? state_bytes(input, *m.compensate, layer, n) : 0; };
    return budget.tokens(input.prompt_len, slot_bytes(info), state, scope == Scope::query_head ? info.group_size : 1);
  }

  static std::unique_ptr<Allocator> allocator_of(const PartUse& use, int layer) {
    return use.info->allocate(use.config(layer).get());
  }

  static std::vector<TokenSpan> spans_of(const Input& input) {
    std::vector<TokenSpan> spans;
    for (const Span& s : input.reader.info().spans) {
      spans.push_back({s.name, s.begin, s.end});
    }
    return spans;
  }

  static int asked_budget(const Input& input, const Column& c, int layer) {
    return c.budget.unit == Budget::Unit::none ? input.n_tokens
                                               : tokens(input, *c.method, layer, c.budget, c.method->traits.scope);
  }

  // Of the selector before the "/"; what a compensator keeps is charged to the other's.
  static int asked_prompt_budget(const Input& input, const Column& c, int layer) {
    const TraceInfo& info = input.reader.info();
    const Method& m = *c.method;
    return m.prefill_budget.unit == Budget::Unit::none
               ? asked_budget(input, c, layer)
               : m.prefill_budget.tokens(input.prompt_len, slot_bytes(info), {},
                                         m.prefill_traits.scope == Scope::query_head ? info.group_size : 1);
  }

  // What an allocator makes of a budget of so many tokens per set and layer in one layer of the run.
  struct Share {
    int layer = 0;           // mean over the layer's sets
    std::vector<int> heads;  // of the KV heads; empty: all alike, or as their scores say
  };
  static Share share(const Input& input, const Column& c, std::size_t l) {
    return share(input, c.method->allocate, l, [&](int layer) { return asked_budget(input, c, layer); });
  }
  static Share prompt_share(const Input& input, const Column& c, std::size_t l) {
    return share(input, c.method->prefill_allocate, l, [&](int layer) { return asked_prompt_budget(input, c, layer); });
  }
  template <typename Asked>
  static Share share(const Input& input, const std::optional<PartUse>& use, std::size_t l, const Asked& asked) {
    if (!use) {
      return {asked(input.layers[l]), {}};
    }
    const TraceInfo& info = input.reader.info();
    const bool alone = any_allocator(*use)->per_layer();
    const std::span<const int> layers = alone ? std::span(input.layers).subspan(l, 1) : input.layers;
    const std::size_t at = alone ? 0 : l;
    const auto allocator = allocator_of(*use, layers[0]);
    Allocator::Layers together{layers,           info.n_layers,  input.prompt_len,
                               asked(layers[0]), input.n_tokens, head_worth(*use, layers, info.n_kv_heads)};
    if (allocator->measures()) {
      together.measured = input.measured.at(canonical(*use)).middleRows(Eigen::Index(l - at), std::ssize(layers));
    }
    return {allocator->over_layers(together)[at], allocator->over_heads(together, at)};
  }

  // Recorded evictions of one layer: (n_sets, tokens of the run). The file has all of the trace's.
  std::vector<std::vector<std::int32_t>> read_evicted_at(const Input& input, const Method& m, const std::string& path,
                                                         int layer) const {
    const TraceInfo& info = input.reader.info();
    std::vector<std::int32_t> all;
    const int n_steps = info.n_tokens - input.prompt_len;
    try {
      const hdf5::File file = hdf5::File::open(path);
      const hdf5::Dataset dataset = file.root().group("evicted_at").dataset(fmt::format("L{:03}", layer));
      const hdf5::Shape shape = dataset.shape();
      const int n_sets = Set::count(m.traits.scope, info.n_heads, info.n_kv_heads);
      const hdf5::Shape expected{std::uint64_t(n_sets), std::uint64_t(info.n_tokens)};
      if (shape != expected || dataset.type() != hdf5::Type::i32) {
        throw TraceError(fmt::format("{}: expected int32 {}, found {} {}", dataset.where(), hdf5::to_string(expected),
                                     hdf5::name_of(dataset.type()), hdf5::to_string(shape)));
      }
      all.resize(hdf5::n_elements(shape));
      dataset.read(hdf5::writable_bytes_of(all));
      for (const std::int32_t step : all) {
        if (step < 0 || step > n_steps) {
          throw TraceError(
              fmt::format("{}: {} is no decode step of a trace that has {}; was it recorded with another "
                          "prompt_len?",
                          dataset.where(), step, n_steps));
        }
      }
    } catch (const hdf5::StorageError& e) {
      throw TraceError(e.what());
    }
    std::vector<std::vector<std::int32_t>> sets;
    for (std::size_t s = 0; s < all.size() / std::size_t(info.n_tokens); ++s) {
      const auto begin = all.begin() + std::ptrdiff_t(s) * info.n_tokens;
      for (std::int32_t& step : sets.emplace_back(begin, begin + input.n_tokens)) {
        step = std::min(step, input.n_steps());
      }
    }
    return sets;
  }

  void prepare_folder() const {
    std::error_code error;
    fs::create_directories(request_.out, error);
    if (error) {
      throw ConfigError("--out " + request_.out.string() + " cannot be made: " + error.message());
    }
    if (::access(request_.out.c_str(), W_OK) != 0) {
      throw ConfigError("--out " + request_.out.string() + " cannot be written to");
    }
  }

  bool replayed(int layer) const {
    const std::vector<int>& some = request_.replay;
    return some.empty() || std::find(some.begin(), some.end(), layer) != some.end();
  }

  std::vector<int> to_replay(const Input& input) const {
    std::vector<int> some;
    std::copy_if(input.layers.begin(), input.layers.end(), std::back_inserter(some),
                 [&](int layer) { return replayed(layer); });
    return some;
  }

  // The layers that a method's cells depend on: those to replay, or all where a budget is divided over the run's.
  std::vector<int> layers_of(const Input& input, const Method& m) const {
    return divides_over_layers(m) ? input.layers : to_replay(input);
  }

  void replay_all() {
    total_ = 0;
    for (const auto& input : inputs_) {
      total_ += double(to_replay(*input).size() * columns_.size()) * input->n_steps();
    }
    double done = 0;
    for (const auto& input : inputs_) {
      for (std::size_t l = 0; l < input->layers.size(); ++l) {
        if (!replayed(input->layers[l])) {
          continue;
        }
        try {
          if (!replay_layer(*input, l, done)) {
            outcome_.interrupted = true;
            return;
          }
        } catch (const TraceError& e) {  // what is finished stays; this trace gives no more
          if (outcome_.n_cells == 0) {
            throw;
          }
          outcome_.failed.emplace_back(e.what());
          outcome_.trace_failed = true;
          break;
        }
      }
    }
  }

  bool replay_layer(const Input& input, std::size_t l, double& done) {
    const TraceInfo& info = input.reader.info();
    const int layer = input.layers[l];
    LoadOptions load{.prompt_len = input.prompt_len,
                     .n_tokens = input.n_tokens,
                     .first_query = input.prompt_len,
                     .scores = {},
                     .w_o = request_.metrics.projected()};
    for (const Column& c : columns_) {
      const Needs needs = c.method->needs(compensators_);
      load.first_query = std::min(load.first_query, first_query(needs, input.prompt_len));
      if (!needs.scores.empty() &&
          std::find(load.scores.begin(), load.scores.end(), needs.scores) == load.scores.end()) {
        load.scores.push_back(needs.scores);
      }
    }
    const Layer data = load_layer(input.reader, layer, load);
    if (writer_) {
      writer_->add_heads(info.stem, layer, head_statistics(data, request_.threads));
    }
    const std::string what = fmt::format("{} layer {}", info.stem, layer);

    ReplayOptions options{.metrics = request_.metrics,
                          .compensators = {},
                          .n_checkpoints = request_.n_checkpoints,
                          .block_steps = kBlockSteps,
                          .threads = request_.threads,
                          .seed = request_.seed,
                          .output_steps = request_.output_steps,
                          .keep_attended = request_.detail.retained,
                          .stop = request_.stop,
                          .progress = {}};
    for (const PartUse& c : compensators_) {
      if (info.logit_softcap == 0) {
        options.compensators.push_back(&c);
      }
    }
    const std::size_t batch = cells_that_fit(input);
    for (std::size_t first = 0; first < columns_.size(); first += batch) {
      const std::size_t n = std::min(batch, columns_.size() - first);
      std::vector<Job> jobs;
      std::vector<std::vector<std::vector<std::int32_t>>> recorded(n);
      for (std::size_t i = 0; i < n; ++i) {
        const Column& c = columns_[first + i];
        const Share whole = share(input, c, l);
        Job job{.method = c.method,
                .budget = whole.layer,
                .head_budgets = whole.heads,
                .prompt_head_budgets = {},
                .evicted_at = nullptr};
        if (c.method->prefill_select) {
          const Share prompt = prompt_share(input, c, l);
          job.prompt_budget = prompt.layer;
          job.prompt_head_budgets = prompt.heads;
        }
        if (const std::string path = c.method->needs().evicted_at; !path.empty()) {
          recorded[i] = read_evicted_at(input, *c.method, path, layer);
          job.evicted_at = &recorded[i];
        }
        jobs.push_back(job);
      }
      options.progress = [&](int steps) {
        if (request_.progress) {
          request_.progress(done + double(n) * steps, total_, what);
        }
      };
      const LayerResult result = replay(data, jobs, options);
      if (!result.complete) {
        return false;
      }
      done += double(n) * data.n_steps();
      for (std::size_t i = 0; i < n; ++i) {
        const Column& c = columns_[first + i];
        const CellResult& cell = result.cells[i];
        const CellId id{.trace = info.stem,
                        .layer = layer,
                        .method = c.method->name,
                        .label = c.method->label,
                        .budget = c.budget.text,
                        .budget_tokens = c.budget.unit == Budget::Unit::none ? -1 : jobs[i].budget,
                        .foresight = c.method->foresight(),
                        .group = group_of(*c.method),
                        .prompt_len = input.prompt_len,
                        .n_heads = info.n_heads,
                        .n_kv_heads = info.n_kv_heads};
        if (!cell.error.empty()) {
          outcome_.failed.push_back(fmt::format("{}, {}{}: {}", what, c.method->label,
                                                c.budget.text.empty() ? "" : " at budget " + c.budget.text,
                                                cell.error));
          if (request_.cell_failed) {
            request_.cell_failed(id, cell.error);
          }
          continue;
        }
        ++outcome_.n_cells;
        if (writer_) {
          writer_->add(id, cell, request_.output_steps, info.v_head_dim);
        }
        if (request_.cell) {
          request_.cell(id, cell, data);
        }
      }
    }
    return true;
  }

  static std::string group_of(const Method& m) {
    return m.read ? "selection" : m.traits.pool == Pool::decode ? "pinned" : "evictable";
  }

  // What a method does beside choosing what stays; the last of these that it does.
  static std::string class_of(const Method& m) {
    const Rewriting rewriting = m.rewrite ? m.rewrite->info->rewriting : Rewriting::encoding;
    return m.compensate || rewriting == Rewriting::correction ? "correction"
           : m.read                                           ? "selection"
           : rewriting == Rewriting::merging                  ? "merging"
           : m.rewrite                                        ? "encoding"
                                                              : "eviction";
  }

  void check_memory() const {
    for (const auto& input : inputs_) {
      cells_that_fit(*input);
    }
  }

  // How many cells may run beside each other in the memory that the user allows.
  std::size_t cells_that_fit(const Input& input) const {
    const TraceInfo& info = input.reader.info();
    const MemoryNeed need =
        memory_need({input.n_tokens, input.n_steps(), info.n_heads, info.n_kv_heads, info.head_dim, info.v_head_dim},
                    request_.metrics, compensators_.size());
    const double memory = memory_allowed(request_.memory);
    const std::size_t n = need.cells_in(memory);
    if (n == 0) {
      throw ConfigError(
          fmt::format("{}: one method on one layer needs about {:.0f} KiB, more than the {:.0f} KiB "
                      "allowed; raise --memory",
                      info.path.string(), (need.shared + need.own) / 1024, memory / 1024));
    }
    return n;
  }

  // The budgets that a method has columns for.
  std::vector<std::string> budgets_of(const Method& m) const {
    std::vector<std::string> all;
    for (const Column& c : columns_) {
      if (c.method == &m && c.budget.unit != Budget::Unit::none) {
        all.push_back(c.budget.text);
      }
    }
    return all;
  }

  // Path and hash of every table that a part's values come from.
  static json value_tables(const PartUse& part) {
    json tables = json::object();
    for (const Setting& s : part.settings) {
      if (s.table) {
        tables[s.table->path] = s.table->hash;
      }
    }
    return tables;
  }

  std::string run_json() const {
    json j;
    j["tool"] = "kvreplay";
    j["version"] = kVersion;
    j["git"] = kGitHash;
    j["build_flags"] = kBuildFlags;
    j["argv"] = request_.argv;
    j["host"] = host_name();
    j["threads"] = request_.threads;
    j["seed"] = request_.seed;
    j["complete"] = !outcome_.interrupted && outcome_.failed.empty();
    j["failed"] = outcome_.failed;
    j["started_utc"] = started_;
    j["wall_s"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    j["open_loop"] = kOpenLoop;
    for (const auto& input : inputs_) {
      const TraceInfo& info = input->reader.info();
      json skipped = json::array();
      for (const auto& [layer, reason] : input->skipped) {
        skipped.push_back({{"layer", layer}, {"reason", reason}});
      }
      json compensators = json::array();
      for (const PartUse& c : compensators_) {
        if (info.logit_softcap == 0) {
          compensators.push_back(canonical(c));
        }
      }
      j["traces"].push_back({{"path", info.path.string()},
                             {"stem", info.stem},
                             {"name", info.model_name},
                             {"content_hash", info.content_hash},
                             {"model_name", info.model_name},
                             {"architecture", info.architecture},
                             {"generator", info.generator},
                             {"provenance", info.provenance},
                             {"n_tokens", input->n_tokens},
                             {"prompt_len", input->prompt_len},
                             {"element", name_of(info.element)},
                             {"head_dim", info.head_dim},
                             {"v_head_dim", info.v_head_dim},
                             {"n_heads", info.n_heads},
                             {"n_kv_heads", info.n_kv_heads},
                             {"layers", input->layers},
                             {"layers_skipped", skipped},
                             {"compensators", compensators}});
    }
    for (const auto& m : methods_) {
      const Preset* preset = find_preset(m->preset);
      json tables = json::object();
      for (const PartUse* part : m->parts()) {
        tables.update(value_tables(*part));
      }
      j["methods"].push_back({{"label", m->label},
                              {"method", m->name},
                              {"preset", m->preset},
                              {"group", group_of(*m)},
                              {"class", class_of(*m)},
                              {"foresight", foresight_name(m->foresight())},
                              {"paper", preset ? preset->paper : m->select.info->paper},
                              {"deviation", preset ? preset->deviation : m->select.info->deviation},
                              {"budgets", budgets_of(*m)},
                              {"value_tables", tables}});
    }
    j["table_files"] = json::object();  // where a table lay that is not called like its file
    for (const auto& [name, file] : request_.tables) {
      j["table_files"][name] = file.string();
    }
    j["plugins"] = plugins_json();
    j["budgets"] = budgets_;
    j["compensators"] = json::array();
    j["compensator_tables"] = json::object();
    for (const PartUse& c : compensators_) {
      j["compensator_tables"].update(value_tables(c));
    }
    for (const PartUse& c : compensators_) {
      j["compensators"].push_back(canonical(c));
    }
    j["metrics"] = json::array();
    for (const MetricInfo& i : all_metrics()) {
      if (request_.metrics.has(i.metric)) {
        j["metrics"].push_back(i.name);
      }
    }
    j["n_checkpoints"] = request_.n_checkpoints;
    j["block_steps"] = kBlockSteps;
    return j.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
  }

  const RunRequest& request_;
  std::chrono::steady_clock::time_point start_;
  std::string started_;
  std::vector<std::unique_ptr<Method>> methods_;
  std::vector<std::string> budgets_;  // asked for, of all methods or of one
  std::vector<PartUse> compensators_;
  std::vector<Column> columns_;
  std::vector<std::unique_ptr<Input>> inputs_;
  std::optional<ResultsWriter> writer_;  // none: nothing is written
  RunOutcome outcome_;
  double total_ = 0;  // decode steps of one method, in all
};

}  // namespace

TableReader table_reader(const std::map<std::string, fs::path>& tables) {
  return [tables](const std::string& name) {
    const auto it = tables.find(name);
    ValueTable table = read_value_table(it == tables.end() ? name : it->second.string());
    table.path = name;
    return table;
  };
}

RunOutcome run(const RunRequest& request) { return Run(request)(); }

void check(const RunRequest& request) { Run(request).check(); }

std::size_t MemoryNeed::cells_in(double bytes) const {
  return bytes < shared + own ? 0 : std::size_t(std::max(1.0, std::min((bytes - shared) / own, 1e6)));
}

MemoryNeed memory_need(const LayerExtent& e, const MetricSet& metrics, std::size_t n_compensators) {
  const int group_size = e.n_heads / e.n_kv_heads;
  const double n = e.n_tokens, steps = e.n_steps, rows = double(kBlockSteps) * group_size,
               dims = e.head_dim + e.v_head_dim;
  const double shared =
      4.0 * e.n_kv_heads * (n * dims + n * group_size * e.head_dim + 2 * n * (rows + 32) + 6 * rows * e.v_head_dim);
  double series = 0;  // numbers per step
  for (const MetricInfo& i : all_metrics()) {
    if (!metrics.has(i.metric) || i.at_checkpoints || i.at_end) {
      continue;
    }
    const double heads = i.level == Level::query_head ? e.n_heads : i.level == Level::kv_head ? e.n_kv_heads : 1;
    series += heads * (i.per_compensator ? double(n_compensators) : 1);
  }
  return {shared, 4 * series * steps + 48 * n * e.n_kv_heads + 16.0 * e.n_kv_heads * dims * dims};
}

double memory_allowed(std::uint64_t asked) {
  return asked > 0 ? double(asked) : 0.75 * double(::sysconf(_SC_AVPHYS_PAGES)) * double(::sysconf(_SC_PAGESIZE));
}

std::uint64_t parse_bytes(const std::string& option, const std::string& text) {
  static constexpr std::pair<std::string_view, double> kUnits[] = {
      {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}, {"TiB", 1099511627776.0}, {"B", 1.0}};
  for (const auto& [unit, factor] : kUnits) {
    if (text.size() <= unit.size() || !text.ends_with(unit)) {
      continue;
    }
    const std::string digits = text.substr(0, text.size() - unit.size());
    char* end = nullptr;
    const double x = std::strtod(digits.c_str(), &end);
    if (*end == '\0' && x > 0 && x * factor < 1e18) {
      return std::uint64_t(x * factor);
    }
    break;
  }
  throw ConfigError(option + ": '" + text + "' is no size; write for example 800MiB or 4GiB");
}

std::vector<int> parse_integers(const std::string& option, const std::string& text) {
  std::vector<int> all;
  const auto refuse = [&]() -> void {
    throw ConfigError(option + ": '" + text + "' is no list of numbers; write for example 0,4-7");
  };
  const auto number = [&](const std::string& s) {
    if (s.empty() || s.size() > 9 || s.find_first_not_of("0123456789") != std::string::npos) {
      refuse();
    }
    return std::stoi(s);
  };
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string piece = text.substr(begin, end - begin);
    const std::size_t dash = piece.find('-');
    const int first = number(piece.substr(0, dash));
    const int last = dash == std::string::npos ? first : number(piece.substr(dash + 1));
    constexpr std::size_t kMost = 1000000;  // a list of ranges could ask for any amount of memory
    if (last < first || all.size() + static_cast<std::size_t>(last - first) > kMost) {
      refuse();
    }
    for (int i = first; i <= last; ++i) {
      all.push_back(i);
    }
    begin = end + 1;
  }
  return all;
}

// {"0": 0.9, "1": [0.8, 0.7]}: model layer number to one value, or one per KV head.
ValueTable read_value_table(const std::string& path) {
  const std::string text = read_whole(path);
  ValueTable table{.path = path, .hash = sha256(text), .layers = {}, .values = {}};
  const json j = json::parse(text, nullptr, false);
  if (!j.is_object() || j.empty()) {
    throw ConfigError(path + ": expected a JSON object of layer numbers, as {\"0\": 0.9, \"1\": [0.8, 0.7]}");
  }
  for (const auto& [key, value] : j.items()) {
    if (key.empty() || key.find_first_not_of("0123456789") != std::string::npos) {
      throw ConfigError(path + ": '" + key + "' is no layer number");
    }
    table.layers.push_back(parse_integers(path, key).front());
    std::vector<double>& row = table.values.emplace_back();
    for (const json& x : value.is_array() ? value : json::array({value})) {
      if (!x.is_number()) {
        throw ConfigError(path + ": the value of layer " + key + " is not a number");
      }
      row.push_back(x.get<double>());
    }
    if (row.empty()) {
      throw ConfigError(path + ": layer " + key + " has no value");
    }
  }
  return table;
}

}  // namespace kvreplay
