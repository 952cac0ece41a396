#include "sim/cli/sweep_command.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "policies/errors.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/cli/exit.hpp"
#include "sim/cli/progress.hpp"
#include "sim/cli/slurm.hpp"
#include "sim/cli/stop.hpp"
#include "sim/run.hpp"
#include "sim/sweep/estimate.hpp"
#include "sim/sweep/merge.hpp"
#include "sim/sweep/ranks.hpp"
#include "sim/sweep/sweep.hpp"

namespace kvreplay {
namespace {

constexpr std::size_t kMostSentences = 20;
constexpr const char* kAuto = "auto";

struct SweepOptions {
  std::string plan, out, memory, slurm;
  std::optional<std::string> shard;
  int threads = 0;
  bool dry_run = false, heads = false;
};

struct StatusOptions {
  std::string folder;
  bool json = false;
};

struct MergeOptions {
  std::vector<std::string> folders;
  std::string out;
};

std::string sentence_of(const Failure& f) {
  return f.n_cells == 1 ? fmt::format("{}: {}", f.first, f.sentence)
                        : fmt::format("{} and {} more cells: {}", f.first, f.n_cells - 1, f.sentence);
}

std::string size_text(double bytes) {
  return bytes < 1e6    ? fmt::format("{:.0f} KiB", bytes / 1024)
         : bytes < 1e9  ? fmt::format("{:.1f} MiB", bytes / 1048576)
         : bytes < 1e13 ? fmt::format("{:.1f} GiB", bytes / 1073741824)
                        : fmt::format("{:.1f} TiB", bytes / 1099511627776.0);
}

std::string time_text(double seconds) {
  return seconds < 100     ? fmt::format("{:.1f} s", seconds)
         : seconds < 6000  ? fmt::format("{:.0f} min", seconds / 60)
         : seconds < 3.6e5 ? fmt::format("{:.1f} h", seconds / 3600)
                           : fmt::format("{:.1f} days", seconds / 86400);
}

std::string share(const Shard& s) { return s.n == 1 ? "" : fmt::format(", of shard {}/{}", s.index, s.n); }

void refuse_no_name(const std::string& out) {  // which would be the current folder
  if (out.empty()) {
    throw ConfigError("--out: the folder's name is empty");
  }
}

SweepRequest request_of(const SweepOptions& o) {
  refuse_no_name(o.out);
  SweepRequest r;
  r.plan = o.plan;
  r.out = o.out;
  r.heads = o.heads;
  r.shard = o.shard ? Shard::parse(*o.shard) : shard_of_environment();
  r.memory = o.memory.empty() ? 0 : parse_bytes("--memory", o.memory);
  r.threads = threads_or_all(o.threads);
  r.argv = command_line();
  r.stop = &stop_requested;
  return r;
}

void print_estimate(const SweepRequest& r) {
  const SweepEstimate e = estimate(r);
  fmt::print("traces   {}, with {} layers\n", e.n_traces, e.n_layers);
  fmt::print("methods  {}, each budget for itself\n", e.n_configs);
  fmt::print("cells    {} to measure{} ({} are done)\n", e.cells.left + e.cells.failed, share(r.shard), e.cells.done);
  fmt::print("units    {}\n", e.n_units);
  if (!e.sample.empty()) {
    fmt::print("memory   {} for the largest unit\n", size_text(e.memory));
    fmt::print("disk     {}\n", size_text(e.disk));
    fmt::print("time     {} with {} threads of this machine\n", time_text(e.seconds), r.threads);
    fmt::print("sample   {}\n", e.sample);
  }
  if (!e.failed.empty()) {
    say("a cell of the sample cannot run: " + e.failed);
  }
}

int n_tasks(const std::string& text) {
  const std::vector<int> n = parse_integers("--emit-slurm", text);
  if (n.size() != 1 || n.front() < 1 || n.front() > 100000) {
    throw ConfigError("--emit-slurm: '" + text + "' is no number of tasks from 1 to 100000");
  }
  return n.front();
}

void print_slurm(const SweepOptions& o, const SweepRequest& r) {
  std::size_t n_layers = 0;
  for (const SweepTrace& t : resolve(r).traces) {
    n_layers += t.layers.size();
  }
  SlurmJob job{.plan = std::filesystem::absolute(r.plan).lexically_normal().string(),
               .out = std::filesystem::absolute(r.out).lexically_normal().string(),
               .n_tasks = o.slurm == kAuto ? int(std::clamp<std::size_t>(n_layers / 8, 1, 64)) : n_tasks(o.slurm),
               .threads = r.threads,
               .memory = o.memory,
               .heads = o.heads};
  fmt::print("{}", sbatch_of(job));
}

void print_outcome(const SweepRequest& r, const SweepOutcome& outcome) {
  for (const std::string& sentence : outcome.damaged) {
    say(sentence);
  }
  for (const auto& [path, sentence] : outcome.failed_traces) {
    say(sentence);
  }
  for (std::size_t i = 0; i < std::min(outcome.failures.size(), kMostSentences); ++i) {
    say(sentence_of(outcome.failures[i]));
  }
  if (outcome.failures.size() > kMostSentences) {
    say(fmt::format("{} more failures, which kvreplay status {} lists", outcome.failures.size() - kMostSentences,
                    r.out.string()));
  }
  fmt::print("{} cells in {}{} ({} were there before)\n", outcome.cells.done, r.out.string(), share(r.shard),
             outcome.n_done_before);
  if (outcome.interrupted) {
    say(fmt::format("interrupted with {} cells left; the same command resumes", outcome.cells.left));
    throw Exit{kInterrupted};
  }
  if (r.shard.n > 1) {
    fmt::print("when all shards are done: kvreplay merge {0} --out {0}\n", r.out.string());
  }
  if (outcome.trace_failed) {
    throw Exit{kTrace};
  }
  if (outcome.cells.failed + outcome.cells.left > 0) {
    throw Exit{kOther};
  }
}

// What a process may take where the user says nothing, as RunRequest::memory.
std::uint64_t free_memory() {
  return std::uint64_t(0.75 * double(::sysconf(_SC_AVPHYS_PAGES)) * double(::sysconf(_SC_PAGESIZE)));
}

void run_sweep(const SweepOptions& o, bool emit_slurm) {
  SweepRequest r = request_of(o);
  if (emit_slurm) {
    print_slurm(o, r);
    return;
  }
  stop_on_signals();
  // A process that was given its part shares nothing with the others.
  const std::unique_ptr<Team> team = o.shard ? std::make_unique<Team>() : team_of_environment();
  if (team->n_here() > 1) {
    r.threads = o.threads > 0 ? o.threads : std::max(1, r.threads / team->n_here());
    r.memory = r.memory > 0 ? r.memory : free_memory() / std::uint64_t(team->n_here());
  }
  SweepOutcome outcome;
  try {
    if (o.dry_run) {  // the others wait for what it says
      if (team->leads()) {
        print_estimate(r);
      }
      team->wait();
      return;
    }
    std::optional<Progress> progress;
    if (team->leads()) {
      progress.emplace();
      r.progress = [&](double done, double total, const std::string& what) { progress->at(done, total, what); };
    }
    outcome = sweep(r, *team);
  } catch (const TeamFailed& failed) {
    throw Exit{ExitCode(failed.code)};
  } catch (...) {
    const Refusal refusal = current_refusal();
    if (team->fail(refusal.code)) {
      say(refusal.sentence);  // before the team parts: a launcher ends all once one has exited so
    }
    throw Exit{refusal.code};
  }
  if (team->leads()) {
    print_outcome(r, outcome);
  }
}

void print_status(const StatusOptions& o) {
  const std::filesystem::path folder = o.folder;
  const Sweep sweep = read_sweep(folder);
  Store store(folder / "items");
  const SweepState state = state_of(sweep, store);
  if (o.json) {
    nlohmann::ordered_json j{{"done", state.counts.done}, {"failed", state.counts.failed}, {"left", state.counts.left}};
    j["failures"] = nlohmann::ordered_json::array();
    for (const Failure& f : state.failures) {
      j["failures"].push_back({{"cells", f.n_cells}, {"first", f.first}, {"why", f.sentence}});
    }
    j["failed_traces"] = nlohmann::ordered_json::array();
    for (const auto& [path, sentence] : sweep.failed_traces) {
      j["failed_traces"].push_back({{"path", path}, {"why", sentence}});
    }
    j["damaged"] = state.damaged;
    fmt::print("{}\n", j.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    return;
  }
  fmt::print("{} of {} cells done, {} failed, {} left\n", state.counts.done, sweep.n_cells(), state.counts.failed,
             state.counts.left);
  for (const Failure& f : state.failures) {
    fmt::print("failed: {}\n", sentence_of(f));
  }
  for (const auto& [path, sentence] : sweep.failed_traces) {
    fmt::print("failed: {}\n", sentence);
  }
  for (const std::string& sentence : state.damaged) {
    fmt::print("{}\n", sentence);
  }
}

void run_merge(const MergeOptions& o) {
  refuse_no_name(o.out);
  const std::filesystem::path out = o.out;
  const SweepState state = merge({o.folders.begin(), o.folders.end()}, out, command_line());
  for (const std::string& sentence : state.damaged) {
    say(sentence);
  }
  if (state.counts.failed + state.counts.left > 0) {
    say(fmt::format("{} cells failed and {} are left; kvreplay status {} says why, and the sweep resumes there",
                    state.counts.failed, state.counts.left, o.out));
  }
  fmt::print("{} cells in {}\n", state.counts.done, (out / "cells.csv").string());
  if (state.counts.failed + state.counts.left > 0) {
    throw Exit{kOther};
  }
}

}  // namespace

void add_sweep_commands(CLI::App& app) {
  CLI::App* sweep_app =
      app.add_subcommand("sweep", "Measure everything that a plan names; what is finished is never done again");
  auto o = std::make_shared<SweepOptions>();
  sweep_app->add_option("plan", o->plan, "What to measure (TOML, docs/sweep.md)")->required();
  sweep_app->add_option("-o,--out", o->out, "Folder of the sweep; the same folder resumes it")->required();
  sweep_app->add_option("--shard", o->shard,
                        "Do only the part i of n, as 0/8 (default: what SLURM_ARRAY_TASK_ID says, else all)");
  sweep_app->add_option("--memory", o->memory,
                        "Memory to stay within, as 8GiB (default: three quarters of what is free)");
  CLI::Option* threads = sweep_app->add_option("-j,--threads", o->threads, "Threads (default: all)");
  sweep_app->add_flag("--dry-run", o->dry_run, "Only say how many cells, and what they will take, from a sample");
  sweep_app->add_flag("--heads", o->heads, "Keep the numbers of every head too (heads.csv)");
  CLI::Option* slurm = sweep_app->add_flag("--emit-slurm{auto}", o->slurm,
                                           "Print a Slurm job array that does the sweep, of so many tasks as "
                                           "--emit-slurm=64 says");
  add_plugin_option(sweep_app);
  sweep_app->callback([=] {
    check_range(threads, o->threads, 1, 1024);
    run_sweep(*o, slurm->count() > 0);
  });

  CLI::App* status_app = app.add_subcommand("status", "How far a sweep is: cells done, failed and left");
  auto s = std::make_shared<StatusOptions>();
  status_app->add_option("folder", s->folder, "Folder of the sweep")->required();
  status_app->add_flag("--json", s->json, "Print JSON");
  status_app->callback([=] { print_status(*s); });

  CLI::App* merge_app = app.add_subcommand("merge", "Join the shards of a sweep and write its tables");
  auto m = std::make_shared<MergeOptions>();
  merge_app->add_option("folders", m->folders, "Folders of the shards, or the one that they shared")->required();
  merge_app->add_option("-o,--out", m->out, "Folder for all of it; may be one of them")->required();
  merge_app->callback([=] { run_merge(*m); });
}

}  // namespace kvreplay
