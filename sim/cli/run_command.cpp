#include "sim/cli/run_command.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <limits>
#include <memory>
#include <utility>

#include "analysis/tuned_methods.hpp"
#include "policies/errors.hpp"
#include "policies/method.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/cli/exit.hpp"
#include "sim/cli/progress.hpp"
#include "sim/cli/stop.hpp"
#include "sim/run.hpp"

namespace kvreplay {
namespace {

struct Options {
  std::vector<std::string> traces, methods, budgets;
  std::string compensators, metrics = "all", layers, detail, steps, memory, out, params_from;
  int prompt_len = 0, max_steps = 0, threads = 0, checkpoints = 16;
  std::int64_t seed = 0;
  bool force = false;
};

// The methods of a tuned.json, each at the budgets it was chosen for (of those asked for); others run at all of them.
void add_tuned(RunRequest& r, const std::string& file) {
  const TunedMethods tuned = read_tuned(file);
  const std::vector<std::string> asked = r.budgets.empty() ? tuned.budgets : r.budgets;
  const std::vector<std::string> others = std::exchange(r.methods, {});
  for (const std::string& method : tuned.methods) {
    const std::vector<std::string>& own = tuned.budgets_of.at(method);
    std::vector<std::string> both;
    std::copy_if(own.begin(), own.end(), std::back_inserter(both),
                 [&](const std::string& b) { return std::find(asked.begin(), asked.end(), b) != asked.end(); });
    const bool also_asked = std::find(others.begin(), others.end(), method) != others.end();
    if (!both.empty() || own.empty() || also_asked) {
      r.methods.push_back(method);
      r.budgets_of[method] = also_asked ? asked : both;
    }
  }
  if (r.methods.empty()) {
    throw ConfigError(fmt::format("--params-from {} has no method for budget {}; it has {}", file,
                                  fmt::join(asked, " or "), fmt::join(tuned.budgets, ", ")));
  }
  for (const std::string& method : others) {
    if (std::find(r.methods.begin(), r.methods.end(), method) == r.methods.end()) {
      r.methods.push_back(method);
    }
  }
  r.budgets = asked;
  r.tables = tuned.tables;
}

RunRequest request_of(const Options& o, bool compensators_given) {
  RunRequest r;
  r.traces.assign(o.traces.begin(), o.traces.end());
  for (const std::string& text : o.methods) {
    for (std::string& m : split_methods(text)) {
      r.methods.push_back(std::move(m));
    }
  }
  for (const std::string& text : o.budgets) {
    for (std::string& b : comma_list(text)) {
      r.budgets.push_back(std::move(b));
    }
  }
  if (!o.params_from.empty()) {
    add_tuned(r, o.params_from);
  }
  if (r.methods.empty()) {
    throw ConfigError(
        "no method is given; add for example --method h2o, or --params-from with what kvreplay tune wrote");
  }
  r.compensators_given = compensators_given;
  if (o.compensators != "none") {
    r.compensators = split_methods(o.compensators);
  }
  r.metrics = MetricSet::parse(o.metrics);
  if (!o.layers.empty()) {
    r.layers = parse_integers("--layers", o.layers);
  }
  r.prompt_len = o.prompt_len;
  r.max_steps = o.max_steps;
  for (const std::string& d : o.detail.empty() ? std::vector<std::string>{} : comma_list(o.detail)) {
    if (d == "steps") {
      r.detail.steps = true;
    } else if (d == "retained") {
      r.detail.retained = true;
    } else if (d == "outputs") {
      r.detail.outputs = true;
    } else {
      throw ConfigError("--detail: '" + d + "' is none of steps, retained, outputs");
    }
  }
  if (r.detail.outputs != !o.steps.empty()) {
    throw ConfigError("--detail outputs and --steps LIST go together: outputs are written at these decode steps");
  }
  if (!o.steps.empty()) {
    r.output_steps = parse_integers("--steps", o.steps);
    std::sort(r.output_steps.begin(), r.output_steps.end());
    r.output_steps.erase(std::unique(r.output_steps.begin(), r.output_steps.end()), r.output_steps.end());
  }
  r.n_checkpoints = o.checkpoints;
  r.threads = threads_or_all(o.threads);
  r.seed = std::uint64_t(o.seed);
  if (!o.memory.empty()) {
    r.memory = parse_bytes("--memory", o.memory);
  }
  r.out = o.out;
  r.force = o.force;
  r.stop = &stop_requested;
  return r;
}

}  // namespace

void add_run_command(CLI::App& app) {
  CLI::App* run_app = app.add_subcommand("run", "Replay traces under methods and write a results folder");
  auto o = std::make_shared<Options>();
  run_app->add_option("traces", o->traces, "Trace files (HDF5)")->required();
  run_app->add_option(
      "-m,--method", o->methods,
      "Methods, as 'h2o:window=128+adakv', or 'snapkv:budget=256+adakv/momentum', which cuts the prompt by "
      "what is before the '/' and the rest by what is after it; several, or a comma list");
  add_plugin_option(run_app);
  run_app->add_option("--params-from", o->params_from,
                      "Methods that `kvreplay tune` chose (its tuned.json), each at its budgets; --method adds others");
  run_app->add_option("-b,--budget", o->budgets,
                      "Tokens (128), share of the prompt (25% or 0.25) or bytes per KV head (64KiB); a comma list");
  o->compensators = "mean,moments,gaussian";
  CLI::Option* compensators =
      run_app->add_option("-c,--compensators", o->compensators,
                          "Measured beside every method; 'none' for none (default: mean,moments,gaussian)");
  run_app->add_option("--metrics", o->metrics,
                      "What to measure; fewer is faster (default: all, which leaves out the diagnostics; "
                      "all,diagnostics has both)");
  run_app->add_option("--layers", o->layers, "The model's layer numbers, as 0,4-7 (default: all in the trace)");
  CLI::Option* prompt_len =
      run_app->add_option("--prompt-len", o->prompt_len, "Move the boundary between prompt and decode");
  CLI::Option* max_steps =
      run_app->add_option("--max-steps", o->max_steps, "Replay only the first so many decode steps (default: all)");
  run_app->add_option("--detail", o->detail, "Also write steps, retained, outputs (a comma list)");
  run_app->add_option("--steps", o->steps, "Decode steps of --detail outputs, as 0,100-103");
  CLI::Option* checkpoints =
      run_app->add_option("--checkpoints", o->checkpoints, "Steps at which subspaces are compared (default: 16)");
  CLI::Option* threads = run_app->add_option("-j,--threads", o->threads, "Threads (default: all)");
  CLI::Option* seed = run_app->add_option("--seed", o->seed, "Seed of random methods and splits (default: 0)");
  run_app->add_option("--memory", o->memory,
                      "Memory to stay within, as 8GiB (default: three quarters of what is free)");
  run_app->add_option("-o,--out", o->out, "Folder for the results")->required();
  run_app->add_flag("--force", o->force, "Write into a folder that is not empty");
  run_app->callback([=] {
    check_range(prompt_len, o->prompt_len, 1, 1 << 30);
    check_range(max_steps, o->max_steps, 1, 1 << 30);
    check_range(threads, o->threads, 1, 1024);
    check_range(checkpoints, o->checkpoints, 1, 1 << 20);
    check_range(seed, o->seed, 0, std::numeric_limits<std::int64_t>::max());
    if (o->out.empty()) {
      throw ConfigError("--out: the folder's name is empty");
    }
    RunRequest request = request_of(*o, compensators->count() > 0);
    request.argv = command_line();
    stop_on_signals();
    RunOutcome outcome;
    {
      Progress progress;
      request.progress = [&](double done, double total, const std::string& what) { progress.at(done, total, what); };
      outcome = run(request);
    }
    if (!outcome.failed.empty()) {
      fail(outcome.failed, outcome.trace_failed, fmt::format("more, listed in {}/run.json", request.out.string()));
    }
    fmt::print("{} cells in {}\n", outcome.n_cells, request.out.string());
    if (outcome.interrupted) {
      throw Exit{kInterrupted};
    }
  });
}

}  // namespace kvreplay
