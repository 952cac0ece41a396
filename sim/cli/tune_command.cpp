#include "sim/cli/tune_command.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>

#include "analysis/tune.hpp"
#include "policies/errors.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/cli/exit.hpp"
#include "sim/cli/progress.hpp"
#include "sim/cli/python.hpp"
#include "sim/cli/stop.hpp"
#include "sim/run.hpp"

namespace kvreplay {
namespace {

struct Options {
  std::vector<std::string> traces, holdout, params, budgets;
  std::string method, objective = "error_output", layers, memory, out;
  int candidates = 32, prompt_len = 0, max_steps = 0, threads = 0;
  std::int64_t seed = 0;
  double holdout_steps = 0;
  bool force = false, json = false;
};

TuneRequest request_of(const Options& o) {
  TuneRequest r;
  r.traces.assign(o.traces.begin(), o.traces.end());
  r.holdout.assign(o.holdout.begin(), o.holdout.end());
  r.holdout_share = o.holdout_steps;
  r.method = o.method;
  r.params = o.params;
  for (const std::string& list : o.budgets) {
    for (std::string& b : comma_list(list)) {
      r.budgets.push_back(std::move(b));
    }
  }
  r.objective = o.objective;
  r.n_candidates = o.candidates;
  if (!o.layers.empty()) {
    r.layers = parse_integers("--layers", o.layers);
  }
  r.prompt_len = o.prompt_len;
  r.max_steps = o.max_steps;
  r.threads = threads_or_all(o.threads);
  r.seed = std::uint64_t(o.seed);
  if (!o.memory.empty()) {
    r.memory = parse_bytes("--memory", o.memory);
  }
  r.out = o.out;
  r.force = o.force;
  r.argv = command_line();
  r.stop = &stop_requested;
  return r;
}

}  // namespace

void add_tune_command(CLI::App& app) {
  CLI::App* tune_app = app.add_subcommand("tune", "Find the best values of a method's parameters, with intervals");
  auto o = std::make_shared<Options>();
  tune_app->add_option("-m,--method", o->method, "The method, as moment-kv or h2o:sink=4+adakv")->required();
  add_plugin_option(tune_app);
  tune_app
      ->add_option("-p,--param", o->params,
                   "What to tune: NAME=LO:HI[:lin|log|one_minus] or NAME=a,b,c; several are tuned together")
      ->required();
  tune_app->add_option("-b,--budget", o->budgets, "As in run; each budget has an optimum of its own");
  tune_app->add_option("--objective", o->objective,
                       "What to make small: [WEIGHT*]METRIC[.COMPENSATOR][:mean|std|p50|p90|p99|max], joined by +; "
                       "@bytes=64KiB compares at equal bytes (default: error_output)");
  tune_app->add_option("--traces", o->traces, "Traces that are tuned on (HDF5)")->required();
  tune_app->add_option("--holdout", o->holdout, "Traces on which the gain is measured, of the same model");
  CLI::Option* holdout_steps = tune_app->add_option(
      "--holdout-steps", o->holdout_steps, "Or: hold out the last share of the decode steps of --traces, as 0.5");
  CLI::Option* candidates =
      tune_app->add_option("--candidates", o->candidates, "Values tried, beside the method as it is (default: 32)");
  tune_app->add_option("--layers", o->layers, "The model's layer numbers, as 0,4-7 (default: all in the trace)");
  CLI::Option* prompt_len =
      tune_app->add_option("--prompt-len", o->prompt_len, "Move the boundary between prompt and decode");
  CLI::Option* max_steps =
      tune_app->add_option("--max-steps", o->max_steps, "Replay only the first so many decode steps (default: all)");
  CLI::Option* threads = tune_app->add_option("-j,--threads", o->threads, "Threads (default: all)");
  CLI::Option* seed = tune_app->add_option("--seed", o->seed, "Seed of the search and of random methods (default: 0)");
  tune_app->add_option("--memory", o->memory,
                       "Memory to stay within, as 8GiB (default: three quarters of what is free)");
  tune_app->add_option("-o,--out", o->out, "Folder for what is found")->required();
  tune_app->add_flag("--force", o->force, "Write into a folder that is not empty");
  tune_app->add_flag("--json", o->json, "Print the result as JSON");
  tune_app->callback([=] {
    check_range(candidates, o->candidates, 1, 4096);
    check_range(prompt_len, o->prompt_len, 1, 1 << 30);
    check_range(max_steps, o->max_steps, 1, 1 << 30);
    check_range(threads, o->threads, 1, 1024);
    check_range(seed, o->seed, 0, std::numeric_limits<std::int64_t>::max());
    if (holdout_steps->count() > 0 && !(o->holdout_steps > 0 && o->holdout_steps < 1)) {
      throw ConfigError(
          fmt::format("--holdout-steps: {} is not allowed, it must be a share above 0 and below 1", o->holdout_steps));
    }
    if (o->out.empty()) {
      throw ConfigError("--out: the folder's name is empty");
    }
    TuneRequest request = request_of(*o);
    stop_on_signals();
    TuneOutcome outcome;
    {
      Progress progress;
      request.progress = [&](double done, double total, const std::string& what) { progress.at(done, total, what); };
      outcome = tune(request);
    }
    if (!outcome.failed.empty()) {
      fail(outcome.failed, outcome.trace_failed, "more");
    }
    if (outcome.interrupted) {
      throw Exit{kInterrupted};
    }
    std::vector<std::string> arguments{"tune", o->out};
    if (o->json) {
      arguments.emplace_back("--json");
    }
    become_python(std::move(arguments));  // the statistics, from what lies in --out
  });
}

}  // namespace kvreplay
