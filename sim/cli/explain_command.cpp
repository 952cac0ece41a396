#include "sim/cli/explain_command.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "analysis/explain.hpp"
#include "policies/errors.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/cli/exit.hpp"
#include "sim/cli/progress.hpp"
#include "sim/cli/python.hpp"
#include "sim/cli/stop.hpp"

namespace kvreplay {
namespace {

struct Options {
  std::string results, method, against, budget, layers, traces_in, memory, out;
  std::vector<std::string> traces;
  int top = 200, threads = 0;
  bool json = false;
};

ExplainRequest request_of(const Options& o) {
  ExplainRequest r;
  r.results = o.results;
  r.method = o.method;
  r.against = o.against;
  r.budget = o.budget;
  r.traces = o.traces;
  r.traces_in = o.traces_in;
  if (!o.layers.empty()) {
    r.layers = parse_integers("--layers", o.layers);
  }
  if (!o.memory.empty()) {
    r.memory = parse_bytes("--memory", o.memory);
  }
  r.top = o.top;
  r.threads = threads_or_all(o.threads);
  r.argv = command_line();
  r.stop = &stop_requested;
  return r;
}

}  // namespace

void add_explain_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("explain", "Say which heads, steps and tokens a method's error comes from");
  auto o = std::make_shared<Options>();
  command->add_option("DIR", o->results, "Results folder that `kvreplay run --out` wrote")->required();
  command->add_option("-m,--method", o->method, "A method of the run, as it was typed or canonical")->required();
  add_plugin_option(command);
  command->add_option("--against", o->against, "Another one, explained beside it");
  command->add_option("-b,--budget", o->budget, "A budget of the run, as it was asked (default: the middle one)");
  command->add_option("--trace", o->traces, "Only these traces (default: all of one model, else the first)")
      ->delimiter(',');
  command->add_option("--layers", o->layers, "The model's layer numbers, as 0,4-7 (default: all of the run)");
  command->add_option("--traces-in", o->traces_in,
                      "Folder where the traces lie now (default: where the run read them)");
  CLI::Option* top =
      command->add_option("--top", o->top, "Tokens listed per head in tokens.csv, the rest in one row (default: 200)");
  CLI::Option* threads = command->add_option("-j,--threads", o->threads, "Threads (default: all)");
  command->add_option("--memory", o->memory,
                      "Memory to stay within, as 8GiB (default: three quarters of what is free)");
  command->add_option("-o,--out", o->out, "The page (default: DIR/explain/METHOD.../explain.html)");
  command->add_flag("--json", o->json, "Print the numbers as JSON instead of text");
  command->callback([o, top, threads] {
    check_range(top, o->top, 1, 1000000);
    check_range(threads, o->threads, 1, 1024);
    ExplainRequest request = request_of(*o);
    stop_on_signals();
    ExplainOutcome outcome;
    {
      Progress progress;
      request.progress = [&](double done, double total, const std::string& what) { progress.at(done, total, what); };
      outcome = explain(request);
    }
    if (!outcome.run.failed.empty()) {
      fail(outcome.run.failed, outcome.run.trace_failed, "more");
    }
    if (outcome.run.interrupted) {
      say("stopped before the end; nothing is written");
      throw Exit{kInterrupted};
    }
    std::vector<std::string> arguments{"explain", outcome.folder.string()};
    if (!o->out.empty()) {
      arguments.push_back("--out=" + o->out);
    }
    if (o->json) {
      arguments.emplace_back("--json");
    }
    become_python(std::move(arguments));
  });
}

}  // namespace kvreplay
