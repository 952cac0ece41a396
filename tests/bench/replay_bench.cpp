// Times the engine on a layer of random numbers. Prints one JSON object per measurement; table.py
// makes the table.
//
//   replay_bench                          the engine's figures
//   replay_bench --method M --metrics X   one method's share of the exact pass, for work on its speed
//   replay_bench --classes                one more configuration of each class of method; --class NAME=METHOD, once or
//                                         more, for others than the representatives below
//   replay_bench --write-trace F          only writes the layer as a trace, for PyTorch and for the memory figure
//   replay_bench --read-trace F           only reads and widens all of a trace's layer 0
#include <CLI/CLI.hpp>
#include <chrono>
#include <deque>
#include <iostream>
#include <nlohmann/json.hpp>

#include "policies/catalogue.hpp"
#include "sim/replay.hpp"
#include "tests/bench/random_layer.hpp"
#include "traces/reader.hpp"

using namespace kvreplay;
using nlohmann::json;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Eigen's own float32 rate at the shape of one block: (m, k) x (k, n).
double product_rate(int m, int k, int n) {
  const MatF a = MatF::Random(m, k), b = MatF::Random(n, k);
  MatF c(m, n);
  double best = 1e9;
  for (int i = 0; i < 30; ++i) {
    const double start = now();
    c.noalias() = a * b.transpose();
    best = std::min(best, now() - start);
  }
  return 2.0 * m * n * k / best;
}

// Both products of exact attention, counted causally.
double exact_flop(const Layer& layer) {
  double flop = 0;
  for (Pos t = layer.prompt_len; t < layer.n_tokens; ++t) {
    flop += 2.0 * layer.n_heads * (layer.head_dim + layer.v_head_dim) * (t + 1);
  }
  return flop;
}

// Every metric of every step that 'all' has: all but those at checkpoints, whose cost does not grow
// with the number of steps.
std::string step_metrics() {
  std::string list;
  for (const MetricInfo& metric : all_metrics()) {
    if (!metric.at_checkpoints && !metric.diagnostic) {
      list += (list.empty() ? "" : ",") + std::string(metric.name);
    }
  }
  return list;
}

struct Case {
  std::string name, metrics = "all";  // "all", "steps" or a list
  std::vector<std::string> methods;
  std::vector<std::string> compensators = {};
  int threads = 1;
};

double mean_error(const CellResult& cell) {
  if (!cell.error.empty()) {
    throw std::runtime_error(cell.error);
  }
  const Series* series = cell.find(Metric::error);
  if (series == nullptr) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  double sum = 0;
  for (float x : series->values) {
    sum += x;
  }
  return sum / static_cast<double>(series->values.size());
}

// Best of `repeat` runs, by wall time.
json measure(const Layer& layer, const Case& c, int budget, int repeat) {
  std::deque<Method> methods, compensators;
  std::vector<Job> jobs;
  for (const std::string& text : c.methods) {
    jobs.push_back({.method = &methods.emplace_back(parse_method(text)), .budget = budget});
  }
  ReplayOptions options;
  options.metrics = MetricSet::parse(c.metrics == "steps" ? step_metrics() : c.metrics);
  options.threads = c.threads;
  for (const std::string& name : c.compensators) {
    options.compensators.push_back(&*compensators.emplace_back(parse_method("full+" + name)).compensate);
  }
  json best;
  for (int i = 0; i < repeat; ++i) {
    const double start = now();
    const LayerResult result = replay(layer, jobs, options);
    const double seconds = now() - start;
    if (!best.is_null() && best["seconds"] <= seconds) {
      continue;
    }
    double own = 0;
    json errors = json::array(), each = json::array();
    for (const CellResult& cell : result.cells) {
      own += cell.seconds;
      each.push_back(cell.seconds);
      errors.push_back(mean_error(cell));
    }
    best = {{"case", c.name},
            {"metrics", c.metrics},
            {"threads", c.threads},
            {"seconds", seconds},
            {"exact", result.exact_seconds},
            {"prefill", result.prefill_seconds},
            {"methods", own},
            {"each", each},
            {"error", errors}};
  }
  return best;
}

