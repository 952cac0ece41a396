// kvreplay: parses the command line, maps errors to exit codes. Results on stdout, everything else on stderr.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/cli/compare_command.hpp"
#include "sim/cli/exit.hpp"
#include "sim/cli/explain_command.hpp"
#include "sim/cli/headscores_command.hpp"
#include "sim/cli/new_policy_command.hpp"
#include "sim/cli/policies_command.hpp"
#include "sim/cli/report_command.hpp"
#include "sim/cli/run_command.hpp"
#include "sim/cli/sweep_command.hpp"
#include "sim/cli/trace_commands.hpp"
#include "sim/cli/tune_command.hpp"
#include "sim/version.hpp"
#include "traces/errors.hpp"

namespace kvreplay {
namespace {

std::vector<std::string> arguments;

int fail(ExitCode code, const std::string& sentence) {
  say(sentence);
  return code;
}

// One sentence, with the nearest command where the first word is none.
std::string usage_sentence(const CLI::App& app, const CLI::ParseError& e) {
  std::vector<std::string> commands;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    commands.push_back(command->get_name());
  }
  const std::string word = arguments.size() > 1 ? arguments[1] : "";
  if (!word.empty() && word[0] != '-' && std::find(commands.begin(), commands.end(), word) == commands.end()) {
    return fmt::format("'{}' is no command; the nearest is '{}' of {}", word, nearest(word, commands),
                       fmt::join(commands, ", "));
  }
  if (word.empty()) {
    return fmt::format("no command is given; there are {}", fmt::join(commands, ", "));
  }
  std::string sentence = e.what();
  std::replace(sentence.begin(), sentence.end(), '\n', ' ');
  return sentence + (word[0] == '-' ? "; see kvreplay --help" : "; see kvreplay " + word + " --help");
}

}  // namespace

Refusal current_refusal() {
  try {
    throw;
  } catch (const ConfigError& e) {
    return {kUsage, e.what()};
  } catch (const TraceError& e) {
    return {kTrace, e.what()};
  } catch (const std::bad_alloc&) {
    return {kOther, "out of memory; lower --memory or replay fewer methods at once"};
  } catch (const std::exception& e) {
    return {kOther, e.what()};
  } catch (...) {
    return {kOther, "something was thrown that says nothing; a plug-in may have done it"};
  }
}

const std::vector<std::string>& command_line() { return arguments; }

}  // namespace kvreplay

int main(int argc, char** argv) {
  using namespace kvreplay;  // NOLINT(google-build-using-namespace): ours, in main alone
  arguments.assign(argv, argv + argc);
  CLI::App app{"Replays KV-cache eviction policies on recorded attention and measures what they lose."};
  app.set_version_flag("--version", fmt::format("kvreplay {} ({}, {})", kVersion, kGitHash, kBuildFlags));
  app.require_subcommand(1);
  app.fallthrough(false);
  add_run_command(app);
  add_policies_command(app);
  add_tune_command(app);
  add_compare_command(app);
  add_report_command(app);
  add_explain_command(app);
  add_headscores_command(app);
  add_new_policy_command(app);
  add_sweep_commands(app);
  add_trace_commands(app);
  try {
    app.parse(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0 || !std::cout) {  // now, or before a long text's end
      return fail(kOther, "standard output cannot be written");
    }
    return kDone;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) {
      return app.exit(e);
    }  // --help, --version
    return fail(kUsage, usage_sentence(app, e));
  } catch (const Exit& e) {
    return e.code;
  } catch (...) {
    const Refusal refusal = current_refusal();
    return fail(refusal.code, refusal.sentence);
  }
}