std::vector<std::string> sweep(const std::string& prefix, const std::vector<std::string>& values) {
  std::vector<std::string> methods;
  for (const std::string& value : values) {
    methods.push_back(prefix + value);
  }
  return methods;
}

void measure_engine(const Layer& layer, int budget, int repeat, const std::vector<std::string>& windows,
                    const std::vector<std::string>& alphas) {
  const std::vector<std::string> momentum16 = sweep("momentum:alpha=", alphas), h2o16 = sweep("h2o:window=", windows);
  const auto say = [](const json& line) { std::cout << line.dump() << std::endl; };
  say({{"case", "product"}, {"rate", product_rate(256, 128, 8192)}, {"exact_flop", exact_flop(layer)}});
  for (const std::string metrics : {"all", "steps", "error,evicted_mass"}) {
    const auto run = [&](const std::string& name, std::vector<std::string> methods,
                         std::vector<std::string> compensators = {}) {
      say(measure(layer, {name, metrics, std::move(methods), std::move(compensators)}, budget, repeat));
    };
    run("h2o", {"h2o"});
    run("h2o, 3 compensators", {"h2o"}, {"mean", "moments", "gaussian"});
    run("residual", {"residual"});
    run("h2o x 16", h2o16);
    run("momentum x 16", momentum16);
    double alone = 0;
    for (const std::string& method : momentum16) {
      alone += measure(layer, {method, metrics, {method}}, budget, 1)["seconds"].get<double>();
    }
    say({{"case", "16 x momentum"}, {"metrics", metrics}, {"threads", 1}, {"seconds", alone}});
    say(measure(layer, {.name = "momentum x 16", .metrics = metrics, .methods = momentum16, .threads = 2}, budget,
                repeat));
  }
  // The same as torch_replay.py does.
  for (const auto& [name, methods] : {std::pair{"h2o x 1", std::vector{h2o16.back()}},
                                      {"h2o x 16", h2o16},
                                      {"momentum x 1", {momentum16.back()}},
                                      {"momentum x 16", momentum16}}) {
    say(measure(layer, {.name = name, .metrics = "error", .methods = methods}, budget, repeat));
  }
}

// Class and method; a method that begins with + is a compensator, measured beside h2o.
struct Representative {
  std::string kind, method;
};

std::vector<Representative> representatives(const std::vector<std::string>& given) {
  if (given.empty()) {
    std::vector<Representative> all{{"eviction", "h2o"},
                                    {"periodic with re-scoring", "snapkv:decode=evict,interval=128"},
                                    {"quantising", "streaming+kivi"},
                                    {"per-step selection", "full+quest"},
                                    {"compensator", "+moments"}};
    for (const PartInfo* part : all_parts()) {
      if (part->role == Role::rewrite && part->rewriting == Rewriting::merging) {
        all.insert(all.begin() + 2, {"merging", "h2o+" + std::string(part->name)});
        break;
      }
    }
    return all;
  }
  std::vector<Representative> out;
  for (const std::string& text : given) {
    const std::size_t equals = text.find('=');
    if (equals == std::string::npos) {
      throw std::runtime_error("--class " + text + " has no method; write NAME=METHOD, as merging=h2o+cam");
    }
    out.push_back({text.substr(0, equals), text.substr(equals + 1)});
  }
  return out;
}

// What one more configuration of each class costs, as a share of the exact pass that all share. One run has them all: a
// cell's seconds are its own.
void measure_classes(const Layer& layer, int budget, int repeat, const std::vector<Representative>& classes) {
  const std::string base = "h2o";
  std::vector<std::string> methods{base};
  for (const Representative& c : classes) {
    if (c.method.front() != '+') {
      methods.push_back(c.method);
    }
  }
  for (const std::string metrics : {"all", "steps", "error,evicted_mass"}) {
    const json together = measure(layer, {.name = "classes", .metrics = metrics, .methods = methods}, budget, repeat);
    const auto exact = together["exact"].get<double>();
    std::size_t next = 1;
    for (const Representative& c : classes) {
      double seconds = 0;
      if (c.method.front() == '+') {
        const json with = measure(
            layer, {.name = "compensator", .metrics = metrics, .methods = {base}, .compensators = {c.method.substr(1)}},
            budget, repeat);
        seconds = with["methods"].get<double>() - together["each"][0].get<double>();
      } else {
        seconds = together["each"][next++].get<double>();
      }
      std::cout << json{{"case", "one more"}, {"class", c.kind}, {"method", c.method},      {"metrics", metrics},
                        {"seconds", seconds}, {"exact", exact},  {"share", seconds / exact}}
                       .dump()
                << std::endl;
    }
  }
}

void measure_reading(const std::string& path) {
  const TraceReader reader(path);
  const TraceInfo& info = reader.info();
  std::vector<float> rows(std::size_t(info.n_tokens) * std::size_t(std::max(info.head_dim, info.v_head_dim)));
  const std::span<float> k_rows(rows.data(), std::size_t(info.n_tokens) * std::size_t(info.head_dim));
  const std::span<float> v_rows(rows.data(), std::size_t(info.n_tokens) * std::size_t(info.v_head_dim));
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    const double start = now();
    for (int h = 0; h < info.n_heads; ++h) {
      reader.read_q(0, h, 0, info.n_tokens, k_rows);
    }
    for (int h = 0; h < info.n_kv_heads; ++h) {
      reader.read_k(0, h, 0, info.n_tokens, k_rows);
      reader.read_v(0, h, 0, info.n_tokens, v_rows);
    }
    best = std::min(best, now() - start);
  }
  const double numbers = double(info.n_tokens) * (double(info.n_heads + info.n_kv_heads) * info.head_dim +
                                                  double(info.n_kv_heads) * info.v_head_dim);
  std::cout << json{{"case", "read"},
                    {"element", name_of(info.element)},
                    {"bytes_per_second", numbers * double(size_of(info.element)) / best}}
                   .dump()
            << std::endl;
}

}  // namespace

int main(int argc, char** argv) try {
  int tokens = 8192, prompt_len = 4096, kv_heads = 2, group = 4, head_dim = 128, budget = 1024, repeat = 2;
  std::string write_to, read_from, element = "f32", metrics = "steps";
  std::vector<std::string> methods, classes;
  bool all_classes = false;
  std::vector<std::string> windows{"512"}, alphas{"0.97"};
  CLI::App app("Times the replay engine on a layer of random numbers");
  app.add_option("--tokens", tokens);
  app.add_option("--prompt-len", prompt_len);
  app.add_option("--kv-heads", kv_heads);
  app.add_option("--group", group);
  app.add_option("--head-dim", head_dim);
  app.add_option("--budget", budget);
  app.add_option("--windows", windows, "of the h2o configurations; the last one also runs alone")->delimiter(',');
  app.add_option("--alphas", alphas, "of the momentum configurations; likewise")->delimiter(',');
  app.add_option("--repeat", repeat, "every figure is the best of so many runs");
  app.add_option("--element", element, "of the trace written: f16, bf16, f32");
  app.add_option("--method", methods, "each is measured alone");
  app.add_option("--class", classes,
                 "NAME=METHOD: one more configuration of a class; +PART is a compensator beside h2o")
      ->take_all();
  app.add_flag("--classes", all_classes, "the same for representatives of every class");
  app.add_option("--metrics", metrics, "of --method: all, steps (all but those at checkpoints) or a list");
  app.add_option("--write-trace", write_to);
  app.add_option("--read-trace", read_from);
  CLI11_PARSE(app, argc, argv);

  if (!read_from.empty()) {
    measure_reading(read_from);
    return 0;
  }
  const Layer layer = random_layer(kv_heads, group, head_dim, tokens, prompt_len, 1);
  if (!write_to.empty()) {
    write_trace(write_to, layer, element_type_of(element));
  } else if (all_classes || !classes.empty()) {
    measure_classes(layer, budget, repeat, representatives(classes));
  } else if (!methods.empty()) {
    for (const std::string& method : methods) {
      std::cout << measure(layer, {method, metrics, {method}}, budget, repeat).dump() << std::endl;
    }
  } else {
    measure_engine(layer, budget, repeat, windows, alphas);
  }
  return 0;
} catch (const std::exception& e) {
  std::cerr << "replay_bench: " << e.what() << '\n';
  return 1;
}
